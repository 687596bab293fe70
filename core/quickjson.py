"""JSON without `import json`, whose patterns take a millisecond of each command to compile.

The work is done by the same C code (`_json`). Where that isn't there, or `json` is loaded already, `json` does it, and
also what the C code doesn't like is given to `json`, for its messages.
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


def _refuse(value: object) -> None:
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _make() -> tuple[Callable[[str, int], tuple[Any, int]], Callable[[Any, int], tuple[str, ...]]] | None:
    if "json" in sys.modules:
        return None
    try:
        native = __import__("_json")
        scan = native.make_scanner(_Context)
        encode = native.make_encoder(None, _refuse, native.encode_basestring, None, ":", ",", False, False, True)
    except (ImportError, AttributeError, TypeError):
        return None
    return scan, encode


_native = _make()


def loads(raw: bytes) -> Any:
    """The value of UTF-8 text; ValueError with json's message for what is none."""
    if _native is not None:
        try:
            text = raw.decode()
            value, end = _native[0](text, len(text) - len(text.lstrip(" \t\n\r")))
        except (StopIteration, ValueError):
            end = -1
        if end >= 0 and not text[end:].strip(" \t\n\r"):
            return value
    import json  # noqa: PLC0415 - see above

    return json.loads(raw)


def dumps(value: Any) -> str:
    """On one line without spaces, other letters than ASCII's as they are; TypeError for what isn't JSON."""
    if _native is not None:
        return "".join(_native[1](value, 0))
    import json  # noqa: PLC0415

    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
