"""A shim gives back the memory that it wrote to and that is again as it was.

A shim is a fork: its memory is the fork server's until it writes to it, and CPython writes wherever it looks, because
every look counts a reference up and down again. Most of the pages that a shim has copies of are, once it sleeps, the
same as those that it began with, but for some reference counts. The kernel can't know that; here it is told:

    fork server   take()        no object of it may die any more (`immortal.py`); the writable memory is copied into a
                                memfd, which is then mapped, privately, over that memory: same addresses, same bytes,
                                but there is now a file behind them
    shim          give_back()   each page of its own that equals the file's, counts of objects that can't die apart, is
                                dropped (madvise(2), MADV_DONTNEED); when it is looked at again, it is the file's page,
                                shared by all

The instructions that copy and compare are `machine_code.py`'s. Where they can't be had (another processor, a kernel
that maps nothing executable), `take` gives None, and shims are heavier, by two megabytes, and otherwise the same.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal's own functions make enums of what they take and give
import mmap
import os
import signal
from bisect import bisect_left
from collections.abc import Iterator
from typing import Final, NamedTuple

from wherry.shim.immortal import make_immortal
from wherry.shim.machine_code import PAGE, Code, address_of, load

_SIGNALS: Final = tuple(int(number) for number in signal.valid_signals())
_MMAP, _MUNMAP, _PWRITE, _MADVISE = 9, 11, 18, 28  # numbers of the system calls on x86_64
_MADV_DONTNEED, _MADV_COLLAPSE = 4, 25
_MAP_FIXED: Final = 0x10
_PROT_NONE, _LARGE_PAGE = 0, 2 << 20

# bits of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst): a page is there, is of a file or shared, is
# mapped by this process alone
_PRESENT, _FILE, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56
# a mapping larger than this is no interpreter's heap
_LARGEST: Final = 64 << 20
_ATTEMPTS: Final = 3


class Region(NamedTuple):
    """A piece of writable memory: its address, its length in pages, and where the file's bytes of it are seen."""

    start: int
    pages: int
    mirror: int


class Template:
    """The fork server's memory as it was when `take` was called; forks of it inherit this object."""

    def __init__(self, regions: list[Region], code: Code, seen: int) -> None:
        self._regions = regions
        self._code = code
        pages = sum(region.pages for region in regions)
        # each process has its own, and none of it once it was used
        size = _round(pages * 8) + _round(pages * 16)
        self._scratch = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = address_of(self._scratch)
        words = memoryview(self._scratch).cast("Q")
        self._entries = words[: _round(pages * 8) // 8]
        self._pairs = words[_round(pages * 8) // 8 :]
        # a bit for each word of the file that is a reference count: 64 bytes a page; shared with all forks
        self._counts = mmap.mmap(-1, _round(pages * 64), mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self._bitmap = (address_of(self._counts) - seen // 64) % (1 << 64)

    def ignore(self, addresses: mmap.mmap) -> None:
        """The words at these addresses, 8 bytes each and sorted, may differ."""
        first, place = address_of(addresses), address_of(self._counts)
        with memoryview(addresses) as raw, raw.cast("Q") as sorted_:
            for start, pages, _ in self._regions:
                low, high = bisect_left(sorted_, start), bisect_left(sorted_, start + pages * PAGE)
                self._code.mark(first + low * 8, high - low, 0, place, start, False)
                place += pages * 64

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
        dropped: int = self._code.release(self._address + len(entries) * 8, count // 2, self._bitmap)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, before)
        self._scratch.madvise(_MADV_DONTNEED)
        return dropped


def take() -> Template | None:
    """Put a file behind the writable memory of this process, which has one thread; None where that can't be done.

    All its objects live for ever then, and the collector has nothing to do with them any more.
    """
    code = load()
    if code is None:
        return None
    counts = make_immortal(code)
    for _ in range(_ATTEMPTS):
        try:
            return _take(code, counts)
        except OSError:  # memory was given back to the kernel between looking and copying
            continue
    return None


def _take(code: Code, counts: mmap.mmap | None) -> Template:
    fd = os.memfd_create("wherry-shim", os.MFD_CLOEXEC)
    try:
        pieces = [piece for piece in _writable() if piece[0] != code.address]
        total = sum(length for _, length in pieces)
        os.ftruncate(fd, (total + _LARGE_PAGE - 1) // _LARGE_PAGE * _LARGE_PAGE)
        seen = code.run([(_MMAP, 0, total, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)])[0]
        if seen < 0:
            raise OSError(-seen, "mmap")
        regions, calls = [], []
        offset = 0
        for start, length in pieces:
            regions.append(Region(start, length // PAGE, seen + offset))
            calls.append((start, length, offset))
            offset += length
        template = Template(regions, code, seen)
        if counts is not None:
            template.ignore(counts)
        _put_behind(code, fd, calls)
        return template
    finally:
        os.close(fd)


def _put_behind(code: Code, fd: int, pieces: list[tuple[int, int, int]]) -> None:
    """Copy and map, twice: the first time only copies, so that the file has all the room that it needs.

    Nothing is mapped ahead of its use: what a fork never looks at, nobody has to copy the page tables of.
    """
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    copies = [(_PWRITE, fd, start, length, offset, 0, 0) for start, length, offset in pieces]
    maps = [(_MMAP, start, length, protection, flags, fd, offset) for start, length, offset in pieces]
    for result, (_, length, _) in zip(code.run(copies), pieces, strict=True):
        if result != length:
            raise OSError(-result, "the memory's copy")
    _use_large_pages(code, fd)
    before = _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGNALS)
    code.run([call for pair in zip(copies, maps, strict=True) for call in pair])
    _signal.pthread_sigmask(_signal.SIG_SETMASK, before)


def _use_large_pages(code: Code, fd: int) -> None:
    """Gather the file in pages of 2 MiB, where the kernel can (Linux 6.1): a fork and its end then take half the time.

    The kernel counts who maps a large page once, not for each small page of it.
    """
    size = os.fstat(fd).st_size
    nothing = (_MMAP, 0, size + _LARGE_PAGE, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    room = code.run([nothing])[0]
    if room < 0:
        return
    aligned = (room + _LARGE_PAGE - 1) // _LARGE_PAGE * _LARGE_PAGE
    code.run(
        [
            (_MMAP, aligned, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, 0),
            (_MADVISE, aligned, size, _MADV_COLLAPSE, 0, 0, 0),
            (_MUNMAP, room, size + _LARGE_PAGE, 0, 0, 0, 0),
        ]
    )


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


def _round(size: int) -> int:
    return (size + PAGE - 1) // PAGE * PAGE
