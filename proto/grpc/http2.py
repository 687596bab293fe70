"""HTTP/2 (RFC 9113), the server's side, without I/O: bytes in, events out, bytes out.

What gRPC needs and no more: no push, no priorities, no upgrade from HTTP/1.1 (a gRPC client knows beforehand that it
speaks HTTP/2). It keeps the rules that protect a server from its peer: sizes, flow control, the order of frames.

    PREFACE ─► SETTINGS … ─► streams:  HEADERS [CONTINUATION…] [DATA…] ─► (end of the request)
                                       ◄─ HEADERS [DATA…] HEADERS(end)
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from wherry.proto.grpc.hpack import MAX_LIST_SIZE, Decoder, HpackError, ListTooLarge, Malformed

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# frame types (section 6)
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
# flags
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
_PRIORITY_FLAG: Final = 0x20
# error codes (section 7)
NO_ERROR: Final = 0x0
PROTOCOL_ERROR: Final = 0x1
FLOW_CONTROL_ERROR: Final = 0x3
STREAM_CLOSED: Final = 0x5
FRAME_SIZE_ERROR: Final = 0x6
REFUSED_STREAM: Final = 0x7
CANCEL: Final = 0x8
COMPRESSION_ERROR: Final = 0x9
ENHANCE_YOUR_CALM: Final = 0xB
# settings (6.5.2)
_ENABLE_PUSH: Final = 0x2
_MAX_CONCURRENT_STREAMS: Final = 0x3
_INITIAL_WINDOW_SIZE: Final = 0x4
_MAX_FRAME_SIZE: Final = 0x5
_MAX_HEADER_LIST_SIZE: Final = 0x6

_DEFAULT_WINDOW: Final = 65_535
_DEFAULT_FRAME: Final = 16_384
_LARGEST_WINDOW: Final = (1 << 31) - 1
_HEAD: Final = struct.Struct(">HBBBL")

# frames up to this size are taken: the default, as gRPC clients send no larger ones anyway
MAX_FRAME: Final = _DEFAULT_FRAME
# what a client may send of one stream, and of all, before it hears that it was taken; bytes
STREAM_WINDOW: Final = 1 << 20
CONNECTION_WINDOW: Final = 16 << 20
# calls that one client may have under way (waits of dockerd for some hundred containers)
MAX_STREAMS: Final = 4096
# bytes of a header block before decoding, over all its frames. Below it a list that is too large ends its stream alone
# (C core's client doesn't heed what it is told); undoing Huffman's code holds everybody up for 0.2 s at worst.
_MAX_BLOCK: Final = 2 * MAX_LIST_SIZE
# frames of one header block: more than its bytes need is the flood of CVE-2024-27316
_MAX_CONTINUATIONS: Final = 64
# streams that a client may give up, or make us give up, at once and then per second: opening and resetting costs it
# less than it costs us (CVE-2023-44487). Twice all that it can have under way is a client that changed its mind.
RESET_BURST: Final = 2 * MAX_STREAMS
RESETS_PER_SECOND: Final = 1000


class ProtocolError(Exception):
    """The peer broke a rule; the connection ends with this error code."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Request(NamedTuple):
    """A stream begins; `end` where nothing follows."""

    stream: int
    fields: list[tuple[str, str]]
    end: bool


class Body(NamedTuple):
    """Bytes of a request. `size` counts for the stream's window (with padding) and is given back by `taken`."""

    stream: int
    data: bytes
    size: int
    end: bool


class Reset(NamedTuple):
    """A stream is over before it was answered: the peer gave it up, or broke a rule on it; with an error code."""

    stream: int
    code: int


class Writable(NamedTuple):
    """More may be sent: on a stream, or with 0 on all."""

    stream: int


Event = Request | Body | Reset | Writable


class Connection:
    """One connection; `outgoing` collects bytes that are to be sent, and is emptied by `take`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._buffer = bytearray()
        self._decoder = Decoder()
        self._begun = False
        self.settled = False  # the peer has said that it speaks HTTP/2
        self._last = 0  # the highest stream that was seen
        self._accepted = 0  # the highest that was handed on
        self._leaving = False  # GOAWAY was sent
        self._pings = 0  # bytes of answers to pings in what is to be sent
        self._block: tuple[int, bool, bytearray] | None = None  # of a HEADERS without END_HEADERS
        self._continuations = 0
        self._clock = clock
        self._resets: float = 0  # of late
        self._resets_at = 0.0
        self._receiving: dict[int, int] = {}  # streams whose request goes on: what they may still send
        self._sending: dict[int, int] = {}  # streams that are answered: what may still be sent
        self.window = _DEFAULT_WINDOW  # what may be sent on the connection
        self._credit = CONNECTION_WINDOW  # what the peer may send
        self._owed = 0  # taken, and not yet given back
        self._peer_window = _DEFAULT_WINDOW
        self.frame = _DEFAULT_FRAME  # the largest frame that the peer takes
        settings = {
            _MAX_CONCURRENT_STREAMS: MAX_STREAMS,
            _INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            _MAX_HEADER_LIST_SIZE: MAX_LIST_SIZE,
        }
        self._out = bytearray(frame(SETTINGS, 0, 0, b"".join(struct.pack(">HL", *each) for each in settings.items())))
        self._out += frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", CONNECTION_WINDOW - _DEFAULT_WINDOW))

    def take(self) -> bytes:
        """The bytes to send now."""
        data = bytes(self._out)
        self._out.clear()
        self._pings = 0
        return data

    @property
    def pending(self) -> int:
        """How many bytes there are to send."""
        return len(self._out)

    @property
    def urgent(self) -> bool:
        """Whether there is more to send than answers to pings, which may wait a moment."""
        return len(self._out) > self._pings

    # -- what comes in

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the peer. Raises ProtocolError; the connection is to be ended with `goaway` then."""
        self._buffer += data
        events: list[Event] = []
        buffer = self._buffer
        if not self._begun:
            if not PREFACE.startswith(buffer[: len(PREFACE)]):
                raise ProtocolError(PROTOCOL_ERROR, "not HTTP/2")
            if len(buffer) < len(PREFACE):
                return events
            del buffer[: len(PREFACE)]
            self._begun = True
        at, end = 0, len(buffer)
        while end - at >= 9:
            high, low, kind, flags, stream = _HEAD.unpack_from(buffer, at)
            length = high << 8 | low
            if length > MAX_FRAME:
                raise ProtocolError(FRAME_SIZE_ERROR, f"frame of {length} bytes")
            if end - at - 9 < length:
                break
            payload = bytes(buffer[at + 9 : at + 9 + length])
            at += 9 + length
            self._frame(kind, flags, stream & _LARGEST_WINDOW, payload, events)
        del buffer[:at]
        return events

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        if self._block is not None and kind != CONTINUATION:
            raise ProtocolError(PROTOCOL_ERROR, "a header block was interrupted")
        if not self.settled and kind != SETTINGS:
            raise ProtocolError(PROTOCOL_ERROR, "the first frame is not SETTINGS")
        handler = self._HANDLERS.get(kind)
        if handler is not None:  # an unknown type is ignored (4.1)
            handler(self, flags, stream, payload, events)

    def _data(self, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        size = len(payload)
        self._credit -= size
        if self._credit < 0:
            raise ProtocolError(FLOW_CONTROL_ERROR, "more data than the connection's window")
        # the connection's room is given back at once: a stream whose handler is busy holds up nobody but itself
        self._owed += size
        if self._owed >= CONNECTION_WINDOW // 2:
            self._out += frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", self._owed))
            self._credit += self._owed
            self._owed = 0
        data = _unpadded(flags, payload)
        allowed = self._receiving.get(stream)
        if allowed is None:
            self._unexpected("DATA", stream, events)
            return
        if size > allowed:
            raise ProtocolError(FLOW_CONTROL_ERROR, "more data than the stream's window")
        end = bool(flags & END_STREAM)
        if end:
            del self._receiving[stream]
        else:
            self._receiving[stream] = allowed - size
        events.append(Body(stream, data, size, end))

    def _headers(self, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        payload = _unpadded(flags, payload)
        if flags & _PRIORITY_FLAG:
            if len(payload) < 5:
                raise ProtocolError(FRAME_SIZE_ERROR, "HEADERS without the priority that it says it has")
            payload = payload[5:]
        end = bool(flags & END_STREAM)
        if flags & END_HEADERS:
            self._begin(stream, end, payload, events)
        else:
            self._block = (stream, end, bytearray(payload))
            self._continuations = 0

    def _continuation(self, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        if self._block is None or self._block[0] != stream:
            raise ProtocolError(PROTOCOL_ERROR, "CONTINUATION of nothing")
        _, end, block = self._block
        block += payload
        self._continuations += 1
        if len(block) > _MAX_BLOCK or self._continuations > _MAX_CONTINUATIONS:
            raise ProtocolError(ENHANCE_YOUR_CALM, "header block is too large")
        if flags & END_HEADERS:
            self._block = None
            self._begin(stream, end, bytes(block), events)

    def _begin(self, stream: int, end: bool, block: bytes, events: list[Event]) -> None:
        if stream % 2 == 0:
            raise ProtocolError(PROTOCOL_ERROR, f"a client can't open stream {stream}")
        try:
            fields = self._decoder.decode(block)
        except ListTooLarge:
            fields = None
        except Malformed as error:
            raise ProtocolError(PROTOCOL_ERROR, str(error)) from error
        except HpackError as error:
            raise ProtocolError(COMPRESSION_ERROR, str(error)) from error
        if stream <= self._last:
            self._trailers(stream, end, events)
            return
        self._last = stream
        if self._leaving:
            return  # sent before the client heard of it: it tries again elsewhere (6.8)
        if len(self._sending) >= MAX_STREAMS:
            self.refuse(stream, REFUSED_STREAM)
            return
        if fields is None:
            self.refuse(stream, ENHANCE_YOUR_CALM)
            return
        self._accepted = stream
        self._sending[stream] = self._peer_window
        if not end:
            self._receiving[stream] = STREAM_WINDOW
        events.append(Request(stream, fields, end))

    def _trailers(self, stream: int, end: bool, events: list[Event]) -> None:
        if stream not in self._receiving:
            self._unexpected("HEADERS", stream, events)
            return
        if not end:
            raise ProtocolError(PROTOCOL_ERROR, "a second header block that isn't the end")
        del self._receiving[stream]
        events.append(Body(stream, b"", 0, True))

    def _unexpected(self, what: str, stream: int, events: list[Event]) -> None:
        """A frame of a request on a stream whose request is over (5.1)."""
        if self._idle(stream):
            raise ProtocolError(PROTOCOL_ERROR, f"{what} on a stream that wasn't opened")
        if stream in self._sending:  # half closed by the peer itself
            self.refuse(stream, STREAM_CLOSED)
            events.append(Reset(stream, STREAM_CLOSED))
        # otherwise it was answered or reset, which the peer needn't have known when it sent this

    def _idle(self, stream: int) -> bool:
        return stream > self._last or stream % 2 == 0

    def _spend_reset(self) -> None:
        now = self._clock()
        self._resets = max(0.0, self._resets - (now - self._resets_at) * RESETS_PER_SECOND) + 1
        self._resets_at = now
        if self._resets > RESET_BURST:
            raise ProtocolError(ENHANCE_YOUR_CALM, "too many streams were opened and given up")

    def _rst_stream(self, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise ProtocolError(FRAME_SIZE_ERROR, "RST_STREAM")
        if self._idle(stream):
            raise ProtocolError(PROTOCOL_ERROR, "RST_STREAM of a stream that wasn't opened")
        if stream in self._sending:
            self._spend_reset()
            self.forget(stream)
            events.append(Reset(stream, int.from_bytes(payload, "big")))

    def _settings(self, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        if stream:
            raise ProtocolError(PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % 6 or (flags & ACK and payload):
            raise ProtocolError(FRAME_SIZE_ERROR, "SETTINGS")
        if flags & ACK:
            if not self.settled:
                raise ProtocolError(PROTOCOL_ERROR, "the first frame acknowledges SETTINGS")
            return
        self.settled = True
        window = self._peer_window
        for name, value in struct.iter_unpack(">HL", payload):
            if name == _INITIAL_WINDOW_SIZE:
                if value > _LARGEST_WINDOW:
                    raise ProtocolError(FLOW_CONTROL_ERROR, "initial window is too large")
                window = value
            elif name == _MAX_FRAME_SIZE:
                if not _DEFAULT_FRAME <= value < 1 << 24:
                    raise ProtocolError(PROTOCOL_ERROR, "frame size out of bounds")
                self.frame = min(value, 1 << 20)
            elif name == _ENABLE_PUSH and value > 1:
                raise ProtocolError(PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
        if window != self._peer_window:  # once for a frame: one frame has room for 2730 changes, for 4096 streams each
            self._resize(window - self._peer_window)
            self._peer_window = window
            events.append(Writable(0))
        self._out += frame(SETTINGS, ACK, 0, b"")

    def _resize(self, change: int) -> None:
        """Streams that are open follow the initial window; theirs may become negative (6.9.2)."""
        for stream in self._sending:
            self._sending[stream] += change
            if self._sending[stream] > _LARGEST_WINDOW:
                raise ProtocolError(FLOW_CONTROL_ERROR, "initial window makes a stream's window too large")

    def _ping(self, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        if stream:
            raise ProtocolError(PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise ProtocolError(FRAME_SIZE_ERROR, "PING")
        if not flags & ACK:
            answer = frame(PING, ACK, 0, payload)
            self._out += answer
            self._pings += len(answer)

    def _window_update(self, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        if len(payload) != 4:
            raise ProtocolError(FRAME_SIZE_ERROR, "WINDOW_UPDATE")
        more = int.from_bytes(payload, "big") & _LARGEST_WINDOW
        if more == 0:
            raise ProtocolError(PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
        if stream == 0:
            self.window += more
            grown = self.window
        elif stream in self._sending:
            self._sending[stream] += more
            grown = self._sending[stream]
        elif self._idle(stream):
            raise ProtocolError(PROTOCOL_ERROR, "WINDOW_UPDATE of a stream that wasn't opened")
        else:
            return
        if grown > _LARGEST_WINDOW:
            raise ProtocolError(FLOW_CONTROL_ERROR, "window is too large")
        events.append(Writable(stream))

    def _priority(self, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        """Priorities are deprecated (5.3.2); what says nothing must still be well-formed."""
        if stream == 0:
            raise ProtocolError(PROTOCOL_ERROR, "PRIORITY of no stream")
        if len(payload) != 5:
            raise ProtocolError(FRAME_SIZE_ERROR, "PRIORITY")

    def _goaway(self, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        """The client opens no more; what runs goes on."""
        if stream:
            raise ProtocolError(PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise ProtocolError(FRAME_SIZE_ERROR, "GOAWAY")

    def _refuse(self, flags: int, stream: int, payload: bytes, events: list[Event]) -> None:
        raise ProtocolError(PROTOCOL_ERROR, "a client can't push")

    _HANDLERS: Final = {
        DATA: _data,
        HEADERS: _headers,
        PRIORITY: _priority,
        RST_STREAM: _rst_stream,
        SETTINGS: _settings,
        PUSH_PROMISE: _refuse,
        PING: _ping,
        GOAWAY: _goaway,
        WINDOW_UPDATE: _window_update,
        CONTINUATION: _continuation,
    }

    # -- what goes out

    def taken(self, stream: int, size: int) -> None:
        """Give back room for `size` bytes of a stream's request, where it isn't over."""
        if size and stream in self._receiving:
            self._receiving[stream] += size
            self._out += frame(WINDOW_UPDATE, 0, stream, struct.pack(">L", size))

    def is_open(self, stream: int) -> bool:
        """Whether a stream still waits for its answer. A request may have been reset by bytes that came with it."""
        return stream in self._sending

    def room(self, stream: int) -> int:
        """How many bytes may be sent on a stream now; 0 or less: wait for Writable."""
        return min(self.window, self._sending.get(stream, 0))

    def headers(self, stream: int, block: bytes, *, end: bool) -> None:
        """Send a header block, in as many frames as it needs; with `end` the stream is over."""
        flags = END_STREAM if end else 0
        if len(block) <= self.frame:
            self._out += frame(HEADERS, END_HEADERS | flags, stream, block)
        else:
            pieces = [block[at : at + self.frame] for at in range(0, len(block), self.frame)]
            self._out += frame(HEADERS, flags, stream, pieces[0])
            for piece in pieces[1:]:
                self._out += frame(CONTINUATION, END_HEADERS if piece is pieces[-1] else 0, stream, piece)
        if end:
            self._close(stream)

    def data(self, stream: int, payload: bytes | memoryview) -> None:
        """Send bytes of a response; at most `room` of them, and at most `frame`."""
        self.window -= len(payload)
        self._sending[stream] -= len(payload)
        self._out += frame(DATA, 0, stream, payload)

    def refuse(self, stream: int, code: int) -> None:
        """Give a stream up for what its client did. Raises ProtocolError where it does so too often."""
        self._spend_reset()
        self._out += frame(RST_STREAM, 0, stream, struct.pack(">L", code))
        self.forget(stream)

    def forget(self, stream: int) -> None:
        """Nothing more is sent on a stream, and what still comes is dropped."""
        self._sending.pop(stream, None)
        self._receiving.pop(stream, None)

    def goaway(self, code: int = NO_ERROR, text: str = "") -> None:
        """Say that no more streams are taken: those that still come are dropped."""
        self._leaving = True
        self._out += frame(GOAWAY, 0, 0, struct.pack(">LL", self._accepted, code) + text.encode()[:200])

    def _close(self, stream: int) -> None:
        if stream in self._receiving:
            # answered before the request was whole: the client needn't send the rest (8.1)
            self._out += frame(RST_STREAM, 0, stream, struct.pack(">L", NO_ERROR))
        self.forget(stream)


def frame(kind: int, flags: int, stream: int, payload: bytes | memoryview) -> bytes:
    """The bytes of one frame."""
    length = len(payload)
    return _HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream) + payload


def _unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ProtocolError(PROTOCOL_ERROR, "padding is longer than its frame")
    return payload[1 : len(payload) - payload[0]]
