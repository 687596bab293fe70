"""The frames of ttrpc and the life of its streams, without I/O: bytes in, events out; calls in, bytes out.

A frame is a header of ten bytes, big-endian, and data: length of the data (4), stream id (4), type (1), flags (1).
A stream is one call. Who called is the *caller*, the other side the *callee*; `TRANSITIONS` says what may happen when:

    IDLE --CALL--> HALF --ANSWER_DATA*--> --ANSWER or ANSWER_END--> CLOSED      unary, server stream
    IDLE --CALL_OPEN--> OPEN --CALL_DATA*--> --CALL_END--> HALF …               client stream, both

Once the callee has finished, the stream is over, whatever the caller would still have sent (PROTOCOL.md of ttrpc).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from google.protobuf.message import DecodeError

from wherry.core.errors import Code, InvalidArgument, ResourceExhausted, WherryError
from wherry.core.tuples import NamedTuple
from wherry.proto import ttrpc_pb2

HEADER_LENGTH = 10
# the protocol's limit on the data of one frame; a longer one is skipped and answered with RESOURCE_EXHAUSTED
MAX_DATA = 4 << 20
# "the first frame byte should always be zero": a length from here on isn't ttrpc at all
NO_LENGTH = 1 << 24
# a u32 that is odd for streams that a client starts
MAX_STREAM_ID = 0xFFFFFFFF

REQUEST, RESPONSE, DATA = 1, 2, 3
REMOTE_CLOSED, REMOTE_OPEN, NO_DATA = 1, 2, 4

_HEADER = struct.Struct(">IIBB")


class ProtocolError(WherryError):
    """The peer doesn't speak ttrpc; the connection is of no more use."""

    code = Code.UNAVAILABLE


class Frame(NamedTuple):
    """One frame."""

    stream_id: int
    kind: int
    flags: int
    data: bytes


class Oversized(NamedTuple):
    """The header of a frame with too much data, which is being skipped."""

    stream_id: int
    kind: int
    length: int


def encode(stream_id: int, kind: int, flags: int, data: bytes = b"") -> bytes:
    """One frame as bytes. Raises ResourceExhausted (with the text that Go's ttrpc has) for data over the limit."""
    if len(data) > MAX_DATA:
        raise ResourceExhausted(f"message length {len(data)} exceed maximum message size of {MAX_DATA}")
    return _HEADER.pack(len(data), stream_id, kind, flags) + data


class Parser:
    """Cuts a stream of bytes into frames; holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = 0

    def feed(self, data: bytes) -> list[Frame | Oversized]:
        """The frames that these bytes complete. Raises ProtocolError for what can't be a header."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        if self._buffer:
            self._buffer += data
            source: bytes | bytearray = self._buffer
        else:
            source = data
        found: list[Frame | Oversized] = []
        at, end = 0, len(source)
        while end - at >= HEADER_LENGTH:
            length, stream_id, kind, flags = _HEADER.unpack_from(source, at)
            if length > MAX_DATA:
                if length >= NO_LENGTH:
                    raise ProtocolError(f"not ttrpc: a frame of {length} bytes was announced")
                found.append(Oversized(stream_id, kind, length))
                at += HEADER_LENGTH + length
                if at > end:
                    self._skip, at = at - end, end
                continue
            stop = at + HEADER_LENGTH + length
            if stop > end:
                break
            found.append(Frame(stream_id, kind, flags, bytes(source[at + HEADER_LENGTH : stop])))
            at = stop
        if source is self._buffer:
            del self._buffer[:at]
        elif at < end:
            self._buffer += source[at:]
        return found


class State:
    """Where a stream is in its life; the same seen from both sides.

    Numbers, as `Input` is: an enumeration's members are hashed in Python, several times for each message.
    """

    IDLE = 0
    # both sides may send
    OPEN = 1
    # the caller is done, the callee isn't
    HALF = 2
    CLOSED = 3


class Input:
    """What happens to a stream, named by who does it."""

    CALL = 0
    CALL_OPEN = 1
    CALL_DATA = 2
    CALL_END = 3
    ANSWER_DATA = 4
    ANSWER_END = 5
    ANSWER = 6


# state and input: the state that follows
TRANSITIONS: Mapping[tuple[int, int], int] = {
    (State.IDLE, Input.CALL): State.HALF,
    (State.IDLE, Input.CALL_OPEN): State.OPEN,
    (State.OPEN, Input.CALL_DATA): State.OPEN,
    (State.OPEN, Input.CALL_END): State.HALF,
    (State.OPEN, Input.ANSWER_DATA): State.OPEN,
    (State.OPEN, Input.ANSWER_END): State.CLOSED,
    (State.OPEN, Input.ANSWER): State.CLOSED,
    (State.HALF, Input.ANSWER_DATA): State.HALF,
    (State.HALF, Input.ANSWER_END): State.CLOSED,
    (State.HALF, Input.ANSWER): State.CLOSED,
}


class Call(NamedTuple):
    """A peer calls. `opened`: more messages will come as data; `timeout_nano` 0 is none."""

    stream_id: int
    service: str
    method: str
    payload: bytes
    timeout_nano: int
    metadata: dict[str, str]
    opened: bool


class Payload(NamedTuple):
    """A message on a stream (None: the frame carried none); `end`: that side sends no more."""

    stream_id: int
    payload: bytes | None
    end: bool


class Answer(NamedTuple):
    """The final answer to a call; `code` 0 is success."""

    stream_id: int
    code: int
    message: str
    payload: bytes


class Reply(NamedTuple):
    """Bytes that must be sent back: the refusal of a frame that was against the rules."""

    data: bytes


def encode_answer(stream_id: int, payload: bytes = b"", code: int = 0, message: str = "") -> bytes:
    """The frame of a final answer.

    The status is there also in success: older Go clients insist on it. Raises ResourceExhausted for too much payload.
    """
    response = ttrpc_pb2.Response(payload=payload)
    response.status.SetInParent()
    if code:
        response.status.code = code
        # so that the status itself never is too long to send
        response.status.message = message[: MAX_DATA // 8]
    return encode(stream_id, RESPONSE, 0, response.SerializeToString())


class ServerConnection:
    """The callee's side of one connection."""

    def __init__(self) -> None:
        self._parser = Parser()
        self._last = 0
        self.streams: dict[int, int] = {}

    def receive(self, data: bytes) -> list[Call | Payload | Reply]:
        """What these bytes bring, in order. Raises ProtocolError for what isn't ttrpc: then close the connection."""
        return [
            event
            for frame in self._parser.feed(data)
            if (event := self._oversized(frame) if isinstance(frame, Oversized) else self._frame(frame)) is not None
        ]

    def _oversized(self, frame: Oversized) -> Reply | None:
        if frame.kind == REQUEST and frame.stream_id > self._last:
            self._last = frame.stream_id
        else:
            self.streams.pop(frame.stream_id, None)
        text = f"message length {frame.length} exceed maximum message size of {MAX_DATA}"
        return Reply(encode_answer(frame.stream_id, code=Code.RESOURCE_EXHAUSTED, message=text))

    def _frame(self, frame: Frame) -> Call | Payload | Reply | None:
        if frame.kind not in {REQUEST, DATA}:
            # types to come are to be ignored (PROTOCOL.md)
            return None
        if frame.stream_id % 2 == 0:
            return self._refuse(frame.stream_id, "StreamID must be odd for client initiated streams")
        return self._request(frame) if frame.kind == REQUEST else self._data(frame)

    def _request(self, frame: Frame) -> Call | Reply:
        stream_id = frame.stream_id
        if stream_id <= self._last:
            return self._refuse(stream_id, "StreamID cannot be re-used and must increment")
        self._last = stream_id
        try:
            request = ttrpc_pb2.Request.FromString(frame.data)
        except DecodeError as error:
            return self._refuse(stream_id, f"unmarshal request error: {error}")
        opened = frame.flags & REMOTE_OPEN != 0
        self.streams[stream_id] = State.OPEN if opened else State.HALF
        metadata: dict[str, str] = {}
        for pair in request.metadata:
            metadata.setdefault(pair.key.lower(), pair.value)
        return Call(stream_id, request.service, request.method, request.payload, request.timeout_nano, metadata, opened)

    def _data(self, frame: Frame) -> Payload | Reply | None:
        state = self.streams.get(frame.stream_id)
        if state is None:
            # a caller may not know yet that its stream is over
            return None if frame.stream_id <= self._last else self._refuse(frame.stream_id, "StreamID is not active")
        end = frame.flags & REMOTE_CLOSED != 0
        following = TRANSITIONS.get((state, Input.CALL_END if end else Input.CALL_DATA))
        if following is None:
            del self.streams[frame.stream_id]
            return self._refuse(frame.stream_id, "data on a stream that was closed")
        self.streams[frame.stream_id] = following
        # the last frame may say that it has no payload; without that, an empty one with the end is no message either
        empty = frame.flags & NO_DATA or (end and not frame.data)
        return Payload(frame.stream_id, None if empty else frame.data, end)

    def _refuse(self, stream_id: int, text: str) -> Reply:
        return Reply(encode_answer(stream_id, code=Code.INVALID_ARGUMENT, message=text))

    def _step(self, stream_id: int, step: int) -> bool:
        """Move a stream on; False where it is over (its caller was refused meanwhile)."""
        state = TRANSITIONS.get((self.streams.get(stream_id, State.CLOSED), step))
        if state is None:
            return False
        if state == State.CLOSED:
            del self.streams[stream_id]
        else:
            self.streams[stream_id] = state
        return True

    def answer(self, stream_id: int, payload: bytes = b"") -> bytes:
        """The bytes that answer a call and end its stream; none where it is over already.

        An answer that is too long becomes a RESOURCE_EXHAUSTED.
        """
        if not self._step(stream_id, Input.ANSWER):
            return b""
        try:
            return encode_answer(stream_id, payload)
        except ResourceExhausted as error:
            return encode_answer(stream_id, code=error.code, message=error.message)

    def fail(self, stream_id: int, code: int, message: str) -> bytes:
        """The bytes that fail a call and end its stream; none where it is over already."""
        if not self._step(stream_id, Input.ANSWER):
            return b""
        return encode_answer(stream_id, code=code or Code.UNKNOWN, message=message)

    def send(self, stream_id: int, payload: bytes) -> bytes:
        """The bytes of one message of a stream of answers; none where the stream is over.

        Raises ResourceExhausted for too much payload.
        """
        frame = encode(stream_id, DATA, 0, payload)
        return frame if self._step(stream_id, Input.ANSWER_DATA) else b""

    def finish(self, stream_id: int) -> bytes:
        """The bytes that end a stream of answers in success."""
        return encode(stream_id, DATA, REMOTE_CLOSED | NO_DATA) if self._step(stream_id, Input.ANSWER_END) else b""


class ClientConnection:
    """The caller's side of one connection."""

    def __init__(self) -> None:
        self._parser = Parser()
        self._next = 1
        self.streams: dict[int, int] = {}

    def call(
        self,
        service: str,
        method: str,
        payload: bytes = b"",
        *,
        timeout_nano: int = 0,
        metadata: Mapping[str, str] | None = None,
        flags: int = 0,
    ) -> tuple[int, bytes]:
        """Start a call: its stream id and the bytes to send.

        `flags` is 0 for a unary call, REMOTE_CLOSED for one that only answers stream to, REMOTE_OPEN where requests
        follow as data. Raises ResourceExhausted for too much payload, or when the connection has used all its ids.
        """
        stream_id = self._next
        if stream_id > MAX_STREAM_ID:
            raise ResourceExhausted("all stream ids of this connection are used up")
        request = ttrpc_pb2.Request(service=service, method=method, payload=payload, timeout_nano=timeout_nano)
        if metadata:
            for key, value in metadata.items():
                request.metadata.add(key=key, value=value)
        data = encode(stream_id, REQUEST, flags, request.SerializeToString())
        self._next += 2
        self.streams[stream_id] = State.OPEN if flags & REMOTE_OPEN else State.HALF
        return stream_id, data

    def send(self, stream_id: int, payload: bytes) -> bytes:
        """The bytes of one more request on a stream. Raises InvalidArgument after its end, ResourceExhausted."""
        frame = encode(stream_id, DATA, 0, payload)
        self._step(stream_id, Input.CALL_DATA)
        return frame

    def close_send(self, stream_id: int) -> bytes:
        """The bytes that say that no more requests follow; none where the stream is over or that was said."""
        if self.streams.get(stream_id) != State.OPEN:
            return b""
        self.streams[stream_id] = State.HALF
        return encode(stream_id, DATA, REMOTE_CLOSED | NO_DATA)

    def forget(self, stream_id: int) -> None:
        """Nobody waits for this stream any more; what still comes on it is dropped (ttrpc has no way to cancel)."""
        self.streams.pop(stream_id, None)

    def _step(self, stream_id: int, step: int) -> None:
        state = TRANSITIONS.get((self.streams.get(stream_id, State.CLOSED), step))
        if state is None:
            raise InvalidArgument(f"stream {stream_id} is closed")
        self.streams[stream_id] = state

    def receive(self, data: bytes) -> list[Answer | Payload]:
        """What these bytes bring, in order. Raises ProtocolError for what isn't ttrpc: then close the connection."""
        found: list[Answer | Payload] = []
        for frame in self._parser.feed(data):
            if frame.stream_id not in self.streams:
                continue
            if isinstance(frame, Oversized):
                del self.streams[frame.stream_id]
                text = f"message length {frame.length} exceed maximum message size of {MAX_DATA}"
                found.append(Answer(frame.stream_id, Code.RESOURCE_EXHAUSTED, text, b""))
            elif frame.kind == RESPONSE:
                del self.streams[frame.stream_id]
                found.append(_answer(frame))
            elif frame.kind == DATA:
                end = frame.flags & REMOTE_CLOSED != 0
                if end:
                    del self.streams[frame.stream_id]
                empty = frame.flags & NO_DATA or (end and not frame.data)
                found.append(Payload(frame.stream_id, None if empty else frame.data, end))
        return found


def _answer(frame: Frame) -> Answer:
    try:
        response = ttrpc_pb2.Response.FromString(frame.data)
    except DecodeError as error:
        raise ProtocolError(f"not ttrpc: a response that can't be decoded: {error}") from error
    return Answer(frame.stream_id, response.status.code, response.status.message, response.payload)
