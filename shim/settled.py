"""Code that has rewritten itself for the last time.

CPython 3.11 counts a function's calls in its code object, exchanges its instructions for ones that specialise
themselves after eight calls, and counts in those for as long as they find nothing to specialise on. Each count is a
write to a page that is otherwise shared by all shims. So once the ways are walked (`warming.py`) what was specialised
stays, what was not becomes the plain instruction again, and nobody counts any more.

Specialised instructions count the times that they met something else than what they are specialised on; those that did
while the ways were walked will do so again, and become plain, too.

Later versions count in the plain instructions, so nothing can be done about it there (and nothing is).
"""

from __future__ import annotations

import ctypes
import dis
import gc
import opcode
import sys
import types
from typing import Any, Final

# struct PyCodeObject of 3.11: co_flags, then co_warmup; the instructions come last
_FLAGS: Final = 48
_WARMUP: Final = 52
_SUFFIX: Final = "_ADAPTIVE"
# where that count begins, down to 0 (pycore_code.h, miss_counter_start)
_NO_MISS: Final = 53


def settle() -> int:
    """Settle all code objects that functions of this process have; how many."""
    if sys.version_info[:2] != (3, 11):
        return 0
    known: dict[str, int] = vars(dis).get("_all_opmap", {})
    plain = {number: opcode.opmap[name.removesuffix(_SUFFIX)] for name, number in known.items() if _SUFFIX in name}
    caches: list[int] = vars(opcode).get("_inline_cache_entries", [])
    if not plain or not caches:
        return 0
    functions = [item for item in gc.get_objects() if type(item) is types.FunctionType]
    codes: dict[int, types.CodeType] = {}
    for function in functions:
        _add(function.__code__, codes)
    for code in codes.values():
        _settle(code, plain, caches)
    return len(codes)


def _add(code: types.CodeType, codes: dict[int, types.CodeType]) -> None:
    if id(code) not in codes:
        codes[id(code)] = code
        for constant in code.co_consts:
            if type(constant) is types.CodeType:
                _add(constant, codes)


def _settle(code: types.CodeType, plain: dict[int, int], caches: list[int]) -> None:
    base = id(code)
    if ctypes.c_int.from_address(base + _FLAGS).value != code.co_flags:
        return
    warmup = ctypes.c_short.from_address(base + _WARMUP)
    if warmup.value:
        warmup.value = 0
        return
    original = code.co_code
    size = len(original)
    instructions: Any = (ctypes.c_ubyte * size).from_address(base + types.CodeType.__basicsize__)
    at = 0
    while at < size:
        instruction, is_, cached = instructions[at], original[at], caches[original[at]]
        if instruction in plain:
            instructions[at] = plain[instruction]
        elif instruction != is_ and cached and instructions[at + 2] | instructions[at + 3] << 8 != _NO_MISS:
            instructions[at] = is_
        at += 2 + 2 * cached
