"""tmpcopyup: a tmpfs begins with what it hides (an option of runc's, for images that fill /run or /var)."""

from __future__ import annotations

import errno
import os
import stat


def copy_tree(source: int, target: int) -> None:
    """Copy the content of one open directory into another: files, folders, links, nodes, owners, modes, times."""
    for name in os.listdir(source):
        info = os.stat(name, dir_fd=source, follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            below, over = os.open(name, flags, dir_fd=source), os.open(name, flags, dir_fd=target)
            try:
                copy_tree(below, over)
            finally:
                os.close(below)
                os.close(over)
        elif stat.S_ISLNK(info.st_mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        elif stat.S_ISREG(info.st_mode):
            _copy_file(source, target, name)
        else:
            os.mknod(name, info.st_mode, info.st_rdev, dir_fd=target)
        _copy_metadata(name, info, target)


def _copy_metadata(name: str, info: os.stat_result, target: int) -> None:
    os.chown(name, info.st_uid, info.st_gid, dir_fd=target, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(name, stat.S_IMODE(info.st_mode), dir_fd=target)
    os.utime(name, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=target, follow_symlinks=False)


def _copy_file(source: int, target: int, name: str) -> None:
    reader = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
    try:
        writer = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
        try:
            while chunk := os.read(reader, 1 << 20):
                view = memoryview(chunk)
                while view:
                    view = view[os.write(writer, view) :]
            for key in _attributes(reader):
                try:
                    os.setxattr(writer, key, os.getxattr(reader, key))
                except OSError as error:
                    if error.errno not in (errno.ENOTSUP, errno.EPERM):
                        raise
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def _attributes(fd: int) -> list[str]:
    try:
        return os.listxattr(fd)
    except OSError:
        return []
