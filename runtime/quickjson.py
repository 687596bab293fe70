"""JSON without `import json`, which imports `re` and `enum`: 6 ms of a command that takes 25.

The work is done by the same C code (`_json`); only the Python around it is left out. What that C code doesn't like is
given to `json` itself, for its messages; and where `json` is loaded already (the shim), or has no C code, it is used.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class _Context:
    """What `_json.make_scanner` asks for: the defaults of `json.JSONDecoder`."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    memo: dict[str, str] = {}  # noqa: RUF012 - the scanner reads it by this name and clears it itself

    @staticmethod
    def parse_constant(name: str) -> float:
        return float(name.replace("Infinity", "inf"))


def _make() -> tuple[Callable[[str, int], tuple[Any, int]], Callable[[Any, int], tuple[str, ...]]] | None:
    if "json" in sys.modules:
        return None
    try:
        native = __import__("_json")
        scan = native.make_scanner(_Context)
        encode = native.make_encoder({}, _refuse, native.encode_basestring_ascii, None, ": ", ", ", False, False, True)
    except (ImportError, AttributeError, TypeError):
        return None
    return scan, encode


def _refuse(value: object) -> None:
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")


_native = _make()


def loads(raw: bytes) -> Any:
    """The value; ValueError with json's message for what is none."""
    text = raw.decode("utf-8-sig", "surrogatepass") if _native else ""
    if _native:
        start = len(text) - len(text.lstrip(" \t\n\r"))
        try:
            value, end = _native[0](text, start)
        except (StopIteration, ValueError):
            end = -1
        if end >= 0 and not text[end:].strip(" \t\n\r"):
            return value
    import json  # noqa: PLC0415 - see above

    return json.loads(raw)


def dumps(value: Any) -> str:
    """On one line, with `, ` and `: `, in ASCII: what `json.dumps` gives."""
    if _native:
        return "".join(_native[1](value, 0))
    import json  # noqa: PLC0415

    return json.dumps(value)
