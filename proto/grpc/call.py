"""One call of the gRPC door: its messages in, its handler, its answers out.

What a client can make the daemon hold is bounded here: what it sent and no handler took yet, and what it was answered
and didn't take yet, by stream (the windows of HTTP/2) and by connection (the limits below).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

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
from wherry.proto.grpc import hpack, http2
from wherry.proto.service import Context, Method

if TYPE_CHECKING:
    from wherry.proto.grpc.server import Connection

log = structlog.get_logger(__name__)

_PREFIX: Final = struct.Struct(">BL")
# messages of one stream that wait for their handler, in bytes; beyond it the client's window isn't refilled
_INBOX_BYTES: Final = 1 << 20
# what a message counts beside its bytes, so that empty ones are bounded too
_MESSAGE_OVERHEAD: Final = 64
# a stream's room is given back in pieces of this size: fewer frames, and never less than half of the window is open
_REFILL: Final = http2.STREAM_WINDOW // 2
# bytes of one client's requests that no handler has taken yet, over all its calls: sixteen of the largest messages
RECEIVE_LIMIT: Final = 256 << 20
# bytes of answers that one client has asked for and not taken, over all its calls
SEND_LIMIT: Final = 256 << 20
# collected bytes that go to the socket before more is collected
_FLUSH_BYTES: Final = 256 << 10
# characters of an error's text on the wire: gRPC's C core refuses all trailers together from 8 KiB on
_LONGEST_TEXT: Final = 4096
_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_OK_HEADERS: Final = hpack.encode([(":status", "200"), ("content-type", "application/grpc")])
_OK_TRAILERS: Final = hpack.encode([("grpc-status", "0"), ("grpc-message", "")])


class Handler:
    """A method with the function that implements it."""

    __slots__ = ("function", "method", "unary")

    def __init__(self, method: Method, function: Callable[..., Any]) -> None:
        self.method = method
        self.function = function
        self.unary = not (method.client_streaming or method.server_streaming)


class Call:
    """One stream of HTTP/2, from its headers to its trailers."""

    def __init__(self, connection: Connection, stream: int) -> None:
        self._connection = connection
        self._http = connection.http
        self._stream = stream
        self._handler: Handler | None = None
        self._context = Context()
        self.task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._began = time.perf_counter()
        self._logged = False
        # in
        self._rest = bytearray()  # of a message that is not whole yet
        self._inbox: deque[bytes] = deque()
        self._inbox_bytes = 0
        self._held = 0  # what this call has of the connection's RECEIVE_LIMIT
        self._owed = 0  # bytes whose room the client gets back when its messages are taken
        self._ended = False
        self._arrived: asyncio.Future[None] | None = None
        # out
        self._headers_sent = False
        self._outbox: deque[memoryview] = deque()
        self._trailers: bytes | None = None
        self._drained: asyncio.Future[None] | None = None

    # -- in

    def begin(self, handler: Handler, grpc: Mapping[str, str], metadata: Mapping[str, str]) -> None:
        """The headers are here: those that are gRPC's, and the caller's. Raises InvalidArgument, Unimplemented."""
        self._handler = handler
        if grpc.get("grpc-encoding", "identity") != "identity":
            raise Unimplemented(f"grpc: Decompressor is not installed for grpc-encoding {grpc['grpc-encoding']!r}")
        deadline = None
        if (text := grpc.get("grpc-timeout")) is not None:
            if (match := _TIMEOUT.fullmatch(text)) is None:
                raise InvalidArgument(f"malformed grpc-timeout: {text!r}")
            deadline = time.monotonic() + int(match[1]) * _UNITS[match[2]]
            # a timer and not a timeout around the handler: it also ends a request that never becomes whole, an answer
            # that is never taken, and it doesn't wait for a handler that is slow to clean up
            self._timer = self._connection.loop.call_at(deadline, self._expire)
        self._context = Context(metadata, deadline, "grpc")
        if not handler.unary:
            self._start(self._run_stream())

    def feed(self, data: bytes, size: int, *, end: bool) -> None:
        """Bytes of the request; `size` of them count for flow control."""
        if self._handler is None or (self.task is not None and self.task.done()):
            self._http.taken(self._stream, size)
            return
        try:
            if not (end and self._whole(data)):
                self._hold(len(data))
                self._rest += data
                self._split()
        except WherryError as error:
            self.abort(error)
            return
        self._ended = self._ended or end
        self._owed += size
        if self._owed >= _REFILL and self._inbox_bytes < _INBOX_BYTES:
            self._give_back()
        if self._handler.unary:
            if self._ended and self.task is None:
                self._start(self._run_unary())
        elif self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    def _whole(self, data: bytes) -> bool:
        """The common case: all of a unary request in one frame, which goes to its handler without another copy."""
        if len(data) < 5 or self._rest or self._inbox:
            return False
        compressed, length = _PREFIX.unpack_from(data)
        if compressed or length != len(data) - 5 or length > self._connection.server.max_receive:
            return False
        self._inbox.append(data[5:])
        return True

    def _hold(self, size: int) -> None:
        """Count bytes that wait for a handler. Raises ResourceExhausted."""
        if self._connection.held + size > RECEIVE_LIMIT:
            raise ResourceExhausted(f"grpc: more than {RECEIVE_LIMIT} bytes of one client's requests wait")
        self._held += size
        self._connection.held += size

    def _split(self) -> None:
        """Move whole messages to the inbox. Raises ResourceExhausted, Unimplemented, InvalidArgument."""
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
            with memoryview(rest) as view:
                self._inbox.append(bytes(view[5 : 5 + length]))
            self._inbox_bytes += length + _MESSAGE_OVERHEAD
            del rest[: 5 + length]
            if len(self._inbox) > 1 and cast("Handler", self._handler).unary:
                raise InvalidArgument(f"{self._path()}: a second message in a call that takes one")

    def _give_back(self) -> None:
        self._http.taken(self._stream, self._owed)
        self._owed = 0

    def _parse(self, data: bytes) -> Message:
        request = cast("Handler", self._handler).method.request
        try:
            return request.FromString(data)
        except DecodeError as error:
            raise InvalidArgument(
                f"{self._path()}: the request is no {request.DESCRIPTOR.full_name}: {error}"
            ) from None

    async def next_request(self) -> Message:
        """The next message of a stream of requests. Raises StopAsyncIteration, InvalidArgument."""
        while not self._inbox:
            if self._ended:
                if self._rest:
                    raise InvalidArgument(f"{self._path()}: the stream ends within a message")
                raise StopAsyncIteration
            self._arrived = self._connection.loop.create_future()
            await self._arrived
        data = self._inbox.popleft()
        if self._inbox_bytes:
            self._inbox_bytes -= len(data) + _MESSAGE_OVERHEAD
        taken = min(self._held, len(data) + 5)
        self._held -= taken
        self._connection.held -= taken
        if self._owed >= _REFILL and self._inbox_bytes < _INBOX_BYTES:
            self._give_back()
            self._connection.flush_soon()
        return self._parse(data)

    # -- the handler

    def _path(self) -> str:
        return "" if self._handler is None else self._handler.method.path

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self.task = self._connection.loop.create_task(work)

    async def _run_unary(self) -> None:
        handler = cast("Handler", self._handler)
        try:
            if len(self._inbox) != 1 or self._rest:
                raise InvalidArgument(f"{self._path()}: expected one request, whole")
            request = self._parse(self._inbox.popleft())
            self._answer(await handler.function(request, self._context))
        except BaseException as error:  # noqa: BLE001 -- the edge: whatever it is becomes a status, and is logged
            self._fail(error)

    async def _run_stream(self) -> None:
        handler = cast("Handler", self._handler)
        method = handler.method
        try:
            argument: object = _Requests(self)
            if not method.client_streaming:
                argument = await anext(cast("_Requests", argument), None)
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
                    if self._http.pending >= _FLUSH_BYTES:  # a handler that never waits would never let it go out
                        self._connection.flush()
                        await asyncio.sleep(0)
                    else:
                        self._connection.flush_soon()
                    if self._outbox or not self._connection.writable:
                        await self._sent()
            self.finish(None)
        except BaseException as error:  # noqa: BLE001 -- as above
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, asyncio.CancelledError):
            error = Cancelled("context canceled")
        elif isinstance(error, TimeoutError):
            error = DeadlineExceeded(f"{error}: deadline exceeded" if str(error) else "context deadline exceeded")
        elif not isinstance(error, WherryError):
            log.error("call failed", method=self._path(), exc_info=error)
            if not isinstance(error, Exception):
                raise error
            error = WherryError(f"{self._path()}: {type(error).__name__}: {error}")
        self.finish(error)

    def _expire(self) -> None:
        self._timer = None
        self.abort(DeadlineExceeded("context deadline exceeded"))

    def abort(self, error: WherryError) -> None:
        """Answer with an error now, and cancel the handler."""
        self.finish(error)
        self._leave()

    def cancel(self) -> None:
        """The client is gone, or gave the call up."""
        self._end()
        self._leave()

    def _leave(self) -> None:
        """Cancel the handler, which counts as a call of its client's until it has cleaned up."""
        if self.task is not None and not self.task.done():
            self._connection.leaving += 1
            self.task.add_done_callback(self._connection.left)
            self.task.cancel()

    def _end(self) -> bool:
        """The stream is over: let go of what it holds; whether it was open."""
        if not self._connection.drop(self._stream):
            return False
        if self._timer is not None:
            self._timer.cancel()
        self._connection.held -= self._held
        self._held = 0
        self._clear()
        return True

    def _clear(self) -> None:
        """Drop what was not sent yet."""
        self._connection.unsent -= sum(map(len, self._outbox))
        self._outbox.clear()

    # -- out

    def _answer(self, response: Message) -> None:
        self._queue(response)
        self.finish(None)

    def _queue(self, response: Message) -> None:
        """Raises ResourceExhausted."""
        payload = response.SerializeToString()
        if len(payload) > self._connection.server.max_send:
            limit = self._connection.server.max_send
            raise ResourceExhausted(f"grpc: trying to send message larger than max ({len(payload)} vs. {limit})")
        if self._stream not in self._connection.calls:
            return  # nobody listens any more
        if self._connection.unsent + len(payload) > SEND_LIMIT:
            raise ResourceExhausted(f"grpc: the client has {self._connection.unsent} bytes of answers waiting")
        self._send_headers()
        self._outbox.append(memoryview(_PREFIX.pack(0, len(payload)) + payload))
        self._connection.unsent += len(payload) + 5

    def _send_headers(self) -> None:
        if not self._headers_sent:
            self._http.headers(self._stream, _OK_HEADERS, end=False)
            self._headers_sent = True

    def finish(self, error: WherryError | None) -> None:
        """The answer is complete; with an error, what was not sent yet is dropped."""
        self._log(error)
        if self._stream not in self._connection.calls:
            return  # nobody listens any more
        if error is None:
            self._send_headers()  # also a stream without any message answers with headers
            self._trailers = _OK_TRAILERS
        else:
            self._clear()
            self._trailers = _error_fields(error, headers=not self._headers_sent)
        self.push()
        self._connection.flush()

    def _log(self, error: WherryError | None) -> None:
        if self._handler is not None and self._connection.server.logs_calls() and not self._logged:
            self._logged = True
            took = round((time.perf_counter() - self._began) * 1000, 3)
            code = "OK" if error is None else type(error).__name__
            log.debug("call", method=self._handler.method.path, ms=took, code=code)

    def push(self) -> None:
        """Put as much on the wire as the windows allow."""
        http, connection = self._http, self._connection
        while self._outbox and connection.writable:
            size = min(http.room(self._stream), http.frame)
            if size <= 0:
                return
            piece = self._outbox[0]
            if size < len(piece):
                http.data(self._stream, piece[:size])
                self._outbox[0] = piece[size:]
                connection.unsent -= size
            else:
                http.data(self._stream, piece)
                self._outbox.popleft()
                connection.unsent -= len(piece)
            if http.pending >= _FLUSH_BYTES:
                connection.flush()
        if self._outbox:
            return
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self._trailers is not None and self._end():
            http.headers(self._stream, self._trailers, end=True)

    async def _sent(self) -> None:
        """Wait until the outbox is empty."""
        while self._outbox or not self._connection.writable:
            self._drained = self._connection.loop.create_future()
            await self._drained


class _Requests:
    """The messages of a stream of requests, as they come; no generator, which would have to be closed."""

    __slots__ = ("_call",)

    def __init__(self, call: Call) -> None:
        self._call = call

    def __aiter__(self) -> AsyncIterator[Message]:
        return self

    async def __anext__(self) -> Message:
        return await self._call.next_request()


def _error_fields(error: WherryError, *, headers: bool) -> bytes:
    """The trailers for an error; with `headers` they are the whole answer."""
    fields = [("grpc-status", str(int(error.code))), ("grpc-message", percent(error.message))]
    if headers:
        fields = [(":status", "200"), ("content-type", "application/grpc"), *fields]
    if isinstance(error, Unimplemented):
        fields.append(("grpc-accept-encoding", "identity"))
    return hpack.encode(fields)


def percent(text: str) -> str:
    """A status's message as gRPC wants it: printable ASCII but `%` as it is, other bytes as %XX.

    A text that would be longer than clients take loses its middle: kinds of errors are named at the end.
    """
    if (
        text.isascii()
        and text.isprintable()
        and "%" not in text
        and len(text) <= _LONGEST_TEXT
        and text == text.strip()
    ):
        return text
    keep = _LONGEST_TEXT
    while len(encoded := _escape(text)) > _LONGEST_TEXT:
        keep = keep * 3 // 4
        text = f"{text[: keep * 3 // 4]} ... {text[-keep // 4 :]}" if len(text) > keep else text
    return encoded


def _escape(text: str) -> str:
    data = text.encode(errors="backslashreplace")  # paths may hold bytes that are no UTF-8
    inner = "".join(chr(byte) if 0x20 <= byte < 0x7F and byte != 0x25 else f"%{byte:02X}" for byte in data)
    # a field's value neither begins nor ends with a space (RFC 9113, 8.2.1)
    if inner[:1] == " ":
        inner = "%20" + inner[1:]
    return inner[:-1] + "%20" if inner[-1:] == " " else inner
