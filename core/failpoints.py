"""Places where a process can be told to kill itself, so that tests can see what a sudden end leaves there.

    reach("shim.create.made")            in the code, at each step that leaves something behind

    WHERRY_FAIL_AT=name[:nth]            the process that comes to this place (for the nth time) gets SIGKILL
    WHERRY_FAIL_FILE=path                the same by a file's content, which is read at each place; the file is removed
                                         by the process that is about to die, so that it happens once

Without these variables, which are read when this module is loaded, a place costs a call and a comparison (50 ns). All
places and what the tests do there: `tests/failpoints.py`, docs/reliability.md.
"""

from __future__ import annotations

import os

_at = os.environ.get("WHERRY_FAIL_AT", "")
_file = os.environ.get("WHERRY_FAIL_FILE", "")
_armed = bool(_at or _file)
_counts: dict[str, int] = {}
_SIGKILL = 9  # `signal` would bring `enum`: 4 ms for each `wherry-runtime`


def reach(name: str) -> None:
    """Die here, if that is what was asked for."""
    if _armed:
        _reached(name)


def _reached(name: str) -> None:
    wanted, colon, nth = _wanted().partition(":")
    if wanted != name:
        return
    _counts[name] = _counts.get(name, 0) + 1
    if colon and nth.isdigit() and _counts[name] < int(nth):
        return
    if not _at:
        try:
            os.unlink(_file)
        except OSError:
            return  # another process was first
    os.kill(os.getpid(), _SIGKILL)
    os._exit(128 + _SIGKILL)  # the first process of a pid namespace can't kill itself


def _wanted() -> str:
    if _at:
        return _at
    try:
        with open(_file, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
