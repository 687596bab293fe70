"""`checkpoint`: criu writes a container's processes into files. `restore.py` is the way back.

criu finds everything in the kernel by itself, except what is the host's business: which mounts lead out of the
container, which namespaces aren't the container's own, and what its standard streams were connected to.
"""

from __future__ import annotations

import fcntl
import os

from wherry.linux import cgroups
from wherry.runtime import criu, lifecycle, quickjson, state
from wherry.runtime import criu_messages as messages
from wherry.runtime.errors import INVALID, PRECONDITION, ContainerError
from wherry.runtime.root import Root, is_missing
from wherry.runtime.spec import namespaces_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, Self

    Spec = dict[str, Any]

#: In the images' folder: the names of descriptors 0, 1, 2 as JSON, as runc has it; its images are ours and the reverse.
DESCRIPTORS = "descriptors.json"
_LOG = "dump.log"
_LOG_LEVEL = 4
_DEFAULT_CONFIG = "/etc/criu/runc.conf"
_CONFIG_ANNOTATION = "org.criu.config"
_OLDEST_FREEZER_V2 = 31400
_OLDEST_NOTIFIED = 31500  # since then criu tells that its page server is ready; before, it writes to `status_fd`
#: Namespaces that criu leaves to us where they are joined by path; it knows them by these keys (runc's).
EXTERNAL = {"network": ("net", "extRootNetNS"), "pid": ("pid", "extRootPidNS")}
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")


class Options:
    """What the commands' flags say; names are the flags'. Paths are absolute, `parent_path` relative to `image_path`.

    page_server: (address, port); empty_ns: CLONE_ flags; status_fd: -1 for none; criu: the program.
    """

    def __init__(self, image_path: str, *, criu: str = "criu") -> None:
        self.image_path = image_path
        self.criu = criu
        self.work_path = ""
        self.parent_path = ""
        self.leave_running = False
        self.tcp_established = False
        self.ext_unix_sk = False
        self.shell_job = False
        self.file_locks = False
        self.lazy_pages = False
        self.pre_dump = False
        self.auto_dedup = False
        self.status_fd = -1
        self.page_server: tuple[str, int] | None = None
        self.manage_cgroups_mode = ""
        self.empty_ns = 0
        self.lsm_profile = ""
        self.lsm_mount_context = ""

    def common(self, annotations: dict[str, str]) -> dict[str, Any]:
        """The options of criu that dump and restore share."""
        mode = self.manage_cgroups_mode
        return {
            "log_level": _LOG_LEVEL,
            "manage_cgroups": True,
            "manage_cgroups_mode": messages.CGROUP_MODES[mode] if mode else None,
            "notify_scripts": True,
            "shell_job": self.shell_job,
            "ext_unix_sk": self.ext_unix_sk,
            "tcp_established": self.tcp_established,
            "file_locks": self.file_locks,
            "empty_ns": self.empty_ns,
            "orphan_pts_master": True,
            "auto_dedup": self.auto_dedup,
            "lazy_pages": self.lazy_pages,
            "config_file": annotations.get(_CONFIG_ANNOTATION, _DEFAULT_CONFIG) or None,
        }


def checkpoint(root: str, container_id: str, options: Options) -> None:
    """See `container.checkpoint`."""
    found = state.load(root, container_id)
    status = found.status()
    if status not in (state.RUNNING, state.PAUSED):
        raise ContainerError(f"Container cannot be checkpointed in {status} state", PRECONDITION)
    if os.geteuid():
        raise ContainerError("checkpoint takes root: criu does", PRECONDITION)
    version = criu.version(options.criu)
    with state.Lock(found), Folders(options, make=True) as folders:
        opts = {**options.common(found.annotations), **folders.opts, "log_file": _LOG, **_dump(found, options, version)}
        if not options.pre_dump:
            opts["ext_mnt"] = [{"key": key, "val": value} for key, value in _outside(found).items()]
            _write_descriptors(options.image_path, found.pid)
        kind = messages.PRE_DUMP if options.pre_dump else messages.DUMP
        swrk = criu.Swrk(options.criu)
        try:
            swrk.ask({"type": kind, "opts": opts}, lambda script, _pid, _fds: _notified(script, options))
        except ContainerError as error:
            error.message += criu.quoted(folders.logs, _LOG)
            raise
        finally:
            swrk.close()
        if not (options.leave_running or options.pre_dump):
            lifecycle.destroy(found)


class Folders:
    """The images' folder and the one for criu's work, open: criu reaches both through our /proc/PID/fd."""

    def __init__(self, options: Options, *, make: bool) -> None:
        self.logs = options.work_path or options.image_path
        self._fds: list[int] = []
        self.opts: dict[str, Any] = {"images_dir_fd": self._open(options.image_path, make=make)}
        if options.work_path:
            self.opts["work_dir_fd"] = self._open(options.work_path, make=True)

    def _open(self, path: str, *, make: bool) -> int:
        if make:
            os.makedirs(path, mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._fds.append(fd)
        return fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def _dump(found: state.State, options: Options, version: int) -> dict[str, Any]:
    """What only dumping asks for."""
    opts: dict[str, Any] = {
        "root": found.rootfs,
        "pid": found.pid,
        "leave_running": options.leave_running,
        "freeze_cgroup": _freezer(found, version),
        "external": [
            f"{EXTERNAL[kind][0]}[{os.stat(path).st_ino}]:{EXTERNAL[kind][1]}"
            for kind, path in namespaces_of(found.spec()).items()
            if path and kind in EXTERNAL
        ],
    }
    if options.page_server:
        opts["ps"] = {"address": options.page_server[0], "port": options.page_server[1]}
    if options.parent_path:
        opts.update(parent_img=options.parent_path, track_mem=True)
    if options.pre_dump:
        criu.require_feature(options.criu, "mem_track")
    if options.lazy_pages:
        _check_status_fd(options.status_fd)
        criu.require_feature(options.criu, "lazy_pages")
        if options.status_fd >= 0 and version < _OLDEST_NOTIFIED:
            opts["status_fd"] = options.status_fd
    return opts


def _freezer(found: state.State, version: int) -> str | None:
    """The cgroup by which criu stops all processes at once; without one it stops them with ptrace, one by one."""
    if "" in found.cgroup_paths:
        return found.cgroup_paths[""] if version >= _OLDEST_FREEZER_V2 else None
    return found.cgroup_paths.get("freezer")


def _check_status_fd(fd: int) -> None:
    if fd < 0:
        return
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError as error:
        raise ContainerError(f"invalid --status-fd argument {fd}: {(error.strerror or '').lower()}", INVALID) from None
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise ContainerError(f"invalid --status-fd argument {fd}: not writable", INVALID)


def _notified(script: str, options: Options) -> None:
    if script == "status-ready" and options.status_fd >= 0:
        os.write(options.status_fd, b"\0")
        os.close(options.status_fd)
        options.status_fd = -1


def _write_descriptors(folder: str, pid: int) -> None:
    names = []
    for fd in (0, 1, 2):
        try:
            names.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except OSError:
            names.append("")  # closed
    fd = os.open(os.path.join(folder, DESCRIPTORS), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, quickjson.dumps(names).encode())
    finally:
        os.close(fd)


# -- mounts that lead out of the container ----------------------------------------------------------------------------


def _outside(found: state.State) -> dict[str, str]:
    """Mount point → the name under which `restore` says what is to be mounted there."""
    spec = found.spec()
    root = Root(found.rootfs)
    try:
        points = {inside(root, path): "" for path, _ in host_mounts(spec, found.cgroup_paths)}
    finally:
        os.close(root.fd)
    outside = {path: path for path in points}
    outside.update(dict.fromkeys(_masked_files(found.pid, spec), "/dev/null"))
    return outside


def host_mounts(spec: Spec, cgroup_paths: dict[str, str]) -> Iterable[tuple[str, str]]:
    """(place in the container, path on the host) of what isn't the container's own: bind mounts, v1's hierarchies
    where they are bound, and devices (bound where a user namespace may not make nodes)."""
    linux = spec.get("linux") or {}
    own_cgroups = "cgroup" in namespaces_of(spec)
    for mount in spec.get("mounts") or ():
        options = mount.get("options") or ()
        if mount.get("type") == "bind" or "bind" in options or "rbind" in options:
            yield mount["destination"], mount.get("source") or ""
        elif mount.get("type") == "cgroup" and cgroups.host().mode != cgroups.Mode.V2 and not own_cgroups:
            for path in set(cgroup_paths.values()):
                names = sorted(name.removeprefix("name=") for name, p in cgroup_paths.items() if p == path)
                yield f"{mount['destination']}/{','.join(names)}", path
    yield from ((path, path) for path in _DEVICES)
    yield from ((device["path"], device["path"]) for device in linux.get("devices") or ())


def inside(root: Root, path: str) -> str:
    """A configured path as the kernel resolves it in the root: symlinks are followed as far as there is something."""
    base = os.readlink(f"/proc/self/fd/{root.fd}")
    head, rest = os.path.normpath("/" + path.lstrip("/")), ""
    while True:
        try:
            fd = root.open(head)
        except OSError as error:
            if not is_missing(error) or head == "/":
                raise
            head, name = os.path.split(head)
            rest = f"{name}/{rest}" if rest else name
            continue
        found = os.readlink(f"/proc/self/fd/{fd}")
        os.close(fd)
        return os.path.normpath("/" + os.path.join(os.path.relpath(found, base), rest))


def _masked_files(pid: int, spec: Spec) -> list[str]:
    """Masked paths that are files: the host's /dev/null lies on them."""
    found = []
    root = Root(f"/proc/{pid}/root")
    try:
        for path in (spec.get("linux") or {}).get("maskedPaths") or ():
            try:
                fd = root.open(path)
            except OSError:
                continue  # there was nothing to mask
            if not os.path.isdir(f"/proc/self/fd/{fd}"):
                found.append(path)
            os.close(fd)
    finally:
        os.close(root.fd)
    return found
