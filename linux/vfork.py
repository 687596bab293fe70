"""A child that borrows its parent's memory until it executes a program: vfork(2), with Python running in the child.

A fork of an interpreter costs its page tables, and a copy of every page that either side then looks at, because looking
counts references. A child that borrows the memory costs neither. The parent is stopped meanwhile, so that one of the
two runs at a time, in the same interpreter and on the same stack::

    parent                                child
      spawn(flags, cgroup, body)
        clone3(CLONE_VM | CLONE_VFORK)
        (stopped)                           body(0): namespaces, mounts, … , returns what to execute
                                            execve(at); if that fails: body(errno), which returns None, and _exit(1)
      goes on, as if it had called `body` itself

Because the child's Python returns before the program is executed, the interpreter is as it would be after a call.
What `body` assigned is what the parent sees; descriptors, namespaces, credentials, signals and the working directory
were the child's own. `body` may not end the process, fork, or leave by an exception.

A child that is killed in the middle of it leaves an interpreter in the middle of a call: the parent then exits at once
with `LOST`. So the caller is a process that may be lost: the runtime, or a shim that has no container yet.

It is done by machine code (the stack may not be left between the two returns of clone3); where that can't be had,
`prepare` gives None, and callers fork.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from wherry.linux import syscalls as sc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# exit status of a parent whose child was killed while it had the memory
LOST = 97
CLONE_VM, CLONE_VFORK = 0x100, 0x4000
_SIGCHLD = 17
_AT_EMPTY_PATH, _EXECVE, _EXECVEAT = 0x1000, 59, 322
# rdi: struct clone_args, rsi: its size, rdx: the callback, rcx: an int that is 0 while the callback runs; returns the
# child's pid, or the negative errno of clone3
_X86_64 = bytes.fromhex(
    "53"  # push rbx
    "4154"  # push r12
    "4155"  # push r13
    "4889d3"  # mov rbx, rdx
    "4989cc"  # mov r12, rcx
    "b8b3010000"  # mov eax, 435 (clone3)
    "0f05"  # syscall
    "4885c0"  # test rax, rax
    "753a"  # jne parent
    "31ff"  # xor edi, edi
    "41c7042400000000"  # again: mov dword [r12], 0
    "ffd3"  # call rbx
    "41c7042401000000"  # mov dword [r12], 1
    "4885c0"  # test rax, rax
    "7434"  # je done
    "4989c1"  # mov r9, rax
    "498b39"  # mov rdi, [r9]: the arguments of a call …
    "498b7108"  # mov rsi, [r9+8]
    "498b5110"  # mov rdx, [r9+16]
    "4d8b5118"  # mov r10, [r9+24]
    "4d8b4120"  # mov r8, [r9+32]
    "498b4128"  # mov rax, [r9+40]: … and its number, execve's or execveat's
    "0f05"  # syscall
    "4889c7"  # mov rdi, rax
    "ebc8"  # jmp again
    "41833c2400"  # parent: cmp dword [r12], 0
    "7518"  # jne ended
    "4885c0"  # test rax, rax
    "7813"  # js ended
    "bf61000000"  # mov edi, LOST
    "eb05"  # jmp leave
    "bf01000000"  # done: mov edi, 1
    "b8e7000000"  # leave: mov eax, 231 (exit_group)
    "0f05"  # syscall
    "415d"  # ended: pop r13
    "415c"  # pop r12
    "5b"  # pop rbx
    "c3"  # ret
)
# rdi: struct clone_args of a vfork, rsi: the size, rdx: struct clone_args of a fork; returns 0 in the fork's child, in
# the caller the pid of the process in between, which has ended, or a negative errno
_X86_64_ORPHAN = bytes.fromhex(
    "53"  # push rbx
    "4154"  # push r12
    "4889d3"  # mov rbx, rdx
    "4989f4"  # mov r12, rsi
    "b8b3010000"  # mov eax, 435 (clone3)
    "0f05"  # syscall
    "4885c0"  # test rax, rax
    "751f"  # jne ended
    "4889df"  # mov rdi, rbx
    "4c89e6"  # mov rsi, r12
    "b8b3010000"  # mov eax, 435 (clone3)
    "0f05"  # syscall
    "4885c0"  # test rax, rax
    "740d"  # je ended
    "48c1e83f"  # shr rax, 63
    "89c7"  # mov edi, eax
    "b8e7000000"  # mov eax, 231 (exit_group)
    "0f05"  # syscall
    "415c"  # ended: pop r12
    "5b"  # pop rbx
    "c3"  # ret
)
_MACHINE_CODE = {"x86_64": (_X86_64, _X86_64_ORPHAN)}


class Program:
    """What a child executes: an open executable file or the path of one, arguments, and `NAME=value` strings."""

    def __init__(self, file: int | bytes, argv: list[bytes], env: list[bytes]) -> None:
        self._argv = (ctypes.c_char_p * (len(argv) + 1))(*argv, None)
        self._env = (ctypes.c_char_p * (len(env) + 1))(*env, None)
        self._path = ctypes.create_string_buffer(b"" if isinstance(file, int) else file)
        path, *lists = (ctypes.addressof(part) for part in (self._path, self._argv, self._env))
        if isinstance(file, int):
            words = (file, path, *lists, _AT_EMPTY_PATH, _EXECVEAT)
        else:
            words = (path, *lists, 0, 0, _EXECVE)
        self._words = (ctypes.c_uint64 * 6)(*words)
        self.address = ctypes.addressof(self._words)


class Vfork:
    """The machine code, ready to be used by this process and its forks."""

    def __init__(self, code: bytes, orphan: bytes) -> None:
        # shared, so that it isn't among the private memory that a shim's template replaces (`wherry.shim.template`)
        self._page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self._page.write(code + orphan)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        protection = ctypes.c_int(mmap.PROT_READ | mmap.PROT_EXEC)
        if sc.libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), protection):
            raise OSError(ctypes.get_errno(), "mprotect")
        callback = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_long)
        self._callback = callback(self._called)
        signature = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t, callback, ctypes.c_void_p)
        self._call = signature(address)
        size = ctypes.sizeof(sc.CloneArgs)
        self._forks = (sc.CloneArgs * 2)()
        self._forks[0].flags = CLONE_VM | CLONE_VFORK
        self._forks[0].exit_signal = self._forks[1].exit_signal = _SIGCHLD
        first = ctypes.addressof(self._forks)
        self._orphan_arguments = (ctypes.c_void_p(first), ctypes.c_size_t(size), ctypes.c_void_p(first + size))
        signature = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        self._orphan = signature(address + len(code))
        self._body: Callable[[int], Program | None] | None = None
        self._program: Program | None = None

    def _called(self, result: int) -> int:
        """In the child. The program's memory has to last until it is executed, so it is kept here."""
        body = self._body
        self._program = None if body is None else body(-result)
        return 0 if self._program is None else self._program.address

    def spawn(self, flags: int, cgroup: int, body: Callable[[int], Program | None]) -> int:
        """Run `body(0)` in a child with these `CLONE_NEW…` flags, born in a v2 cgroup (a descriptor, or -1); its pid.

        `body` returns what the child executes, or None for an exit with status 1; it is called again, with the errno,
        where that can't be executed. Raises OSError where there is no child.
        """
        args = sc.CloneArgs(flags=flags | CLONE_VM | CLONE_VFORK, exit_signal=_SIGCHLD)
        if cgroup >= 0:
            args.flags |= sc.CLONE_INTO_CGROUP
            args.cgroup = cgroup
        returned = ctypes.c_int(0)
        self._body = body
        try:
            size = ctypes.sizeof(args)
            pid: int = self._call(ctypes.addressof(args), size, self._callback, ctypes.addressof(returned))
        finally:
            self._body = self._program = None
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid), f"clone3({flags:#x})")
        return pid

    def orphan(self) -> int:
        """fork(2) twice, so that the process that is made (where this returns 0) belongs to init from its birth.

        Elsewhere it returns the pid of the process in between, a zombie by now, with exit status 1 where it could not
        fork.

        The first fork borrows the memory and costs next to nothing. What `os.fork` does for threads and for modules
        that ask to be told is left out.
        """
        pid: int = self._orphan(*self._orphan_arguments)
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid), "clone3")
        return pid


_prepared: list[Vfork] = []


def prepare() -> Vfork | None:
    """Once, before forking; None on another processor, or where nothing may be mapped executable."""
    code = _MACHINE_CODE.get(os.uname().machine)
    if code is not None and not _prepared:
        try:
            _prepared.append(Vfork(*code))
        except OSError:
            return None
    return _prepared[0] if _prepared else None
