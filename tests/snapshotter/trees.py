"""Trees as values that can be compared, and mounts for the time of a block."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from wherry.linux.mounts import Mount, mount_all, unmount_all


def output_of(*command: str | Path) -> bytes:
    """What a program prints; it must succeed."""
    return subprocess.run(command, check=True, capture_output=True).stdout


@contextmanager
def mounted(mounts: Sequence[Mount], target: Path) -> Iterator[Path]:
    """The tree that the mounts show, at `target`."""
    target.mkdir(exist_ok=True)
    mount_all(mounts, str(target))
    try:
        yield target
    finally:
        unmount_all(str(target))


def look(root: Path | str, *, times: bool = True, ignore: Sequence[str] = ()) -> dict[str, tuple[object, ...]]:
    """Everything below `root` that an archive can tell: by name, with modes, owners, times, links, contents."""
    found: dict[str, tuple[object, ...]] = {}
    first: dict[tuple[int, int], str] = {}
    top = os.fspath(root)
    for directory, directories, files in os.walk(top):
        directories.sort()
        for name in sorted([*directories, *files]):
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, top)
            if relative in ignore:
                continue
            found[relative] = _look(path, relative, first, times=times)
    return found


def _look(path: str, relative: str, first: dict[tuple[int, int], str], *, times: bool) -> tuple[object, ...]:
    status = os.lstat(path)
    kind = stat.S_IFMT(status.st_mode)
    content = ""
    if kind == stat.S_IFREG:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    elif kind == stat.S_IFLNK:
        content = os.readlink(path)
    elif kind in {stat.S_IFCHR, stat.S_IFBLK}:
        content = str(status.st_rdev)
    group = ""
    if status.st_nlink > 1 and kind != stat.S_IFDIR:
        group = first.setdefault((status.st_dev, status.st_ino), relative)
    attributes = {
        name: os.getxattr(path, name, follow_symlinks=False)
        for name in os.listxattr(path, follow_symlinks=False)
        if not name.startswith("trusted.overlay.")
    }
    return (
        oct(status.st_mode),
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns if times else 0,
        content,
        group,
        tuple(sorted(attributes.items())),
    )
