"""Removing cgroup directories."""

from __future__ import annotations

import errno
import os
import time

from wherry.linux.cgroups.files import list_pids, subdirectories

_FIRST_WAIT, _LONGEST_WAIT = 0.001, 0.1  # seconds


def remove_tree(directory: str, timeout: float) -> None:
    """Remove a cgroup and those below it.

    A cgroup stays busy for a moment after its last process was reaped (the kernel takes it out when the task is
    freed), so EBUSY is tried again for `timeout` seconds. Raises OSError(EBUSY) with the pids that are left.
    """
    wait, deadline = _FIRST_WAIT, time.monotonic() + timeout
    while not _try(directory):
        if time.monotonic() >= deadline:
            left = list_pids(directory, recursive=True)
            msg = f"still busy (processes in it: {left or 'none'})"
            raise OSError(errno.EBUSY, msg, directory)
        time.sleep(wait)
        wait = min(wait * 2, _LONGEST_WAIT)


def _try(directory: str) -> bool:
    """One pass, children first only where there are some; True if the directory is gone."""
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        children = subdirectories(directory)
        # stops at the first that is busy: the next pass goes on there
        return bool(children) and all(_try(child) for child in children) and _try(directory)
    return True
