"""The asyncio server: transportless services (see `wherry.proto.service`) behind a unix socket.

Each connection stands for itself: what one peer sends, however wrong, ends at most its own connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, cast

from google.protobuf.message import DecodeError, Message

from wherry.core.errors import Cancelled, Code, InvalidArgument, ResourceExhausted, Unimplemented, WherryError
from wherry.proto.service import Context, Method, methods
from wherry.proto.ttrpc import sockets
from wherry.proto.ttrpc.frames import Call, Payload, ProtocolError, Reply, ServerConnection

# calls that one connection may have under way; a client of ours has a handful, dockerd some hundred waits
MAX_CALLS = 4096
# messages of one stream that wait for their handler (Go's server keeps 64) ...
MAX_BACKLOG = 64
# ... and the seconds that reading pauses for a handler that doesn't take them, before its stream is failed (as in Go)
STALL_SECONDS = 1.0
# unsent bytes of one connection above which its handlers of streams wait and no more calls are read
WRITE_HIGH = 1 << 20

# what is told of an exception that no handler expected: the method's path and the traceback
ErrorReport = Callable[[str, str], None]


class _Handler:
    """A method with the object that implements it."""

    __slots__ = ("function", "method", "unary")

    def __init__(self, method: Method, function: Callable[..., Any]) -> None:
        self.method = method
        self.function = function
        self.unary = not (method.client_streaming or method.server_streaming)


class TtrpcServer:
    """Serves services on any number of sockets.

    `on_error(path, traceback)` hears of exceptions that are no WherryError; the caller gets INTERNAL.
    """

    def __init__(self, services: Iterable[object] = (), *, on_error: ErrorReport | None = None) -> None:
        self._services: dict[str, dict[str, _Handler]] = {}
        self._on_error = on_error
        self._servers: list[asyncio.Server] = []
        self._bound: list[tuple[str, int]] = []
        self._connections: set[_Connection] = set()
        for service in services:
            self.add(service)

    def add(self, service: object, name: str | None = None) -> None:
        """Serve an object under its `SERVICE`, or under another name with the same methods (task v2 and v3)."""
        name = name or cast("str", service.SERVICE)  # type: ignore[attr-defined]
        self._services[name] = {
            method.name: _Handler(method, function)
            for method in methods(name).values()
            if (function := getattr(service, method.attribute, None)) is not None
        }

    def find(self, service: str, method: str) -> _Handler:
        """The handler of a method. Raises the WherryError with Go's texts where there is none."""
        known = self._services.get(service)
        if known is None:
            raise Unimplemented(f"service {service}")
        handler = known.get(method)
        if handler is None:
            raise Unimplemented(f"method {method}")
        return handler

    async def serve_unix(self, path: str, *, mode: int = 0o600, replace: bool = True) -> None:
        """Bind and serve; returns when connections are accepted. Raises AlreadyExists, OSError as `sockets.bind`."""
        sock = sockets.bind(path, mode, replace=replace)
        self._bound.append((path, os.stat(path).st_ino))
        await self.serve_socket(sock)

    async def serve_socket(self, sock: socket.socket) -> None:
        """Serve a socket that listens already (handed over by systemd, say)."""
        loop = asyncio.get_running_loop()
        # from 3.13 on asyncio would remove the file at the end, also when it is the service manager's
        more: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        server = await loop.create_unix_server(
            lambda: _Connection(self, loop), sock=sock, backlog=sockets.BACKLOG, **more
        )
        self._servers.append(server)

    async def close(self, grace: float = 0.0) -> None:
        """Accept nothing more, wait up to `grace` seconds for the calls under way, cancel the rest, remove files."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        for path, inode in self._bound:
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
        self._bound.clear()
        tasks = {task for connection in self._connections for task in connection.tasks}
        if tasks and grace > 0:
            await asyncio.wait(tasks, timeout=grace)
        for connection in list(self._connections):
            connection.close()
        pending = [task for task in tasks if not task.done()]
        if pending:
            await asyncio.wait(pending, timeout=1)

    def report(self, path: str, error: BaseException) -> None:
        """Tell of an exception that nobody expected; the report itself may not do harm."""
        if self._on_error is not None:
            text = "".join(traceback.format_exception(error))
            with contextlib.suppress(Exception):
                self._on_error(path, text)


class _Inbox:
    """The requests that come on one stream, for its handler: an async iterator."""

    __slots__ = ("_connection", "_ended", "_error", "_message", "_queue", "_waiter")

    def __init__(self, connection: _Connection, message: type[Message]) -> None:
        self._connection = connection
        self._message = message
        self._queue: deque[bytes] = deque()
        self._ended = False
        self._error: WherryError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, payload: bytes) -> bool:
        """Keep a message; False when there are too many now."""
        self._queue.append(payload)
        self._wake()
        return len(self._queue) <= MAX_BACKLOG

    def end(self, error: WherryError | None = None) -> None:
        self._ended = True
        self._error = self._error or error
        self._wake()

    @property
    def full(self) -> bool:
        return len(self._queue) > MAX_BACKLOG

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        while not self._queue:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        payload = self._queue.popleft()
        self._connection.relieve()
        return _parse(self._message, payload)


def _parse(message: type[Message], payload: bytes) -> Message:
    try:
        return message.FromString(payload)
    except DecodeError as error:
        raise InvalidArgument(f"ttrpc: error unmarshalling payload: {error}") from error


class _Connection(asyncio.Protocol):
    """One peer."""

    def __init__(self, server: TtrpcServer, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._state = ServerConnection()
        self._transport: asyncio.Transport | None = None
        self._inboxes: dict[int, _Inbox] = {}
        self._drained: asyncio.Event | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self.tasks: set[asyncio.Task[None]] = set()

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH)
        self._server._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server._connections.discard(self)
        if self._stalled is not None:
            self._stalled.cancel()
        for inbox in self._inboxes.values():
            inbox.end(Cancelled("context canceled"))
        for task in self.tasks:
            task.cancel()
        if self._drained is not None:
            self._drained.set()

    def data_received(self, data: bytes) -> None:
        try:
            events = self._state.receive(data)
        except ProtocolError:
            self.close()
            return
        for event in events:
            if type(event) is Call:
                self._call(event)
            elif type(event) is Payload:
                self._payload(event)
            elif type(event) is Reply:
                self._write(event.data)

    def pause_writing(self) -> None:
        # a peer that doesn't take its answers gets to ask no more questions
        self._drained = asyncio.Event()
        self._update_reading()

    def resume_writing(self) -> None:
        if self._drained is not None:
            self._drained.set()
            self._drained = None
        self._update_reading()

    def close(self) -> None:
        """Drop the peer; its calls are cancelled."""
        if self._transport is not None:
            self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._transport is not None and data:
            self._transport.write(data)

    def _update_reading(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._drained is not None or self._stalled is not None:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    # -- streams that come faster than they are taken

    def _stall(self) -> None:
        if self._stalled is None:
            self._stalled = self._loop.call_later(STALL_SECONDS, self._fail_full)
            self._update_reading()

    def _fail_full(self) -> None:
        self._stalled = None
        for stream_id, inbox in list(self._inboxes.items()):
            if inbox.full:
                error = ResourceExhausted("stream buffer full")
                self._write(self._state.fail(stream_id, error.code, error.message))
                del self._inboxes[stream_id]
                inbox.end(error)
        self._update_reading()

    def relieve(self) -> None:
        """A message was taken from an inbox: read on where that was what stopped it."""
        if self._stalled is not None and not any(inbox.full for inbox in self._inboxes.values()):
            self._stalled.cancel()
            self._stalled = None
            self._update_reading()

    # -- calls

    def _call(self, call: Call) -> None:
        stream_id = call.stream_id
        try:
            handler = self._server.find(call.service, call.method)
            if len(self.tasks) >= MAX_CALLS:
                raise ResourceExhausted(f"more than {MAX_CALLS} calls at once on one connection")
        except WherryError as error:
            self._write(self._state.fail(stream_id, error.code, error.message))
            return
        deadline = None
        if call.timeout_nano:
            deadline = time.monotonic() + call.timeout_nano / 1e9
        context = Context(call.metadata, deadline, "ttrpc")
        if handler.method.client_streaming:
            # now, not in the task: its messages may be in the same read
            inbox = self._inboxes[stream_id] = _Inbox(self, handler.method.request)
            if call.payload:
                inbox.put(call.payload)
            if not call.opened:
                inbox.end()
        work = self._unary(call, handler, context) if handler.unary else self._stream(call, handler, context)
        task = self._loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _payload(self, event: Payload) -> None:
        inbox = self._inboxes.get(event.stream_id)
        if inbox is None:
            return
        if event.payload is not None and not inbox.put(event.payload):
            self._stall()
        if event.end:
            inbox.end()

    async def _unary(self, call: Call, handler: _Handler, context: Context) -> None:
        try:
            async with _deadline(context):
                request = _parse(handler.method.request, call.payload)
                response = await handler.function(request, context)
                data = self._state.answer(call.stream_id, response.SerializeToString())
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises becomes the answer
            data = self._failure(call, error)
        self._write(data)

    async def _stream(self, call: Call, handler: _Handler, context: Context) -> None:
        method, stream_id = handler.method, call.stream_id
        try:
            async with _deadline(context):
                argument = self._inboxes[stream_id] if method.client_streaming else _parse(method.request, call.payload)
                if method.server_streaming:
                    async with contextlib.aclosing(handler.function(argument, context)) as responses:
                        async for response in responses:
                            await self._send(stream_id, response)
                    data = self._state.finish(stream_id)
                else:
                    response = await handler.function(argument, context)
                    data = self._state.answer(stream_id, response.SerializeToString())
        except BaseException as error:  # noqa: BLE001 - whatever a handler raises becomes the answer
            data = self._failure(call, error)
        finally:
            self._inboxes.pop(stream_id, None)
            self.relieve()
        self._write(data)

    async def _send(self, stream_id: int, response: Message) -> None:
        if self._transport is None:
            raise Cancelled("context canceled")
        self._write(self._state.send(stream_id, response.SerializeToString()))
        if self._drained is not None:
            await self._drained.wait()

    def _failure(self, call: Call, error: BaseException) -> bytes:
        """The bytes that tell a caller of an exception; unexpected ones are reported, an end of ours goes on."""
        if isinstance(error, WherryError):
            code, message = int(error.code), error.message
        elif isinstance(error, TimeoutError):
            code, message = Code.DEADLINE_EXCEEDED, "context deadline exceeded"
        elif isinstance(error, asyncio.CancelledError):
            code, message = Code.CANCELLED, "context canceled"
        else:
            path = f"/{call.service}/{call.method}"
            self._server.report(path, error)
            if not isinstance(error, Exception):
                raise error
            code, message = Code.INTERNAL, f"{path}: {type(error).__name__}: {error}"
        return self._state.fail(call.stream_id, code, message)


def _deadline(context: Context) -> contextlib.AbstractAsyncContextManager[object]:
    return contextlib.nullcontext() if context.deadline is None else asyncio.timeout(context.remaining())
