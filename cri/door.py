"""A transport within the daemon: the client's calls go to the service objects themselves.

The CRI is written against containerd's API, as any client of it; only that it sits in the daemon, and needs neither a
socket nor messages in bytes. Messages are handed over as they are: who gets one doesn't change it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Generic, TypeVar, cast

from google.protobuf.message import Message

from wherry.client.transport import Call, Response
from wherry.core.errors import Cancelled, DeadlineExceeded, Unimplemented, WherryError
from wherry.proto.service import Context, Method, methods

R = TypeVar("R", bound=Message)

# messages that wait for a service which reads a stream; beyond it the sender waits
_INBOX = 16


class LocalTransport:
    """Calls of services as `wherry.proto.service` describes them; `wherry.client.transport.Transport`."""

    def __init__(self, services: Iterable[object]) -> None:
        """A method is looked up when it is first called: services may be added to the list after this."""
        self._services = services
        self._found: dict[str, tuple[Method, Callable[..., Any]]] = {}

    def _find(self, path: str) -> tuple[Method, Callable[..., Any]]:
        if (known := self._found.get(path)) is not None:
            return known
        name, _, method_name = path.partition("/")
        for service in self._services:
            if cast("str", service.SERVICE) == name:  # type: ignore[attr-defined]
                method = methods(name)[method_name]
                self._found[path] = found = method, getattr(service, method.attribute)
                return found
        raise Unimplemented(f"unknown service {name}: it is disabled in the configuration")

    async def unary(self, call: Call[Response]) -> Response:
        """One request, one answer."""
        _, function = self._find(call.path)
        timeout = call.timeout
        if timeout is None:
            return cast("Response", await function(call.request, Context(call.metadata)))
        try:
            async with asyncio.timeout(timeout):
                context = Context(call.metadata, time.monotonic() + timeout)
                return cast("Response", await function(call.request, context))
        except TimeoutError:
            raise DeadlineExceeded(f"{call.path}: no answer within {timeout:g} s: deadline exceeded") from None

    def begin(self, call: Call[Response]) -> LocalPending[Response]:
        """Begins a call now; its answer is asked for later."""
        return LocalPending(asyncio.get_running_loop().create_task(self.unary(call)))

    async def stream(self, call: Call[Response]) -> LocalStream[Response]:
        """A call that streams."""
        method, function = self._find(call.path)
        context = Context(call.metadata, None if call.timeout is None else time.monotonic() + call.timeout)
        return LocalStream(method, function, call.request, context)

    async def close(self) -> None:
        """Nothing is held."""


class LocalPending(Generic[R]):
    """A call on its way."""

    def __init__(self, task: asyncio.Task[R]) -> None:
        self._task = task
        task.add_done_callback(_seen)

    async def result(self) -> R:
        """Waits for the answer; who is cancelled meanwhile hasn't given the call up."""
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if self._task.cancelled():
                raise Cancelled("the call was given up") from None
            raise

    def cancel(self) -> None:
        """Gives it up."""
        self._task.cancel()


def _seen(task: asyncio.Task[Any]) -> None:
    """Nobody has to ask for a call's error."""
    if not task.cancelled():
        task.exception()


class LocalStream(Generic[R]):
    """A call with several messages."""

    def __init__(self, method: Method, function: Callable[..., Any], request: Message | None, context: Context) -> None:
        self._inbox: asyncio.Queue[Message | None] = asyncio.Queue(_INBOX)
        argument: object = request if request is not None and not method.client_streaming else self._requests()
        if request is not None and method.client_streaming:
            self._inbox.put_nowait(request)
            self._inbox.put_nowait(None)
        answered = function(argument, context)
        self._answers: AsyncIterator[R] = answered if method.server_streaming else _only(answered)
        self._deadline = context.deadline
        self._answering: asyncio.Task[None] | None = None

    async def _requests(self) -> AsyncIterator[Message]:
        while (message := await self._inbox.get()) is not None:
            yield message

    async def send(self, message: Message) -> None:
        """Sends one message; waits while the service is slow."""
        await self._inbox.put(message)

    async def close_send(self) -> None:
        """No more messages."""
        await self._inbox.put(None)

    async def receive(self) -> R | None:
        """The next message, None at the end."""
        try:
            async with asyncio.timeout(None if self._deadline is None else self._deadline - time.monotonic()):
                return await anext(self._answers, None)
        except TimeoutError:
            raise DeadlineExceeded("context deadline exceeded") from None

    def answer(self, respond: Callable[[R], Message]) -> None:
        """A task answers."""
        self._answering = asyncio.get_running_loop().create_task(self._answer(respond))

    async def _answer(self, respond: Callable[[R], Message]) -> None:
        # what is wrong with the stream, the call that it is for says better
        with contextlib.suppress(WherryError):
            while (message := await self.receive()) is not None:
                await self.send(await asyncio.to_thread(respond, message))

    async def close(self) -> None:
        """Gives up what isn't over."""
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.gather(self._answering, return_exceptions=True)
        with contextlib.suppress(WherryError):
            await cast("Any", self._answers).aclose()


async def _only(answer: Any) -> AsyncIterator[Any]:
    yield await answer
