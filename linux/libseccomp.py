"""libseccomp, bound by its soname and loaded when the first filter is compiled.

Only what turns a profile into a program is here: the program is loaded by seccomp(2) itself (`runtime/seccomp.py`), so
that a cached one needs no library. Signatures and numbers: seccomp.h of libseccomp 2.5 (its API is stable).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from enum import IntEnum
from types import TracebackType
from typing import Self

_SONAME = "libseccomp.so.2"
_UNKNOWN_SYSCALL = -1  # __NR_SCMP_ERROR
_ATTRIBUTE_OPTIMIZE, _BINARY_TREE = 8, 2


class Action(IntEnum):
    """What a filter does (SECCOMP_RET_*); ERRNO and TRACE take a value in the lower 16 bits."""

    KILL_PROCESS = 0x80000000
    KILL_THREAD = 0x00000000
    TRAP = 0x00030000
    ERRNO = 0x00050000
    NOTIFY = 0x7FC00000
    TRACE = 0x7FF00000
    LOG = 0x7FFC0000
    ALLOW = 0x7FFF0000


class Compare(IntEnum):
    """enum scmp_compare."""

    NE = 1
    LT = 2
    LE = 3
    EQ = 4
    GE = 5
    GT = 6
    MASKED_EQ = 7


class Arch(IntEnum):
    """AUDIT_ARCH_* of linux/audit.h, which libseccomp uses as its tokens; X32 is libseccomp's own."""

    X86 = 0x40000003
    X86_64 = 0xC000003E
    X32 = 0x4000003E
    ARM = 0x40000028
    AARCH64 = 0xC00000B7
    LOONGARCH64 = 0xC0000102
    M68K = 0x00000004
    MIPS = 0x00000008
    MIPS64 = 0x80000008
    MIPS64N32 = 0xA0000008
    MIPSEL = 0x40000008
    MIPSEL64 = 0xC0000008
    MIPSEL64N32 = 0xE0000008
    PPC = 0x00000014
    PPC64 = 0x80000015
    PPC64LE = 0xC0000015
    S390 = 0x00000016
    S390X = 0x80000016
    PARISC = 0x0000000F
    PARISC64 = 0x8000000F
    RISCV64 = 0xC00000F3
    SH = 0x0000002A
    SHEB = 0x4000002A


class Condition(ctypes.Structure):
    """struct scmp_arg_cmp: argument `arg` (0…5) compared by `op` with `a`; MASKED_EQ: (argument & a) == b."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


class _Library:
    """The functions with their signatures, bound once."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(_SONAME)
        except OSError as error:
            msg = f"seccomp profile given, but {_SONAME} can't be loaded (Debian: libseccomp2): {error}"
            raise OSError(errno.ENOSYS, msg) from error
        context, number = ctypes.c_void_p, ctypes.c_uint32
        self.init = library.seccomp_init
        self.init.argtypes, self.init.restype = (number,), context
        self.release = library.seccomp_release
        self.release.argtypes, self.release.restype = (context,), None
        self.arch_native = library.seccomp_arch_native
        self.arch_native.argtypes, self.arch_native.restype = (), number
        self.arch_add = library.seccomp_arch_add
        self.arch_add.argtypes, self.arch_add.restype = (context, number), ctypes.c_int
        self.attr_set = library.seccomp_attr_set
        self.attr_set.argtypes, self.attr_set.restype = (context, ctypes.c_int, number), ctypes.c_int
        self.resolve = library.seccomp_syscall_resolve_name_arch
        self.resolve.argtypes, self.resolve.restype = (number, ctypes.c_char_p), ctypes.c_int
        self.rule_add = library.seccomp_rule_add_array
        self.rule_add.argtypes = (context, number, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(Condition))
        self.rule_add.restype = ctypes.c_int
        self.export = library.seccomp_export_bpf
        self.export.argtypes, self.export.restype = (context, ctypes.c_int), ctypes.c_int


_library: _Library | None = None


def _load() -> _Library:
    global _library  # noqa: PLW0603 - one library in a process
    if _library is None:
        _library = _Library()
    return _library


def native() -> int:
    """The token of this process's architecture (`Arch`). Raises OSError(ENOSYS) without the library."""
    return int(_load().arch_native())


def resolve(name: str, arch: int) -> int | None:
    """The number of a call on an architecture; None if libseccomp doesn't know it, negative if the arch hasn't it."""
    number = int(_load().resolve(arch, name.encode()))
    return None if number == _UNKNOWN_SYSCALL else number


class Filter:
    """A filter in the making; a context manager that frees it. OSErrors carry libseccomp's negated errno."""

    def __init__(self, default_action: int) -> None:
        self._library = _load()
        self._context: int | None = self._library.init(default_action)
        if not self._context:
            msg = f"seccomp: invalid default action {default_action:#x}"
            raise ValueError(msg)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._context:
            self._library.release(self._context)
            self._context = None

    def add_architecture(self, arch: int) -> None:
        """Make the filter for one more architecture; the native one is there from the start."""
        code = self._library.arch_add(self._context, arch)
        if code not in {0, -errno.EEXIST}:
            raise OSError(-code, f"seccomp: architecture {arch:#x}: {os.strerror(-code)}")

    def optimize(self) -> None:
        """Search the calls by a binary tree instead of one by one; libseccomp before 2.5 can't, and goes without."""
        self._library.attr_set(self._context, _ATTRIBUTE_OPTIMIZE, _BINARY_TREE)

    def add_rule(self, action: int, number: int, conditions: Sequence[Condition]) -> None:
        """An action for a call (native number); all conditions must hold."""
        array = (Condition * len(conditions))(*conditions)
        code = self._library.rule_add(self._context, action, number, len(conditions), array)
        if code:
            raise OSError(-code, f"seccomp: rule for call {number}: {os.strerror(-code)}")

    def export(self) -> bytes:
        """The program: struct sock_filter[] as bytes, 8 for each instruction."""
        # seccomp_export_bpf_mem came with 2.6; a memory file works with all
        fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        try:
            code = self._library.export(self._context, fd)
            if code:
                raise OSError(-code, f"seccomp: export: {os.strerror(-code)}")
            return os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)
