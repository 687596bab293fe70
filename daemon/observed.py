"""Services with somebody who watches their calls: figures, traces. Where nobody watches, nothing is wrapped."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol, cast

from wherry.core.errors import Code, WherryError
from wherry.proto.service import Context, Method, methods

Ended = Callable[[int], None]


class Observer(Protocol):
    """Who watches calls."""

    def began(self, method: Method, context: Context) -> Ended:
        """A call begins; what is returned is called with its status code (gRPC's numbers) when it ends."""


class Observed:
    """A service whose calls are watched; to a door it looks like the service."""

    def __init__(self, service: object, observers: Sequence[Observer]) -> None:
        self.SERVICE = cast("str", service.SERVICE)  # type: ignore[attr-defined]
        for method in methods(self.SERVICE).values():
            function = getattr(service, method.attribute, None)
            if function is not None:
                setattr(self, method.attribute, _watched(method, function, tuple(observers)))


def _watched(method: Method, function: Callable[..., Any], observers: tuple[Observer, ...]) -> Callable[..., Any]:
    def began(context: Context) -> list[Ended]:
        return [observer.began(method, context) for observer in observers]

    if inspect.isasyncgenfunction(function) or method.server_streaming:

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            ends, code = began(context), Code.OK
            try:
                async for message in cast("AsyncIterator[Any]", function(request, context)):
                    yield message
            except BaseException as error:
                code = _code(error)
                raise
            finally:
                for end in ends:
                    end(code)

        return stream

    async def call(request: Any, context: Context) -> Any:
        ends, code = began(context), Code.OK
        try:
            return await cast("Awaitable[Any]", function(request, context))
        except BaseException as error:
            code = _code(error)
            raise
        finally:
            for end in ends:
                end(code)

    return call


def _code(error: BaseException) -> int:
    if isinstance(error, WherryError):
        return error.code
    # a caller that leaves ends an asynchronous generator in this way
    return Code.CANCELLED if isinstance(error, asyncio.CancelledError | GeneratorExit) else Code.INTERNAL
