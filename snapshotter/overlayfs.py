"""The overlayfs snapshotter: a snapshot keeps what it changed, the kernel lays it over its parents.

    snapshots/N/fs     upper directory while active, a lower directory of others once committed
    snapshots/N/work   overlay's work directory, only of active snapshots

The mounts are those of containerd's snapshotter of this name: a bind mount where there is one layer only (overlay
needs a lower directory), an overlay otherwise; a view has no upper directory.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace

from wherry.core.errors import FailedPrecondition, InvalidArgument
from wherry.linux.mounts import Mount, unmount_all
from wherry.snapshotter import remap
from wherry.snapshotter.below import adopt_implied
from wherry.snapshotter.directories import DirectorySnapshotter
from wherry.snapshotter.interface import Info, Kind
from wherry.snapshotter.metadata import Record
from wherry.snapshotter.roots import in_user_namespace

log = logging.getLogger("wherry.snapshotter")

UPPERDIR_LABEL = "containerd.io/snapshot/overlay.upperdir"
"""Where a snapshot's changes are; clients that copy layers themselves ask for it (`upperdir_label`)."""


class OverlaySnapshotter(DirectorySnapshotter):
    """Options are containerd's: `upperdir_label` shows `UPPERDIR_LABEL` on each snapshot, `mount_options` are added to
    each overlay mount (not to bind mounts), `async_remove` leaves files of removed snapshots to `cleanup()`,
    `slow_chown` leaves it to clients to give a user namespace's containers files of their own (see `remap.py`).

    `mount_type` is the kernel's overlay, or fuse.OVERLAY, which keeps the same files.

    FailedPrecondition where the kernel or the file system below `root` can't do overlays (`check`).
    """

    rebases = True

    def __init__(
        self,
        root: str,
        *,
        upperdir_label: bool = False,
        mount_options: Sequence[str] = (),
        async_remove: bool = False,
        sync_remove: bool = False,
        slow_chown: bool = False,
        check: bool = True,
        mount_type: str = "overlay",
    ) -> None:
        if any(char in root for char in ",:\\"):
            raise InvalidArgument(f"overlayfs can't have layers under a path with a comma, colon or backslash: {root}")
        os.makedirs(root, mode=0o700, exist_ok=True)
        if check:
            check_support(root, mount_type)
        super().__init__(root, async_remove=async_remove, sync_remove=sync_remove)
        self._mount_type = mount_type
        self.remaps = not slow_chown and mount_type == "overlay" and remap.supported()
        self._upperdir_label = upperdir_label
        self._options = default_options(mount_options)

    def _make(self, record: Record, directory: str) -> None:
        files = f"{directory}/fs"
        os.mkdir(files, 0o755)
        if record.parent_id is not None:
            # the uppermost root directory is the one that is seen: it must look like the one below
            _like(files, self.content(record.parent_id))
            if self.remaps and remap.check(record.info.labels):
                _remap(files, record.info.labels)
        if record.info.kind is Kind.ACTIVE:
            os.mkdir(f"{directory}/work", 0o711)

    def _mounts_of(self, record: Record, chain: Sequence[int]) -> list[Mount]:
        writable = record.info.kind is Kind.ACTIVE
        maps = remap.options(record.info.labels) if self.remaps else ()
        if not chain:
            return [Mount("bind", self.content(record.id), options=(*maps, "rw" if writable else "ro", "rbind"))]
        if not writable and len(chain) == 1:
            return [Mount("bind", self.content(chain[0]), options=(*maps, "ro", "rbind"))]
        options = [*maps, *self._options]
        if writable:
            options += [f"workdir={self.directory(record.id)}/work", f"upperdir={self.content(record.id)}"]
        options.append("lowerdir=" + ":".join(self.content(number) for number in chain))
        return [Mount(self._mount_type, "overlay", options=tuple(options))]

    def _commit_on(self, record: Record, parent: Record) -> None:
        layers = [self.content(number) for number in self._metadata.chain(parent.id)]
        _like(self.content(record.id), layers[0])
        adopt_implied(self.content(record.id), layers)

    def _shown(self, record: Record) -> Info:
        if not self._upperdir_label:
            return record.info
        return replace(record.info, labels={**record.info.labels, UPPERDIR_LABEL: self.content(record.id)})


def _like(directory: str, other: str) -> None:
    status = os.stat(other)
    if status.st_uid or status.st_gid:
        os.chown(directory, status.st_uid, status.st_gid)
    if status.st_mode & 0o7777 != 0o755:
        os.chmod(directory, status.st_mode & 0o7777)


def _remap(directory: str, labels: Mapping[str, str]) -> None:
    """The root is seen as it is, unlike the layers below: it gets the owner that theirs have when they are mapped."""
    status = os.stat(directory)
    owner = remap.to_host(status.st_uid, remap.parse(labels[remap.UID_LABEL]))
    os.chown(directory, owner, remap.to_host(status.st_gid, remap.parse(labels[remap.GID_LABEL])))


def default_options(mount_options: Sequence[str]) -> tuple[str, ...]:
    """The options of every overlay mount.

    `index=off` because a container's upper directory may be mounted again elsewhere (a debugger, a copy), which the
    index refuses; `userxattr` because without it a user namespace can't keep overlay's attributes (Linux 5.11).
    """
    options = list(mount_options)
    names = {option.partition("=")[0] for option in options}
    if "index" not in names and os.path.exists("/sys/module/overlay/parameters/index"):
        options.insert(0, "index=off")
    if "userxattr" not in names and in_user_namespace():
        options.append("userxattr")
    return tuple(options)


def check_support(root: str, mount_type: str = "overlay") -> None:
    """Mount an overlay of two lower directories below `root` for a moment; FailedPrecondition if that fails."""
    try:
        with tempfile.TemporaryDirectory(prefix="check-", dir=root) as directory:
            for name in ("lower1", "lower2", "upper", "work", "merged"):
                os.mkdir(f"{directory}/{name}")
            layers = f"lowerdir={directory}/lower2:{directory}/lower1"
            upper = (f"upperdir={directory}/upper", f"workdir={directory}/work")
            merged = f"{directory}/merged"
            Mount(mount_type, "overlay", options=(*default_options(()), layers, *upper)).mount(merged)
            unmount_all(merged)
    except OSError as error:
        raise FailedPrecondition(f"overlayfs doesn't work below {root}: {error}: failed precondition") from error
