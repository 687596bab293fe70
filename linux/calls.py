"""A list of system calls that a child makes, which borrows its parent's memory while the parent goes on.

`vfork.py` lends a child the whole interpreter, so that the parent has to stand still, and is lost where the child is
killed. Here the child runs no Python: it is machine code that makes one system call after the other, each with
arguments that were written down before, and writes to nothing but what belongs to this list. So the parent can be
anybody, a shim too: it goes on meanwhile, and a child that hangs or is killed does it no harm::

    caller                       helper                             process
      start() ─────────────────────▶ its calls, the last but one a
      (goes on)                      vfork ─────────────────────────▶ its calls, the last one execve
                                     (stopped)                        │
                                     ◀────────────────────────────────┤
      waits for the helper's end ◀── exit                             ▼ a child of the caller, if that is a subreaper

There are two of them because only a process whose parent waits in vfork(2) is one that the kernel never kills for lack
of memory together with all who share its own (mm/oom_kill.c, `in_vfork`), and one whose `oom_score_adj` is its own
(fs/proc/base.c, `__set_oom_adj`).

A call that fails ends the process, or the helper, unless it is one whose failure is of no matter; nothing was executed
then, and `failure` says which call it was.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

from wherry.linux import syscalls as sc
from wherry.linux.vfork import CLONE_VFORK, CLONE_VM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_CLONE_PARENT_SETTID, _CLONE_CLEAR_SIGHAND = 0x00100000, 0x100000000
_SIGCHLD = 17
_LAST_SIGNAL, _SIGKILL, _SIGSTOP = 64, 9, 19
# rdi: struct clone_args, rsi: its size, rdx: the first call, rcx: where a failure is told; returns the child's pid, or
# a negative errno. A call is nine words: number, six arguments, where to go on if it gives 0 (0: with the next one),
# whether its failure is of no matter. The child uses no stack: it is the parent's, which goes on.
_X86_64 = bytes.fromhex(
    "53"  # push rbx
    "4154"  # push r12
    "4889d3"  # mov rbx, rdx
    "4989cc"  # mov r12, rcx
    "b8b3010000"  # mov eax, 435 (clone3)
    "0f05"  # syscall
    "4885c0"  # test rax, rax
    "7551"  # jne ended
    "488b03"  # next: mov rax, [rbx]
    "488b7b08"  # mov rdi, [rbx+8]
    "488b7310"  # mov rsi, [rbx+16]
    "488b5318"  # mov rdx, [rbx+24]
    "4c8b5320"  # mov r10, [rbx+32]
    "4c8b4328"  # mov r8, [rbx+40]
    "4c8b4b30"  # mov r9, [rbx+48]
    "0f05"  # syscall
    "4885c0"  # test rax, rax
    "780d"  # js failed
    "7512"  # jne advance
    "488b4b38"  # mov rcx, [rbx+56]
    "e30c"  # jrcxz advance
    "4889cb"  # mov rbx, rcx
    "ebd1"  # jmp next
    "48837b4000"  # failed: cmp qword [rbx+64], 0
    "7406"  # je tell
    "4883c348"  # advance: add rbx, 72
    "ebc4"  # jmp next
    "49891c24"  # tell: mov [r12], rbx
    "4989442408"  # mov [r12+8], rax
    "bf01000000"  # mov edi, 1
    "b8e7000000"  # mov eax, 231 (exit_group)
    "0f05"  # syscall
    "415c"  # ended: pop r12
    "5b"  # pop rbx
    "c3"  # ret
)
_MACHINE_CODE = {"x86_64": _X86_64}
_CALL_WORDS = 9
# of the memory of a list: arguments, environment and calls; what takes more is left to others
ROOM = 256 << 10
# the failure (two words), the process's pid, and two struct clone_args
_CLONE = struct.Struct("=11Q")
_FAILURE, _PID, _CLONES = 0, 16, 24
_BEGIN = _CLONES + 2 * _CLONE.size
_WRITE, _CLOSE, _RT_SIGACTION, _RT_SIGPROCMASK, _CLONE3, _EXIT_GROUP, _OPENAT = 1, 3, 13, 14, 435, 231, 257
# struct sigaction as the kernel has it: SIG_DFL, no flags, no restorer, an empty mask; and its size, and a mask's
_SIGACTION, _SIGSET = bytes(32), 8
_SIG_SETMASK = 2


class _Machine:
    """The machine code, and a few zeros behind it, at an address that all forks of this process share."""

    def __init__(self, code: bytes) -> None:
        # shared, so that it isn't among the private memory that a shim's template replaces (`wherry.shim.template`)
        self._page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self._page.write(code)
        address = _address(self._page)
        protection = ctypes.c_int(mmap.PROT_READ | mmap.PROT_EXEC)
        if sc.libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), protection):
            raise OSError(ctypes.get_errno(), "mprotect")
        word = ctypes.c_size_t
        self.start = ctypes.PYFUNCTYPE(ctypes.c_long, word, word, word, word)(address)
        self.zeros = address + mmap.PAGESIZE - 64
        numbers = [number for number in range(1, _LAST_SIGNAL + 1) if number not in (_SIGKILL, _SIGSTOP)]
        words: list[int] = []
        for number in numbers:
            # libc's own two refuse nobody here: it is the kernel that is asked
            words += (_RT_SIGACTION, number, self.zeros, 0, _SIGSET, 0, 0, 0, 1)
        words += (_RT_SIGPROCMASK, _SIG_SETMASK, self.zeros, 0, _SIGSET, 0, 0, 0, 0)
        self.signals = words


_prepared: list[_Machine] = []


def prepare() -> None:
    """Once, before forking; without it, or on another processor, `ready` says no."""
    code = _MACHINE_CODE.get(os.uname().machine)
    if code is not None and not _prepared:
        try:
            _prepared.append(_Machine(code))
        except OSError:  # nothing may be mapped executable here
            return


def ready() -> bool:
    """Whether lists of calls can be made by this process."""
    return bool(_prepared)


class Calls:
    """The calls of one process, its memory, and the helper that makes the process; used once.

    Addresses that `data` and `text` give stay good until `close`, which may come only when helper and process are done
    with the memory: the helper has ended by itself, or both have ended.
    """

    def __init__(self) -> None:
        self._machine = _prepared[0]
        self._memory = mmap.mmap(-1, ROOM, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = _address(self._memory)
        self._bytes = bytearray(_BEGIN)
        self._words: list[int] = []

    # -- what the process does --------------------------------------------------------------------------------------

    def data(self, raw: bytes) -> int:
        """Where these bytes will be, aligned to a word."""
        self._bytes += bytes(-len(self._bytes) % 8)
        address = self._address + len(self._bytes)
        self._bytes += raw
        return address

    def text(self, value: str | bytes) -> int:
        """Where this string will be, with a zero byte behind it. Raises ValueError for one that has a zero byte."""
        raw = os.fsencode(value)
        if b"\0" in raw:
            raise ValueError(f"embedded null byte in {value!r}")
        address = self._address + len(self._bytes)
        self._bytes += raw
        self._bytes.append(0)
        return address

    def texts(self, values: Sequence[str]) -> int:
        """Where an array of pointers to these strings will be, a null pointer at its end."""
        pointers = [self.text(value) for value in values]
        return self.data(struct.pack(f"={len(pointers) + 1}Q", *pointers, 0))

    def add(self, number: int, *arguments: int, optional: bool = False) -> None:
        """One more call; `optional` ones may fail."""
        self._words += (number, *arguments, *((0,) * (6 - len(arguments))), 0, int(optional))

    def default_signals(self) -> None:
        """`syscalls.reset_signals` as calls."""
        self._words += self._machine.signals

    def write(self, path: str, text: bytes, fd: int) -> None:
        """A file's content in one write; `fd` is the descriptor that opening it gives: the lowest that is free then."""
        self.add(_OPENAT, sc.AT_FDCWD, self.text(path), os.O_WRONLY | os.O_CLOEXEC)
        self.add(_WRITE, fd, self.data(text), len(text))
        self.add(_CLOSE, fd)

    # -- doing it ---------------------------------------------------------------------------------------------------

    def start(self, helper: Sequence[tuple[int, ...]], cgroup: int = -1) -> int:
        """Have it done: the helper's pid, a child. `helper` are calls before the process is made, which is then born
        in a v2 cgroup (a descriptor, or -1). Raises OSError, E2BIG where the memory doesn't suffice."""
        count = len(self._words) // _CALL_WORDS
        process = self.data(b"") - self._address
        before = process + count * _CALL_WORDS * 8
        words = self._words
        for number, *arguments in helper:
            words += (number, *arguments, *((0,) * (6 - len(arguments))), 0, 0)
        clones = self._address + _CLONES
        words += (_CLONE3, clones + _CLONE.size, _CLONE.size, 0, 0, 0, 0, self._address + process, 0)
        words += (_EXIT_GROUP, 0, 0, 0, 0, 0, 0, 0, 0)
        self._bytes += struct.pack(f"={len(words)}q", *words)
        if len(self._bytes) > ROOM:
            raise OSError(7, "Argument list too long")
        flags = CLONE_VM | CLONE_VFORK | _CLONE_PARENT_SETTID | (sc.CLONE_INTO_CGROUP if cgroup >= 0 else 0)
        told = self._address + _PID
        _CLONE.pack_into(self._bytes, _CLONES, CLONE_VM | _CLONE_CLEAR_SIGHAND, 0, 0, 0, _SIGCHLD, *(0,) * 6)
        made = (flags, 0, 0, told, _SIGCHLD, 0, 0, 0, 0, 0, max(cgroup, 0))
        _CLONE.pack_into(self._bytes, _CLONES + _CLONE.size, *made)
        self._memory[: len(self._bytes)] = bytes(self._bytes)
        pid: int = self._machine.start(clones, _CLONE.size, self._address + before, self._address + _FAILURE)
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid), "clone3")
        return pid

    @property
    def pid(self) -> int:
        """The process's pid, 0 where it was not made (yet)."""
        return int.from_bytes(self._memory[_PID : _PID + 4], "little")

    @property
    def failure(self) -> tuple[int, int]:
        """The number of the system call that failed, and its errno; zeros where none did."""
        at, result = struct.unpack("=Qq", self._memory[_FAILURE:_PID])
        if not at:
            return 0, 0
        place = at - self._address
        return struct.unpack("=q", self._memory[place : place + 8])[0], -result

    def close(self) -> None:
        """Free the memory."""
        self._memory.close()


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
