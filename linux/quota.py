"""Project quotas: a limit on what a directory tree holds, kept by the file system (quotactl(2), ext4 and XFS).

A project is a number that files carry and inherit from their directory; the file system counts blocks and inodes of
each number and refuses what goes over its limit with EDQUOT. It must be mounted for that (`prjquota`, `pquota`).
"""

from __future__ import annotations

import ctypes
import os
import struct

from wherry.linux import syscalls

# linux/fs.h: FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR, struct fsxattr (28 bytes: xflags, extsize, nextents, projid,
# cowextsize, padding)
_GET, _SET = 0x801C581F, 0x401C5820
_ATTRIBUTES = struct.Struct("=IIIII8x")
_INHERIT = 0x200  # FS_XFLAG_PROJINHERIT
# linux/quota.h: Q_GETQUOTA, Q_SETQUOTA, project quotas are kind 2, QIF_BLIMITS | QIF_ILIMITS
_GETQUOTA, _SETQUOTA, _PROJECT, _LIMITS = 0x800007, 0x800008, 2, 5
# struct if_dqblk: limits in blocks of 1 KiB, hard and soft; used bytes; limits of inodes; used inodes; times; which
_QUOTA = struct.Struct("=QQQQQQQQII")
_BLOCK = 1024


_QUOTACTL_FD = 443  # the same number on every architecture


def _quotactl(fd: int, command: int, project: int, data: ctypes.Array[ctypes.c_char]) -> None:
    """quotactl_fd(2): the file system is named by an open file, not by its device."""
    result = syscalls.libc.syscall(
        ctypes.c_long(_QUOTACTL_FD),
        ctypes.c_uint(fd),
        ctypes.c_uint(command << 8 | _PROJECT),
        ctypes.c_uint(project),
        data,
    )
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "project quota")


def supported(folder: str) -> bool:
    """Whether the file system of a folder counts projects."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _quotactl(fd, _GETQUOTA, 0, ctypes.create_string_buffer(_QUOTA.size))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def used(folder: str, project: int) -> tuple[int, int]:
    """Bytes and inodes that a project holds. OSError where nothing is counted."""
    data = ctypes.create_string_buffer(_QUOTA.size)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _quotactl(fd, _GETQUOTA, project, data)
    except FileNotFoundError:
        # XFS, where nobody ever had this number
        return 0, 0
    finally:
        os.close(fd)
    fields = _QUOTA.unpack(data.raw)
    return fields[2], fields[5]


def limit(folder: str, project: int, size: int, inodes: int = 0) -> None:
    """Give a project a hard limit in bytes (rounded up to 1 KiB), and in inodes; 0 is none. OSError."""
    blocks = -(-size // _BLOCK)
    data = ctypes.create_string_buffer(_QUOTA.pack(blocks, blocks, 0, inodes, inodes, 0, 0, 0, _LIMITS, 0), _QUOTA.size)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _quotactl(fd, _SETQUOTA, project, data)
    finally:
        os.close(fd)


def assign(folder: str, project: int) -> None:
    """Make an empty folder and all that is made below it belong to a project. OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        data = ctypes.create_string_buffer(_ATTRIBUTES.size)
        syscalls.ioctl(fd, _GET, data)
        flags, extent, extents, _, cow = _ATTRIBUTES.unpack(data.raw)
        data.raw = _ATTRIBUTES.pack(flags | _INHERIT, extent, extents, project, cow)
        syscalls.ioctl(fd, _SET, data)
    finally:
        os.close(fd)
