"""Going into the tree that mounts show, with no way back: for processes that handle what strangers packed.

An overlay is not mounted to be written: its upper directory is entered, and whiteouts are made in overlay's own form
(Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories"), which is what the kernel would do, at a
third of the cost. Neither is a plain bind mount. Everything else is mounted for real in a mount namespace of this
process's own, so that it is gone when the process is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from wherry.core.errors import FailedPrecondition
from wherry.linux import capabilities
from wherry.linux import syscalls as sc
from wherry.linux.fuse import OVERLAYS
from wherry.linux.mounts import Mount, mount_all, split_escaped

MOUNTPOINT = "/sys"
"""A directory that every host has and under which no layer lies; it is covered in this process's view only."""


@dataclass(slots=True)
class Root:
    """What was entered. Paths are relative to the working directory, which is its root.

    overlay: whiteouts are kept as overlay's, opaque directories by the attribute `opaque`; layers: descriptors of the
    layers below, the nearest first; fresh: there was nothing in it; user_namespace: this process is in one of its own;
    one_id: in which there is one user alone, who owns everything.
    """

    overlay: bool
    opaque: str = "trusted.overlay.opaque"
    layers: list[int] = field(default_factory=list)
    fresh: bool = True
    user_namespace: bool = False
    one_id: bool = False


def direct(mounts: Sequence[Mount]) -> tuple[str, list[str], bool] | None:
    """The directory to write to, the layers below it, and whether overlay's attributes are the user's; None where
    only a mount will do."""
    if len(mounts) != 1 or mounts[0].target:
        return None
    mount = mounts[0]
    if mount.type in ("bind", "rbind", "") and set(mount.options) <= {"rw", "rbind", "bind"}:
        return (mount.source, [], False) if {"rbind", "bind"} & {mount.type, *mount.options} else None
    if mount.type not in OVERLAYS or "ro" in mount.options:
        return None
    options = dict(option.partition("=")[::2] for option in mount.options)
    upper, lower = options.get("upperdir"), options.get("lowerdir")
    if not upper or any(key in options for key in ("metacopy", "redirect_dir", "uidmap", "gidmap", "lowerdir+")):
        return None
    return upper, split_escaped(lower) if lower else [], "userxattr" in options


def enter(mounts: Sequence[Mount], *, overlay: bool | None) -> Root:
    """Make the tree of `mounts` this process's root and working directory. FailedPrecondition."""
    try:
        found = direct(mounts)
        if found is None:
            root = Root(overlay=bool(overlay))
            mount_private(mounts, MOUNTPOINT)
            path = MOUNTPOINT
        else:
            path, layers, user = found
            root = Root(overlay=mounts[0].type in OVERLAYS if overlay is None else overlay)
            if user:
                root.opaque = "user.overlay.opaque"
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            root.layers = [os.open(layer, flags) for layer in layers]
        root.user_namespace = in_user_namespace()
        root.one_id = root.user_namespace and _has_one_id()
        confine(path)
    except OSError as error:
        raise FailedPrecondition(f"the snapshot's mounts can't be mounted: {error}: failed precondition") from error
    with os.scandir(".") as entries:
        root.fresh = next(entries, None) is None
    return root


# what making and reading a layer's files takes. Not among them: CAP_SYS_CHROOT, CAP_DAC_READ_SEARCH (which opens files
# by handles) and CAP_SYS_PTRACE, the ways out of a root. Overlay's attributes (`trusted.`) want CAP_SYS_ADMIN.
_KEPT = ("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_MKNOD", "CAP_SETFCAP", "CAP_SYS_ADMIN")


def confine(path: str) -> None:
    """Make `path` the root of this thread and those that it starts, with no more rights than a layer takes. OSError."""
    kept = sc.capget()[1] & capabilities.mask(list(_KEPT))[0]
    os.chroot(path)
    os.chdir("/")
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    sc.capset(kept, kept, 0)


def in_user_namespace() -> bool:
    """Whether this process is in another user namespace than the first (user_namespaces(7))."""
    try:
        with open("/proc/self/uid_map", "rb") as file:  # as bytes: this process loads no codecs any more
            return file.read().split() != [b"0", b"0", b"4294967295"]
    except OSError:
        return False


def _has_one_id() -> bool:
    """Whether no second user is known here: what an ordinary user has to whom no ids were granted."""
    try:
        with open("/proc/self/uid_map", "rb") as file:
            return file.read().split()[2:] == [b"1"]
    except OSError:
        return False


def mount_private(mounts: Sequence[Mount], target: str) -> None:
    """Mount at `target` where only this process sees it. OSError."""
    isolate()
    mount_all(mounts, target)


def isolate() -> None:
    """A mount namespace of this process's own, from which nothing spreads. OSError."""
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount("", "/", "", sc.MS_REC | sc.MS_PRIVATE)
