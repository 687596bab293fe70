"""A shim gives back the memory that it wrote to and that is again as it was.

A shim is a fork: its memory is the fork server's until it writes to it, and CPython writes wherever it looks, because
every look counts a reference up and down again. Half of the pages that a shim has copies of are, once it sleeps, the
same to the byte as those that it began with. The kernel can't know that; here it is told:

    fork server   take()        the writable memory is copied into a memfd, which is then mapped, privately, over that
                                memory: same addresses, same bytes, but there is now a file behind them
    shim          give_back()   each page of its own that equals the file's is dropped (madvise(2), MADV_DONTNEED); when
                                it is looked at again, it is the file's page, shared by all

Copying and mapping, and comparing and dropping, may have nothing between them that writes to memory, so both are done
by a few instructions of machine code and not by the interpreter; `MACHINE_CODE` has them with their assembly beside.
Where they can't be had (another processor, a kernel that maps nothing executable), `take` gives None, and shims are
heavier, by a megabyte, and otherwise the same.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's own functions make enums of what they take and give
import ctypes
import mmap
import os
import platform
import signal
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

PAGE: Final = mmap.PAGESIZE
_SIGNALS: Final = tuple(int(number) for number in signal.valid_signals())
_ENTRY: Final = struct.Struct("=7q")
# one system call after the other: rdi points to entries of seven words (number, six arguments), rsi counts them; each
# result replaces its number
_BATCH: Final = bytes.fromhex(
    "53"  # push rbx
    "4154"  # push r12
    "4889fb"  # mov rbx, rdi
    "4989f4"  # mov r12, rsi
    "4d85e4"  # next: test r12, r12
    "7429"  # jz done
    "488b03"  # mov rax, [rbx]
    "488b7b08"  # mov rdi, [rbx+8]
    "488b7310"  # mov rsi, [rbx+16]
    "488b5318"  # mov rdx, [rbx+24]
    "4c8b5320"  # mov r10, [rbx+32]
    "4c8b4328"  # mov r8, [rbx+40]
    "4c8b4b30"  # mov r9, [rbx+48]
    "0f05"  # syscall
    "488903"  # mov [rbx], rax
    "4883c338"  # add rbx, 56
    "49ffcc"  # dec r12
    "ebd2"  # jmp next
    "415c"  # done: pop r12
    "5b"  # pop rbx
    "c3"  # ret
)
# rdi points to pairs (page, the file's page), rsi counts them; a page that equals the file's is dropped with
# madvise(page, 4096, MADV_DONTNEED); returns how many were
_RELEASE: Final = bytes.fromhex(
    "53"  # push rbx
    "4154"  # push r12
    "4155"  # push r13
    "4889fb"  # mov rbx, rdi
    "4989f4"  # mov r12, rsi
    "4531ed"  # xor r13d, r13d
    "fc"  # cld
    "4d85e4"  # next: test r12, r12
    "7431"  # jz done
    "488b33"  # mov rsi, [rbx]
    "488b7b08"  # mov rdi, [rbx+8]
    "b900020000"  # mov ecx, 512
    "f348a7"  # repe cmpsq
    "7517"  # jne differs
    "488b3b"  # mov rdi, [rbx]
    "be00100000"  # mov esi, 4096
    "ba04000000"  # mov edx, 4
    "b81c000000"  # mov eax, 28
    "0f05"  # syscall
    "49ffc5"  # inc r13
    "4883c310"  # differs: add rbx, 16
    "49ffcc"  # dec r12
    "ebca"  # jmp next
    "4c89e8"  # done: mov rax, r13
    "415d"  # pop r13
    "415c"  # pop r12
    "5b"  # pop rbx
    "c3"  # ret
)
MACHINE_CODE: Final = {"x86_64": _BATCH + _RELEASE}
_MMAP, _PWRITE, _MADVISE = 9, 18, 28  # numbers of the system calls on x86_64
_MADV_DONTNEED, _MADV_POPULATE_READ = 4, 22
_MAP_FIXED: Final = 0x10

# bits of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst): a page is there, is of a file or shared, is
# mapped by this process alone
_PRESENT, _FILE, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56
# a mapping larger than this is no interpreter's heap
_LARGEST: Final = 64 << 20


class Region(NamedTuple):
    """A piece of writable memory: its address, its length in pages, and where the file's bytes of it are seen."""

    start: int
    pages: int
    mirror: int


class Template:
    """The fork server's memory as it was when `take` was called; forks of it inherit this object."""

    def __init__(self, regions: list[Region], code: _Code) -> None:
        self._regions = regions
        self._code = code
        pages = sum(region.pages for region in regions)
        # each process has its own, and none of it once it was used
        size = _round(pages * 8) + _round(pages * 16)
        self._scratch = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = _address(self._scratch)
        words = memoryview(self._scratch).cast("Q")
        self._entries = words[: _round(pages * 8) // 8]
        self._pairs = words[_round(pages * 8) // 8 :]

    def give_back(self) -> int:
        """Drop this process's own pages that are as they were; how many. Takes a millisecond."""
        entries, pairs, count = self._entries, self._pairs, 0
        wanted, mask = _PRESENT | _EXCLUSIVE, _PRESENT | _EXCLUSIVE | _FILE
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start, pages, mirror in self._regions:
                some = entries[:pages]
                os.preadv(fd, [some], start // PAGE * 8)
                for index, entry in enumerate(some):
                    if entry & mask == wanted:
                        pairs[count] = start + index * PAGE
                        pairs[count + 1] = mirror + index * PAGE
                        count += 2
        finally:
            os.close(fd)
        # a signal's handler writes to memory, and must not do so between the comparison and the drop
        before = _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGNALS)
        dropped: int = self._code.release(self._address + len(entries) * 8, count // 2)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
        self._scratch.madvise(_MADV_DONTNEED)
        return dropped


def take() -> Template | None:
    """Put a file behind the writable memory of this process, which has one thread; None where that can't be done."""
    code = _load()
    if code is None:
        return None
    try:
        return _take(code)
    except OSError:
        return None


def _take(code: _Code) -> Template:
    fd = os.memfd_create("wherry-shim", os.MFD_CLOEXEC)
    try:
        pieces = [piece for piece in _writable() if piece[0] != code.address]
        total = sum(length for _, length in pieces)
        os.ftruncate(fd, total)
        seen = code.run([(_MMAP, 0, total, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)])[0]
        if seen < 0:
            raise OSError(-seen, "mmap")
        regions, calls = [], []
        offset = 0
        for start, length in pieces:
            regions.append(Region(start, length // PAGE, seen + offset))
            calls.append((start, length, offset))
            offset += length
        template = Template(regions, code)
        _put_behind(code, fd, calls)
        return template
    finally:
        os.close(fd)


def _put_behind(code: _Code, fd: int, pieces: list[tuple[int, int, int]]) -> None:
    """Copy and map, twice: the first time only copies, so that the file has all the room that it needs."""
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    copies = [(_PWRITE, fd, start, length, offset, 0, 0) for start, length, offset in pieces]
    maps = [(_MMAP, start, length, protection, flags, fd, offset) for start, length, offset in pieces]
    warm = [(_MADVISE, start, length, _MADV_POPULATE_READ, 0, 0, 0) for start, length, _ in pieces]
    for result, (_, length, _) in zip(code.run(copies), pieces, strict=True):
        if result != length:
            raise OSError(-result, "the memory's copy")
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGNALS)
    both = [call for pair in zip(copies, maps, strict=True) for call in pair]
    code.run([*both, *warm])
    _signal.pthread_sigmask(_signal.SIG_SETMASK, before)


def _writable() -> Iterator[tuple[int, int]]:
    """Address and length of this process's private writable memory.

    Two things aren't among it: the stack, which the copying itself writes to, and the pages of the process's title,
    which the kernel shows in /proc/PID/cmdline only where no file is behind them.
    """
    first, last = _title()
    with open("/proc/self/maps") as file:
        lines = file.read().splitlines()
    for line in lines:
        words = line.split(None, 5)
        start, end = (int(word, 16) for word in words[0].split("-"))
        if words[1] == "rw-p" and words[5:] != ["[stack]"] and end - start <= _LARGEST:
            for part, stop in ((start, min(end, first)), (max(start, last), end)):
                if part < stop:
                    yield part, stop - part


def _title() -> tuple[int, int]:
    """Where the title's pages begin and end: arg_start and arg_end, fields 48 and 49 of proc_pid_stat(5)."""
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[45]) // PAGE * PAGE, _round(int(fields[46]))


class _Code:
    """The machine code, mapped executable, and a buffer for its arguments; neither is part of what is replaced."""

    ROOM: Final = 1 << 16

    def __init__(self, code: bytes) -> None:
        # shared mappings aren't among the private memory that is replaced
        self._page = mmap.mmap(-1, PAGE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE)
        self._page.write(code)
        self.address = _address(self._page)
        self._buffer = mmap.mmap(-1, self.ROOM, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self.address), ctypes.c_size_t(PAGE), mmap.PROT_READ | mmap.PROT_EXEC):
            raise OSError(ctypes.get_errno(), "mprotect")
        function = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_long)
        self._batch = function(self.address)
        self.release = function(self.address + len(_BATCH))

    def run(self, calls: list[tuple[int, int, int, int, int, int, int]]) -> list[int]:
        """System calls with nothing between them; their results (negative: an errno)."""
        if len(calls) * _ENTRY.size > self.ROOM:
            raise OSError(0, "too many pieces of memory")
        for index, call in enumerate(calls):
            _ENTRY.pack_into(self._buffer, index * _ENTRY.size, *call)
        self._batch(_address(self._buffer), len(calls))
        return [_ENTRY.unpack_from(self._buffer, index * _ENTRY.size)[0] for index in range(len(calls))]


def _load() -> _Code | None:
    code = MACHINE_CODE.get(platform.machine())
    if code is None or PAGE != 4096:
        return None
    try:
        return _Code(code)
    except OSError:
        return None


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _round(size: int) -> int:
    return (size + PAGE - 1) // PAGE * PAGE
