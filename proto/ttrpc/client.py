"""The asyncio client: any number of calls at once over one connection.

It doesn't reconnect: when the connection is gone, every call fails with ConnectionLost, and whoever made the client
decides. A client that was closed on purpose fails with ClientClosed instead.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Self, cast

from google.protobuf.message import Message

from wherry.core.errors import DeadlineExceeded, Internal, Unavailable, WherryError, from_code
from wherry.proto.service import Method
from wherry.proto.ttrpc import sockets
from wherry.proto.ttrpc.calls import ClientClosed, ConnectionLost, find_method, nanoseconds, parse_response
from wherry.proto.ttrpc.frames import REMOTE_CLOSED, REMOTE_OPEN, Answer, ClientConnection, Payload, ProtocolError

# messages of one stream that nobody has taken yet, above which the connection isn't read
MAX_BACKLOG = 256
# seconds that connecting may take where the caller names no limit
CONNECT_SECONDS = 10.0


class TtrpcClient:
    """One connection to a ttrpc server; make it with `connect` or `over`."""

    def __init__(self, on_close: Callable[[WherryError], None] | None = None) -> None:
        self._state = ClientConnection()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._streams: dict[int, ClientStream] = {}
        self._error: WherryError | None = None
        self._closed: asyncio.Future[WherryError] = self._loop.create_future()
        self._on_close = on_close
        self._drained: asyncio.Future[None] | None = None
        self._address = "ttrpc server"

    @classmethod
    async def connect(
        cls,
        path: str,
        timeout: float | None = CONNECT_SECONDS,  # noqa: ASYNC109 - only connecting is limited
        on_close: Callable[[WherryError], None] | None = None,
    ) -> TtrpcClient:
        """Connect to a unix socket (`unix://` in front is allowed), within `timeout` seconds.

        `on_close` is called once when the connection ends, with the reason. Raises Unavailable.
        """
        path = sockets.strip_scheme(path)
        # connect(2) of a unix socket returns at once, except for a full backlog: then it is waited for in a thread
        try:
            sock = sockets.connect(path, timeout=0)
        except Unavailable as error:
            if not isinstance(error.__cause__, BlockingIOError):
                raise
            sock = await asyncio.to_thread(sockets.connect, path, timeout)
        client = await cls.over(sock, on_close)
        client._address = path
        return client

    @classmethod
    async def over(cls, sock: socket.socket, on_close: Callable[[WherryError], None] | None = None) -> TtrpcClient:
        """A client over a connected socket, which it then owns."""
        client = cls(on_close)
        sock.setblocking(False)
        await client._loop.create_unix_connection(lambda: _Connection(client), sock=sock)
        return client

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer."""
        return bool(self._calls or self._streams)

    async def wait_closed(self) -> WherryError:
        """Wait for the end of the connection; returns the reason (ClientClosed or ConnectionLost)."""
        return await asyncio.shield(self._closed)

    async def close(self) -> None:
        """Close the connection; calls under way fail with ClientClosed."""
        self._end(ClientClosed(f"{self._address}: ttrpc: closed by this side"))

    def watch(self, on_close: Callable[[WherryError], None]) -> None:
        """Have another one hear of the connection's end than who was told so far."""
        self._on_close = on_close

    # -- calls

    async def call(
        self,
        service: str,
        name: str,
        request: Message,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - the server is told too
        metadata: Mapping[str, str] | None = None,
    ) -> Message:
        """Call a unary method: `call("containerd.task.v2.Task", "State", StateRequest(id="x"))`.

        `timeout` (seconds) is told to the server and kept here. Raises the server's error as its WherryError,
        DeadlineExceeded, ConnectionLost, ClientClosed. A cancelled call is forgotten here, the server goes on with it.
        """
        method = find_method(service, name)
        if self._error is not None:
            raise self._gone()
        stream_id, data = self._state.call(
            service, name, request.SerializeToString(), timeout_nano=nanoseconds(timeout), metadata=metadata
        )
        future: asyncio.Future[bytes] = self._loop.create_future()
        self._calls[stream_id] = future
        self._write(data)
        timer = None
        if timeout is not None:
            timer = self._loop.call_later(timeout, _expire, future, method.path)
        try:
            payload = await future
        finally:
            if timer is not None:
                timer.cancel()
            self._calls.pop(stream_id, None)
            self._state.forget(stream_id)
        return parse_response(method, payload)

    async def stream(
        self,
        service: str,
        name: str,
        request: Message | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - the server is told too
        metadata: Mapping[str, str] | None = None,
    ) -> ClientStream:
        """Start a call that streams; `request` is given where only the answers stream. Errors as for `call`."""
        method = find_method(service, name)
        if self._error is not None:
            raise self._gone()
        stream_id, data = self._state.call(
            service,
            name,
            b"" if request is None else request.SerializeToString(),
            timeout_nano=nanoseconds(timeout),
            metadata=metadata,
            flags=REMOTE_OPEN if method.client_streaming else REMOTE_CLOSED,
        )
        stream = self._streams[stream_id] = ClientStream(self, stream_id, method)
        if timeout is not None:
            stream._timer = self._loop.call_later(
                timeout, stream._end, DeadlineExceeded(f"{method.path}: context deadline exceeded")
            )
        self._write(data)
        return stream

    # -- the connection's side

    def _write(self, data: bytes) -> None:
        if self._transport is None:
            raise self._gone()
        self._transport.write(data)

    def _gone(self) -> WherryError:
        """The reason, as a fresh exception: one object must not be raised in many places."""
        error = self._error or ConnectionLost(f"{self._address}: ttrpc: not connected")
        return type(error)(error.message)

    def _events(self, data: bytes) -> None:
        for event in self._state.receive(data):
            stream = self._streams.get(event.stream_id)
            if stream is not None:
                stream._event(event)
                continue
            future = self._calls.get(event.stream_id)
            if future is None or future.done():
                continue
            if isinstance(event, Payload):
                if event.end:
                    future.set_exception(Internal("ttrpc: a stream of data answers a unary call"))
            elif event.code:
                future.set_exception(from_code(event.code, event.message))
            else:
                future.set_result(event.payload)

    def _end(self, error: WherryError) -> None:
        """The connection is over, once."""
        if self._error is not None:
            return
        self._error = error
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        for future in self._calls.values():
            if not future.done():
                future.set_exception(self._gone())
        for stream in list(self._streams.values()):
            stream._end(self._gone())
        self._drain()
        self._closed.set_result(error)
        if self._on_close is not None:
            self._on_close(error)

    def _drain(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    def _update_reading(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if any(stream._full for stream in self._streams.values()):
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()


def _expire(future: asyncio.Future[bytes], path: str) -> None:
    if not future.done():
        future.set_exception(DeadlineExceeded(f"{path}: context deadline exceeded"))


class _Connection(asyncio.Protocol):
    """What the transport calls."""

    def __init__(self, client: TtrpcClient) -> None:
        self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._client._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._client._events(data)
        except ProtocolError as error:
            self._client._end(ConnectionLost(f"{self._client._address}: {error.message}"))

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f": {exc}" if exc else ""
        self._client._end(ConnectionLost(f"{self._client._address}: ttrpc: closed by the other side{reason}"))

    def pause_writing(self) -> None:
        self._client._drained = self._client._loop.create_future()

    def resume_writing(self) -> None:
        self._client._drain()


class ClientStream:
    """A call that streams. Iterate over its answers; `send` and `close_send` where requests stream.

    `response()` gives the one answer where only the requests stream. Leave it by `close()` (or `async with`): what
    still comes is dropped then; the server learns of it only when the connection ends, as ttrpc has no way to cancel.
    """

    def __init__(self, client: TtrpcClient, stream_id: int, method: Method) -> None:
        self._client = client
        self._id = stream_id
        self._method = method
        self._queue: deque[bytes] = deque()
        self._ended = False
        self._error: WherryError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def _full(self) -> bool:
        return len(self._queue) > MAX_BACKLOG

    async def send(self, request: Message) -> None:
        """Send one more request, waiting while the connection can't take it. Raises what ended the stream."""
        if self._error is not None:
            raise self._error
        self._client._write(self._client._state.send(self._id, request.SerializeToString()))
        if self._client._drained is not None:
            await asyncio.shield(self._client._drained)

    async def close_send(self) -> None:
        """Say that no more requests follow."""
        if self._error is None and not self._ended:
            data = self._client._state.close_send(self._id)
            if data:
                self._client._write(data)

    async def response(self) -> Message:
        """The answer of a method whose requests stream; closes the requests' side first."""
        await self.close_send()
        async for message in self:
            self.close()
            return message
        raise Internal(f"{self._method.path}: ended without a response")

    def close(self) -> None:
        """Nobody wants more of it."""
        self._client._state.forget(self._id)
        self._end(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        while not self._queue:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = self._client._loop.create_future()
            await self._waiter
        payload = self._queue.popleft()
        if len(self._queue) == MAX_BACKLOG:
            self._client._update_reading()
        return parse_response(self._method, payload)

    def _event(self, event: Answer | Payload) -> None:
        if isinstance(event, Answer):
            if event.code:
                self._end(from_code(event.code, event.message))
                return
            if event.payload or not self._method.server_streaming:
                self._queue.append(event.payload)
            self._end(None)
            return
        if event.payload is not None:
            self._queue.append(event.payload)
            if self._full:
                self._client._update_reading()
        if event.end:
            self._end(None)
        else:
            self._wake()

    def _end(self, error: WherryError | None) -> None:
        if self._ended:
            return
        self._ended = True
        self._error = error
        if self._timer is not None:
            self._timer.cancel()
        self._client._streams.pop(self._id, None)
        self._client._state.forget(self._id)
        self._client._update_reading()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
