"""JSON without `json`: the same values, the same text, the same errors; in a process that hasn't loaded `json`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from wherry.core import quickjson

VALUES: list[Any] = [
    None,
    [1, -2.5, 1e300, True, 'ä\u2028\n\t"\\', {"a": {"b": [[], {}]}}],
    {"x": ("tuple", 1), "": "", "\x00": "\x1f"},
    "text",
    12345678901234567890123,
]
WRONG = [b"", b" ", b"{", b"[1,]", b'{"a":1}x', b'"\n"', b"\xff", b"nul", b"{'a':1}", b'{"a" 1}']
RIGHT = [b' {"a" : [1 , 2.0e1, null]} \n', b"NaN", b"-Infinity", b'"\\ud83d\\ude00"', b"[]", b'\xef\xbb\xbf{"bom": 1}']


def test_it_is_what_json_gives() -> None:
    program = (
        "import sys, ast; from wherry.core import quickjson; assert 'json' not in sys.modules and quickjson._native\n"
        "for line in sys.stdin:\n"
        "    kind, value = ast.literal_eval(line)\n"
        "    try: print(repr(quickjson.dumps(value) if kind == 'dumps' else quickjson.loads(value)))\n"
        "    except ValueError as error: print(repr(str(error)))\n"
    )
    cases = [("dumps", value) for value in VALUES] + [("loads", raw) for raw in (*RIGHT, *WRONG)]
    done = subprocess.run(
        [sys.executable, "-c", program], input="".join(f"{case!r}\n" for case in cases), capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [_expected(*case) for case in cases], done.stderr


def _expected(kind: str, value: Any) -> str:
    try:
        if kind == "dumps":
            return repr(json.dumps(value, separators=(",", ":"), ensure_ascii=False))
        return repr(json.loads(value))
    except ValueError as error:
        return repr(str(error))


def test_with_json_loaded_json_does_it() -> None:
    assert quickjson.loads(b'{"a": [1]}') == {"a": [1]}
    assert quickjson.dumps({"ä": [1, 2]}) == '{"ä":[1,2]}'


def test_what_is_no_json_is_refused() -> None:
    program = "from wherry.core import quickjson; quickjson.dumps({'a': object()})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "TypeError: Object of type object is not JSON serializable" in done.stderr
    with pytest.raises(TypeError):
        quickjson.dumps({"a": object()})
