"""How much a directory takes: unique inodes and the bytes of their blocks, as du(1) counts."""

from __future__ import annotations

import os
from collections.abc import Iterator

from wherry.snapshotter.interface import Usage

BLOCK = 512
"""`st_blocks` counts these, whatever the file system's block size is (stat(2))."""
_LONGEST = 4000
"""Bytes of a path that one call takes (PATH_MAX is 4096); a container can make trees that are deeper."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def disk_usage(root: str) -> Usage:
    """Walk `root` (itself included) without following links. What vanishes meanwhile isn't counted. OSError."""
    seen: set[tuple[int, int]] = set()
    status = os.lstat(root)
    inodes, blocks = 1, status.st_blocks
    for entry in walk(root):
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if status.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
            identity = (status.st_dev, status.st_ino)
            if identity in seen:
                continue
            seen.add(identity)
        inodes += 1
        blocks += status.st_blocks
    return Usage(inodes, blocks * BLOCK)


def walk(root: str) -> Iterator[os.DirEntry[str]]:
    """All that is below `root`, without following links, however deep it is. What vanishes meanwhile is left out."""
    top = os.open(root, _DIRECTORY)
    try:
        pending = [""]
        while pending:
            path = pending.pop()
            try:
                fd = open_below(top, path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(f"{path}/{entry.name}" if path else entry.name)
                        yield entry
            finally:
                os.close(fd)
    finally:
        os.close(top)


def open_below(top: int, path: str) -> int:
    """A directory below the one that `top` is, by a path of any length; "" for `top` itself. OSError."""
    fd = os.open(".", _DIRECTORY, dir_fd=top)
    while path:
        cut = len(path)
        if len(os.fsencode(path)) > _LONGEST:
            cut = path.rfind("/", 0, _LONGEST // 4)  # a character has four bytes at most
        try:
            following = os.open(path[:cut], _DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)
        fd, path = following, path[cut + 1 :]
    return fd
