"""Errors as people read them, and commands that go on to the next thing when one went wrong."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterable

from wherry.core.errors import NotFound, WherryError

# what the wire says of an error's kind, and a person needn't hear
_KINDS = (": failed precondition", ": invalid argument")
_HINTS = (
    ('network "', ": not found", " ('wherry network ls' lists them)"),
    ("port ", "Address already in use", " ('wherry ps' shows whose it is; name another one, or none for any, with -p)"),
)


def said(error: WherryError) -> str:
    """An error for people: with what to do next, where the daemon couldn't know who asks."""
    text = error.message or type(error).__name__
    for kind in _KINDS:
        text = text.removesuffix(kind)
    for begin, end, hint in _HINTS:
        if text.startswith(begin) and text.endswith(end):
            return text + hint
    return text


def complain(error: WherryError) -> None:
    """Says it where errors belong."""
    sys.stdout.flush()
    sys.stderr.write(f"wherry: {said(error)}\n")


async def each(
    names: Iterable[str], act: Callable[[str], Awaitable[Iterable[str] | None]], *, missing_ok: bool = False
) -> int:
    """Does something to each thing and prints what `act` says of it, else its name; the exit code is 1 where one went
    wrong. The others are done all the same, as docker has it. With `missing_ok` one that isn't there is none."""
    failed = 0
    for name in names:
        try:
            lines = await act(name)
            for line in (name,) if lines is None else lines:
                print(line)
        except WherryError as error:
            if missing_ok and isinstance(error, NotFound):
                continue
            complain(error)
            failed = 1
    return failed
