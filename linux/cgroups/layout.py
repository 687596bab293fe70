"""How this host's cgroup hierarchies are mounted; read once per process and kept over fork."""

from __future__ import annotations

import errno
import os
import posixpath

#: The v1 hierarchies that a container gets a directory in, in runc's order (devices before what fills them).
V1_CONTROLLERS = (
    "cpuset",
    "devices",
    "memory",
    "cpu",
    "cpuacct",
    "pids",
    "blkio",
    "hugetlb",
    "net_cls",
    "net_prio",
    "perf_event",
    "freezer",
    "rdma",
    "name=systemd",
)


#: Names, in the environment of an ordinary user's daemon, the part of the unified tree that was given to the user's
#: containers (`delegation.py`).
DELEGATED = "WHERRY_DELEGATED_CGROUP"


class Mode:
    """V2: unified. V1: legacy hierarchies only. HYBRID: legacy controllers and an empty v2 tree beside them."""

    V1 = "legacy"
    V2 = "unified"
    HYBRID = "hybrid"


class Hierarchy:
    """One mounted hierarchy: where, and which part of it the mount shows ("/" outside a container)."""

    __slots__ = ("mountpoint", "root")

    def __init__(self, mountpoint: str, root: str) -> None:
        self.mountpoint = mountpoint
        self.root = root

    def below(self, own: str, path: str) -> str:
        """The directory of `path`, which is relative to the cgroup `own`, a path of /proc/self/cgroup."""
        inside = posixpath.relpath(own, self.root) if self.root != "/" else own.lstrip("/")
        if inside == ".." or inside.startswith("../"):
            # our own cgroup lies outside of what the mount shows (a container without a cgroup namespace)
            inside = ""
        return posixpath.normpath(posixpath.join(self.mountpoint, inside, path))


class Layout:
    """`v1`: controller (or name=NAME) → hierarchy. `v2`: the unified tree, on hybrid hosts one without controllers.

    `user_namespace`: this process is in a user namespace of its own, where no devices can be opened that weren't, and
    device rules can't be set (they are left out, as runc does). `delegated`: there, the part of the unified tree that
    was given to the user ("" for none): what is "below the hierarchy's root" elsewhere is below it.
    """

    __slots__ = ("delegated", "mode", "user_namespace", "v1", "v2")

    def __init__(self, mode: str, v1: dict[str, Hierarchy], v2: Hierarchy | None) -> None:
        self.mode = mode
        self.user_namespace = _in_user_namespace()
        self.delegated = os.environ.get(DELEGATED, "") if self.user_namespace else ""
        self.v1 = v1
        self.v2 = v2


_host: Layout | None = None


def host() -> Layout:
    """This host's layout. Raises NotFound where no cgroup filesystem is mounted."""
    global _host  # noqa: PLW0603 - mounts of the hierarchies don't change while a host is up
    if _host is None:
        _host = detect()
    return _host


def detect(mountinfo: str = "/proc/self/mountinfo") -> Layout:
    """Read the layout from a mountinfo file (proc(5)); `host` keeps the result."""
    with open(mountinfo, "rb") as file:
        lines = [line for line in file.read().split(b"\n") if b" - cgroup" in line]
    v1: dict[str, Hierarchy] = {}
    v2: Hierarchy | None = None
    for line in lines:
        fields, _, rest = os.fsdecode(line).partition(" - ")
        kind, _, options = rest.split(" ", 2)
        root, mountpoint = (_unescape(field) for field in fields.split(" ", 5)[3:5])
        hierarchy = Hierarchy(mountpoint, root)
        if kind == "cgroup2":
            v2 = v2 if v2 is not None else hierarchy
        elif kind == "cgroup":
            for name in options.split(","):
                if name in V1_CONTROLLERS:
                    v1.setdefault(name, hierarchy)
    # name=systemd alone doesn't make a host hybrid: its controllers decide
    controllers = [name for name in v1 if not name.startswith("name=")]
    if not controllers and v2 is not None:
        return Layout(Mode.V2, {}, v2)
    if not v1:
        msg = "no cgroup hierarchy is mounted on this host (/sys/fs/cgroup)"
        raise FileNotFoundError(errno.ENOENT, msg)
    return Layout(Mode.V1 if v2 is None else Mode.HYBRID, v1, v2)


def own_cgroups(pid: int | str = "self") -> dict[str, str]:
    """The cgroups of a process: controller (or name=NAME) → path; "" is the unified tree's (cgroups(7))."""
    with open(f"/proc/{pid}/cgroup", "rb") as file:
        text = os.fsdecode(file.read())
    found: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for name in names.split(","):
            found[name] = path
    return found


def inner_path(cgroups_path: str, container_id: str) -> str:
    """The spec's path, cleaned; raises ValueError where it climbs or names the root of the hierarchy.

    runc clips a path that climbs; an explicit error is kinder than a container in an unexpected place.
    """
    path = posixpath.normpath(cgroups_path) if cgroups_path else container_id
    if path.startswith("//"):
        path = path[1:]
    if path == ".." or path.startswith("../") or path in ("/", "."):
        msg = f"invalid cgroup path {cgroups_path!r}: it must name a cgroup below the hierarchy's root"
        raise ValueError(msg)
    return path


def _in_user_namespace() -> bool:
    """The first namespace maps all ids to themselves (user_namespaces(7))."""
    try:
        with open("/proc/self/uid_map", "rb") as file:
            return file.read().split() != [b"0", b"0", b"4294967295"]
    except FileNotFoundError:
        return False  # a kernel without user namespaces


def _unescape(field: str) -> str:
    """Undo proc(5)'s escapes of space, tab, newline and backslash (three octal digits)."""
    for escape, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(escape, character)
    return field
