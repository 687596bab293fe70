"""How much a directory takes: unique inodes and the bytes of their blocks, as du(1) counts."""

from __future__ import annotations

import os

from wherry.snapshotter.interface import Usage

BLOCK = 512
"""`st_blocks` counts these, whatever the file system's block size is (stat(2))."""


def disk_usage(root: str) -> Usage:
    """Walk `root` (itself included) without following links. What vanishes meanwhile isn't counted."""
    seen: set[tuple[int, int]] = set()
    status = os.lstat(root)
    inodes, blocks = 1, status.st_blocks
    pending = [root]
    while pending:
        try:
            entries = os.scandir(pending.pop())
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif status.st_nlink > 1:
                    identity = (status.st_dev, status.st_ino)
                    if identity in seen:
                        continue
                    seen.add(identity)
                inodes += 1
                blocks += status.st_blocks
    return Usage(inodes, blocks * BLOCK)
