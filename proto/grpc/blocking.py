"""A gRPC client for unix sockets without asyncio, threads of its own or grpcio: what asks other people's plugins.

Any thread may call. A connection carries one call at a time; as many are opened as there are calls at once, and kept
for the next ones. A call is never sent twice: a connection that the server has ended is found out before it is used.

The protocol is that of PROTOCOL-HTTP2.md of the gRPC project, the client's side of `server.py`.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Final
from urllib.parse import unquote

from google.protobuf.message import Message

from wherry.core.errors import (
    DeadlineExceeded,
    Internal,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
    WherryError,
    from_code,
)
from wherry.proto.grpc import hpack, http2
from wherry.proto.grpc.http2 import frame
from wherry.proto.service import Method
from wherry.proto.ttrpc import sockets
from wherry.proto.ttrpc.calls import find_method, parse_response

CONNECT_SECONDS: Final = 10.0
# idle connections that are kept
_KEPT: Final = 4
_READ: Final = 1 << 16
# what the server may send before it hears that it was taken: of a stream, and of the connection
_WINDOW: Final = 1 << 20
_PREFIX: Final = struct.Struct(">BL")
_SETTINGS_FIELD: Final = struct.Struct(">HL")
_NO_PUSH, _INITIAL_WINDOW, _FRAME_SIZE = 2, 4, 5
_DEFAULT_WINDOW: Final = 65_535
# the code of gRPC where a server answers with HTTP's status alone (http-grpc-status-mapping.md)
_OF_HTTP: Final = {"400": 13, "401": 16, "403": 7, "404": 12, "429": 14, "502": 14, "503": 14, "504": 14}


class GrpcClient:
    """Calls the services behind one unix socket; connects at the first call."""

    def __init__(self, address: str, *, max_message: int = 16 << 20) -> None:
        """`address` is a path, with `unix://` before it or not; `max_message` bounds one answer, in bytes."""
        self.path = sockets.strip_scheme(address)
        self._max = max_message
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._closed = False

    def call(
        self,
        service: str,
        name: str,
        request: Message,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Message:
        """Call a method that answers once; `timeout` in seconds.

        Raises the server's error as its WherryError, DeadlineExceeded, Unavailable where nobody is there.
        """
        answers = list(self._run(find_method(service, name), request, timeout, metadata))
        if len(answers) != 1:
            raise Internal(f"/{service}/{name}: {len(answers)} responses where one belongs")
        return answers[0]

    def stream(
        self,
        service: str,
        name: str,
        request: Message,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[Message]:
        """The answers of a method that streams them; errors as of `call`. Leaving it early ends the call."""
        return self._run(find_method(service, name), request, timeout, metadata)

    def close(self) -> None:
        """Close the connections; calls under way end as Unavailable."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for connection in self._busy:
                connection.abort()
        for connection in idle:
            connection.close()

    def _run(
        self, method: Method, request: Message, timeout: float | None, metadata: Mapping[str, str] | None
    ) -> Iterator[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        connection = self._take(deadline)
        done = False
        try:
            stream = connection.request(method.path, request.SerializeToString(), timeout, metadata or {})
            for payload in connection.answers(stream, method.path):
                yield parse_response(method, payload)
            done = True
        except WherryError:
            done = connection.between
            raise
        finally:
            self._give_back(connection, good=done)

    def _take(self, deadline: float | None) -> _Connection:
        with self._lock:
            idle = [*self._idle]
            self._idle.clear()
        chosen = None
        for connection in idle:
            if chosen is None and connection.alive():
                chosen = connection
            elif chosen is None:
                connection.close()
            else:
                self._give_back(connection, good=True)
        if chosen is None:
            left = (
                CONNECT_SECONDS if deadline is None else max(0.001, min(CONNECT_SECONDS, deadline - time.monotonic()))
            )
            chosen = _Connection(self.path, left, self._max)
        chosen.deadline = deadline
        with self._lock:
            self._busy.add(chosen)
            if self._closed:
                chosen.abort()
        return chosen

    def _give_back(self, connection: _Connection, *, good: bool) -> None:
        with self._lock:
            self._busy.discard(connection)
            if good and connection.reusable and not self._closed and len(self._idle) < _KEPT:
                self._idle.append(connection)
                return
        connection.close()


class _Connection:
    """One HTTP/2 connection with one stream at a time."""

    def __init__(self, path: str, timeout: float, max_message: int) -> None:
        self._path = path
        self._max = max_message
        self._socket = sockets.connect(path, timeout)
        self._buffer = bytearray()
        self._decoder = hpack.Decoder()
        self._next = 1
        self._window = _DEFAULT_WINDOW  # what may be sent on the connection
        self._stream_window = _DEFAULT_WINDOW
        self._initial = _DEFAULT_WINDOW
        self._frame = http2.MAX_FRAME
        self._going_away = False
        self.between = True  # no call is under way
        self.deadline: float | None = None
        settings = {_NO_PUSH: 0, _INITIAL_WINDOW: _WINDOW}
        hello = http2.PREFACE + frame(
            http2.SETTINGS, 0, 0, b"".join(_SETTINGS_FIELD.pack(*each) for each in settings.items())
        )
        self._send(hello + frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">L", _WINDOW)))

    @property
    def reusable(self) -> bool:
        """Whether another call may go over it."""
        return self.between and not self._going_away

    def alive(self) -> bool:
        """Take what has come while it was idle (a ping, a farewell); whether it can be used."""
        self.deadline = time.monotonic() + CONNECT_SECONDS
        try:
            while select.select([self._socket], [], [], 0)[0]:
                self._read()
                while (taken := self._next_frame()) is not None:
                    self._housekeeping(*taken)
        except (WherryError, OSError):
            return False
        return not self._going_away

    def abort(self) -> None:
        """From another thread: whoever waits for this connection hears of its end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    # out

    def request(self, path: str, payload: bytes, timeout: float | None, metadata: Mapping[str, str]) -> int:
        """Send a request of one message, whole; its stream."""
        stream, self._next = self._next, self._next + 2
        self.between = False
        self._stream_window = self._initial
        fields = [
            (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost"),
            ("te", "trailers"), ("content-type", "application/grpc"), ("user-agent", "wherry"),
        ]  # fmt: skip
        if timeout is not None:
            fields.append(("grpc-timeout", _timeout(timeout)))
        fields += ((name.lower(), value) for name, value in metadata.items())
        self._send(_header_frames(stream, hpack.encode(fields), self._frame))
        data = memoryview(_PREFIX.pack(0, len(payload)) + payload)
        while True:
            room = min(len(data), self._window, self._stream_window, self._frame)
            end = room == len(data)
            if room > 0 or end:
                self._send(frame(http2.DATA, http2.END_STREAM if end else 0, stream, data[:room]))
                self._window -= room
                self._stream_window -= room
                data = data[room:]
            if end:
                return stream
            if room <= 0:
                self._await_room(stream)

    def _await_room(self, stream: int) -> None:
        while (taken := self._next_frame()) is None:
            self._read()
        kind, _, number, payload = taken
        if kind == http2.RST_STREAM and number == stream:
            raise self._reset(payload)
        self._housekeeping(*taken)

    def _send(self, data: bytes) -> None:
        self._limit()
        try:
            self._socket.sendall(data)
        except TimeoutError as error:
            raise DeadlineExceeded("context deadline exceeded") from error
        except OSError as error:
            raise self._broken(error) from error

    def _broken(self, error: OSError) -> Unavailable:
        return Unavailable(f"{self._path}: the connection broke: {error.strerror}: unavailable")

    def _limit(self) -> None:
        if self.deadline is None:
            self._socket.settimeout(None)
            return
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("context deadline exceeded")
        self._socket.settimeout(left)

    # in

    def answers(self, stream: int, path: str) -> Iterator[bytes]:
        """The messages of the response. Raises what its trailers say."""
        body = bytearray()
        begun = False
        while True:
            while (taken := self._next_frame()) is None:
                self._read()
            kind, flags, number, payload = taken
            if kind == http2.RST_STREAM and number == stream:
                self.between = True
                raise self._reset(payload)
            if kind == http2.HEADERS:
                fields = dict(self._fields(flags, number, payload))
                if number == stream and (flags & http2.END_STREAM or "grpc-status" in fields or not begun):
                    self._status(fields, path, ended=bool(flags & http2.END_STREAM))
                    begun = True
                    if flags & http2.END_STREAM:
                        return
            elif kind == http2.DATA and number == stream:
                body += _unpadded(flags, payload)
                self._refill(stream, len(payload), ended=bool(flags & http2.END_STREAM))
                yield from self._messages(body, path)
                if flags & http2.END_STREAM:
                    self.between = True
                    raise Internal(f"{path}: the server ended the response without a status")
            else:
                self._housekeeping(*taken)

    def _messages(self, body: bytearray, path: str) -> Iterator[bytes]:
        while len(body) >= 5:
            compressed, length = _PREFIX.unpack_from(body)
            if compressed:
                raise Unimplemented(f"{path}: a compressed response, which nobody asked for")
            if length > self._max:
                raise ResourceExhausted(f"grpc: received message larger than max ({length} vs. {self._max})")
            if len(body) < 5 + length:
                return
            message = bytes(body[5 : 5 + length])
            del body[: 5 + length]
            yield message

    def _status(self, fields: Mapping[str, str], path: str, *, ended: bool) -> None:
        """Raise the error that a header block says, if it says one."""
        status = fields.get("grpc-status")
        if ended:
            self.between = True
        if status is None:
            code = fields.get(":status", "200")
            if code != "200":
                self.between = self.between or False
                raise from_code(_OF_HTTP.get(code, 2), f"{path}: unexpected HTTP status code {code}")
            if ended:
                raise Internal(f"{path}: the server ended the response without a status")
            return
        if not status.isdecimal():
            raise Internal(f"{path}: the server's status is {status[:40]!r}")
        if int(status):
            raise from_code(int(status), unquote(fields.get("grpc-message", ""), errors="replace"))

    def _refill(self, stream: int, size: int, *, ended: bool) -> None:
        if size:
            room = struct.pack(">L", size)
            update = frame(http2.WINDOW_UPDATE, 0, 0, room)
            self._send(update if ended else update + frame(http2.WINDOW_UPDATE, 0, stream, room))

    def _fields(self, flags: int, stream: int, payload: bytes) -> list[tuple[str, str]]:
        block = bytearray(_unpadded(flags, payload))
        if flags & 0x20:  # a priority goes before the block
            del block[:5]
        while not flags & http2.END_HEADERS:
            while (taken := self._next_frame()) is None:
                self._read()
            kind, flags, number, more = taken
            if kind != http2.CONTINUATION or number != stream or len(block) > 2 * hpack.MAX_LIST_SIZE:
                raise Unavailable(f"{self._path}: the server broke the rules of HTTP/2: unavailable")
            block += more
        try:
            return self._decoder.decode(bytes(block))
        except hpack.HpackError as error:
            raise Unavailable(f"{self._path}: the server broke the rules of HTTP/2: {error}: unavailable") from error

    def _reset(self, payload: bytes) -> WherryError:
        code = int.from_bytes(payload, "big")
        if code == http2.REFUSED_STREAM:
            return Unavailable(f"{self._path}: the server refused the call: unavailable")
        return from_code(1 if code == http2.CANCEL else 13, f"{self._path}: stream terminated by RST_STREAM {code}")

    def _housekeeping(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """What isn't an answer: settings, pings, windows, farewells, answers that nobody waits for any more."""
        if kind == http2.SETTINGS and not flags & http2.ACK:
            for name, value in _SETTINGS_FIELD.iter_unpack(payload[: len(payload) // 6 * 6]):
                if name == _INITIAL_WINDOW:
                    self._stream_window += value - self._initial
                    self._initial = value
                elif name == _FRAME_SIZE:
                    self._frame = max(http2.MAX_FRAME, min(value, 1 << 20))
            self._send(frame(http2.SETTINGS, http2.ACK, 0, b""))
        elif kind == http2.PING and not flags & http2.ACK:
            self._send(frame(http2.PING, http2.ACK, 0, payload))
        elif kind == http2.WINDOW_UPDATE and len(payload) == 4:
            more = int.from_bytes(payload, "big") & 0x7FFFFFFF
            if stream:
                self._stream_window += more
            else:
                self._window += more
        elif kind == http2.GOAWAY:
            self._going_away = True
            last = int.from_bytes(payload[:4], "big") & 0x7FFFFFFF
            if not self.between and last < self._next - 2:
                raise Unavailable(f"{self._path}: the server stops: unavailable")

    def _next_frame(self) -> tuple[int, int, int, bytes] | None:
        buffer = self._buffer
        if len(buffer) < 9:
            return None
        length = int.from_bytes(buffer[:3], "big")
        if length > http2.MAX_FRAME:
            raise Unavailable(f"{self._path}: no gRPC server: a frame of {length} bytes: unavailable")
        if len(buffer) < 9 + length:
            return None
        kind, flags, stream = buffer[3], buffer[4], int.from_bytes(buffer[5:9], "big") & 0x7FFFFFFF
        payload = bytes(buffer[9 : 9 + length])
        del buffer[: 9 + length]
        return kind, flags, stream, payload

    def _read(self) -> None:
        self._limit()
        try:
            data = self._socket.recv(_READ)
        except TimeoutError as error:
            raise DeadlineExceeded("context deadline exceeded") from error
        except OSError as error:
            raise self._broken(error) from error
        if not data:
            raise Unavailable(f"{self._path}: the server closed the connection: unavailable")
        self._buffer += data


def _header_frames(stream: int, block: bytes, size: int) -> bytes:
    pieces = [block[at : at + size] for at in range(0, len(block), size)]
    out = b""
    for number, piece in enumerate(pieces):
        kind = http2.CONTINUATION if number else http2.HEADERS
        out += frame(kind, http2.END_HEADERS if number == len(pieces) - 1 else 0, stream, piece)
    return out


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & http2.PADDED or not payload:
        return payload
    return payload[1 : len(payload) - payload[0]]


def _timeout(seconds: float) -> str:
    """gRPC's form: at most eight digits and a unit."""
    with contextlib.suppress(OverflowError):
        microseconds = max(1, int(seconds * 1e6))
        if microseconds < 10**8:
            return f"{microseconds}u"
        if seconds < 10**8:
            return f"{int(seconds)}S"
    return "99999999H"
