"""The gRPC door: services without a transport, served to gRPC clients over HTTP/2 on a unix socket.

It is our own and not grpcio's server: that one has a thread for its sockets, which wakes the loop for each step of
a call. It took more than half of the daemon's time, and it can't take over a listening socket. What goes over the
wire is the protocol of gRPC over HTTP/2 (PROTOCOL-HTTP2.md of the gRPC project):

    request   HEADERS(:path /package.Service/Method, grpc-timeout, metadata…) DATA(flag, 4 bytes length, message)…
    response  HEADERS(:status 200) DATA… HEADERS(grpc-status, grpc-message)

Errors become a status here, once; the caller's metadata and deadline become a `Context`; where the caller goes away,
the handler's task is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Final, cast

import structlog
from google.protobuf.message import DecodeError, Message

from wherry.core.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unimplemented,
    WherryError,
)
from wherry.daemon import hpack, http2, logs
from wherry.daemon.addresses import own, short_path, tight_umask
from wherry.proto.service import Context, Method, methods

log = structlog.get_logger(__name__)

_PREFIX: Final = struct.Struct(">BL")
_BACKLOG: Final = 512
# bytes of one client that wait to be sent, above which its calls wait and its requests aren't read
_WRITE_HIGH: Final = 1 << 20
# seconds that an answer to a client's ping may wait for a response to travel with. Go's client pings with nearly each
# call, to measure; answered at once it would be woken, and again a moment later by the response.
_PING_DELAY: Final = 0.002
# complete messages of one stream that wait for their handler; beyond it the client's window isn't refilled
_INBOX_BYTES: Final = 1 << 20
_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_OK_HEADERS: Final = hpack.encode([(":status", "200"), ("content-type", "application/grpc")])
_OK_TRAILERS: Final = hpack.encode([("grpc-status", "0"), ("grpc-message", "")])


class _Handler:
    """A method with the function that implements it."""

    __slots__ = ("function", "method", "unary")

    def __init__(self, method: Method, function: Callable[..., Any]) -> None:
        self.method = method
        self.function = function
        self.unary = not (method.client_streaming or method.server_streaming)


class GrpcServer:
    """The server: `serve_unix` or `serve_socket`, then `stop`."""

    def __init__(self, services: Iterable[object], *, max_receive: int, max_send: int) -> None:
        """`services` as wherry.proto.service describes them; sizes in bytes of one message."""
        self.max_receive = max_receive
        self.max_send = max_send
        self._handlers: dict[str, _Handler] = {}
        self._names: set[str] = set()
        self._servers: list[asyncio.Server] = []
        self._bound: list[tuple[str, int]] = []
        self.connections: set[_Connection] = set()
        for service in services:
            self._add(service)

    def _add(self, service: object) -> None:
        """A method that the object lacks answers UNIMPLEMENTED."""
        name: str = service.SERVICE  # type: ignore[attr-defined]
        self._names.add(name)
        for method in methods(name).values():
            if (function := getattr(service, method.attribute, None)) is not None:
                self._handlers[method.path] = _Handler(method, function)

    def find(self, path: str) -> _Handler:
        """The handler for a path. Raises Unimplemented in the words of Go's servers."""
        handler = self._handlers.get(path)
        if handler is None:
            service, _, name = path.lstrip("/").partition("/")
            raise Unimplemented(
                f"unknown method {name} for service {service}"
                if service in self._names
                else f"unknown service {service}"
            )
        return handler

    async def serve_unix(self, path: str, *, uid: int = 0, gid: int = 0) -> None:
        """Listen on a unix socket, with its mode and owner before anybody can connect.

        The caller holds the address's lock: whatever is at the path is replaced. Raises OSError with the path.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            with short_path(path) as short:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(short)
                with tight_umask():
                    sock.bind(short)
                own(short, uid=uid, gid=gid)
            self._bound.append((path, os.stat(path).st_ino))
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"can't listen on {path}: {error.strerror}") from error
        await self.serve_socket(sock)

    async def serve_socket(self, sock: socket.socket) -> None:
        """Serve a socket that is bound, or listens already (handed over by systemd)."""
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: _Connection(self, loop), sock=sock, backlog=_BACKLOG)
        self._servers.append(server)

    async def stop(self, grace: float) -> None:
        """Take no more calls; give those that run `grace` seconds, then cancel them. Files that were bound go."""
        for server in self._servers:
            server.close()
        for path, inode in self._bound:
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
        for connection in self.connections:
            connection.refuse_more()
        tasks = {call.task for connection in self.connections for call in connection.calls.values() if call.task}
        if tasks:
            await asyncio.wait(tasks, timeout=grace)
        for connection in tuple(self.connections):
            connection.close()
        if pending := [task for task in tasks if not task.done()]:
            await asyncio.wait(pending, timeout=1)


class _Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: GrpcServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.loop = loop
        self.http = http2.Connection()
        self.calls: dict[int, _Call] = {}
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._flush_at: asyncio.Handle | None = None

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH)
        self.server.connections.add(self)
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.server.connections.discard(self)
        for call in tuple(self.calls.values()):
            call.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            events = self.http.receive(data)
        except http2.ProtocolError as error:
            self.http.goaway(error.code, str(error))
            self.flush()
            self.close()
            return
        for event in events:
            if type(event) is http2.Request:
                self._request(event)
            elif type(event) is http2.Body:
                self._body(event)
            elif type(event) is http2.Reset:
                if (call := self.calls.get(event.stream)) is not None:
                    call.cancel()
            elif type(event) is http2.Writable:
                for call in tuple(self.calls.values()):
                    call.push()
        if self.http.urgent:
            self.flush()
        elif self._flush_at is None and self.http.pending:
            self._flush_at = self.loop.call_later(_PING_DELAY, self.flush)

    def pause_writing(self) -> None:
        # a client that doesn't take its answers gets to ask no more questions
        self._paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        if self._transport is not None:
            self._transport.resume_reading()
        for call in tuple(self.calls.values()):
            call.push()
        self.flush()

    @property
    def writable(self) -> bool:
        """Whether more may be handed to the transport."""
        return not self._paused and self._transport is not None

    def flush(self) -> None:
        """Send what has collected."""
        if self._flush_at is not None:
            self._flush_at.cancel()
            self._flush_at = None
        data = self.http.take()
        if data and self._transport is not None:
            self._transport.write(data)

    def flush_soon(self) -> None:
        """Send what has collected when the tasks that can run now have run, which may have more to say."""
        if self._flush_at is not None:
            self._flush_at.cancel()
        self._flush_at = self.loop.call_soon(self.flush)

    def refuse_more(self) -> None:
        """The server stops: the client is to open no more streams."""
        self.http.goaway()
        self.flush()

    def close(self) -> None:
        """Hang up, after what was written."""
        if self._transport is not None:
            self._transport.close()

    # -- calls

    def _request(self, event: http2.Request) -> None:
        fields = dict(reversed(event.fields))  # of a name that is repeated, the first
        call = _Call(self, event.stream)
        content_type = fields.get("content-type", "")
        if fields.get(":method") != "POST" or not content_type.startswith("application/grpc"):
            self.http.headers(event.stream, hpack.encode([(":status", "415")]), end=True)
            return
        self.calls[event.stream] = call
        try:
            call.begin(self.server.find(fields.get(":path", "")), fields)
        except WherryError as error:
            call.finish(error)
            return
        if event.end:
            call.feed(b"", 0, end=True)

    def _body(self, event: http2.Body) -> None:
        call = self.calls.get(event.stream)
        if call is None:
            self.http.taken(0, event.size)
            return
        call.feed(event.data, event.size, end=event.end)


class _Call:
    """One call: its messages in, its answers out."""

    def __init__(self, connection: _Connection, stream: int) -> None:
        self._connection = connection
        self._http = connection.http
        self._stream = stream
        self._handler: _Handler | None = None
        self._context = Context()
        self.task: asyncio.Task[None] | None = None
        self._began = time.perf_counter()
        # in
        self._rest = bytearray()  # of a message that is not whole yet
        self._inbox: deque[bytes] = deque()
        self._inbox_bytes = 0
        self._owed = 0  # bytes whose room the client gets back when its messages are taken
        self._ended = False
        self._arrived: asyncio.Future[None] | None = None
        # out
        self._headers_sent = False
        self._outbox: deque[memoryview] = deque()
        self._trailers: bytes | None = None
        self._drained: asyncio.Future[None] | None = None

    # -- in

    def begin(self, handler: _Handler, fields: dict[str, str]) -> None:
        """The headers are here. Raises InvalidArgument, Unimplemented."""
        self._handler = handler
        if fields.get("grpc-encoding", "identity") != "identity":
            raise Unimplemented(f"grpc: Decompressor is not installed for grpc-encoding {fields['grpc-encoding']!r}")
        deadline = None
        if (text := fields.get("grpc-timeout")) is not None:
            if (match := _TIMEOUT.fullmatch(text)) is None:
                raise InvalidArgument(f"malformed grpc-timeout: {text!r}")
            deadline = time.monotonic() + int(match[1]) * _UNITS[match[2]]
        metadata = {
            key: value
            for key, value in fields.items()
            if key[0] != ":" and not key.endswith("-bin") and key[:5] != "grpc-"
        }
        self._context = Context(metadata, deadline, "grpc")
        if not handler.unary:
            self._start(self._run_stream())

    def feed(self, data: bytes, size: int, *, end: bool) -> None:
        """Bytes of the request; `size` of them count for flow control."""
        if self._handler is None or (self.task is not None and self.task.done()):
            self._http.taken(self._stream, size)
            return
        self._rest += data
        self._owed += size
        try:
            self._split()
        except WherryError as error:
            if self.task is not None:
                self.task.cancel()
            self.finish(error)
            return
        self._ended = self._ended or end
        if self._inbox_bytes < _INBOX_BYTES:
            self._give_back()
        if self._handler.unary:
            if self._ended and self.task is None:
                self._start(self._run_unary())
        elif self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def _split(self) -> None:
        """Move whole messages to the inbox. Raises ResourceExhausted, Unimplemented."""
        rest = self._rest
        while len(rest) >= 5:
            compressed, length = _PREFIX.unpack_from(rest)
            if compressed:
                raise Unimplemented("grpc: compressed message without grpc-encoding")
            if length > self._connection.server.max_receive:
                limit = self._connection.server.max_receive
                raise ResourceExhausted(f"grpc: received message larger than max ({length} vs. {limit})")
            if len(rest) < 5 + length:
                return
            self._inbox.append(bytes(rest[5 : 5 + length]))
            self._inbox_bytes += length
            del rest[: 5 + length]

    def _give_back(self) -> None:
        self._http.taken(self._stream, self._owed)
        self._owed = 0

    def _parse(self, data: bytes) -> Message:
        handler = cast("_Handler", self._handler)
        request = handler.method.request
        try:
            return request.FromString(data)
        except DecodeError as error:
            path = handler.method.path
            raise InvalidArgument(f"{path}: the request is no {request.DESCRIPTOR.full_name}: {error}") from None

    async def _requests(self) -> AsyncIterator[Message]:
        """The messages of a stream of requests, as they come."""
        while True:
            while not self._inbox:
                if self._ended:
                    if self._rest:
                        raise InvalidArgument("the stream ends within a message")
                    return
                self._arrived = self._connection.loop.create_future()
                await self._arrived
            data = self._inbox.popleft()
            self._inbox_bytes -= len(data)
            if self._owed and self._inbox_bytes < _INBOX_BYTES:
                self._give_back()
                self._connection.flush()
            yield self._parse(data)

    # -- the handler

    def _start(self, work: Any) -> None:
        self.task = self._connection.loop.create_task(work)

    async def _run_unary(self) -> None:
        handler = cast("_Handler", self._handler)
        try:
            request = self._parse(self._only())
            async with _within(self._context):
                response = await handler.function(request, self._context)
            self._answer(response)
        except BaseException as error:  # noqa: BLE001 -- the edge: whatever it is becomes a status, and is logged
            self._fail(error)

    async def _run_stream(self) -> None:
        handler = cast("_Handler", self._handler)
        method = handler.method
        try:
            async with _within(self._context):
                requests = self._requests()
                argument = requests if method.client_streaming else await anext(requests, None)
                if argument is None:
                    raise InvalidArgument(f"{method.path}: a call without a request")
                if not method.server_streaming:
                    self._answer(await cast("Awaitable[Message]", handler.function(argument, self._context)))
                    return
                # a generator that is left half-way lets go of what it holds now, not when it is collected
                async with contextlib.aclosing(handler.function(argument, self._context)) as responses:
                    async for response in responses:
                        self._queue(response)
                        self.push()
                        self._connection.flush_soon()
                        if self._outbox or not self._connection.writable:
                            await self._sent()
            self.finish(None)
        except BaseException as error:  # noqa: BLE001 -- as above
            self._fail(error)

    def _only(self) -> bytes:
        """The request of a call that has one. Raises InvalidArgument."""
        if len(self._inbox) != 1 or self._rest:
            raise InvalidArgument(f"{cast('_Handler', self._handler).method.path}: expected one request, whole")
        return self._inbox[0]

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            error = Cancelled("context canceled")
        elif isinstance(error, TimeoutError):
            error = DeadlineExceeded(f"{error}: deadline exceeded" if str(error) else "context deadline exceeded")
        elif not isinstance(error, WherryError):
            path = cast("_Handler", self._handler).method.path
            log.error("call failed", method=path, exc_info=error)
            if not isinstance(error, Exception):
                raise error
            error = WherryError(f"{path}: {type(error).__name__}: {error}")
        self.finish(error)

    def cancel(self) -> None:
        """The client is gone, or gave the call up."""
        self._connection.calls.pop(self._stream, None)
        if self.task is not None:
            self.task.cancel()

    # -- out

    def _answer(self, response: Message) -> None:
        self._queue(response)
        self.finish(None)

    def _queue(self, response: Message) -> None:
        payload = response.SerializeToString()
        if len(payload) > self._connection.server.max_send:
            limit = self._connection.server.max_send
            raise ResourceExhausted(f"grpc: trying to send message larger than max ({len(payload)} vs. {limit})")
        if not self._headers_sent and self._stream in self._connection.calls:
            self._http.headers(self._stream, _OK_HEADERS, end=False)
            self._headers_sent = True
        self._outbox.append(memoryview(_PREFIX.pack(0, len(payload)) + payload))

    def finish(self, error: WherryError | None) -> None:
        """The answer is complete; with an error, what was not sent yet is dropped."""
        self._log(error)
        if self._stream not in self._connection.calls:
            return  # nobody listens any more
        if error is None:
            if not self._headers_sent:  # a stream without any message still answers with headers
                self._http.headers(self._stream, _OK_HEADERS, end=False)
                self._headers_sent = True
            self._trailers = _OK_TRAILERS
        else:
            self._outbox.clear()
            fields = [("grpc-status", str(int(error.code))), ("grpc-message", _percent(error.message))]
            if not self._headers_sent:
                fields = [(":status", "200"), ("content-type", "application/grpc"), *fields]
            self._trailers = hpack.encode(fields)
        self.push()
        self._connection.flush()

    def _log(self, error: WherryError | None) -> None:
        if self._handler is not None and logs.is_debug():
            took = round((time.perf_counter() - self._began) * 1000, 3)
            code = "OK" if error is None else type(error).__name__
            log.debug("call", method=self._handler.method.path, ms=took, code=code)

    def push(self) -> None:
        """Put as much on the wire as the windows allow."""
        while self._outbox and self._connection.writable:
            size = min(self._http.room(self._stream), self._http.frame)
            if size <= 0:
                return
            piece = self._outbox[0]
            self._http.data(self._stream, piece[:size])
            if size < len(piece):
                self._outbox[0] = piece[size:]
            else:
                self._outbox.popleft()
        if self._outbox:
            return
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self._trailers is not None and self._connection.calls.pop(self._stream, None) is not None:
            self._http.headers(self._stream, self._trailers, end=True)

    async def _sent(self) -> None:
        """Wait until the outbox is empty."""
        while self._outbox or not self._connection.writable:
            self._drained = self._connection.loop.create_future()
            await self._drained


def _within(context: Context) -> contextlib.AbstractAsyncContextManager[object]:
    return contextlib.nullcontext() if context.deadline is None else asyncio.timeout(context.remaining())


def _percent(text: str) -> str:
    """A status's message as gRPC wants it: printable ASCII but `%` as it is, other bytes as %XX."""
    if text.isascii() and text.isprintable() and "%" not in text:
        return text
    return "".join(chr(byte) if 0x20 <= byte < 0x7F and byte != 0x25 else f"%{byte:02X}" for byte in text.encode())
