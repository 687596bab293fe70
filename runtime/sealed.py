"""No container gets a writable handle on the host's interpreter (CVE-2019-5736, `#!/proc/self/exe`).

The attack: a process that enters a container is, until it executes the user's program, the runtime itself. Whoever can
reach its /proc/PID/exe, or makes it execute `/proc/self/exe` (as the program, or as a script's interpreter), holds a
file of the host, and may open it for writing as soon as nothing runs it any more.

The defence: /proc/self/exe leads to the same file through a read-only overlay mount that exists only as long as our
processes do (as runc ≥ 1.2 does it). No bytes are copied, and no interpreter is started a second time: the few pages of
the executable that are mapped are exchanged in place for the same pages of the sealed file, then the kernel is told
(`PR_SET_MM_MAP`) that this is our executable. Where that can't be done (an interpreter without a shared libpython, an
old kernel), the process executes itself once more from the overlay, or from a sealed copy in memory.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import ctypes
import errno
import os

from wherry.linux import process
from wherry.linux import syscalls as sc

_OVERLAYFS_SUPER_MAGIC = 0x794C7630
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_WRITE = 1, 2, 4, 8
_ALL_SEALS = _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW | _SEAL_WRITE
_MARK = "_WHERRY_SEALED"  # set in the environment for the second start, so that it can't become a third
_MREMAP_MAYMOVE_FIXED = 1 | 2
_PT_LOAD = 1
_MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 2, 16, 32
_PAGE = os.sysconf("SC_PAGE_SIZE")


def is_sealed() -> bool:
    """Whether /proc/self/exe is a file that nobody can write to: a sealed memfd, or one on a read-only overlay."""
    fd = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _fd_is_sealed(fd)
    finally:
        os.close(fd)


def _fd_is_sealed(fd: int) -> bool:
    import fcntl

    try:
        return bool(fcntl.fcntl(fd, _F_GET_SEALS) & _SEAL_WRITE)
    except OSError:
        pass
    buffer = ctypes.create_string_buffer(256)  # struct statfs: f_type is its first word
    if sc.libc.fstatfs(fd, buffer) != 0:
        return False
    magic = int.from_bytes(buffer.raw[:4], "little")
    return magic == _OVERLAYFS_SUPER_MAGIC and bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)


def ensure_sealed() -> None:
    """Make /proc/self/exe of this process, and of all that it forks, something that nobody can write to.

    Called once, early, single-threaded: by the command line before it makes a container, by the fork server at its
    start. sys.executable, sys.argv and the environment stay as they are. Falls back to executing this same process
    again from a sealed copy (so call it before anything that must not happen twice). OSError if nothing of it works.
    """
    if os.environ.pop(_MARK, None) is not None and is_sealed():
        return
    try:
        fd = overlay_executable()
    except OSError:
        if is_sealed():
            return
        _execute_again(memory_executable())
        return
    try:
        _seal_in_place(fd)
    except (OSError, ValueError):
        _execute_again(fd)
        return
    os.close(fd)


def overlay_executable() -> int:
    """The running executable, opened through a read-only overlay of its folder that is mounted nowhere.

    Needs CAP_SYS_ADMIN in the mount namespace's user namespace and Linux 5.2.
    """
    path = os.readlink("/proc/self/exe")
    folder, name = os.path.split(path)
    if ":" in folder or "," in folder or "\\" in folder:
        raise OSError(errno.EINVAL, "a name that overlay options can't carry", folder)
    fs = sc.fsopen("overlay")
    try:
        # An overlay without an upper folder wants two lower ones; the second one holds nothing that is looked up.
        sc.fsconfig_string(fs, "lowerdir", f"{folder}:{_second_layer(folder)}")
        sc.fsconfig_create(fs)
        tree = sc.fsmount(fs, sc.MOUNT_ATTR_RDONLY | sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV)
    finally:
        os.close(fs)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=tree)
    finally:
        os.close(tree)
    here, there = os.stat("/proc/self/exe"), os.fstat(fd)
    if (here.st_size, here.st_mtime_ns) != (there.st_size, there.st_mtime_ns):
        os.close(fd)
        raise OSError(errno.ESTALE, "the executable was replaced while it ran", path)
    return fd


def _second_layer(folder: str) -> str:
    """A folder that is neither above nor below `folder` (overlapping layers are refused)."""
    for candidate in ("/var/empty", "/proc/self/fdinfo", "/dev/shm", "/run", "/etc", "/usr"):
        real = os.path.realpath(candidate)
        apart = not (folder + "/").startswith(real + "/") and not (real + "/").startswith(folder + "/")
        if apart and os.path.isdir(real) and not real.startswith("/proc"):
            return real
    raise OSError(errno.ENOENT, "no second layer for the overlay", folder)


def memory_executable() -> int:
    """A sealed copy of the executable in memory, for hosts without overlayfs."""
    import fcntl

    copy = os.memfd_create("wherry-runtime", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    source = os.open("/proc/self/exe", os.O_RDONLY | os.O_CLOEXEC)
    try:
        left = os.fstat(source).st_size
        while left > 0:
            sent = os.sendfile(copy, source, None, left)
            if sent == 0:
                break
            left -= sent
    finally:
        os.close(source)
    os.fchmod(copy, 0o555)
    fcntl.fcntl(copy, _F_ADD_SEALS, _ALL_SEALS)
    # A descriptor that can be written to may not stay open: exec refuses it (ETXTBSY).
    reopened = os.open(f"/proc/self/fd/{copy}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(copy)
    return reopened


def _execute_again(fd: int) -> None:
    """Start over from the sealed file. The interpreter finds its installation by argv[0], which is sys.executable."""
    import sys

    if os.environ.get(_MARK):
        raise OSError(errno.ELOOP, "the process was executed from a sealed copy, and yet isn't sealed")
    env = [f"{name}={value}" for name, value in os.environ.items()]
    sc.execveat(fd, "", [sys.executable, *sys.orig_argv[1:]], [*env, f"{_MARK}=1"])


class _Mapping:
    """A line of /proc/self/maps that belongs to the executable."""

    __slots__ = ("end", "offset", "protection", "start")

    def __init__(self, line: str) -> None:
        span, permissions, offset = line.split(" ", 3)[:3]
        start, _, end = span.partition("-")
        self.start, self.end, self.offset = int(start, 16), int(end, 16), int(offset, 16)
        self.protection = sum(bit for char, bit in zip("rwx", (1, 2, 4), strict=True) if char in permissions)


def _own_mappings() -> list[_Mapping]:
    path = os.readlink("/proc/self/exe")
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        return [_Mapping(line) for line in file if line.endswith(f" {path}\n")]


def _first_written_offset(fd: int) -> int:
    """Where in the file the segment with data begins: pages from there on may differ from the file (relocations)."""
    header = os.pread(fd, 64, 0)
    if header[:5] != b"\x7fELF\x02" or header[5] != 1:
        raise ValueError("not a 64-bit little-endian ELF file")
    table, size, count = (int.from_bytes(header[a:b], "little") for a, b in ((32, 40), (54, 56), (56, 58)))
    first = 1 << 62
    for number in range(count):
        entry = os.pread(fd, size, table + number * size)
        kind, flags = int.from_bytes(entry[0:4], "little"), int.from_bytes(entry[4:8], "little")
        if kind == _PT_LOAD and flags & 2:
            first = min(first, int.from_bytes(entry[8:16], "little"))
    return first & ~(_PAGE - 1)


def _seal_in_place(fd: int) -> None:
    """Exchange the executable's pages for the same pages of `fd`, then make `fd` the executable.

    Each exchange is one system call, atomic, and puts the same bytes in the same place, so that code which runs in
    these very pages goes on as if nothing had happened. Pages with data are copied: they are ours alone.
    """
    mappings = _own_mappings()
    if not mappings:
        raise ValueError("the executable isn't among the mappings")
    if any(item.start <= id(type) < item.end for item in mappings):
        # Without a shared libpython the interpreter's own objects live in those pages, and change while we copy them.
        raise ValueError("the interpreter is linked into the executable")
    written = _first_written_offset(fd)
    c_mmap, c_mremap = sc.libc.mmap, sc.libc.mremap
    c_mmap.restype = c_mremap.restype = ctypes.c_void_p
    c_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t) + (ctypes.c_int,) * 3 + (ctypes.c_long,)
    c_mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    failed = ctypes.c_void_p(-1).value
    for item in mappings:
        size = item.end - item.start
        if item.offset < written and not item.protection & 2:
            flags = _MAP_PRIVATE | _MAP_FIXED
            placed = c_mmap(item.start, size, item.protection, flags, fd, item.offset)
        else:
            copy = c_mmap(None, size, 3, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
            if copy == failed:
                raise OSError(ctypes.get_errno(), "mmap")
            ctypes.memmove(copy, item.start, size)
            sc.libc.mprotect(ctypes.c_void_p(copy), ctypes.c_size_t(size), item.protection)
            placed = c_mremap(copy, size, size, _MREMAP_MAYMOVE_FIXED, item.start)
        if placed == failed:
            raise OSError(ctypes.get_errno(), "the executable's pages can't be exchanged")
    process.set_executable(fd)
