"""A container's disk with a size: what it writes goes to a place that holds no more than that.

What a container writes goes to the upper directory of its overlay. Three things can limit one:

- `quota`: a project quota on the snapshot's own directory, where its file system counts projects. Costs nothing.
- `loop`: an ext4 file system in a sparse file, as upper directory. Costs a few milliseconds and a loop device.
- `tmpfs`: one of that size, as upper directory. Its pages count for the container's memory limit.

Where none can be had, a limit is refused, not ignored.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from typing import TYPE_CHECKING

from wherry.core.errors import FailedPrecondition, InvalidArgument
from wherry.core.tuples import NamedTuple
from wherry.linux import mounts as kernel
from wherry.linux import quota
from wherry.linux.syscalls import MNT_DETACH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wherry.client.values import Mount

KINDS = ("quota", "loop", "tmpfs")
# a smaller ext4 has no room for its own tables and a few files
SMALLEST = 1 << 20


class Disk(NamedTuple):
    """Where a container writes. `mounts` are those for its task; `kind` is one of `KINDS`, "" without a limit.

    `upper` is the overlay's upper directory; `place` a mount point of ours, "" where there is none; `project` a number.
    """

    mounts: tuple[Mount, ...]
    upper: str
    kind: str = ""
    place: str = ""
    project: int = 0


def upper_of(mounts: Sequence[Mount]) -> str:
    """The upper directory of an overlay's mount; raises FailedPrecondition where the root is no overlay."""
    for mount in mounts:
        if mount.type == "overlay":
            for option in mount.options:
                if option.startswith("upperdir="):
                    return option.removeprefix("upperdir=")
    raise FailedPrecondition("this needs a container whose root is an overlay (snapshotter overlayfs)")


def limited(mounts: Sequence[Mount], size: int, folder: str, kind: str = "") -> Disk:
    """The mounts of a fresh snapshot, changed so that at most `size` bytes can be written; 0 changes nothing.

    `folder` is an empty folder of the caller's, `kind` one of `KINDS`, "" the first that works. Raises InvalidArgument,
    FailedPrecondition with what was tried. `release` undoes it.
    """
    upper = upper_of(mounts)
    if not size:
        return Disk(tuple(mounts), upper)
    if size < SMALLEST:
        raise InvalidArgument(f"a disk of {size} bytes is too small: at least {SMALLEST}")
    if kind and kind not in KINDS:
        raise InvalidArgument(f"unknown kind of disk {kind!r}: one of {', '.join(KINDS)}")
    refused = []
    for candidate in [kind] if kind else KINDS:
        try:
            if candidate == "quota":
                return _with_quota(tuple(mounts), upper, size)
            return _with_upper(mounts, size, folder, candidate)
        except OSError as error:
            refused.append(f"{candidate}: {error.strerror or error}")
        except subprocess.CalledProcessError as error:
            refused.append(f"{candidate}: {error.stderr.decode(errors='replace').strip() or error}")
    raise FailedPrecondition(f"this host can't limit a container's disk ({'; '.join(refused)})")


def release(disk: Disk) -> None:
    """Gives up what `limited` took. The container must be gone."""
    if disk.place:
        with contextlib.suppress(OSError):
            kernel.unmount(disk.place, MNT_DETACH)
    if disk.project:
        with contextlib.suppress(OSError):
            quota.limit(os.path.dirname(disk.upper), disk.project, 0)


def _with_quota(mounts: tuple[Mount, ...], upper: str, size: int) -> Disk:
    if not quota.supported(upper):
        raise OSError(errno.EOPNOTSUPP, "the file system of the snapshots counts no projects")
    # numbers that no one uses: system tools hand out small ones
    for _ in range(16):
        project = 0x40000000 | int.from_bytes(os.urandom(4)) >> 2
        if quota.used(upper, project) == (0, 0):
            break
    # the work directory as well: overlay moves files from there to the upper one, which may not change their project
    for place in (upper, os.path.join(os.path.dirname(upper), "work")):
        quota.assign(place, project)
    quota.limit(upper, project, size)
    return Disk(mounts, upper, "quota", project=project)


def _with_upper(mounts: Sequence[Mount], size: int, folder: str, kind: str) -> Disk:
    """A file system of its own below `folder`, with an upper and a work directory in it."""
    place = os.path.join(folder, "disk")
    os.makedirs(place, mode=0o700, exist_ok=True)
    if kind == "loop":
        image = os.path.join(folder, "disk.img")
        with open(image, "wb") as file:
            file.truncate(size)
        options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-E", options, image)
        _run("mount", "-t", "ext4", "-o", "loop", image, place)
    else:
        kernel.mount("tmpfs", "wherry-sandbox", place, [f"size={size}", "mode=0700"])
    names = {name: os.path.join(place, name) for name in ("upper", "work")}
    for path in names.values():
        os.mkdir(path, 0o755)
    changed = tuple(
        mount._replace(options=tuple(_elsewhere(option, names) for option in mount.options))
        if mount.type == "overlay"
        else mount
        for mount in mounts
    )
    # the root of the container looks as the snapshot's upper directory does
    info = os.stat(upper_of(mounts))
    os.chmod(names["upper"], info.st_mode & 0o7777)
    os.chown(names["upper"], info.st_uid, info.st_gid)
    return Disk(changed, names["upper"], kind, place=place)


def _elsewhere(option: str, names: dict[str, str]) -> str:
    key = option.partition("=")[0]
    replaced = {"upperdir": "upper", "workdir": "work"}.get(key)
    return f"{key}={names[replaced]}" if replaced else option


def _run(*command: str) -> None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PATH": path})
