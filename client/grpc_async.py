"""gRPC for programs with asyncio: a `Transport` over grpc.aio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from wherry.client.grpc_options import OPTIONS, as_error, serialize, target
from wherry.client.transport import Call, Response
from wherry.core.errors import Unavailable, WherryError

R = TypeVar("R", bound=Message)
# what a read gives at the end of a stream; the type stubs of grpc leave it out
_END = vars(grpc.aio)["EOF"]


def _raised(failure: grpc.aio.AioRpcError) -> WherryError:
    return as_error(failure.code(), failure.details())


class AsyncPending(Generic[R]):
    """A unary call on its way."""

    def __init__(self, call: grpc.aio.UnaryUnaryCall[Any, R]) -> None:
        self._call = call

    async def result(self) -> R:
        """Waits for the answer."""
        try:
            return await self._call
        except grpc.aio.AioRpcError as failure:
            raise _raised(failure) from None

    def cancel(self) -> None:
        """Gives it up."""
        self._call.cancel()


class AsyncStream(Generic[R]):
    """A streaming call."""

    def __init__(self, call: grpc.aio.StreamStreamCall[Any, R]) -> None:
        self._call = call
        self._answering: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        """Sends one message; a call that is over says why."""
        try:
            await self._call.write(message)
        except grpc.aio.AioRpcError as failure:
            raise _raised(failure) from None
        except asyncio.InvalidStateError:
            raise as_error(await self._call.code(), await self._call.details()) from None

    async def close_send(self) -> None:
        """No more messages; a call that is over already doesn't mind."""
        with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
            await self._call.done_writing()

    async def receive(self) -> R | None:
        """The next message, None at the end."""
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            raise _raised(failure) from None
        if message is not _END:
            return cast(R, message)
        code = await self._call.code()
        if code is not grpc.StatusCode.OK:
            raise as_error(code, await self._call.details())
        return None

    def answer(self, respond: Callable[[R], Message]) -> None:
        """A task answers; what `respond` does blocks nobody."""
        self._answering = asyncio.get_running_loop().create_task(self._answer(respond))

    async def _answer(self, respond: Callable[[R], Message]) -> None:
        # what is wrong with the stream, the call that it is for says better
        with contextlib.suppress(WherryError):
            while (message := await self.receive()) is not None:
                await self.send(await asyncio.to_thread(respond, message))

    async def close(self) -> None:
        """Cancels what isn't over."""
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.gather(self._answering, return_exceptions=True)
        self._call.cancel()


class GrpcTransport:
    """A channel to one socket."""

    def __init__(self, address: str) -> None:
        """`address` is the path of the daemon's gRPC socket. Nothing connects before the first call."""
        self.address = address
        self._channel = grpc.aio.insecure_channel(target(address), options=OPTIONS)

    async def ready(self, timeout: float | None) -> None:  # noqa: ASYNC109 - seconds until it is given up
        """Waits until somebody answers on the socket; raises Unavailable after `timeout` seconds."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout)
        except TimeoutError:
            raise Unavailable(f"no daemon answers at {self.address}") from None

    async def unary(self, call: Call[Response]) -> Response:
        """One request, one answer."""
        return await self.begin(call).result()

    def begin(self, call: Call[Response]) -> AsyncPending[Response]:
        """Sends a request now; its answer is asked for later."""
        method: grpc.aio.UnaryUnaryMultiCallable[Any, Response] = self._channel.unary_unary(
            f"/{call.path}", serialize, call.response.FromString
        )
        return AsyncPending(method(call.request, timeout=call.timeout, metadata=tuple(call.metadata.items())))

    async def stream(self, call: Call[Response]) -> AsyncStream[Response]:
        """A call that streams: with a `request` only the other side does, without one both do."""
        method: grpc.aio.StreamStreamMultiCallable[Any, Response] = self._channel.stream_stream(
            f"/{call.path}", serialize, call.response.FromString
        )
        stream = AsyncStream(method(None, timeout=call.timeout, metadata=tuple(call.metadata.items())))
        if call.request is not None:
            await stream.send(call.request)
            await stream.close_send()
        return stream

    async def close(self) -> None:
        """Closes the channel and cancels what runs on it."""
        await self._channel.close(None)
