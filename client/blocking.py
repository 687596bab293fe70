"""Runs the client's coroutines without an event loop.

Over a blocking transport a coroutine of the API never suspends: each await is on something that has done its work when
it returns. Such a coroutine is run by one `send`. That keeps one text of the API for programs and for the command line,
which must not pay for asyncio (80 ms, several times the command itself).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

from wherry.core.hints import TypeVar

T = TypeVar("T")


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result; its exceptions come through.

    Raises RuntimeError where it suspends, which only a coroutine over an asyncio transport does.
    """
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coroutine.close()
    raise RuntimeError("this coroutine needs an event loop: it was made for a transport of asyncio")


def iterate(items: AsyncIterator[T]) -> Iterator[T]:
    """The items of an asynchronous iterator over a blocking transport, one by one."""
    while True:
        try:
            item = drive(_next(items))
        except StopAsyncIteration:
            return
        yield item


async def _next(items: AsyncIterator[T]) -> T:
    return await anext(items)
