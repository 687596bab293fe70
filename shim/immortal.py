"""No object of the fork server dies any more, so that shims need not agree on how many references it has.

A shim that looks at an object counts a reference up, and where it keeps one the count stays up; its page then differs
from the fork server's for no other reason. With counts so high that no shim ever brings one to zero they mean nothing,
and a page that differs in them alone may be dropped (`template.py`).

CPython 3.12 and later have immortal objects (PEP 683), whose counts aren't even written: there the objects become that.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import types
from array import array
from typing import Final

from wherry.shim.machine_code import Code

# far above what can be counted, far below an overflow
_HIGH: Final = 1 << 40
_IMMORTAL_BIT: Final = 1 << 31
# a reference count and a type
_HEADER: Final = 16


def make_immortal(code: Code) -> mmap.mmap | None:
    """All objects of this process that the collector knows, or that can be reached from one of those.

    Their addresses, sorted, 8 bytes each: nothing of what was needed to find them is left. None in an interpreter that
    lays out its objects otherwise (free-threaded, or built to trace references).
    """
    if object.__basicsize__ != _HEADER:
        return None
    objects, numbers = _find()
    addresses = array("Q", sorted(numbers))
    none = ctypes.c_uint32.from_address(id(None)).value
    value, store = (none, True) if none & _IMMORTAL_BIT else (_HIGH, False)
    code.mark(addresses.buffer_info()[0], len(addresses), value, None, 0, store)
    # from here on it is of no matter that the list goes
    del objects
    kept = mmap.mmap(-1, len(addresses) * 8, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    kept.write(addresses.tobytes())
    return kept


def _find() -> tuple[list[object], set[int]]:
    """The objects, held so that none can go, and their addresses."""
    gc.unfreeze()
    objects: list[object] = gc.get_objects()
    gc.freeze()
    # what the interpreter has one of each, which nothing needs to refer to now
    objects += [*range(-5, 257), *map(chr, range(256)), *(bytes([number]) for number in range(256)), b"", "", ()]
    seen: set[int] = set()
    objects = level = _unseen(objects, seen)
    while level:
        level = _unseen(gc.get_referents(*level), seen) + _unseen(_of_code(level), seen)
        objects = objects + level
    return objects, seen


def _unseen(objects: list[object], seen: set[int]) -> list[object]:
    fresh = []
    for item in objects:
        number = id(item)
        if number not in seen:
            seen.add(number)
            fresh.append(item)
    return fresh


def _of_code(level: list[object]) -> list[object]:
    """What code objects refer to; the collector doesn't know them."""
    return [
        part
        for code in level
        if type(code) is types.CodeType
        for part in (
            code.co_consts,
            code.co_names,
            code.co_filename,
            code.co_name,
            code.co_qualname,
            code.co_linetable,
            code.co_exceptiontable,
        )
    ]
