"""Mounts as values: parsed from option strings, described, mounted, unmounted, read back from the kernel.

A `Mount` is what snapshotters hand out and what `types.Mount` carries on the wire: a filesystem type, a source, options
as fstab spells them, and optionally a target below the place where the set is mounted. The option tables are those of
mount(8) as containerd and runc understand them, the recursive ones (`rro`, `rnosuid`, …) those of the OCI runtime
specification 1.1 ("Linux mount options").
"""

from __future__ import annotations

import errno
import os

from wherry.linux import fuse, idmapped
from wherry.linux import syscalls as sc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PAGE_LIMIT = 4095
"""mount(2) copies one page of options; a longer string is cut without an error."""

# option → (clear?, flags)
FLAGS: dict[str, tuple[bool, int]] = {
    "defaults": (False, 0),
    "ro": (False, sc.MS_RDONLY),
    "rw": (True, sc.MS_RDONLY),
    "nosuid": (False, sc.MS_NOSUID),
    "suid": (True, sc.MS_NOSUID),
    "nodev": (False, sc.MS_NODEV),
    "dev": (True, sc.MS_NODEV),
    "noexec": (False, sc.MS_NOEXEC),
    "exec": (True, sc.MS_NOEXEC),
    "sync": (False, sc.MS_SYNCHRONOUS),
    "async": (True, sc.MS_SYNCHRONOUS),
    "dirsync": (False, sc.MS_DIRSYNC),
    "remount": (False, sc.MS_REMOUNT),
    "mand": (False, sc.MS_MANDLOCK),
    "nomand": (True, sc.MS_MANDLOCK),
    "atime": (True, sc.MS_NOATIME),
    "noatime": (False, sc.MS_NOATIME),
    "diratime": (True, sc.MS_NODIRATIME),
    "nodiratime": (False, sc.MS_NODIRATIME),
    "relatime": (False, sc.MS_RELATIME),
    "norelatime": (True, sc.MS_RELATIME),
    "strictatime": (False, sc.MS_STRICTATIME),
    "nostrictatime": (True, sc.MS_STRICTATIME),
    "lazytime": (False, sc.MS_LAZYTIME),
    "nolazytime": (True, sc.MS_LAZYTIME),
    "iversion": (False, sc.MS_I_VERSION),
    "noiversion": (True, sc.MS_I_VERSION),
    "silent": (False, sc.MS_SILENT),
    "loud": (True, sc.MS_SILENT),
    "symfollow": (True, sc.MS_NOSYMFOLLOW),
    "nosymfollow": (False, sc.MS_NOSYMFOLLOW),
    "bind": (False, sc.MS_BIND),
    "rbind": (False, sc.MS_BIND | sc.MS_REC),
}

PROPAGATION: dict[str, int] = {
    "private": sc.MS_PRIVATE,
    "shared": sc.MS_SHARED,
    "slave": sc.MS_SLAVE,
    "unbindable": sc.MS_UNBINDABLE,
    "rprivate": sc.MS_PRIVATE | sc.MS_REC,
    "rshared": sc.MS_SHARED | sc.MS_REC,
    "rslave": sc.MS_SLAVE | sc.MS_REC,
    "runbindable": sc.MS_UNBINDABLE | sc.MS_REC,
}

# option → (attributes to set, attributes to clear), for mount_setattr(2) with AT_RECURSIVE
RECURSIVE: dict[str, tuple[int, int]] = {
    "rro": (sc.MOUNT_ATTR_RDONLY, 0),
    "rrw": (0, sc.MOUNT_ATTR_RDONLY),
    "rnosuid": (sc.MOUNT_ATTR_NOSUID, 0),
    "rsuid": (0, sc.MOUNT_ATTR_NOSUID),
    "rnodev": (sc.MOUNT_ATTR_NODEV, 0),
    "rdev": (0, sc.MOUNT_ATTR_NODEV),
    "rnoexec": (sc.MOUNT_ATTR_NOEXEC, 0),
    "rexec": (0, sc.MOUNT_ATTR_NOEXEC),
    "rnodiratime": (sc.MOUNT_ATTR_NODIRATIME, 0),
    "rdiratime": (0, sc.MOUNT_ATTR_NODIRATIME),
    "rrelatime": (sc.MOUNT_ATTR_RELATIME, sc.MOUNT_ATTR_ATIME),
    "rnorelatime": (sc.MOUNT_ATTR_STRICTATIME, sc.MOUNT_ATTR_ATIME),
    "rnoatime": (sc.MOUNT_ATTR_NOATIME, sc.MOUNT_ATTR_ATIME),
    "ratime": (sc.MOUNT_ATTR_RELATIME, sc.MOUNT_ATTR_ATIME),
    "rstrictatime": (sc.MOUNT_ATTR_STRICTATIME, sc.MOUNT_ATTR_ATIME),
    "rnostrictatime": (sc.MOUNT_ATTR_RELATIME, sc.MOUNT_ATTR_ATIME),
    "rnosymfollow": (sc.MOUNT_ATTR_NOSYMFOLLOW, 0),
    "rsymfollow": (0, sc.MOUNT_ATTR_NOSYMFOLLOW),
}

OURS = frozenset(("tmpcopyup", "idmap", "ridmap"))
"""Options that a runtime itself carries out."""

_NAMES = (
    (sc.MS_RDONLY, "MS_RDONLY"),
    (sc.MS_NOSUID, "MS_NOSUID"),
    (sc.MS_NODEV, "MS_NODEV"),
    (sc.MS_NOEXEC, "MS_NOEXEC"),
    (sc.MS_SYNCHRONOUS, "MS_SYNCHRONOUS"),
    (sc.MS_REMOUNT, "MS_REMOUNT"),
    (sc.MS_MANDLOCK, "MS_MANDLOCK"),
    (sc.MS_DIRSYNC, "MS_DIRSYNC"),
    (sc.MS_NOSYMFOLLOW, "MS_NOSYMFOLLOW"),
    (sc.MS_NOATIME, "MS_NOATIME"),
    (sc.MS_NODIRATIME, "MS_NODIRATIME"),
    (sc.MS_BIND, "MS_BIND"),
    (sc.MS_MOVE, "MS_MOVE"),
    (sc.MS_REC, "MS_REC"),
    (sc.MS_UNBINDABLE, "MS_UNBINDABLE"),
    (sc.MS_PRIVATE, "MS_PRIVATE"),
    (sc.MS_SLAVE, "MS_SLAVE"),
    (sc.MS_SHARED, "MS_SHARED"),
    (sc.MS_RELATIME, "MS_RELATIME"),
    (sc.MS_I_VERSION, "MS_I_VERSION"),
    (sc.MS_STRICTATIME, "MS_STRICTATIME"),
    (sc.MS_LAZYTIME, "MS_LAZYTIME"),
    (sc.MS_SILENT, "MS_SILENT"),
)


def describe_flags(flags: int) -> str:
    """`MS_RDONLY|MS_NOSUID`, for messages."""
    names = [name for bit, name in _NAMES if flags & bit]
    return "|".join(names) or "0"


class Options:
    """An option list, taken apart.

    flags: what mount(2) gets; cleared: bits that an option switched off explicitly (`rw`, `exec`); propagation: flags
    for mount(2) calls of their own, in order; data: what is left for the filesystem, comma-separated; set_rec and
    clear_rec: attributes for a recursive mount_setattr(2); maps: what `uidmap=` and `gidmap=` say (`idmapped.py`).
    """

    __slots__ = ("clear_rec", "cleared", "data", "flags", "maps", "propagation", "set_rec")

    def __init__(self, options: Iterable[str]) -> None:
        self.flags = 0
        self.cleared = 0
        self.propagation: list[int] = []
        self.set_rec = 0
        self.clear_rec = 0
        self.maps: dict[str, str] = {}
        data: list[str] = []
        for option in options:
            if option in FLAGS:
                clear, bits = FLAGS[option]
                self.flags = self.flags & ~bits if clear else self.flags | bits
                self.cleared = self.cleared | bits if clear else self.cleared & ~bits
            elif option in PROPAGATION:
                self.propagation.append(PROPAGATION[option])
            elif option in RECURSIVE:
                attributes, cleared = RECURSIVE[option]
                self.set_rec = self.set_rec & ~cleared | attributes
                self.clear_rec = self.clear_rec & ~attributes | cleared
            elif option.startswith(("uidmap=", "gidmap=")):
                self.maps[option[:6]] = option[7:]
            elif option:
                data.append(option)
        self.data = ",".join(data)


class Mount:
    """One mount, immutable and comparable. `target` is relative to where the set is mounted ("" = right there)."""

    __slots__ = ("options", "source", "target", "type")

    type: str
    source: str
    target: str
    options: tuple[str, ...]

    def __init__(self, type: str, source: str, target: str = "", options: Sequence[str] = ()) -> None:  # noqa: A002
        for name, value in (("type", type), ("source", source), ("target", target), ("options", tuple(options))):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Mount is a value: {name} can't be set")

    def _key(self) -> tuple[object, ...]:
        return (self.type, self.source, self.target, self.options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mount) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Mount(type={self.type!r}, source={self.source!r}, target={self.target!r}, options={self.options!r})"

    def mount(self, root: str) -> None:
        """Mount it at `root` (joined with `target`, whose symlinks are resolved inside `root`).

        Raises OSError whose text has type, source, target and the flags by name.
        """
        if not self.target:
            mount(self.type, self.source, root, self.options)
            return
        root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = sc.openat2(root_fd, self.target, os.O_PATH, resolve=sc.RESOLVE_IN_ROOT)
        finally:
            os.close(root_fd)
        try:
            mount(self.type, self.source, f"/proc/self/fd/{fd}", self.options, shown=os.path.join(root, self.target))
        finally:
            os.close(fd)


def mount(type: str, source: str, target: str, options: Iterable[str], *, shown: str = "") -> None:  # noqa: A002
    """Mount by fstab-like options, as mount(8) does it: the mount, its flags if it is a bind mount, its propagation."""
    opts = Options(options)
    if type in ("bind", "rbind"):
        opts.flags |= sc.MS_BIND | (sc.MS_REC if type == "rbind" else 0)
    try:
        if opts.propagation and not type and not source:
            pass  # only the propagation of what is there changes
        elif type == fuse.OVERLAY:
            fuse.mount(target, ("ro",) if opts.flags & sc.MS_RDONLY else (), opts.data)
        elif opts.maps:
            _mount_mapped(type, source, target, opts)
        elif len(opts.data) > PAGE_LIMIT and type == "overlay":
            _mount_overlay(source, target, opts)
        else:
            if len(opts.data) > PAGE_LIMIT:
                raise OSError(errno.E2BIG, f"mount options are longer than {PAGE_LIMIT} bytes", target)
            sc.mount(source, target, type, opts.flags, opts.data)
        _finish(target, opts)
    except OSError as error:
        raise _explained(error, type, source, shown or target, opts) from None


def _mount_mapped(type: str, source: str, target: str, opts: Options) -> None:  # noqa: A002
    users = idmapped.user_namespace(opts.maps.get("uidmap", ""), opts.maps.get("gidmap", ""))
    try:
        if type != "overlay":
            idmapped.bind(source, target, users, recursive=bool(opts.flags & sc.MS_REC))
            return
        lower = next((o[9:] for o in split_escaped_keep(opts.data) if o.startswith("lowerdir=")), "")

        def use(layers: Sequence[str]) -> None:
            mapped = Options(())
            mapped.flags = opts.flags
            mapped.data = opts.data.replace(f"lowerdir={lower}", "lowerdir=" + ":".join(layers))
            if len(mapped.data) > PAGE_LIMIT:
                _mount_overlay(source, target, mapped)
            else:
                sc.mount(source, target, type, mapped.flags, mapped.data)

        idmapped.with_layers(split_escaped(lower), users, use)
    finally:
        os.close(users)


def _finish(target: str, opts: Options) -> None:
    """What mount(2) ignores in its first call: a bind mount's flags, propagation, recursive attributes."""
    bits = opts.flags & ~(sc.MS_BIND | sc.MS_REC)
    if opts.flags & sc.MS_BIND and not opts.flags & sc.MS_REMOUNT and bits:
        sc.mount("", target, "", sc.MS_REMOUNT | sc.MS_BIND | bits | _locked_flags(target, opts))
    for propagation in opts.propagation:
        sc.mount("", target, "", propagation)
    if opts.set_rec or opts.clear_rec:
        sc.mount_setattr(sc.AT_FDCWD, target, sc.AT_RECURSIVE, set_=opts.set_rec, clear=opts.clear_rec)


# statvfs(3) bits that differ from the MS_ ones only in these
_ST_TO_MS = (
    (1, sc.MS_RDONLY),
    (2, sc.MS_NOSUID),
    (4, sc.MS_NODEV),
    (8, sc.MS_NOEXEC),
    (1024, sc.MS_NOATIME),
    (2048, sc.MS_NODIRATIME),
    (4096, sc.MS_RELATIME),
)


def current_flags(target: str) -> int:
    """The MS_ flags that the mount at `target` has now."""
    bits = os.statvfs(target).f_flag
    return sum(ms for st, ms in _ST_TO_MS if bits & st)


def _locked_flags(target: str, opts: Options) -> int:
    """A bind remount replaces all flags; those of the source that no option speaks of stay (runc, mount(8) ≥ 2.27)."""
    return current_flags(target) & ~opts.cleared & (sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC | sc.MS_RDONLY)


_MOUNT_ATTRS = (
    (sc.MS_RDONLY, sc.MOUNT_ATTR_RDONLY),
    (sc.MS_NOSUID, sc.MOUNT_ATTR_NOSUID),
    (sc.MS_NODEV, sc.MOUNT_ATTR_NODEV),
    (sc.MS_NOEXEC, sc.MOUNT_ATTR_NOEXEC),
    (sc.MS_NOATIME, sc.MOUNT_ATTR_NOATIME),
    (sc.MS_STRICTATIME, sc.MOUNT_ATTR_STRICTATIME),
    (sc.MS_NODIRATIME, sc.MOUNT_ATTR_NODIRATIME),
    (sc.MS_NOSYMFOLLOW, sc.MOUNT_ATTR_NOSYMFOLLOW),
)


def split_escaped(text: str, separator: str = ":") -> list[str]:
    """Split where overlayfs does: a separator after a backslash belongs to the name."""
    parts, current, escaped = [], "", False
    for char in text:
        if escaped:
            current += char
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == separator:
            parts.append(current)
            current = ""
        else:
            current += char
    return [*parts, current]


def _mount_overlay(source: str, target: str, opts: Options) -> None:
    """An overlay with more options than one page: through the mount API, one call for each layer.

    `lowerdir+` is there since Linux 6.7 (and takes one layer a call); before it one value may have 255 bytes, so the
    layers' common folder becomes the working directory and short relative names go to mount(2), as containerd does it.
    """
    fd = sc.fsopen("overlay")
    try:
        sc.fsconfig_string(fd, "source", source)
        try:
            for option in split_escaped_keep(opts.data):
                key, equals, value = option.partition("=")
                if key == "lowerdir":
                    for layer in split_escaped(value):
                        sc.fsconfig_string(fd, "lowerdir+", layer)
                elif equals:
                    sc.fsconfig_string(fd, key, value)
                else:
                    sc.fsconfig_flag(fd, key)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _mount_overlay_relative(source, target, opts)
            return
        sc.fsconfig_create(fd)
        attributes = sum(attr for ms, attr in _MOUNT_ATTRS if opts.flags & ms)
        mount_fd = sc.fsmount(fd, attributes)
    finally:
        os.close(fd)
    try:
        sc.move_mount(mount_fd, "", sc.AT_FDCWD, target, sc.MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(mount_fd)


def split_escaped_keep(data: str) -> list[str]:
    """Split options at commas that have no backslash before them; the backslashes before other characters stay."""
    parts: list[str] = []
    for piece in data.split(","):
        if parts and parts[-1].endswith("\\"):
            parts[-1] = parts[-1][:-1] + "," + piece
        else:
            parts.append(piece)
    return parts


def _mount_overlay_relative(source: str, target: str, opts: Options) -> None:
    lower = next((o[9:] for o in opts.data.split(",") if o.startswith("lowerdir=")), "")
    layers = split_escaped(lower)
    common = os.path.commonpath(layers) if all(layer.startswith("/") for layer in layers) else ""
    short = ":".join(os.path.relpath(layer, common) for layer in layers) if common else lower
    data = opts.data.replace(f"lowerdir={lower}", f"lowerdir={short}")
    if not common or len(data) > PAGE_LIMIT:
        raise OSError(errno.E2BIG, "the overlay has more layers than this kernel's mount options hold", target)
    before = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(common)
        sc.mount(source, target, "overlay", opts.flags, data)
    finally:
        os.fchdir(before)
        os.close(before)


def _explained(error: OSError, type: str, source: str, target: str, opts: Options) -> OSError:  # noqa: A002
    data = opts.data if len(opts.data) <= 512 else opts.data[:500] + "…"
    what = f"mount {type or 'none'} {source!r} at {target!r} (flags {describe_flags(opts.flags)}, data {data!r})"
    number = error.errno or errno.EIO
    return OSError(number, f"{what}: {error.strerror}")


def mount_all(mounts: Iterable[Mount], target: str) -> None:
    """Mount a snapshot's mounts at `target`, in order; what was mounted is undone if a later one fails."""
    done = 0
    try:
        for item in mounts:
            item.mount(target)
            done += 1
    except OSError:
        if done:
            unmount_all(target)
        raise


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2) once; symlinks at the end are not followed. EINVAL: nothing is mounted there."""
    sc.umount2(target, flags | sc.UMOUNT_NOFOLLOW)


def unmount_all(target: str, flags: int = 0) -> None:
    """Unmount everything stacked at `target`, submounts first; what isn't mounted, or isn't there, is no error.

    A busy mount is detached lazily, so that no caller waits for a process that it can't see.
    """
    target = os.path.realpath(target)
    for _ in range(64):  # mounts may be stacked; a bound, lest an unmount without effect spins
        try:
            unmount(target, flags)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
                return
            if error.errno != errno.EBUSY or flags & sc.MNT_DETACH:
                raise
            flags |= sc.MNT_DETACH


class MountInfo:
    """A line of /proc/PID/mountinfo (proc(5)): octal escapes are undone, `propagation` are the optional fields."""

    __slots__ = (
        "device",
        "mount_id",
        "options",
        "parent_id",
        "propagation",
        "root",
        "source",
        "super",
        "target",
        "type",
    )

    def __init__(self, line: str) -> None:
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        self.mount_id = int(fields[0])
        self.parent_id = int(fields[1])
        self.device = fields[2]
        self.root = _unescape(fields[3])
        self.target = _unescape(fields[4])
        self.options = fields[5]
        self.propagation = tuple(fields[6:])
        rest = right.split(" ")
        self.type = rest[0]
        self.source = _unescape(rest[1]) if len(rest) > 1 else ""
        self.super = rest[2] if len(rest) > 2 else ""


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    for escape, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escape, char)
    return text


def mountinfo(pid: int | str = "self") -> list[MountInfo]:
    """The mounts that process `pid` sees, in the kernel's order."""
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [MountInfo(line.rstrip("\n")) for line in file]


def is_mountpoint(path: str) -> bool:
    """Whether something is mounted exactly at `path` (bind mounts of the same filesystem included)."""
    path = os.path.realpath(path)
    return any(info.target == path for info in mountinfo())
