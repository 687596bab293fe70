"""Processes: who reaps them, how `ps` names them, whether a pid still is the process that it was."""

from __future__ import annotations

import ctypes
import errno
import os

from wherry.linux import syscalls as sc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def set_child_subreaper(on: bool = True) -> None:
    """Orphans among our descendants become our children (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    sc.prctl(sc.PR_SET_CHILD_SUBREAPER, 1 if on else 0)


def set_parent_death_signal(number: int) -> None:
    """Which signal this process gets when its parent dies; 0: none. Cleared by fork and by gaining rights in exec."""
    sc.prctl(sc.PR_SET_PDEATHSIG, number)


def set_dumpable(on: bool) -> None:
    """Off: /proc/PID belongs to root and only CAP_SYS_PTRACE of the host may look into it (CVE-2016-9962)."""
    sc.prctl(sc.PR_SET_DUMPABLE, 1 if on else 0)


def pidfd_open(pid: int) -> int:
    return os.pidfd_open(pid)


def stat_fields(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the third one (state) on, so that field N of proc(5) is `[N - 3]`.

    Raises ProcessLookupError if there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(errno.ESRCH, "no such process", str(pid)) from None
    return text[text.rindex(")") + 2 :].split()


def start_time(pid: int) -> int:
    """When it started, in clock ticks since boot: together with the pid it names a process once and for all."""
    return int(stat_fields(pid)[19])


def is_alive(pid: int, started: int = 0) -> bool:
    """Whether the process runs; a zombie doesn't. With `started` a recycled pid doesn't count either."""
    if pid <= 0:
        return False
    try:
        fields = stat_fields(pid)
    except ProcessLookupError:
        return False
    return fields[0] not in "ZX" and (not started or int(fields[19]) == started)


# struct prctl_mm_map, <linux/prctl.h>: eleven addresses, the auxiliary vector (kept when its size is 0), the exe's fd
class _MemoryMap(ctypes.Structure):
    _fields_ = (
        ("start_code", ctypes.c_uint64),
        ("end_code", ctypes.c_uint64),
        ("start_data", ctypes.c_uint64),
        ("end_data", ctypes.c_uint64),
        ("start_brk", ctypes.c_uint64),
        ("brk", ctypes.c_uint64),
        ("start_stack", ctypes.c_uint64),
        ("arg_start", ctypes.c_uint64),
        ("arg_end", ctypes.c_uint64),
        ("env_start", ctypes.c_uint64),
        ("env_end", ctypes.c_uint64),
        ("auxv", ctypes.c_uint64),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    )


def _memory_map() -> _MemoryMap:
    fields = stat_fields("self")  # numbers of proc(5) less 3

    def field(number: int) -> int:
        return int(fields[number - 3])

    sbrk = sc.libc.sbrk
    sbrk.restype, sbrk.argtypes = ctypes.c_void_p, (ctypes.c_long,)
    return _MemoryMap(
        field(26), field(27), field(45), field(46), field(47), sbrk(0), field(28),
        field(48), field(49), field(50), field(51), 0, 0, 0xFFFFFFFF,
    )  # fmt: skip


def _set_memory_map(layout: _MemoryMap) -> None:
    """PR_SET_MM_MAP needs no capability as long as the executable isn't changed (Linux 3.18)."""
    sc.prctl(sc.PR_SET_MM, sc.PR_SET_MM_MAP, ctypes.addressof(layout), ctypes.sizeof(layout), 0)


_title_buffer: ctypes.Array[ctypes.c_char] | None = None
_title_reserved = False


def reserve_process_title(size: int) -> None:
    """Point the kernel at a buffer of `size` bytes once, before forking: a title that fits is then only written there.

    It saves each child the reading of its memory map and the structures for the kernel (0.3 MB of unshared pages).
    """
    global _title_reserved  # noqa: PLW0603 - as above
    set_process_title(["\0" * size])
    _title_reserved = _title_buffer is not None


def set_process_title(args: Sequence[str], name: str = "") -> None:
    """What `ps` shows: /proc/PID/cmdline becomes `args`, /proc/PID/comm becomes `name` (15 bytes) if one is given.

    The kernel is pointed at a buffer of ours, so the title may be longer than the first command line was; this works
    after fork and as often as wanted. A kernel that refuses (a sandbox without prctl) is no error: it is a comfort.
    """
    global _title_buffer  # noqa: PLW0603 - the kernel keeps the address for as long as the process lives
    raw = b"".join(os.fsencode(arg) + b"\0" for arg in args)
    if _title_reserved and _title_buffer is not None and len(raw) <= len(_title_buffer):
        # ps and pgrep drop the zero bytes at the end
        _title_buffer.raw = raw.ljust(len(_title_buffer), b"\0")
        if name:
            fd = os.open("/proc/self/comm", os.O_WRONLY | os.O_CLOEXEC)
            os.write(fd, os.fsencode(name)[:15])
            os.close(fd)
        return
    if name:
        sc.set_process_name(name)
    buffer = ctypes.create_string_buffer(raw, len(raw))
    try:
        layout = _memory_map()
        layout.arg_start = ctypes.addressof(buffer)
        layout.arg_end = layout.arg_start + len(raw)
        _set_memory_map(layout)
    except OSError:
        return
    _title_buffer = buffer


def set_executable(fd: int) -> None:
    """Make `fd` what /proc/self/exe is. Nothing of the old executable may be mapped any more (EBUSY).

    Needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE (before Linux 5.9 CAP_SYS_RESOURCE).
    """
    layout = _memory_map()
    layout.exe_fd = fd
    _set_memory_map(layout)
