"""A shim's log: lines on descriptor 2, which is a file in the bundle, or the FIFO that containerd reads.

A log that takes nothing (a full FIFO, a full disk) loses the line; the container doesn't wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback

_LEVELS = {"debug": 0, "info": 1, "warning": 2, "error": 3}
_least = 1


class _Unfailing:
    """What tracebacks are printed to: `sys.stderr` without its buffer and its errors."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            os.write(2, text.encode(errors="replace"))
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


def take_over(level: str) -> None:
    """From now on, everything on `sys.stderr` goes to descriptor 2 and never fails."""
    global _least  # noqa: PLW0603  # one process, one log
    _least = _LEVELS.get(level, 1)
    sys.stderr = _Unfailing()


def log(level: str, message: str, **fields: object) -> None:
    """One line as containerd's shims write it: time, level, msg, fields."""
    if _LEVELS.get(level, 1) < _least:
        return
    now = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
    words = [f'time="{stamp}.{int(now % 1 * 1e6):06d}Z"', f"level={level}", f"msg={json.dumps(message)}"]
    words += [f"{key}={json.dumps(str(value))}" for key, value in fields.items()]
    with contextlib.suppress(OSError):
        os.write(2, (" ".join(words) + "\n").encode(errors="replace"))


def log_exception(error: BaseException) -> None:
    """A bug, with where it happened."""
    traceback.print_exception(error, file=sys.stderr)
