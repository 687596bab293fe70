"""What of a layer can only be finished with its parents at hand.

Directories that the layer needs but doesn't name must look like those of the layers below, and a hard link may lead
to a file of theirs.

A layer may hold `etc/app/x` without an entry for `etc/app`. Where the layer's files are written into an overlay's upper
directory, `etc/app` has to be made there, and what is made there hides the owner, mode, times and attributes of the
same directory below. So they are copied from the nearest layer that has it, as overlay's own copy-up does.

An opaque mark on the root itself is not overlay's to follow (a root is always merged), so each name in the roots
below gets a whiteout of its own; such a layer has `ROOT` among its implied paths.

A layer that was applied before its parents were known (`Applier.apply(overlay=True)`) has the list of such directories
beside its files, in `snapshots/N/implied`, until it is committed on its parent.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence

from wherry.linux import syscalls as sc

ROOT = b"."
_STEP = 1 << 30
OPAQUE = "trusted.overlay.opaque"
_OWN = ("trusted.overlay.", "user.overlay.")
_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


def is_below(layers: Sequence[int], path: bytes) -> bool:
    """Whether one of the layers has something under that name. A whiteout there counts: it may hide, too. OSError."""
    for layer in layers:
        try:
            os.close(sc.openat2(layer, os.fsdecode(path), os.O_PATH | os.O_NOFOLLOW, resolve=sc.RESOLVE_IN_ROOT))
        except OSError as error:
            if error.errno not in _MISSING:
                raise
            continue
        return True
    return False


def copy_up(layers: Sequence[int], path: bytes) -> bool:
    """Copy a file or a link of the layers below to the same place below the working directory, as overlay does before
    a link is made to it. False where there is none, or where it is a directory. OSError."""
    text = os.fsdecode(path)
    for layer in layers:
        try:
            source = sc.openat2(layer, text, os.O_PATH | os.O_NOFOLLOW, resolve=sc.RESOLVE_IN_ROOT)
        except OSError as error:
            if error.errno not in _MISSING:
                raise
            continue
        try:
            status = os.fstat(source)
            if stat.S_ISREG(status.st_mode):
                _copy_file(layer, text, status)
            elif stat.S_ISLNK(status.st_mode):
                os.symlink(os.readlink("", dir_fd=source), text)
            else:
                return False  # a directory, or a whiteout
            os.chown(text, status.st_uid, status.st_gid, follow_symlinks=False)
            os.utime(text, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)
        finally:
            os.close(source)
        return True
    return False


def _copy_file(layer: int, path: str, status: os.stat_result) -> None:
    source = sc.openat2(layer, path, os.O_RDONLY | os.O_NOFOLLOW, resolve=sc.RESOLVE_IN_ROOT)
    try:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            while os.copy_file_range(source, target, _STEP):
                pass
            os.fchown(target, status.st_uid, status.st_gid)
            os.fchmod(target, stat.S_IMODE(status.st_mode))
            for name in os.listxattr(source):
                if not name.startswith(_OWN):
                    os.setxattr(target, name, os.getxattr(source, name))
        finally:
            os.close(target)
    finally:
        os.close(source)


def hide_below(root: int, layers: Sequence[int], opaque: str) -> None:
    """Hide all that the layers have in their roots, but not what is in the directory `root`. OSError."""
    names: set[str] = set()
    for layer in layers:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=layer)
        try:
            names.update(os.listdir(fd))
        finally:
            os.close(fd)
    for name in names:
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=root)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(name, dir_fd=root, follow_symlinks=False).st_mode):
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
                try:
                    os.setxattr(fd, opaque, b"y")
                finally:
                    os.close(fd)


def adopt(root: int, layers: Sequence[int], paths: Iterable[bytes], opaque: str = OPAQUE) -> None:
    """Give directories below `root` the look of the same in `layers` (descriptors, the nearest first). OSError."""
    for path in paths:
        if path == ROOT:
            hide_below(root, layers, opaque)
            continue
        text = os.fsdecode(path)
        try:
            target = sc.openat2(root, text, os.O_RDONLY | os.O_DIRECTORY, resolve=sc.RESOLVE_IN_ROOT)
        except OSError as error:
            if error.errno in _MISSING:
                continue  # a later entry replaced it
            raise
        try:
            _adopt_one(target, layers, text)
        finally:
            os.close(target)


def _adopt_one(target: int, layers: Sequence[int], path: str) -> None:
    for layer in layers:
        try:
            source = sc.openat2(layer, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, resolve=sc.RESOLVE_IN_ROOT)
        except OSError as error:
            if error.errno not in _MISSING:
                raise
            if error.errno == errno.ENOENT:
                continue
            return  # a file or a link hides what is further below
        try:
            status = os.fstat(source)
            os.fchown(target, status.st_uid, status.st_gid)
            os.fchmod(target, stat.S_IMODE(status.st_mode))
            for name in os.listxattr(source):
                if not name.startswith(_OWN):
                    os.setxattr(target, name, os.getxattr(source, name))
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(source)
        return


def _list_of(upper: str) -> str:
    return os.path.join(os.path.dirname(upper.rstrip("/")), "implied")


def record_implied(upper: str, paths: Sequence[bytes]) -> None:
    """Keep the list for `adopt_implied`. OSError."""
    if paths:
        with open(_list_of(upper), "wb") as file:
            file.write(b"\0".join(paths))


def adopt_implied(upper: str, layers: Sequence[str]) -> None:
    """What was put off when the layer at `upper` was applied; `layers` are its parents, the nearest first. OSError."""
    try:
        with open(_list_of(upper), "rb") as file:
            paths = file.read().split(b"\0")
    except FileNotFoundError:
        return
    fds: list[int] = []
    try:
        fds.extend(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in (upper, *layers))
        adopt(fds[0], fds[1:], paths)
    finally:
        for fd in fds:
            os.close(fd)
    os.unlink(_list_of(upper))
