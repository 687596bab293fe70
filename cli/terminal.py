"""The terminal that a command runs on: raw mode, its size."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def is_terminal(descriptor: int) -> bool:
    """Whether a descriptor is a terminal; False for one that is closed."""
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def window() -> tuple[int, int] | None:
    """Width and height in characters; None where no stream is a terminal."""
    for descriptor in (1, 0, 2):
        try:
            size = os.get_terminal_size(descriptor)
        except OSError:
            continue
        if size.columns and size.lines:
            return size.columns, size.lines
    return None


@contextmanager
def raw(active: bool) -> Iterator[None]:
    """The terminal in raw mode for the time of the block, where there is one: every key goes to the container."""
    if not active or not is_terminal(0):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(0)
    sys.stdout.flush()
    tty.setraw(0, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
