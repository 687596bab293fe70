"""What files can do beyond Python's `os`."""

from __future__ import annotations

import ctypes
import os

from wherry.linux.syscalls import libc

_FALLOC_FL_KEEP_SIZE = 1

_fallocate = libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def reserve(fd: int, size: int) -> None:
    """Have the disk keep room for the first `size` bytes of a file; its length stays what it is (fallocate(2)).

    Raises OSError: ENOSPC for a full disk, EOPNOTSUPP where the file system can't.
    """
    if _fallocate(fd, _FALLOC_FL_KEEP_SIZE, 0, size) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"fallocate({fd}, {size})")
