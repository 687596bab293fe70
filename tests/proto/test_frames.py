"""Frames byte by byte, and the table of a stream's life, every pair of state and input."""

from __future__ import annotations

import itertools
import struct

import pytest

from wherry.core.errors import Code, InvalidArgument, ResourceExhausted
from wherry.proto import ttrpc_pb2
from wherry.proto.ttrpc.frames import (
    DATA,
    MAX_DATA,
    NO_DATA,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    REQUEST,
    RESPONSE,
    TRANSITIONS,
    Answer,
    Call,
    ClientConnection,
    Frame,
    Input,
    Oversized,
    Parser,
    Payload,
    ProtocolError,
    Reply,
    ServerConnection,
    State,
    encode,
)


def request(stream_id: int, *, flags: int = 0, payload: bytes = b"") -> bytes:
    message = ttrpc_pb2.Request(service="s", method="m", payload=payload)
    return encode(stream_id, REQUEST, flags, message.SerializeToString())


def refusal(event: object) -> tuple[int, int, str]:
    assert isinstance(event, Reply)
    (frame,) = Parser().feed(event.data)
    assert isinstance(frame, Frame)
    assert frame.kind == RESPONSE
    response = ttrpc_pb2.Response.FromString(frame.data)
    return frame.stream_id, response.status.code, response.status.message


def test_the_header_is_ten_bytes_big_endian() -> None:
    assert encode(0x01020305, DATA, REMOTE_CLOSED, b"xyz") == bytes.fromhex("00000003 01020305 03 01") + b"xyz"


def test_a_request_as_go_sends_it() -> None:
    # service "a.B", method "C", payload 0x01, timeout 1 s, one pair of metadata
    body = bytes.fromhex("0a03612e42 120143 1a0101 208094ebdc03 2a060a016b120176")
    (event,) = ServerConnection().receive(struct.pack(">IIBB", len(body), 1, 1, 0) + body)
    assert event == Call(1, "a.B", "C", b"\x01", 1_000_000_000, {"k": "v"}, opened=False)


def test_a_success_has_a_status() -> None:
    server = ServerConnection()
    server.receive(request(1))
    assert server.answer(1, b"x") == bytes.fromhex("00000005 00000001 02 00 0a00 120178")


@pytest.mark.parametrize("size", [1, 3, 9, 10, 11, 64])
def test_frames_come_whole_however_they_are_cut(size: int) -> None:
    wire = b"".join(encode(n, DATA, 0, bytes([n]) * n) for n in range(20)) + encode(99, DATA, REMOTE_CLOSED | NO_DATA)
    parser = Parser()
    found = [f for at in range(0, len(wire), size) for f in parser.feed(wire[at : at + size])]
    assert found == [Frame(n, DATA, 0, bytes([n]) * n) for n in range(20)] + [Frame(99, DATA, 5, b"")]


@pytest.mark.parametrize("size", [7, 4096, 1 << 23])
def test_a_frame_over_the_limit_is_skipped_and_named(size: int) -> None:
    wire = struct.pack(">IIBB", MAX_DATA + 1, 7, 1, 0) + bytes(MAX_DATA + 1) + encode(9, DATA, 0, b"after")
    parser = Parser()
    found = []
    if size == 7:
        found += [f for at in range(0, 28, 7) for f in parser.feed(wire[at : at + 7])] + parser.feed(wire[28:])
    else:
        found += [f for at in range(0, len(wire), size) for f in parser.feed(wire[at : at + size])]
    assert found == [Oversized(7, REQUEST, MAX_DATA + 1), Frame(9, DATA, 0, b"after")]
    assert len(parser._buffer) == 0


def test_a_frame_of_exactly_the_limit_passes() -> None:
    (frame,) = Parser().feed(encode(1, DATA, 0, bytes(MAX_DATA)))
    assert len(frame.data) == MAX_DATA  # type: ignore[union-attr]
    with pytest.raises(ResourceExhausted, match="exceed maximum message size of 4194304"):
        encode(1, DATA, 0, bytes(MAX_DATA + 1))


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 40, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
def test_what_is_not_ttrpc_is_told_apart(garbage: bytes) -> None:
    with pytest.raises(ProtocolError):
        ServerConnection().receive(garbage)
    with pytest.raises(ProtocolError):
        ClientConnection().receive(garbage)


def test_an_oversized_request_is_answered_and_the_connection_goes_on() -> None:
    server = ServerConnection()
    wire = struct.pack(">IIBB", MAX_DATA + 5, 1, 1, 0) + bytes(MAX_DATA + 5)
    refused, call = server.receive(wire + request(3))
    assert refusal(refused)[:2] == (1, Code.RESOURCE_EXHAUSTED)
    assert isinstance(call, Call)


def test_stream_ids_must_be_odd_and_rise() -> None:
    server = ServerConnection()
    (even,) = server.receive(request(2))
    assert refusal(even)[1:] == (Code.INVALID_ARGUMENT, "StreamID must be odd for client initiated streams")
    server.receive(request(5))
    for stream_id in (5, 3):
        (again,) = server.receive(request(stream_id))
        assert refusal(again)[1:] == (Code.INVALID_ARGUMENT, "StreamID cannot be re-used and must increment")


def test_a_request_that_is_no_message_is_refused() -> None:
    (event,) = ServerConnection().receive(encode(1, REQUEST, 0, b"\xff\xff"))
    assert refusal(event)[:2] == (1, Code.INVALID_ARGUMENT)


def test_unknown_types_are_ignored() -> None:
    assert ServerConnection().receive(encode(1, 200, 0, b"x")) == []


def test_data_for_no_stream() -> None:
    server = ServerConnection()
    (event,) = server.receive(encode(1, DATA, 0, b"x"))
    assert refusal(event)[1] == Code.INVALID_ARGUMENT
    server.receive(request(3, flags=REMOTE_OPEN))
    server.answer(3)
    assert server.receive(encode(3, DATA, 0, b"late")) == []


def test_data_after_the_end_ends_the_stream_in_an_error() -> None:
    server = ServerConnection()
    server.receive(request(1, flags=REMOTE_OPEN))
    assert server.receive(encode(1, DATA, REMOTE_CLOSED | NO_DATA)) == [Payload(1, None, end=True)]
    (event,) = server.receive(encode(1, DATA, 0, b"more"))
    assert refusal(event)[1] == Code.INVALID_ARGUMENT
    assert server.answer(1) == b""


def test_an_answer_over_the_limit_becomes_an_error() -> None:
    server, client = ServerConnection(), ClientConnection()
    stream_id, data = client.call("s", "m")
    server.receive(data)
    (answer,) = client.receive(server.answer(stream_id, bytes(MAX_DATA)))
    assert isinstance(answer, Answer)
    assert answer.code == Code.RESOURCE_EXHAUSTED


def test_a_client_drops_what_it_no_longer_waits_for() -> None:
    client = ClientConnection()
    stream_id, _ = client.call("s", "m")
    client.forget(stream_id)
    assert client.receive(encode(stream_id, RESPONSE, 0)) == []
    with pytest.raises(InvalidArgument):
        client.send(stream_id, b"")


def numbers(of: type) -> list[int]:
    return [value for name, value in vars(of).items() if name.isupper()]


def drive(state: int) -> ServerConnection:
    """A server whose stream 1 is in this state."""
    server = ServerConnection()
    if state != State.IDLE:
        server.receive(request(1, flags=REMOTE_OPEN if state == State.OPEN else REMOTE_CLOSED))
    if state == State.CLOSED:
        server.answer(1)
    return server


@pytest.mark.parametrize(("state", "step"), list(itertools.product(numbers(State), numbers(Input))))
def test_every_pair_of_state_and_input(state: int, step: int) -> None:
    """A server (and where the caller acts: what it receives) does what the table says, and refuses the rest."""
    server = drive(state)
    following = TRANSITIONS.get((state, step))
    if step in {Input.CALL, Input.CALL_OPEN}:
        (event,) = server.receive(request(1, flags=REMOTE_OPEN if step == Input.CALL_OPEN else 0))
        allowed = isinstance(event, Call)
    elif step in {Input.CALL_DATA, Input.CALL_END}:
        events = server.receive(encode(1, DATA, REMOTE_CLOSED if step == Input.CALL_END else 0, b"x"))
        allowed = bool(events) and isinstance(events[0], Payload)
    elif step == Input.ANSWER_DATA:
        allowed = server.send(1, b"x") != b""
    elif step == Input.ANSWER_END:
        allowed = server.finish(1) != b""
    else:
        allowed = server.answer(1, b"x") != b""
    assert allowed == (following is not None)
    if following is not None:
        assert server.streams.get(1, State.CLOSED) == following
