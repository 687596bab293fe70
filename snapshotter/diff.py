"""Computing a layer: what turns one tree into another, as an archive with whiteouts (OCI image layer.md).

Where the upper tree is an overlay right above the lower one, its upper directory *is* the difference and only that is
read. Otherwise both are mounted, in a mount namespace of this process's own, and walked side by side. Either way the
process has gone into the trees before it reads them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any

from wherry.core.errors import FailedPrecondition
from wherry.linux import syscalls as sc
from wherry.linux.fuse import OVERLAYS
from wherry.linux.mounts import Mount, mount_all, split_escaped
from wherry.snapshotter import remap, tar
from wherry.snapshotter.output import Output
from wherry.snapshotter.roots import MOUNTPOINT, confine, isolate
from wherry.snapshotter.tarwrite import TarWriter, padding

_STEP = 256 << 10
_SECOND = 1_000_000_000
_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque", "user.fuseoverlayfs.opaque")
_OF_WRITING = frozenset(("upperdir", "workdir", "lowerdir", "rw", "uidmap", "gidmap"))


def write_diff(
    lower: Sequence[Mount],
    upper: Sequence[Mount],
    fd: int,
    *,
    compression: str,
    epoch: int | None,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    """Write the layer to `fd`; returns digest and size of what was written and the digest of the plain archive.

    This process is confined to the trees afterwards. FailedPrecondition when they can't be mounted; OSError.
    """
    output = Output(fd, compression, progress)
    layer = LayerWriter(TarWriter(output.write), epoch)
    changed = upper_directory(lower, upper)
    # a container's root wrote what the host has as 100000: in the layer it is 0 again
    layer.owners = owners(upper)
    if changed is not None:
        _enter(changed)
        walk_upper(layer, "")
    else:
        _enter_both(lower, upper)
        Walk(layer, "lower", "upper").run()
    layer.close()
    output.close()
    return {"digest": output.digest, "size": output.size, "diff_id": output.diff_id}


# where the trees are


def chain(mounts: Sequence[Mount]) -> list[str] | None:
    """The directories that are laid over each other, the uppermost first; None where that can't be said."""
    if not mounts:
        return []
    if len(mounts) != 1 or mounts[0].target:
        return None
    mount = mounts[0]
    if mount.type in ("bind", "rbind"):
        return [mount.source] if not mapped(mount) else None
    if mount.type not in OVERLAYS:
        return None
    options = dict(option.partition("=")[::2] for option in mount.options)
    if "lowerdir+" in options:
        return None
    layers = split_escaped(options["lowerdir"]) if options.get("lowerdir") else []
    return [options["upperdir"], *layers] if options.get("upperdir") else layers


def mapped(mount: Mount) -> bool:
    """Whether the mount shows other owners than its files have."""
    return any(option.startswith(("uidmap=", "gidmap=")) for option in mount.options)


def owners(mounts: Sequence[Mount]) -> tuple[remap.Ranges, remap.Ranges]:
    """The mappings of users and groups that the mounts ask for."""
    options = dict(option.partition("=")[::2] for mount in mounts for option in mount.options)
    users, groups = options.get("uidmap"), options.get("gidmap")
    return (remap.parse(users) if users else (), remap.parse(groups) if groups else ())


def upper_directory(lower: Sequence[Mount], upper: Sequence[Mount]) -> str | None:
    """The directory that holds just the changes, if there is one."""
    below, above = chain(lower), chain(upper)
    if below is None or not above or above[1:] != below:
        return None
    options = [option for mount in upper for option in mount.options]
    for feature in ("redirect_dir", "metacopy"):
        # with these an upper directory refers to places in the layers below
        if any(option.startswith(f"{feature}=") and not option.endswith(("=off", "=nofollow")) for option in options):
            return None
        try:
            with open(f"/sys/module/overlay/parameters/{feature}", "rb") as file:
                if file.read(1) == b"Y" and f"{feature}=off" not in options:
                    return None
        except FileNotFoundError:
            pass
    return above[0]


def _enter(directory: str) -> None:
    try:
        confine(directory)
    except OSError as error:
        raise FailedPrecondition(f"the snapshot's files aren't there: {error}: failed precondition") from error


def _enter_both(lower: Sequence[Mount], upper: Sequence[Mount]) -> None:
    try:
        isolate()
        sc.mount("tmpfs", MOUNTPOINT, "tmpfs", sc.MS_NOSUID | sc.MS_NODEV, "mode=700")
        for name, mounts in (("lower", lower), ("upper", upper)):
            target = f"{MOUNTPOINT}/{name}"
            os.mkdir(target)
            mount_all([_read_only(mount) for mount in mounts], target)
    except OSError as error:
        raise FailedPrecondition(f"the snapshots' mounts can't be mounted: {error}: failed precondition") from error
    _enter(MOUNTPOINT)


def _read_only(mount: Mount) -> Mount:
    """A mount to look at: an overlay without its upper directory, which may be in use; with the owners that the files
    have, whatever a user namespace is shown."""
    layers = chain([mount]) if mount.type in OVERLAYS else None
    if layers is None or len(layers) < 2:
        options = tuple(o for o in mount.options if o != "rw" and not o.startswith(("uidmap=", "gidmap=")))
        return Mount(mount.type, mount.source, mount.target, options if "ro" in options else ("ro", *options))
    kept = [o for o in mount.options if o.partition("=")[0] not in _OF_WRITING]
    joined = ":".join(layer.replace("\\", "\\\\").replace(":", "\\:") for layer in layers)
    return Mount(mount.type, "overlay", mount.target, ("ro", *kept, f"lowerdir={joined}"))


# what is written


class LayerWriter:
    """Writes files and whiteouts of a tree into an archive. Paths are as strings with surrogates for other bytes."""

    def __init__(self, archive: TarWriter, epoch: int | None) -> None:
        self._archive = archive
        self._epoch = None if epoch is None else epoch * _SECOND
        self._links: dict[tuple[int, int], bytes] = {}
        self.owners: tuple[remap.Ranges, remap.Ranges] = ((), ())

    def close(self) -> None:
        self._archive.close()

    def whiteout(self, path: str) -> None:
        """`path` is in a lower layer and gone."""
        parent, _, base = path.rpartition("/")
        self._mark(f"{parent}/.wh.{base}" if parent else f".wh.{base}")

    def opaque(self, path: str) -> None:
        """Nothing of the lower layers shows in directory `path` ("" for the root)."""
        self._mark(f"{path}/.wh..wh..opq" if path else ".wh..wh..opq")

    def _mark(self, path: str) -> None:
        self._archive.member(os.fsencode(path), tar.REGULAR, mtime=self._epoch or 0)

    def file(self, path: str, source: str, status: os.stat_result) -> None:
        """The file, directory, link or node at `source` under the name `path`. Sockets are left out."""
        mode = status.st_mode
        name = os.fsencode(path)
        if stat.S_ISSOCK(mode):
            return
        link, size, device = b"", 0, (0, 0)
        if status.st_nlink > 1 and not stat.S_ISDIR(mode):
            first = self._links.setdefault((status.st_dev, status.st_ino), name)
            if first != name:
                self._header(name, tar.LINK, source, status, link=first, with_attributes=False)
                return
        if stat.S_ISREG(mode):
            kind, size = tar.REGULAR, status.st_size
        elif stat.S_ISDIR(mode):
            kind = tar.DIRECTORY
        elif stat.S_ISLNK(mode):
            kind, link = tar.SYMLINK, os.fsencode(os.readlink(source))
        elif stat.S_ISFIFO(mode):
            kind = tar.FIFO
        else:
            kind = tar.CHARACTER if stat.S_ISCHR(mode) else tar.BLOCK_DEVICE
            device = (os.major(status.st_rdev), os.minor(status.st_rdev))
        if kind == tar.REGULAR:
            self._regular(name, source, status, size)
        else:
            self._header(name, kind, source, status, link=link, device=device)

    def _header(
        self,
        name: bytes,
        kind: bytes,
        source: str,
        status: os.stat_result,
        *,
        link: bytes = b"",
        size: int = 0,
        device: tuple[int, int] = (0, 0),
        with_attributes: bool = True,
    ) -> None:
        mtime = status.st_mtime_ns
        self._archive.member(
            name,
            kind,
            mode=stat.S_IMODE(status.st_mode),
            uid=remap.to_image(status.st_uid, self.owners[0]),
            gid=remap.to_image(status.st_gid, self.owners[1]),
            size=size,
            mtime=mtime if self._epoch is None else min(mtime, self._epoch),
            link=link,
            device=device,
            xattrs=attributes(source) if with_attributes else None,
        )

    def _regular(self, name: bytes, source: str, status: os.stat_result, size: int) -> None:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._header(name, tar.REGULAR, source, status, size=size)
            left = size
            while left:
                data = os.read(fd, min(left, _STEP))
                if not data:  # it became shorter while it was read; the header's size must hold
                    data = bytes(min(left, _STEP))
                left -= len(data)
                self._archive.data(data)
            self._archive.data(padding(size))
        finally:
            os.close(fd)


def attributes(path: str) -> dict[str, bytes]:
    """The extended attributes that belong to an image: not overlay's own, not the host's security labels."""
    found = {}
    try:
        for name in os.listxattr(path, follow_symlinks=False):
            space, _, rest = name.partition(".")
            if rest.startswith("overlay.") or (space == "security" and rest != "capability"):
                continue
            found[name] = os.getxattr(path, name, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
    return found


# an upper directory


def walk_upper(layer: LayerWriter, directory: str) -> None:
    """Write what an overlay's upper directory holds: its own marks become whiteouts."""
    pending = [directory]
    while pending:
        path = pending.pop()
        if path:
            layer.file(path, path, os.lstat(path))
        if _is_opaque(path or "."):
            layer.opaque(path)
        below = []
        for entry in _sorted(path or "."):
            name = f"{path}/{entry.name}" if path else entry.name
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                layer.whiteout(name)
            elif entry.is_dir(follow_symlinks=False):
                below.append(name)
            else:
                layer.file(name, name, status)
        pending += reversed(below)


def _sorted(directory: str) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_opaque(directory: str) -> bool:
    for name in _OPAQUE:
        try:
            if os.getxattr(directory, name, follow_symlinks=False) == b"y":
                return True
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOTSUP):
                raise
    return False


# two trees


class Walk:
    """Compares the trees at `lower` and `upper` and writes the difference."""

    def __init__(self, layer: LayerWriter, lower: str, upper: str) -> None:
        self._layer = layer
        self._lower = lower
        self._upper = upper
        self._written = {""}  # directories that are in the layer

    def run(self) -> None:
        pending = [""]
        while pending:
            pending += reversed(self._directory(pending.pop()))

    def _directory(self, path: str) -> list[str]:
        """Compare what is in a directory of both trees; returns the directories in it that are in both, too."""
        prefix = f"{path}/" if path else ""
        old = {entry.name for entry in _sorted(f"{self._lower}/{path}")}
        below = []
        for entry in _sorted(f"{self._upper}/{path}"):
            name = prefix + entry.name
            status = entry.stat(follow_symlinks=False)
            was = os.lstat(f"{self._lower}/{name}") if entry.name in old else None
            old.discard(entry.name)
            is_directory = stat.S_ISDIR(status.st_mode)
            if was is None or not self._same(name, was, status):
                self._write(name, status)
            if is_directory:
                if was is not None and stat.S_ISDIR(was.st_mode):
                    below.append(name)
                else:
                    self._added(name)
        for gone in sorted(old):
            self._parents(prefix + gone)
            self._layer.whiteout(prefix + gone)
        return below

    def _added(self, path: str) -> None:
        """All that is in a directory which the lower tree has not."""
        pending = [path]
        while pending:
            directory = pending.pop()
            below = []
            for entry in _sorted(f"{self._upper}/{directory}"):
                name = f"{directory}/{entry.name}"
                self._write(name, entry.stat(follow_symlinks=False))
                if entry.is_dir(follow_symlinks=False):
                    below.append(name)
            pending += reversed(below)

    def _write(self, name: str, status: os.stat_result) -> None:
        self._parents(name)
        self._layer.file(name, f"{self._upper}/{name}", status)
        if stat.S_ISDIR(status.st_mode):
            self._written.add(name)

    def _parents(self, name: str) -> None:
        """Directories on the way to a change belong to the layer, unchanged: who applies it needs their look."""
        parts = name.split("/")[:-1]
        for count in range(1, len(parts) + 1):
            parent = "/".join(parts[:count])
            if parent not in self._written:
                self._written.add(parent)
                self._layer.file(parent, f"{self._upper}/{parent}", os.lstat(f"{self._upper}/{parent}"))

    def _same(self, name: str, was: os.stat_result, now: os.stat_result) -> bool:
        """What a header holds is compared, then the times, and where these can't tell the contents."""
        if (was.st_mode, was.st_uid, was.st_gid, was.st_rdev) != (now.st_mode, now.st_uid, now.st_gid, now.st_rdev):
            return False
        old, new = f"{self._lower}/{name}", f"{self._upper}/{name}"
        if was.st_mtime_ns != now.st_mtime_ns or attributes(old) != attributes(new):
            return False
        if stat.S_ISLNK(now.st_mode):
            return os.readlink(old) == os.readlink(new)
        if not stat.S_ISREG(now.st_mode):
            return True
        if was.st_size != now.st_size:
            return False
        # times without nanoseconds come from archives: two builds may have set the same second
        return (
            now.st_mtime_ns % _SECOND != 0 or (was.st_dev, was.st_ino) == (now.st_dev, now.st_ino) or _equal(old, new)
        )


def _equal(old: str, new: str) -> bool:
    with open(old, "rb") as first, open(new, "rb") as second:
        while (piece := first.read(_STEP)) == second.read(_STEP):
            if not piece:
                return True
    return False
