"""HTTP/2 without I/O: the rules of RFC 9113, those that protect a server among them; and grpcio's client.

How gRPC is spoken over it is tested in test_grpc.py, with a whole daemon in ../daemon/test_grpc_peers.py.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from wherry.core.errors import NotFound
from wherry.proto import content_pb2 as pb
from wherry.proto.grpc import hpack, http2
from wherry.proto.grpc.server import GrpcServer
from wherry.proto.service import Context

CONTENT = "containerd.services.content.v1.Content"


# -- frames


def opened() -> http2.Connection:
    connection = http2.Connection()
    assert connection.receive(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0, b"")) == []
    connection.take()
    return connection


def headers(stream: int, *, end: bool = False) -> bytes:
    flags = http2.END_HEADERS | (http2.END_STREAM if end else 0)
    return http2.frame(http2.HEADERS, flags, stream, hpack.encode([(":path", "/x")]))


def test_a_request_in_pieces_of_one_byte() -> None:
    connection = http2.Connection()
    data = http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0, b"") + headers(1)
    data += http2.frame(http2.DATA, http2.END_STREAM | http2.PADDED, 1, b"\x02hi\0\0")
    events = [event for at in range(len(data)) for event in connection.receive(data[at : at + 1])]
    assert events == [http2.Request(1, [(":path", "/x")], False), http2.Body(1, b"hi", 5, True)]


def test_a_header_block_over_several_frames() -> None:
    connection = opened()
    block = hpack.encode([(":path", "/x"), ("a", "b" * 100)])
    data = http2.frame(http2.HEADERS, http2.END_STREAM, 1, block[:20])
    data += http2.frame(http2.CONTINUATION, 0, 1, block[20:40])
    data += http2.frame(http2.CONTINUATION, http2.END_HEADERS, 1, block[40:])
    (event,) = connection.receive(data)
    assert event == http2.Request(1, [(":path", "/x"), ("a", "b" * 100)], True)


def test_pings_and_settings_are_acknowledged() -> None:
    connection = opened()
    connection.receive(http2.frame(http2.PING, 0, 0, b"12345678"))
    assert connection.take() == http2.frame(http2.PING, http2.ACK, 0, b"12345678")
    connection.receive(http2.frame(http2.SETTINGS, 0, 0, struct.pack(">HL", 4, 10)))
    assert connection.take() == http2.frame(http2.SETTINGS, http2.ACK, 0, b"")
    connection.receive(headers(1, end=True))
    assert connection.room(1) == 10
    connection.data(1, b"x" * 10)
    assert connection.room(1) == 0
    (event,) = connection.receive(http2.frame(http2.WINDOW_UPDATE, 0, 1, struct.pack(">L", 7)))
    assert event == http2.Writable(1)
    assert connection.room(1) == 7
    connection.receive(http2.frame(http2.SETTINGS, 0, 0, struct.pack(">HL", 4, 0)))
    assert connection.room(1) == -3


def test_a_reset_and_what_comes_after_it() -> None:
    connection = opened()
    connection.receive(headers(1))
    (event,) = connection.receive(http2.frame(http2.RST_STREAM, 0, 1, struct.pack(">L", http2.CANCEL)))
    assert event == http2.Reset(1, http2.CANCEL)
    assert connection.receive(http2.frame(http2.DATA, 0, 1, b"late")) == []
    assert connection.receive(http2.frame(http2.RST_STREAM, 0, 1, b"\0\0\0\0")) == []


def settings(*pairs: tuple[int, int]) -> bytes:
    return http2.frame(http2.SETTINGS, 0, 0, b"".join(struct.pack(">HL", *pair) for pair in pairs))


def update(stream: int, more: int) -> bytes:
    return http2.frame(http2.WINDOW_UPDATE, 0, stream, struct.pack(">L", more))


def reset(stream: int, code: int = http2.CANCEL) -> bytes:
    return http2.frame(http2.RST_STREAM, 0, stream, struct.pack(">L", code))


BROKEN = {
    "DATA on an idle stream": (http2.frame(http2.DATA, 0, 1, b"x"), http2.PROTOCOL_ERROR),
    "DATA on no stream": (http2.frame(http2.DATA, 0, 0, b"x"), http2.PROTOCOL_ERROR),
    "DATA padded beyond itself": (headers(1) + http2.frame(http2.DATA, 8, 1, b"\x09x"), http2.PROTOCOL_ERROR),
    "DATA padded with nothing": (headers(1) + http2.frame(http2.DATA, 8, 1, b""), http2.PROTOCOL_ERROR),
    "DATA beyond the window": (
        headers(1) + http2.frame(http2.DATA, 0, 1, b"x" * 16384) * 65,
        http2.FLOW_CONTROL_ERROR,
    ),
    "HEADERS on a server's stream": (headers(2), http2.PROTOCOL_ERROR),
    "HEADERS on no stream": (headers(0), http2.PROTOCOL_ERROR),
    "HEADERS on a lower stream that never was": (headers(5) + http2.frame(http2.DATA, 0, 4, b""), http2.PROTOCOL_ERROR),
    "HEADERS that are no HPACK": (http2.frame(http2.HEADERS, 4, 1, b"\x80"), http2.COMPRESSION_ERROR),
    "HEADERS with half a priority": (http2.frame(http2.HEADERS, 0x24, 1, b"abcd"), http2.FRAME_SIZE_ERROR),
    "HEADERS with upper case": (
        http2.frame(http2.HEADERS, 4, 1, hpack.encode([("Te", "trailers")])),
        http2.PROTOCOL_ERROR,
    ),
    "trailers that don't end": (headers(1) + headers(1), http2.PROTOCOL_ERROR),
    "a header block that is interrupted": (
        http2.frame(http2.HEADERS, 0, 1, b"") + http2.frame(http2.PING, 0, 0, b"12345678"),
        http2.PROTOCOL_ERROR,
    ),
    "a header block interrupted by an unknown frame": (
        http2.frame(http2.HEADERS, 0, 1, b"") + http2.frame(77, 0, 0, b""),
        http2.PROTOCOL_ERROR,
    ),
    "a header block that goes on elsewhere": (
        http2.frame(http2.HEADERS, 0, 1, b"") + http2.frame(http2.CONTINUATION, 4, 3, b""),
        http2.PROTOCOL_ERROR,
    ),
    "CONTINUATION of nothing": (http2.frame(http2.CONTINUATION, 0, 1, b""), http2.PROTOCOL_ERROR),
    "CONTINUATION without end": (
        http2.frame(http2.HEADERS, 0, 1, b"") + http2.frame(http2.CONTINUATION, 0, 1, b"") * 100,
        http2.ENHANCE_YOUR_CALM,
    ),
    "CONTINUATION of too much": (
        http2.frame(http2.HEADERS, 0, 1, b"") + http2.frame(http2.CONTINUATION, 0, 1, b"x" * 16384) * 9,
        http2.ENHANCE_YOUR_CALM,
    ),
    "PRIORITY of no stream": (http2.frame(http2.PRIORITY, 0, 0, bytes(5)), http2.PROTOCOL_ERROR),
    "PRIORITY of four bytes": (http2.frame(http2.PRIORITY, 0, 1, bytes(4)), http2.FRAME_SIZE_ERROR),
    "RST_STREAM on an idle stream": (reset(9), http2.PROTOCOL_ERROR),
    "RST_STREAM on no stream": (reset(0), http2.PROTOCOL_ERROR),
    "RST_STREAM of three bytes": (headers(1) + http2.frame(http2.RST_STREAM, 0, 1, bytes(3)), http2.FRAME_SIZE_ERROR),
    "SETTINGS of a byte": (http2.frame(http2.SETTINGS, 0, 0, b"1"), http2.FRAME_SIZE_ERROR),
    "SETTINGS on a stream": (http2.frame(http2.SETTINGS, 0, 1, b""), http2.PROTOCOL_ERROR),
    "SETTINGS acknowledged with more": (http2.frame(http2.SETTINGS, 1, 0, bytes(6)), http2.FRAME_SIZE_ERROR),
    "SETTINGS with a window too large": (settings((4, 1 << 31)), http2.FLOW_CONTROL_ERROR),
    "SETTINGS that make an open stream's window too large": (
        headers(1, end=True) + update(1, 1000) + settings((4, (1 << 31) - 1)),
        http2.FLOW_CONTROL_ERROR,
    ),
    "SETTINGS with frames too small": (settings((5, 16383)), http2.PROTOCOL_ERROR),
    "SETTINGS with frames too large": (settings((5, 1 << 24)), http2.PROTOCOL_ERROR),
    "SETTINGS with push as 2": (settings((2, 2)), http2.PROTOCOL_ERROR),
    "PUSH_PROMISE from a client": (http2.frame(http2.PUSH_PROMISE, 0, 1, b""), http2.PROTOCOL_ERROR),
    "PING of a byte": (http2.frame(http2.PING, 0, 0, b"1"), http2.FRAME_SIZE_ERROR),
    "PING on a stream": (http2.frame(http2.PING, 0, 1, bytes(8)), http2.PROTOCOL_ERROR),
    "GOAWAY on a stream": (http2.frame(http2.GOAWAY, 0, 1, bytes(8)), http2.PROTOCOL_ERROR),
    "GOAWAY of four bytes": (http2.frame(http2.GOAWAY, 0, 0, bytes(4)), http2.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE of nothing": (update(0, 0), http2.PROTOCOL_ERROR),
    "WINDOW_UPDATE of nothing on a stream": (headers(1) + update(1, 0), http2.PROTOCOL_ERROR),
    "WINDOW_UPDATE on an idle stream": (update(3, 1), http2.PROTOCOL_ERROR),
    "WINDOW_UPDATE of three bytes": (http2.frame(http2.WINDOW_UPDATE, 0, 0, bytes(3)), http2.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE beyond 2^31-1": (update(0, (1 << 31) - 1), http2.FLOW_CONTROL_ERROR),
    "WINDOW_UPDATE beyond 2^31-1 on a stream": (headers(1) + update(1, (1 << 31) - 1), http2.FLOW_CONTROL_ERROR),
    "a frame larger than was allowed": (b"\xff\xff\xff" + bytes(6), http2.FRAME_SIZE_ERROR),
    "a frame larger by a byte": (b"\x00\x40\x01" + bytes(6), http2.FRAME_SIZE_ERROR),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_rules_that_are_broken(rule: str) -> None:
    data, code = BROKEN[rule]
    with pytest.raises(http2.ProtocolError) as caught:
        opened().receive(data)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"P",
        http2.PREFACE[:-1] + b"x",
        http2.PREFACE + http2.frame(http2.PING, 0, 0, bytes(8)),
        http2.PREFACE + http2.frame(http2.SETTINGS, http2.ACK, 0, b""),
    ],
)
def test_a_client_that_speaks_something_else(data: bytes) -> None:
    connection = http2.Connection()
    if http2.PREFACE.startswith(data):
        assert connection.receive(data) == []
        return
    with pytest.raises(http2.ProtocolError):
        connection.receive(data)


def test_what_must_be_ignored() -> None:
    connection = opened()
    connection.receive(headers(1))
    data = http2.frame(77, 0xFF, 9, b"unknown") + http2.frame(http2.PRIORITY, 0, 99, bytes(5))
    data += settings((99, 1), (3, 0), (1, 0), (6, 5)) + http2.frame(http2.SETTINGS, http2.ACK, 0, b"")
    data += http2.frame(http2.PING, http2.ACK, 0, bytes(8)) + http2.frame(http2.GOAWAY, 0, 0, bytes(8) + b"bye")
    data += http2.frame(http2.DATA, 0xF0, 1, b"flags")
    assert connection.receive(data) == [http2.Body(1, b"flags", 5, False)]


# what each frame does to a stream in each state: the events, or the code of a stream error ("!") or of the connection's
STATES = ("idle", "open", "half closed", "reset by the peer", "answered", "answered early")
FRAMES = {
    "DATA": lambda: http2.frame(http2.DATA, 0, 1, b"x"),
    "DATA, end": lambda: http2.frame(http2.DATA, http2.END_STREAM, 1, b"x"),
    "HEADERS, end": lambda: headers(1, end=True),
    "RST_STREAM": lambda: reset(1),
    "WINDOW_UPDATE": lambda: update(1, 1),
    "PRIORITY": lambda: http2.frame(http2.PRIORITY, 0, 1, bytes(5)),
}
TABLE: dict[str, tuple[str, ...]] = {
    "DATA": ("error", "Body", "closed", "", "", ""),
    "DATA, end": ("error", "Body", "closed", "", "", ""),
    "HEADERS, end": ("Request", "Body", "closed", "", "", ""),
    "RST_STREAM": ("error", "Reset", "Reset", "", "", ""),
    "WINDOW_UPDATE": ("error", "Writable", "Writable", "", "", ""),
    "PRIORITY": ("", "", "", "", "", ""),
}


def in_state(state: str) -> http2.Connection:
    connection = opened()
    if state != "idle":
        connection.receive(headers(1, end=state in ("half closed", "answered")))
    if state == "reset by the peer":
        connection.receive(reset(1))
    if state.startswith("answered"):
        connection.headers(1, b"", end=True)
    connection.take()
    return connection


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", FRAMES)
def test_every_frame_in_every_state_of_a_stream(name: str, state: str) -> None:
    connection = in_state(state)
    expected = TABLE[name][STATES.index(state)]
    if expected == "error":
        with pytest.raises(http2.ProtocolError) as caught:
            connection.receive(FRAMES[name]())
        assert caught.value.code == http2.PROTOCOL_ERROR
        return
    events = connection.receive(FRAMES[name]())
    if expected == "closed":
        assert events == [http2.Reset(1, http2.STREAM_CLOSED)]
        assert connection.take() == reset(1, http2.STREAM_CLOSED)
    else:
        assert [type(event).__name__ for event in events] == ([expected] if expected else [])
        assert connection.take() == b""


def test_an_early_answer_tells_the_client_to_stop_sending() -> None:
    connection = opened()
    connection.receive(headers(1))
    connection.headers(1, b"\x88", end=True)
    assert connection.take() == http2.frame(http2.HEADERS, 5, 1, b"\x88") + reset(1, http2.NO_ERROR)
    assert not connection.is_open(1)


def test_the_connections_room_comes_back_whatever_becomes_of_a_stream() -> None:
    connection = opened()
    for stream in range(1, 201, 2):  # 100 MiB in all
        connection.receive(headers(stream))
        for _ in range(64):
            connection.receive(http2.frame(http2.DATA, 0, stream, b"x" * 16384))
        connection.receive(reset(stream))
    assert sum(struct.unpack(">L", connection.take()[9:13])) > 0


def test_windows_of_streams_follow_the_settings_once_for_a_frame() -> None:
    connection = opened()
    connection.receive(headers(1, end=True) + headers(3, end=True))
    connection.data(1, b"x" * 100)
    events = connection.receive(settings(*[(4, size) for size in range(2000)], (4, 100)))
    assert events == [http2.Writable(0)]
    assert (connection.room(1), connection.room(3)) == (0, 100)
    assert connection.receive(settings((4, 100))) == []


def test_a_header_list_that_is_too_large_ends_its_stream_alone() -> None:
    connection = opened()
    large = b"\x40\x01a\x7f\x81\x1e" + b"x" * 3968
    (event,) = connection.receive(http2.frame(http2.HEADERS, 5, 1, large))
    assert connection.receive(http2.frame(http2.HEADERS, 5, 3, b"\xbe" * 1000)) == []
    assert connection.take() == reset(3, http2.ENHANCE_YOUR_CALM)
    (event,) = connection.receive(http2.frame(http2.HEADERS, 5, 5, b"\xbe"))
    assert event == http2.Request(5, [("a", "x" * 3968)], True)


def test_more_streams_than_are_allowed_are_refused() -> None:
    connection = opened()
    for stream in range(1, 2 * http2.MAX_STREAMS + 1, 2):
        connection.receive(headers(stream))
    connection.take()
    last = 2 * http2.MAX_STREAMS + 1
    assert connection.receive(headers(last)) == []
    assert connection.take() == reset(last, http2.REFUSED_STREAM)
    connection.headers(1, b"", end=True)
    (event,) = connection.receive(headers(last + 2))
    assert isinstance(event, http2.Request)


def give_up(connection: http2.Connection, streams: range) -> None:
    for stream in streams:
        connection.receive(headers(stream) + reset(stream))


def break_a_rule(connection: http2.Connection, streams: range) -> None:
    for stream in streams:
        connection.receive(headers(stream, end=True) + http2.frame(http2.DATA, 0, stream, b""))


def test_a_rapid_reset_ends_the_connection_and_a_slow_one_does_not() -> None:
    now = [0.0]
    connection = http2.Connection(lambda: now[0])
    connection.receive(http2.PREFACE + settings())
    for number in range(3 * http2.RESET_BURST):
        now[0] += 1 / http2.RESETS_PER_SECOND
        give_up(connection, range(2 * number + 1, 2 * number + 2))
    first = 6 * http2.RESET_BURST + 1
    with pytest.raises(http2.ProtocolError) as caught:
        give_up(connection, range(first, first + 2 * http2.RESET_BURST + 4, 2))
    assert caught.value.code == http2.ENHANCE_YOUR_CALM


def test_a_client_cannot_have_us_reset_its_streams_for_ever() -> None:
    connection = http2.Connection(lambda: 0.0)
    connection.receive(http2.PREFACE + settings())
    with pytest.raises(http2.ProtocolError) as caught:  # CVE-2025-8671
        break_a_rule(connection, range(1, 2 * http2.RESET_BURST + 4, 2))
    assert caught.value.code == http2.ENHANCE_YOUR_CALM


def test_after_goaway_new_streams_are_dropped_and_old_ones_go_on() -> None:
    connection = opened()
    connection.receive(headers(1))
    connection.goaway()
    assert connection.take() == http2.frame(http2.GOAWAY, 0, 0, struct.pack(">LL", 1, 0))
    assert connection.receive(headers(3) + http2.frame(http2.DATA, 1, 3, b"x") + reset(3)) == []
    assert connection.receive(http2.frame(http2.DATA, 1, 1, b"x")) == [http2.Body(1, b"x", 1, True)]
    connection.goaway(http2.PROTOCOL_ERROR, "no")
    assert connection.take() == http2.frame(http2.GOAWAY, 0, 0, struct.pack(">LL", 1, 1) + b"no")


def test_a_large_header_block_goes_out_in_frames_that_the_peer_takes() -> None:
    connection = opened()
    connection.receive(headers(1, end=True))
    connection.headers(1, b"x" * 40_000, end=True)
    expected = http2.frame(http2.HEADERS, http2.END_STREAM, 1, b"x" * 16384)
    expected += http2.frame(http2.CONTINUATION, 0, 1, b"x" * 16384)
    expected += http2.frame(http2.CONTINUATION, http2.END_HEADERS, 1, b"x" * 7232)
    assert connection.take() == expected


def test_random_bytes_raise_nothing_else() -> None:
    chance = random.Random(9)
    for _ in range(2000):
        connection = opened()
        data = b"".join(
            http2.frame(
                chance.randrange(12), chance.randrange(256), chance.randrange(6), chance.randbytes(chance.randrange(20))
            )
            for _ in range(chance.randrange(1, 8))
        )
        try:
            connection.receive(data)
        except http2.ProtocolError:
            continue


# -- with grpcio's client


class Echo:
    """Part of the content service: reads give back what is asked for, writes count."""

    SERVICE = CONTENT

    async def info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        if request.digest == "missing":
            raise NotFound("content 100% missing: ünïcode\n: not found")
        if request.digest == "broken":
            raise KeyError("a bug")
        return pb.InfoResponse(info=pb.Info(digest=request.digest, size=len(context.metadata.get("x-mine", ""))))

    async def read(self, request: pb.ReadContentRequest, context: Context) -> AsyncIterator[pb.ReadContentResponse]:
        for _ in range(request.offset):
            yield pb.ReadContentResponse(data=b"\xab" * request.size)

    async def write(
        self, requests: AsyncIterator[pb.WriteContentRequest], context: Context
    ) -> AsyncIterator[pb.WriteContentResponse]:
        total = 0
        async for request in requests:
            total += len(request.data)
            yield pb.WriteContentResponse(offset=total)


@pytest.fixture
async def channel(tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    server = GrpcServer([Echo()], max_receive=16 << 20, max_send=16 << 20)
    await server.serve_unix(str(tmp_path / "s"))
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s", options=options) as channel:
        yield channel
    await server.stop(1)


async def info(channel: grpc.aio.Channel, digest: str, **more: object) -> pb.InfoResponse:
    call = channel.unary_unary(f"/{CONTENT}/Info", pb.InfoRequest.SerializeToString, pb.InfoResponse.FromString)
    return await call(pb.InfoRequest(digest=digest), **more)  # type: ignore[no-any-return, arg-type]


async def test_calls_at_once_and_metadata(channel: grpc.aio.Channel) -> None:
    answers = await asyncio.gather(
        *(info(channel, str(number), metadata=(("x-mine", "y" * number),)) for number in range(200))
    )
    assert [(answer.info.digest, answer.info.size) for answer in answers] == [(str(n), n) for n in range(200)]


async def test_errors_keep_their_text(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await info(channel, "missing")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "content 100% missing: ünïcode\n: not found"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await info(channel, "broken")
    assert caught.value.code() == grpc.StatusCode.UNKNOWN
    assert "KeyError" in (caught.value.details() or "")


@pytest.mark.parametrize(("count", "size"), [(0, 0), (3, 10), (1, 8 << 20), (40, 1 << 20), (5000, 1)])
async def test_streams_of_any_size_come_through(channel: grpc.aio.Channel, count: int, size: int) -> None:
    call = channel.unary_stream(
        f"/{CONTENT}/Read", pb.ReadContentRequest.SerializeToString, pb.ReadContentResponse.FromString
    )
    sizes = [len(each.data) async for each in call(pb.ReadContentRequest(offset=count, size=size))]
    assert sizes == [size] * count


@pytest.mark.parametrize(("count", "size"), [(1, 0), (3, 10), (2, 8 << 20), (40, 1 << 20), (2000, 1)])
async def test_uploads_of_any_size_come_through(channel: grpc.aio.Channel, count: int, size: int) -> None:
    call = channel.stream_stream(
        f"/{CONTENT}/Write", pb.WriteContentRequest.SerializeToString, pb.WriteContentResponse.FromString
    )(iter([pb.WriteContentRequest(data=bytes(size))] * count))
    offsets = [each.offset async for each in call]
    assert offsets == [size * number for number in range(1, count + 1)]


async def test_a_message_that_is_too_large(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await info(channel, "x" * (17 << 20))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await info(channel, "x")).info.digest == "x"


async def test_a_slow_reader_of_a_stream_delays_nobody(channel: grpc.aio.Channel) -> None:
    call = channel.unary_stream(
        f"/{CONTENT}/Read", pb.ReadContentRequest.SerializeToString, pb.ReadContentResponse.FromString
    )(pb.ReadContentRequest(offset=1000, size=1 << 20))
    await call.read()
    for number in range(20):
        assert (await asyncio.wait_for(info(channel, str(number)), 5)).info.digest == str(number)
    call.cancel()
    assert (await info(channel, "after")).info.digest == "after"
