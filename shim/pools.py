"""Gives a process that is about to be forked fresh memory to allocate from, and types that are known.

CPython's small objects live in pools of 16 KiB, one size to a pool (`Objects/obmalloc.c`). After everything is imported
the pools are full of holes, and a fork that fills a hole here and a hole there writes to a page of its own for each.
With the holes filled beforehand, the objects that a fork makes come to lie side by side. What is larger than 512 bytes,
and what isn't Python's, is malloc's: the same there.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Final

# obmalloc: sizes are rounded up to 16 bytes, up to 512; the first block of a pool comes after its header
_STEP, _LARGEST = 16, 512
_POOL_MASK: Final = 0x3FFF
_FIRST_BLOCK: Final = 0x30
# a bound, should the layout of another Python be another: so many bytes of holes of one size are filled at most
_LIMIT: Final = 2 << 20
_BYTES_OVERHEAD: Final = 33
# malloc: larger pieces are seldom, those from 128 KiB on are mapped; a piece has 8 bytes of its own
_HEAP_LARGEST: Final = 120 << 10
_HEAP_LIMIT: Final = 4 << 20
_CHUNK_HEADER: Final = 8

_fillings: list[object] = []


def fill_holes() -> int:
    """Fill them, for the rest of this process's life; how many bytes it took."""
    filled = 0
    for size in range(_STEP, _LARGEST + 1, _STEP):
        for _ in range(_LIMIT // size):
            filling = _of(size)
            _fillings.append(filling)
            filled += size
            if id(filling) & _POOL_MASK == _FIRST_BLOCK:
                break
    return filled


def fill_heap() -> int:
    """The same for malloc: take what lies free below the end of its heap; how many bytes it took."""
    malloc, free = ctypes.PyDLL(None).malloc, ctypes.PyDLL(None).free
    malloc.restype, malloc.argtypes = ctypes.c_size_t, (ctypes.c_size_t,)
    free.restype, free.argtypes = None, (ctypes.c_size_t,)
    end: int = malloc(_HEAP_LARGEST)
    free(end)
    filled = 0
    for size in range(_HEAP_LARGEST, 0, -_STEP):
        while (taken := malloc(size - _CHUNK_HEADER)) < end and filled < _HEAP_LIMIT:
            filled += size
        free(taken)
    return filled


def know_types() -> None:
    """Give each type the version number that the first look at an attribute of it would write into it."""
    for item in gc.get_objects():
        if isinstance(item, type):
            getattr(item, "__wherry__", None)


def _of(size: int) -> object:
    if size <= _STEP:
        return object()
    if size < _BYTES_OVERHEAD + 1:
        return float(size)
    return bytes(size - _BYTES_OVERHEAD)
