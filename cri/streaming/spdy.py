"""SPDY/3.1 without I/O: bytes in, events and bytes out. (Draft 3.1; what a kubelet's streams are framed in.)

    session = Session()                     # the server's end
    for event in session.receive(data): …   # Opened, Data, Reset, GoneAway; raises ProtocolError
    session.reply(1); session.send(1, b"…"); session.finish(1)
    transport.write(session.take())         # what is to be sent

A frame is 8 bytes and a payload. Control frames: `1 | version:15, type:16, flags:8, length:24`, data frames: `0 |
stream:31, flags:8, length:24`. Header blocks are compressed in one zlib stream for each direction.

Flow control: the Go library that Kubernetes uses (spdystream) has none; it ignores our updates and sends none, so a
window is only kept to once the peer has shown, by SETTINGS or WINDOW_UPDATE, that it knows of windows.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from wherry.cri.streaming.spdy_dictionary import DICTIONARY

VERSION: Final = 3
# the draft's initial window of a stream and of the session, in bytes
WINDOW: Final = 64 << 10
MAX_WINDOW: Final = (1 << 31) - 1
# bytes of a control frame that are taken, and of a header block when it is inflated: those of Kubernetes have 200
MAX_CONTROL: Final = 32 << 10
MAX_HEADERS: Final = 64 << 10
# streams that a peer may have open at once: a port-forward uses two for each connection
MAX_STREAMS: Final = 2000
_DATA_FRAME: Final = 32 << 10

SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 8, 9
FIN, UNIDIRECTIONAL = 1, 2
_INITIAL_WINDOW_SIZE: Final = 7
_HEAD: Final = struct.Struct(">II")
_U32: Final = struct.Struct(">I")


class Status(IntEnum):
    """Why a stream is reset."""

    PROTOCOL_ERROR = 1
    INVALID_STREAM = 2
    REFUSED_STREAM = 3
    UNSUPPORTED_VERSION = 4
    CANCEL = 5
    INTERNAL_ERROR = 6
    FLOW_CONTROL_ERROR = 7
    STREAM_IN_USE = 8
    STREAM_ALREADY_CLOSED = 9
    FRAME_TOO_LARGE = 11


class ProtocolError(Exception):
    """The peer broke the protocol: the connection is of no use any more. A GOAWAY is in `take`."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer opened a stream (SYN_STREAM), or answered one of ours (`answer`, SYN_REPLY). Names are lower-case."""

    stream: int
    headers: Mapping[str, str]
    fin: bool = False
    answer: bool = False


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of a stream; `fin`: nothing follows. A frame may come as several. Call `consumed` when it was used."""

    stream: int
    data: bytes
    fin: bool = False


@dataclass(frozen=True, slots=True)
class Reset:
    """The peer gave a stream up, in both directions."""

    stream: int
    status: int


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer opens no further streams."""

    status: int


Event = Opened | Data | Reset | GoneAway


@dataclass(slots=True)
class _Stream:
    window: int
    replied: bool = False
    ended_here: bool = False
    ended_there: bool = False
    unconsumed: int = 0


class Session:
    """One connection's state."""

    def __init__(self, *, client: bool = False) -> None:
        self._odd = not client
        """Whether streams of the peer have odd numbers: clients' have."""
        self._next = 1 if client else 2
        self._streams: dict[int, _Stream] = {}
        self._last = 0
        self._buffer = bytearray()
        self._data: tuple[int, int, bool] | None = None  # of the data frame that comes: stream, bytes missing, fin
        self._out = bytearray()
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._deflate = zlib.compressobj(zdict=DICTIONARY)
        self._window = WINDOW
        self._initial = WINDOW
        self._unconsumed = 0
        self.windows = False
        """Whether the peer has shown that it knows of windows."""
        self.dead = False

    # -- out -------------------------------------------------------------------------------------------------------

    def take(self) -> bytes:
        """What is to be sent now."""
        out, self._out = bytes(self._out), bytearray()
        return out

    def open(self, headers: Mapping[str, str], *, fin: bool = False) -> int:
        """Open a stream; its number."""
        number, self._next = self._next, self._next + 2
        self._streams[number] = _Stream(self._initial, ended_here=fin)
        payload = struct.pack(">IIH", number, 0, 0) + self._pack(headers)
        self._control(SYN_STREAM, FIN if fin else 0, payload)
        return number

    def reply(self, number: int, headers: Mapping[str, str] | None = None) -> None:
        """Accept a stream that the peer opened; before anything is sent on it."""
        stream = self._streams.get(number)
        if stream is not None and not stream.replied:
            stream.replied = True
            self._control(SYN_REPLY, 0, _U32.pack(number) + self._pack(headers or {}))

    def send(self, number: int, data: bytes | memoryview) -> int:
        """Send as much of it as the windows allow; the number of bytes that was. All of it where the stream is gone."""
        stream = self._streams.get(number)
        if stream is None or stream.ended_here or self.dead:
            return len(data)
        room = max(0, min(stream.window, self._window)) if self.windows else len(data)
        size = min(len(data), room)
        for start in range(0, size, _DATA_FRAME):
            part = data[start : min(size, start + _DATA_FRAME)]
            self._out += _HEAD.pack(number, len(part))
            self._out += part
        stream.window -= size
        self._window -= size
        return size

    def finish(self, number: int) -> None:
        """Nothing more is sent on a stream."""
        stream = self._streams.get(number)
        if stream is not None and not stream.ended_here:
            stream.ended_here = True
            self._out += _HEAD.pack(number, FIN << 24)
            self._forget_ended(number, stream)

    def reset(self, number: int, status: int = Status.CANCEL) -> None:
        """Give a stream up, in both directions."""
        if self._streams.pop(number, None) is not None:
            self._control(RST_STREAM, 0, struct.pack(">II", number, status))

    def go_away(self, status: int = 0) -> None:
        """Accept no further streams. 0: all is well, 1: protocol error, 2: internal error."""
        if not self.dead:
            self._control(GOAWAY, 0, struct.pack(">II", self._last, status))

    def ping(self, number: int) -> None:
        """Ask for a sign of life."""
        self._control(PING, 0, _U32.pack(number))

    def consumed(self, number: int, size: int) -> None:
        """So many bytes of a stream were used: the peer may send as many again."""
        self._unconsumed += size
        if self._unconsumed >= WINDOW // 2:
            self._update(0, self._unconsumed)
            self._unconsumed = 0
        stream = self._streams.get(number)
        if stream is None or stream.ended_there:
            return
        stream.unconsumed += size
        if stream.unconsumed >= WINDOW // 2:
            self._update(number, stream.unconsumed)
            stream.unconsumed = 0

    def knows(self, number: int) -> bool:
        """Whether a stream is open in a direction at least."""
        return number in self._streams

    def _update(self, number: int, size: int) -> None:
        self._control(WINDOW_UPDATE, 0, struct.pack(">II", number, size))

    def _control(self, kind: int, flags: int, payload: bytes) -> None:
        self._out += _HEAD.pack(1 << 31 | VERSION << 16 | kind, flags << 24 | len(payload)) + payload

    def _pack(self, headers: Mapping[str, str]) -> bytes:
        block = bytearray(_U32.pack(len(headers)))
        for name, value in headers.items():
            for text in (name.lower().encode(), value.encode()):
                block += _U32.pack(len(text)) + text
        return self._deflate.compress(bytes(block)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    # -- in --------------------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[Event]:
        """What came. Raises ProtocolError; after it, and after a GOAWAY of ours for it, nothing is taken any more."""
        if self.dead:
            return []
        self._buffer += data
        events: list[Event] = []
        try:
            while self._step(events):
                pass
        except ProtocolError:
            self.go_away(1)
            self.dead = True
            raise
        return events

    def _step(self, events: list[Event]) -> bool:
        if self._data is not None:
            return self._take_data(self._data, events)
        if len(self._buffer) < _HEAD.size:
            return False
        first, second = _HEAD.unpack_from(self._buffer)
        flags, length = second >> 24, second & 0xFFFFFF
        if not first >> 31:
            del self._buffer[: _HEAD.size]
            self._data = (first, length, bool(flags & FIN))
            return True
        if first >> 16 & 0x7FFF != VERSION:
            raise ProtocolError(f"a control frame of version {first >> 16 & 0x7FFF}, not {VERSION}")
        if length > MAX_CONTROL:
            raise ProtocolError(f"a control frame of {length} bytes")
        if len(self._buffer) < _HEAD.size + length:
            return False
        payload = bytes(self._buffer[_HEAD.size : _HEAD.size + length])
        del self._buffer[: _HEAD.size + length]
        try:
            self._take_control(first & 0xFFFF, flags, payload, events)
        except struct.error:
            raise ProtocolError(f"a control frame of kind {first & 0xFFFF} is too short") from None
        return True

    def _take_data(self, head: tuple[int, int, bool], events: list[Event]) -> bool:
        number, missing, fin = head
        part = bytes(self._buffer[:missing])
        if not part and missing:
            return False
        del self._buffer[: len(part)]
        missing -= len(part)
        self._data = (number, missing, fin) if missing else None
        stream = self._streams.get(number)
        if stream is None or stream.ended_there:
            # a stream that we gave up a moment ago; its bytes count for the session all the same
            self.consumed(0, len(part))
            if stream is not None:
                self.reset(number, Status.STREAM_ALREADY_CLOSED)
            elif not self._was(number):
                raise ProtocolError(f"data of stream {number}, which nobody opened")
            return True
        ended = fin and not missing
        if part or ended:
            events.append(Data(number, part, ended))
        if ended:
            stream.ended_there = True
            self._forget_ended(number, stream)
        return True

    def _was(self, number: int) -> bool:
        """Whether there was a stream of this number."""
        return 0 < number <= self._last if bool(number & 1) == self._odd else 0 < number < self._next

    def _forget_ended(self, number: int, stream: _Stream) -> None:
        if stream.ended_here and stream.ended_there:
            self._streams.pop(number, None)

    def _take_control(self, kind: int, flags: int, payload: bytes, events: list[Event]) -> None:
        if kind == SYN_STREAM:
            self._take_syn(flags, payload, events)
        elif kind in (SYN_REPLY, HEADERS):
            self._take_headers(kind, flags, payload, events)
        elif kind == RST_STREAM:
            number, status = struct.unpack_from(">II", payload)
            if self._streams.pop(number & MAX_WINDOW, None) is not None:
                events.append(Reset(number & MAX_WINDOW, status))
        elif kind == SETTINGS:
            self._take_settings(payload)
        elif kind == PING:
            (number,) = _U32.unpack_from(payload)
            if bool(number & 1) == self._odd:  # the peer's own, not the answer to one of ours
                self._control(PING, 0, payload[:4])
        elif kind == GOAWAY:
            events.append(GoneAway(_U32.unpack_from(payload, 4)[0] if len(payload) >= 8 else 0))
        elif kind == WINDOW_UPDATE:
            self._take_update(*struct.unpack_from(">II", payload))
        # others are to be ignored (2.2.1)

    def _take_syn(self, flags: int, payload: bytes, events: list[Event]) -> None:
        number = _U32.unpack_from(payload)[0] & MAX_WINDOW
        headers = self._unpack(payload[10:])
        if bool(number & 1) != self._odd or number <= self._last:
            raise ProtocolError(f"stream {number} can't be opened after stream {self._last}")
        self._last = number
        if len(self._streams) >= MAX_STREAMS:
            self._control(RST_STREAM, 0, struct.pack(">II", number, Status.REFUSED_STREAM))
            return
        stream = _Stream(self._initial, ended_there=bool(flags & FIN), ended_here=bool(flags & UNIDIRECTIONAL))
        self._streams[number] = stream
        events.append(Opened(number, headers, stream.ended_there))
        self._forget_ended(number, stream)

    def _take_headers(self, kind: int, flags: int, payload: bytes, events: list[Event]) -> None:
        number = _U32.unpack_from(payload)[0] & MAX_WINDOW
        headers = self._unpack(payload[4:])
        stream = self._streams.get(number)
        if stream is None or stream.ended_there:
            return
        fin = bool(flags & FIN)
        if kind == SYN_REPLY:
            if stream.replied or bool(number & 1) == self._odd:
                raise ProtocolError(f"a second answer for stream {number}")
            stream.replied = True
            events.append(Opened(number, headers, fin, answer=True))
        elif fin:
            events.append(Data(number, b"", fin=True))
        if fin:
            stream.ended_there = True
            self._forget_ended(number, stream)

    def _take_settings(self, payload: bytes) -> None:
        (count,) = _U32.unpack_from(payload)
        if len(payload) != 4 + 8 * count:
            raise ProtocolError(f"SETTINGS of {count} entries in {len(payload)} bytes")
        self.windows = True
        for index in range(count):
            key, value = _HEAD.unpack_from(payload, 4 + 8 * index)
            if key & 0xFFFFFF != _INITIAL_WINDOW_SIZE:
                continue
            if value > MAX_WINDOW:
                raise ProtocolError(f"a window of {value} bytes")
            change, self._initial = value - self._initial, value
            for stream in self._streams.values():
                stream.window += change

    def _take_update(self, number: int, delta: int) -> None:
        number, delta = number & MAX_WINDOW, delta & MAX_WINDOW
        if not self.windows:
            self.windows = True
        if not delta:
            raise ProtocolError("a window update by nothing")
        if not number:
            self._window += delta
            if self._window > MAX_WINDOW:
                raise ProtocolError("the session's window overflows")
            return
        stream = self._streams.get(number)
        if stream is not None:
            stream.window += delta
            if stream.window > MAX_WINDOW:
                self.reset(number, Status.FLOW_CONTROL_ERROR)

    def _unpack(self, block: bytes) -> dict[str, str]:
        try:
            raw = self._inflate.decompress(block, MAX_HEADERS)
        except zlib.error as error:
            raise ProtocolError(f"a header block: {error}") from None
        if self._inflate.unconsumed_tail:
            raise ProtocolError(f"a header block of more than {MAX_HEADERS} bytes")
        try:
            (count,) = _U32.unpack_from(raw)
            texts, at = [], 4
            for _ in range(2 * min(count, len(raw))):
                (size,) = _U32.unpack_from(raw, at)
                text = raw[at + 4 : at + 4 + size]
                if len(text) != size:
                    raise ProtocolError("a header block ends within a text")
                texts.append(text.decode("utf-8", "replace"))
                at += 4 + size
        except struct.error:
            raise ProtocolError("a header block ends too early") from None
        return {name.lower(): value for name, value in zip(texts[::2], texts[1::2], strict=True)}
