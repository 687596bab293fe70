"""Copying a tree exactly: owners, modes, times, attributes, hard links, special files, holes.

Data is copied by the kernel (copy_file_range(2)), which shares the blocks where the file system can.
"""

from __future__ import annotations

import errno
import os
import stat

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOATIME
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_NO_RANGES = frozenset({errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
_STEP = 1 << 30


def copy_tree(source: str, target: str) -> None:
    """Copy what is in directory `source` into the directory `target`, which becomes like it. OSError.

    Sockets are left out: nothing listens on a copy.
    """
    links: dict[tuple[int, int], str] = {}
    directories = [(source, target)]
    for old, new in directories:
        with os.scandir(old) as entries:
            for entry in entries:
                there = f"{new}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    os.mkdir(there, 0o700)
                    directories.append((entry.path, there))
                else:
                    _copy_one(entry.path, there, entry.stat(follow_symlinks=False), links)
    for old, new in reversed(directories):
        _copy_look(old, new, os.lstat(old))


def _copy_one(old: str, new: str, status: os.stat_result, links: dict[tuple[int, int], str]) -> None:
    if status.st_nlink > 1:
        first = links.setdefault((status.st_dev, status.st_ino), new)
        if first != new:
            os.link(first, new, follow_symlinks=False)
            return
    mode = status.st_mode
    if stat.S_ISREG(mode):
        _copy_data(old, new, status)
    elif stat.S_ISLNK(mode):
        os.symlink(os.readlink(old), new)
    elif stat.S_ISSOCK(mode):
        return
    else:
        os.mknod(new, mode, status.st_rdev)
    _copy_look(old, new, status)


def _copy_look(old: str, new: str, status: os.stat_result) -> None:
    os.chown(new, status.st_uid, status.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(new, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(old, follow_symlinks=False):
        os.setxattr(new, name, os.getxattr(old, name, follow_symlinks=False), follow_symlinks=False)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _copy_data(old: str, new: str, status: os.stat_result) -> None:
    source = os.open(old, _READ)
    try:
        target = os.open(new, _WRITE, 0o600)
        try:
            if status.st_size > status.st_blocks * 512:
                _copy_pieces(source, target, status.st_size)
            else:
                _copy_range(source, target, 0, status.st_size)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _copy_pieces(source: int, target: int, size: int) -> None:
    """A file with holes: only what is there (lseek(2), SEEK_DATA)."""
    at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing but a hole follows
                raise
            break
        at = os.lseek(source, start, os.SEEK_HOLE)
        _copy_range(source, target, start, at - start)
    os.ftruncate(target, size)


def _copy_range(source: int, target: int, at: int, size: int) -> None:
    end = at + size
    try:
        while at < end:
            done = os.copy_file_range(source, target, min(end - at, _STEP), at, at)
            if not done:
                return
            at += done
    except OSError as error:
        if error.errno not in _NO_RANGES:
            raise
        while at < end and (data := os.pread(source, min(end - at, 1 << 20), at)):
            at += os.pwrite(target, data, at)
