"""Deletes the directories of snapshots: few system calls for a container's, and a program for an image's.

A container's upper directory has a dozen entries, most of them empty folders that something was mounted on. Each system
call is a chance for another thread to take the interpreter, and costs more by that than by itself. So a folder is
removed without being looked into first; only one that isn't empty is opened.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from itertools import islice

from wherry.linux.mounts import mountinfo, unmount_all

LARGE = 500
"""Trees with more entries are not deleted by this process."""
DEEP = 50
"""Nor are those with more levels."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)


class _Large(Exception):
    """There is more than this process should delete."""


def delete_tree(directory: str) -> None:
    """Delete a directory with all that is in it; mounts that somebody left in it are detached. It may be gone.

    Raises OSError.
    """
    try:
        _delete(directory)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        below = directory + "/"
        for info in reversed(mountinfo()):
            if info.target.startswith(below):
                unmount_all(info.target)
        _delete(directory)


def _delete(directory: str) -> None:
    """Small trees here; large and deep ones by rm(1): an image's files, one by one, would take the interpreter from
    other threads, and shutil has one frame of the stack for each level."""
    try:
        fd = os.open(directory, _FOLDER)
        try:
            _empty(fd, LARGE, DEEP)
        finally:
            os.close(fd)
    except _Large:
        if not _removed_by_program(directory):
            shutil.rmtree(directory)
    else:
        os.rmdir(directory)


def _empty(folder: int, room: int, levels: int) -> int:
    """Delete what is in an open folder, relative to it: whoever swaps something for a link meanwhile gains nothing.

    How many entries there may still be is passed in and returned.
    """
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in islice(entries, room + 1)]
    room -= len(found)
    if room < 0 or not levels:
        raise _Large
    for name, is_folder in found:
        if not is_folder:
            os.unlink(name, dir_fd=folder)
            continue
        try:
            os.rmdir(name, dir_fd=folder)
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise
            below = os.open(name, _FOLDER, dir_fd=folder)
            try:
                room = _empty(below, room, levels - 1)
            finally:
                os.close(below)
            os.rmdir(name, dir_fd=folder)
    return room


def _removed_by_program(directory: str) -> bool:
    """Whether rm(1) could do it."""
    try:
        done = subprocess.run(
            ["rm", "-rf", "--", directory], stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except OSError:
        return False
    return done.returncode == 0
