"""gRPC without asyncio, for the command line on a daemon that has no ttrpc services (containerd).

grpc runs its own threads; answers that are pending are announced on a pipe, so that one `select` can wait for them and
for the container's output.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

import grpc
from google.protobuf.message import Message

from wherry.client.grpc_options import OPTIONS, as_error, serialize, target
from wherry.client.transport import Call, Response
from wherry.core.errors import Unavailable, WherryError

R = TypeVar("R", bound=Message)


def _raised(failure: grpc.RpcError) -> WherryError:
    status = cast("grpc.Call", failure)
    return as_error(status.code(), status.details())


class BlockingPending(Generic[R]):
    """A unary call on its way; readable (`fileno`) when its answer is there."""

    def __init__(self, future: Any) -> None:
        self._future = future
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        future.add_done_callback(self._announce)

    def _announce(self, _: object) -> None:
        with contextlib.suppress(OSError):
            os.write(self._write, b"!")

    def fileno(self) -> int:
        """A descriptor that becomes readable with the answer."""
        return self._read

    def ready(self) -> bool:
        """Whether `result` would return at once."""
        return bool(self._future.done())

    async def result(self) -> R:
        """Waits for the answer."""
        try:
            answer: R = self._future.result()
        except grpc.RpcError as failure:
            raise _raised(failure) from None
        finally:
            self._close()
        return answer

    def cancel(self) -> None:
        """Gives it up."""
        self._future.cancel()
        self._close()

    def _close(self) -> None:
        for descriptor in (self._read, self._write):
            if descriptor >= 0:
                os.close(descriptor)
        self._read = self._write = -1


class BlockingStream(Generic[R]):
    """A streaming call; what is sent goes through a queue that grpc's thread empties."""

    def __init__(self, method: Any, metadata: Mapping[str, str], timeout: float | None) -> None:
        self._requests: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._call = method(self._drain(), timeout=timeout, metadata=tuple(metadata.items()))

    def _drain(self) -> Iterator[Message]:
        while (message := self._requests.get()) is not None:
            yield message

    async def send(self, message: Message) -> None:
        """Queues one message."""
        self._requests.put(message)

    async def close_send(self) -> None:
        """No more messages."""
        self._requests.put(None)

    async def receive(self) -> R | None:
        """The next message, None at the end."""
        try:
            message: R = next(self._call)
        except StopIteration:
            return None
        except grpc.RpcError as failure:
            raise _raised(failure) from None
        return message

    def answer(self, respond: Callable[[R], Message]) -> None:
        """A thread answers."""

        def run() -> None:
            with contextlib.suppress(grpc.RpcError):
                for message in self._call:
                    self._requests.put(respond(message))

        threading.Thread(target=run, daemon=True).start()

    async def close(self) -> None:
        """Cancels what isn't over and lets grpc's thread go."""
        self._requests.put(None)
        self._call.cancel()


class BlockingGrpcTransport:
    """A channel to one socket, for code without an event loop."""

    def __init__(self, address: str) -> None:
        """`address` is the path of the daemon's gRPC socket."""
        self.address = address
        self._channel = grpc.insecure_channel(target(address), options=OPTIONS)

    def ready(self, timeout: float | None) -> None:
        """Waits until somebody answers on the socket; raises Unavailable after `timeout` seconds."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout)
        except grpc.FutureTimeoutError:
            raise Unavailable(f"no daemon answers at {self.address}") from None

    async def unary(self, call: Call[Response]) -> Response:
        """One request, one answer."""
        method = self._channel.unary_unary(f"/{call.path}", serialize, call.response.FromString)
        try:
            return cast(Response, method(call.request, timeout=call.timeout, metadata=tuple(call.metadata.items())))
        except grpc.RpcError as failure:
            raise _raised(failure) from None

    def begin(self, call: Call[Response]) -> BlockingPending[Response]:
        """Sends a request now; its answer is asked for later."""
        method = self._channel.unary_unary(f"/{call.path}", serialize, call.response.FromString)
        return BlockingPending(method.future(call.request, timeout=call.timeout, metadata=tuple(call.metadata.items())))

    async def stream(self, call: Call[Response]) -> BlockingStream[Response]:
        """A call that streams: with a `request` only the other side does, without one both do."""
        method = self._channel.stream_stream(f"/{call.path}", serialize, call.response.FromString)
        stream: BlockingStream[Response] = BlockingStream(method, call.metadata, call.timeout)
        if call.request is not None:
            await stream.send(call.request)
            await stream.close_send()
        return stream

    async def close(self) -> None:
        """Closes the channel and cancels what runs on it."""
        self._channel.close()
