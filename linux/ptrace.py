"""ptrace(2), as far as watching system calls needs it. All calls for one process must come from one thread."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final, NamedTuple

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long

_SYSCALL, _DETACH, _SEIZE, _INTERRUPT, _LISTEN = 24, 17, 0x4206, 0x4207, 0x4208
_GET_SYSCALL_INFO, _GET_EVENT_MESSAGE = 0x420E, 0x4201
# TRACESYSGOOD, and stops at fork, vfork, clone, exec, exit
_OPTIONS = 0x01 | 0x02 | 0x04 | 0x08 | 0x10 | 0x40
#: waitpid(2): children of every kind.
WALL: Final = 0x40000000
EVENT_FORK, EVENT_VFORK, EVENT_CLONE, EVENT_EXEC, EVENT_EXIT, EVENT_STOP = 1, 2, 3, 4, 6, 128
#: What `syscall_info` is about.
ENTRY, EXIT = 1, 2
# struct ptrace_syscall_info: op, arch, instruction and stack pointer; then what the kind of stop has
_HEAD = struct.Struct("@B3xIQQ")
_ENTRY, _LEAVE = struct.Struct("@Q6Q"), struct.Struct("@qB")


class SyscallInfo(NamedTuple):
    """A stop at a system call: `number` and `args` at its entry, `result` (negative: -errno) at its exit."""

    kind: int
    number: int = -1
    args: tuple[int, ...] = ()
    result: int = 0


def _ptrace(request: int, pid: int, address: int | ctypes.Array[ctypes.c_char] = 0, data: object = 0) -> int:
    where = ctypes.c_void_p(address) if isinstance(address, int) else address
    what = ctypes.c_void_p(data) if isinstance(data, int) else data
    result: int = _LIBC.ptrace(request, pid, where, what)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"ptrace of {pid}")
    return result


def seize(pid: int) -> None:
    """PTRACE_SEIZE: watch a process and what it will fork, without stopping it."""
    _ptrace(_SEIZE, pid, 0, _OPTIONS)


def interrupt(pid: int) -> None:
    """PTRACE_INTERRUPT: stop it."""
    _ptrace(_INTERRUPT, pid)


def resume(pid: int, signal: int = 0) -> None:
    """PTRACE_SYSCALL: let a stopped one run to the next stop, with a signal that it was to get."""
    _ptrace(_SYSCALL, pid, 0, signal)


def listen(pid: int) -> None:
    """PTRACE_LISTEN: leave one in a group-stop, as SIGSTOP asked for."""
    _ptrace(_LISTEN, pid)


def detach(pid: int, signal: int = 0) -> None:
    """PTRACE_DETACH: a stopped one runs on unwatched."""
    _ptrace(_DETACH, pid, 0, signal)


def event_message(pid: int) -> int:
    """PTRACE_GETEVENTMSG: the new process' id at a fork, the exit status at an exit."""
    value = ctypes.c_ulong()
    _ptrace(_GET_EVENT_MESSAGE, pid, 0, ctypes.addressof(value))
    return value.value


def syscall_info(pid: int) -> SyscallInfo | None:
    """PTRACE_GET_SYSCALL_INFO (Linux 5.3); None where the stop isn't about a call."""
    buffer = ctypes.create_string_buffer(128)
    _ptrace(_GET_SYSCALL_INFO, pid, len(buffer), ctypes.addressof(buffer))
    kind = _HEAD.unpack_from(buffer.raw)[0]
    if kind == ENTRY:
        number, *args = _ENTRY.unpack_from(buffer.raw, _HEAD.size)
        return SyscallInfo(ENTRY, number, tuple(args))
    if kind == EXIT:
        return SyscallInfo(EXIT, result=_LEAVE.unpack_from(buffer.raw, _HEAD.size)[0])
    return None
