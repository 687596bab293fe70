"""HTTP/2 and HPACK without I/O, by the examples of the RFCs, the rules that protect a server, and real clients."""

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
from wherry.daemon import hpack, http2
from wherry.daemon.grpc_edge import GrpcServer
from wherry.proto import content_pb2 as pb
from wherry.proto.service import Context

CONTENT = "containerd.services.content.v1.Content"


# -- HPACK


def test_the_examples_of_rfc_7541() -> None:
    decoder = hpack.Decoder()  # appendix C.4
    first = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")]
    assert decoder.decode(bytes.fromhex("828684418cf1e3c2e5f23a6ba0ab90f4ff")) == first
    assert decoder.decode(bytes.fromhex("828684be5886a8eb10649cbf")) == [*first, ("cache-control", "no-cache")]
    third = decoder.decode(bytes.fromhex("828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf"))
    assert third[2:] == [(":path", "/index.html"), first[3], ("custom-key", "custom-value")]
    with_eviction = hpack.Decoder()  # C.5.1, not Huffman coded
    fields = with_eviction.decode(
        bytes.fromhex(
            "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d54"
            "6e1768747470733a2f2f7777772e6578616d706c652e636f6d"
        )
    )
    assert [value for _, value in fields] == [
        "302",
        "private",
        "Mon, 21 Oct 2013 20:13:21 GMT",
        "https://www.example.com",
    ]


def huffman_encode(data: bytes) -> bytes:
    codes = {
        symbol: (first + at, length) for length, first, symbols in hpack._CODES for at, symbol in enumerate(symbols)
    }
    bits = "".join(f"{codes[byte][0]:0{codes[byte][1]}b}" for byte in data)
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big") if bits else b""


def test_huffman_there_and_back() -> None:
    chance = random.Random(7)
    for _ in range(300):
        data = chance.randbytes(chance.randrange(40))
        assert hpack.huffman_decode(huffman_encode(data)) == data
    assert huffman_encode(b"www.example.com").hex() == "f1e3c2e5f23a6ba0ab90f4ff"


def test_what_is_encoded_is_decoded() -> None:
    fields = [("grpc-status", "5"), ("grpc-message", "x" * 5000), ("a", "")]
    assert hpack.Decoder().decode(hpack.encode(fields)) == fields


@pytest.mark.parametrize(
    "block",
    ["80", "be", "40", "4085", "408825a849", "3fffffff7f", "ffffffffffff0f", "0001", "82" + "3f01", "00818100", "00ff"],
)
def test_blocks_that_are_none(block: str) -> None:
    with pytest.raises(hpack.HpackError):
        hpack.Decoder().decode(bytes.fromhex(block))


def test_random_blocks_raise_nothing_else() -> None:
    chance = random.Random(8)
    for _ in range(3000):
        try:
            hpack.Decoder().decode(chance.randbytes(chance.randrange(1, 60)))
        except hpack.HpackError:
            continue


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


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (http2.frame(http2.DATA, 0, 1, b"x"), http2.PROTOCOL_ERROR),
        (http2.frame(http2.DATA, 0, 0, b"x"), http2.PROTOCOL_ERROR),
        (headers(2), http2.PROTOCOL_ERROR),
        (http2.frame(http2.HEADERS, http2.END_HEADERS, 1, b"\x80"), http2.COMPRESSION_ERROR),
        (http2.frame(http2.HEADERS, 0, 1, b"") + http2.frame(http2.PING, 0, 0, b"12345678"), http2.PROTOCOL_ERROR),
        (http2.frame(http2.CONTINUATION, 0, 1, b""), http2.PROTOCOL_ERROR),
        (http2.frame(http2.PING, 0, 0, b"1"), http2.FRAME_SIZE_ERROR),
        (http2.frame(http2.SETTINGS, 0, 0, b"1"), http2.FRAME_SIZE_ERROR),
        (http2.frame(http2.WINDOW_UPDATE, 0, 0, b"\0\0\0\0"), http2.PROTOCOL_ERROR),
        (http2.frame(http2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), http2.FLOW_CONTROL_ERROR),
        (http2.frame(http2.RST_STREAM, 0, 9, b"\0\0\0\0"), http2.PROTOCOL_ERROR),
        (http2.frame(http2.PUSH_PROMISE, 0, 1, b""), http2.PROTOCOL_ERROR),
        (headers(1) + http2.frame(http2.DATA, http2.PADDED, 1, b"\x09x"), http2.PROTOCOL_ERROR),
        (headers(1) + headers(1), http2.PROTOCOL_ERROR),
        (headers(1) + http2.frame(http2.DATA, 0, 1, b"x" * 16384) * 65, http2.FLOW_CONTROL_ERROR),
        (b"\xff\xff\xff" + bytes(6), http2.FRAME_SIZE_ERROR),
    ],
)
def test_rules_that_are_broken(data: bytes, code: int) -> None:
    with pytest.raises(http2.ProtocolError) as caught:
        opened().receive(data)
    assert caught.value.code == code


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
