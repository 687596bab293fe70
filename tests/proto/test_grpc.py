"""gRPC over HTTP/2 as PROTOCOL-HTTP2 of the gRPC project says, spoken by the h2 package: also what no library sends."""

from __future__ import annotations

import asyncio
import base64
import socket
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest

from tests.proto.h2peer import INFO, PATIENCE, READ, WRITE, Answer, Peer, info, message
from wherry.core.errors import Code, NotFound
from wherry.proto import content_pb2 as pb
from wherry.proto.grpc import call as grpc_calls
from wherry.proto.grpc import hpack, http2
from wherry.proto.grpc import server as grpc_server
from wherry.proto.grpc.server import GrpcServer
from wherry.proto.service import Context

READ_ONE = message(pb.ReadContentRequest(offset=1, size=1 << 20).SerializeToString())


class Probe:
    """Part of the content service, which says what happens to its calls. What it does goes by the digest."""

    SERVICE = "containerd.services.content.v1.Content"

    def __init__(self) -> None:
        self.started = 0
        self.cancelled = 0
        self.cleaning = asyncio.Event()
        self.go = asyncio.Event()
        self.written: list[int] = []
        self.read_on = True

    async def info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        self.started += 1
        remaining = context.remaining()
        said = {
            "time": lambda: "none" if remaining is None else f"{remaining:.6f}",
            "metadata": lambda: ";".join(f"{name}={value}" for name, value in sorted(context.metadata.items())),
        }
        if request.digest.startswith("error:"):
            raise NotFound(request.digest.removeprefix("error:"))
        if request.digest == "surrogate":
            raise NotFound("a path \udcff: not found")
        if request.digest == "go":
            await self.go.wait()
        if request.digest in ("wait", "dawdle"):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                if request.digest == "dawdle":
                    await self.cleaning.wait()
                raise
        size = int(request.digest[5:]) if request.digest.startswith("size:") else 0
        digest = said.get(request.digest, lambda: "x" * size or request.digest)()
        return pb.InfoResponse(info=pb.Info(digest=digest))

    async def read(self, request: pb.ReadContentRequest, context: Context) -> AsyncIterator[pb.ReadContentResponse]:
        self.started += 1
        try:
            for _ in range(request.offset):
                yield pb.ReadContentResponse(data=bytes(request.size))
            if request.digest == "wait":
                await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise

    async def write(
        self, requests: AsyncIterator[pb.WriteContentRequest], context: Context
    ) -> AsyncIterator[pb.WriteContentResponse]:
        self.started += 1
        if not self.read_on:
            await self.go.wait()
        try:
            async for request in requests:
                self.written.append(len(request.data))
                yield pb.WriteContentResponse(offset=len(self.written))
                if request.ref == "stop":
                    return
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class Rig:
    """A server in this process, and its probe."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.probe = Probe()
        self.server = GrpcServer([self.probe], max_receive=16 << 20, max_send=16 << 20)

    async def peer(self, window: int | None = None) -> Peer:
        peer = await Peer.connect(self.path, window)
        self.peers.append(peer)
        return peer

    peers: list[Peer]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(str(tmp_path / "s"))
    rig.peers = []
    await rig.server.serve_unix(rig.path)
    yield rig
    for peer in rig.peers:
        await peer.close()
    await rig.server.stop(0)


def has_bytes(peer: Peer, stream: int, count: int) -> bool:
    assert len(peer.answers[stream].data) <= count
    return len(peer.answers[stream].data) == count


def has_more(peer: Peer, streams: tuple[int, int], than: int) -> bool:
    return peer.answers[streams[1]].ended or sum(len(peer.answers[stream].data) for stream in streams) > than


def started(probe: Probe, count: int) -> bool:
    return probe.started == count


async def eventually(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def digest(answer: Answer) -> str:
    (payload,) = answer.messages
    assert answer.status == 0
    return pb.InfoResponse.FromString(payload).info.digest


# -- shapes


async def test_an_answer_has_headers_a_message_and_trailers(rig: Rig) -> None:
    answer = await (await rig.peer()).call(INFO, info("x"))
    assert digest(answer) == "x"
    assert answer.headers == [
        {":status": "200", "content-type": "application/grpc"},
        {"grpc-status": "0", "grpc-message": ""},
    ]


async def test_an_error_is_trailers_only(rig: Rig) -> None:
    answer = await (await rig.peer()).call(INFO, info("error:x: not found"))
    (fields,) = answer.headers
    assert fields == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-status": "5",
        "grpc-message": "x: not found",
    }
    assert answer.data == b""


@pytest.mark.parametrize(
    "text", ["ünïcode ☃", "a\nb\r\nc\0d", "100%", "%41", " spaces around ", "", " ", "~", "\x7f", "a\tb"]
)
async def test_errors_keep_their_text(rig: Rig, text: str) -> None:
    assert (await (await rig.peer()).call(INFO, info(f"error:{text}"))).text == text


async def test_a_text_that_is_no_utf_8_still_answers(rig: Rig) -> None:
    answer = await (await rig.peer()).call(INFO, info("surrogate"))
    assert answer.status == Code.NOT_FOUND
    assert answer.text == "a path \\udcff: not found"


@pytest.mark.parametrize("text", ["x" * 100_000, "☃" * 10_000])
async def test_a_text_that_is_too_long_keeps_its_ends(rig: Rig, text: str) -> None:
    answer = await (await rig.peer()).call(INFO, info(f"error:begin {text}: not found"))
    assert answer.text.startswith("begin ")
    assert answer.text.endswith(": not found")
    assert len(answer.headers[-1]["grpc-message"]) <= 4096


@pytest.mark.parametrize("kind", ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"])
async def test_content_types_that_are_grpc(rig: Rig, kind: str) -> None:
    assert digest(await (await rig.peer()).call(INFO, info("x"), content_type=kind)) == "x"


@pytest.mark.parametrize("kind", ["text/plain", "application/grpc-web", "application/json", "", "-"])
async def test_content_types_that_are_not(rig: Rig, kind: str) -> None:
    peer = await rig.peer()
    answer = await peer.call(INFO, info("x"), content_type=kind)
    assert answer.headers[0][":status"] == "415"
    assert "content-type" in answer.text
    assert digest(await peer.call(INFO, info("x"))) == "x"


async def test_a_get_is_refused(rig: Rig) -> None:
    peer = await rig.peer()
    stream = peer.open(INFO, method="GET")
    assert (await peer.end(stream)).headers[0][":status"] == "405"


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        ({"path": "-"}, ()),
        ({"scheme": "-"}, ()),
        ({"method": "-"}, ()),
        ({}, ((":path", "/x"),)),
        ({}, ((":unknown", "x"),)),
        ({}, (("connection", "close"),)),
        ({}, (("transfer-encoding", "chunked"),)),
        ({"te": "gzip"}, ()),
    ],
)
async def test_malformed_requests_are_reset_and_the_connection_lives(
    rig: Rig, fields: dict[str, str], extra: tuple[tuple[str, str], ...]
) -> None:
    peer = await rig.peer()
    assert (await peer.end(peer.open(INFO, *extra, **fields))).reset == http2.PROTOCOL_ERROR
    assert digest(await peer.call(INFO, info("x"))) == "x"


@pytest.mark.parametrize("path", ["/no.Such/Thing", INFO + "x", "", "/", "/" + "x" * 5000, "noslash"])
async def test_paths_that_lead_nowhere(rig: Rig, path: str) -> None:
    peer = await rig.peer()
    answer = await peer.call(path, info("x"))
    assert answer.status == Code.UNIMPLEMENTED
    assert "unknown" in answer.text
    assert digest(await peer.call(INFO, info("x"))) == "x"


# -- requests


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", Code.INVALID_ARGUMENT),
        (info("x")[:-1], Code.INVALID_ARGUMENT),
        (info("x") + b"\0", Code.INVALID_ARGUMENT),
        (info("x") + info("y"), Code.INVALID_ARGUMENT),
        (b"\0\0\0", Code.INVALID_ARGUMENT),
        (message(b"\xff\xff"), Code.INVALID_ARGUMENT),
        (message(b"x", flag=1), Code.UNIMPLEMENTED),
        (message(b"x", flag=7), Code.UNIMPLEMENTED),
        (b"\0" + (17 << 20).to_bytes(4, "big"), Code.RESOURCE_EXHAUSTED),
        (b"\0\xff\xff\xff\xff", Code.RESOURCE_EXHAUSTED),
    ],
)
async def test_a_unary_request_is_one_message_whole(rig: Rig, data: bytes, code: int) -> None:
    peer = await rig.peer()
    answer = await peer.call(INFO, data)
    assert answer.status == code
    assert rig.probe.started == 0
    assert digest(await peer.call(INFO, info("x"))) == "x"


async def test_the_handler_of_a_unary_call_starts_when_the_client_has_said_all(rig: Rig) -> None:
    peer = await rig.peer()
    stream = peer.open(INFO)
    peer.send(stream, info("x"))
    assert digest(await peer.call(INFO, info("y"))) == "y"
    assert rig.probe.started == 1
    peer.send(stream, b"", end=True)
    assert digest(await peer.end(stream)) == "x"


async def test_requests_in_any_pieces_with_padding_and_trailers(rig: Rig) -> None:
    peer = await rig.peer()
    stream = peer.open(INFO)
    for byte in info("in pieces"):
        peer.send(stream, bytes([byte]), pad=3)
    peer.h2.send_headers(stream, [("x-trailer", "1")], end_stream=True)
    peer.flush()
    assert digest(await peer.end(stream)) == "in pieces"


async def test_compression_is_refused_with_what_is_taken(rig: Rig) -> None:
    answer = await (await rig.peer()).call(INFO, info("x"), ("grpc-encoding", "gzip"))
    assert answer.status == Code.UNIMPLEMENTED
    assert "gzip" in answer.text
    assert answer.headers[0]["grpc-accept-encoding"] == "identity"
    assert digest(await (await rig.peer()).call(INFO, info("x"), ("grpc-encoding", "identity"))) == "x"


async def test_metadata(rig: Rig) -> None:
    padded = base64.b64encode(b"\0\xffab").decode()
    extra = [("x-a", "1"), ("x-a", "2"), ("x-bin", padded), ("y-bin", padded.rstrip("=")), ("z-bin", "not base64!")]
    said = digest(await (await rig.peer()).call(INFO, info("metadata"), *extra, ("grpc-trace", "t"), te="-"))
    assert said == "content-type=application/grpc;x-a=1"


# -- deadlines and cancelling


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("99999999H", 99999999 * 3600), ("2M", 120), ("7S", 7), ("2500m", 2.5), ("3000000u", 3), ("99999999n", 0.1)],
)
async def test_units_of_deadlines(rig: Rig, text: str, seconds: float) -> None:
    said = float(digest(await (await rig.peer()).call(INFO, info("time"), ("grpc-timeout", text))))
    assert seconds - 0.09 <= said <= seconds


@pytest.mark.parametrize("text", ["", "1", "S", "123456789S", "-1S", "1.5S", "1x", " 1S", "1S1S", "\u0661S"])
async def test_deadlines_that_are_none(rig: Rig, text: str) -> None:
    answer = await (await rig.peer()).call(INFO, info("time"), ("grpc-timeout", text))
    assert answer.status == Code.INVALID_ARGUMENT
    assert "grpc-timeout" in answer.text


@pytest.mark.parametrize("path", [INFO, READ, WRITE])
async def test_a_deadline_cancels_the_handler(rig: Rig, path: str) -> None:
    peer = await rig.peer()
    request = info("wait") if path == INFO else message(pb.ReadContentRequest(digest="wait").SerializeToString())
    stream = peer.open(path, ("grpc-timeout", "50m"))
    peer.send(stream, b"" if path == WRITE else request, end=path != WRITE)
    answer = await peer.end(stream)
    assert (answer.status, answer.text) == (Code.DEADLINE_EXCEEDED, "context deadline exceeded")
    await eventually(lambda: rig.probe.cancelled == 1)


async def test_a_deadline_does_not_wait_for_a_handler_that_cleans_up(rig: Rig) -> None:
    peer = await rig.peer()
    answer = await peer.call(INFO, info("dawdle"), ("grpc-timeout", "50m"))
    assert answer.status == Code.DEADLINE_EXCEEDED
    assert rig.probe.cancelled == 1
    rig.probe.cleaning.set()


async def test_a_deadline_ends_a_request_that_never_becomes_whole(rig: Rig) -> None:
    peer = await rig.peer()
    stream = peer.open(INFO, ("grpc-timeout", "50m"))
    peer.send(stream, info("x")[:3])
    assert (await peer.end(stream)).status == Code.DEADLINE_EXCEEDED
    assert rig.probe.started == 0


async def test_a_deadline_ends_an_answer_that_nobody_takes(rig: Rig) -> None:
    peer = await rig.peer(window=10)
    answer = await peer.call(INFO, info("size:1000"), ("grpc-timeout", "50m"))
    assert len(answer.data) == 10
    assert answer.status == Code.DEADLINE_EXCEEDED
    (connection,) = rig.server.connections
    assert (connection.unsent, connection.held, connection.calls) == (0, 0, {})


@pytest.mark.parametrize("path", [INFO, READ, WRITE])
@pytest.mark.parametrize("leave", [False, True])
async def test_a_client_that_gives_up_cancels_its_handler(rig: Rig, path: str, leave: bool) -> None:
    peer = await rig.peer()
    stream = peer.open(path)
    request = info("wait") if path == INFO else message(pb.ReadContentRequest(digest="wait").SerializeToString())
    peer.send(stream, request, end=path == INFO)
    await eventually(lambda: rig.probe.started == 1)
    if leave:
        await peer.close()
    else:
        peer.h2.reset_stream(stream, http2.CANCEL)
        peer.flush()
    await eventually(lambda: rig.probe.cancelled == 1)
    await eventually(lambda: not any(each.calls or each.leaving for each in rig.server.connections))


async def test_cancelled_while_it_waits_for_the_window(rig: Rig) -> None:
    peer = await rig.peer(window=100)
    stream = peer.open(READ)
    peer.send(stream, READ_ONE, end=True)
    await peer.until(lambda: len(peer.answers[stream].data) == 100)
    peer.h2.reset_stream(stream, http2.CANCEL)
    peer.flush()
    await eventually(lambda: rig.probe.cancelled == 1)
    (connection,) = rig.server.connections
    assert connection.unsent == 0


async def test_opened_and_reset_in_one_breath(rig: Rig) -> None:
    peer = await rig.peer()
    for _ in range(50):
        stream = peer.h2.get_next_available_stream_id()
        fields = [(":method", "POST"), (":scheme", "http"), (":path", INFO), ("content-type", "application/grpc")]
        peer.h2.send_headers(stream, fields)
        peer.h2.send_data(stream, info("x"), end_stream=True)
        peer.h2.reset_stream(stream, http2.CANCEL)
    peer.flush()
    assert digest(await peer.call(INFO, info("x"))) == "x"
    assert rig.probe.started == 1


# -- flow control and memory


async def test_an_answer_through_a_window_of_few_bytes(rig: Rig) -> None:
    peer = await rig.peer(window=3)
    stream = peer.open(INFO)
    peer.send(stream, info("size:50"), end=True)
    for total in range(3, 57, 3):
        await peer.until(partial(has_bytes, peer, stream, total))
        peer.h2.increment_flow_control_window(3, stream)
        peer.flush()
    peer.h2.increment_flow_control_window(1000, stream)
    peer.flush()
    assert digest(await peer.end(stream)) == "x" * 50


async def test_a_window_that_settings_open(rig: Rig) -> None:
    peer = await rig.peer(window=0)
    stream = peer.open(INFO)
    peer.send(stream, info("size:50"), end=True)
    await peer.until(lambda: peer.answers[stream].headers)
    peer.h2.update_settings({4: 1000})
    peer.flush()
    assert digest(await peer.end(stream)) == "x" * 50


async def test_calls_that_wait_for_the_connections_window_all_come_through(rig: Rig) -> None:
    peer = await rig.peer()
    streams = [peer.open(READ) for _ in range(20)]
    for stream in streams:
        peer.send(stream, message(pb.ReadContentRequest(offset=3, size=100_000).SerializeToString()), end=True)
    for stream in streams:
        assert [len(each) for each in (await peer.end(stream)).messages] == [100_004] * 3


async def test_a_long_answer_leaves_room_for_a_short_one(rig: Rig) -> None:
    peer = await rig.peer()
    peer.window = 0  # the test gives the room
    peer.h2.update_settings({4: 1 << 24})
    long, short = peer.open(READ), peer.open(READ)
    peer.send(long, message(pb.ReadContentRequest(offset=100, size=100_000).SerializeToString()), end=True)
    await peer.until(lambda: len(peer.answers[long].data) > 60_000)
    peer.send(short, message(pb.ReadContentRequest(offset=2, size=100_000).SerializeToString()), end=True)
    while not peer.answers[short].ended:
        got = len(peer.answers[long].data) + len(peer.answers[short].data)
        peer.h2.increment_flow_control_window(10_000)
        peer.flush()
        await peer.until(partial(has_more, peer, (long, short), got))
        assert len(peer.answers[long].data) < 500_000


async def test_the_server_ends_a_stream_first(rig: Rig) -> None:
    peer = await rig.peer()
    stream = peer.open(WRITE)
    peer.send(stream, message(pb.WriteContentRequest(ref="stop", data=b"x").SerializeToString()))
    answer = await peer.end(stream)
    assert (answer.status, len(answer.messages)) == (0, 1)
    await peer.until(lambda: answer.reset is not None)
    assert answer.reset == http2.NO_ERROR
    # what was under way meanwhile
    peer.raw(http2.frame(http2.DATA, 0, stream, message(b"late")))
    assert digest(await peer.call(INFO, info("x"))) == "x"


@pytest.mark.parametrize("size", [0, 1, 60_000])
async def test_a_handler_that_does_not_read_stops_its_client_and_nobody_else(rig: Rig, size: int) -> None:
    rig.probe.read_on = False
    peer = await rig.peer()
    block = message(pb.WriteContentRequest(data=bytes(size)).SerializeToString())
    streams = [peer.open(WRITE) for _ in range(20)]
    for stream in streams:
        many = block * (4 * http2.STREAM_WINDOW // len(block))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await peer.send_all(stream, many)
    assert digest(await peer.call(INFO, info("x"))) == "x"
    (connection,) = rig.server.connections
    assert connection.held <= 20 * (2 * http2.STREAM_WINDOW + http2.STREAM_WINDOW)
    rig.probe.go.set()
    peer.send(streams[0], b"", end=True)
    if size > 1:
        await eventually(lambda: connection.held < 20 * (size + 100))


async def test_half_sent_requests_are_bounded_over_all_calls(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_calls, "RECEIVE_LIMIT", 200_000)
    peer = await rig.peer()
    streams = [peer.open(INFO) for _ in range(5)]
    for stream in streams:
        peer.send(stream, info("x" * 60_000)[:50_000])
    assert (await peer.end(streams[4])).status == Code.RESOURCE_EXHAUSTED
    for stream in streams[:4]:
        peer.h2.reset_stream(stream, http2.CANCEL)
    assert len(digest(await peer.call(INFO, info("x" * 60_000)))) == 60_000
    (connection,) = rig.server.connections
    assert connection.held == 0


async def test_answers_that_nobody_takes_are_bounded_over_all_calls(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_calls, "SEND_LIMIT", 200_000)
    peer = await rig.peer(window=0)
    streams = [peer.open(INFO) for _ in range(5)]
    for stream in streams:
        peer.send(stream, info("size:60000"), end=True)
    await peer.until(lambda: sum(peer.answers[stream].ended for stream in streams) == 2)
    done = [stream for stream in streams if peer.answers[stream].ended]
    assert {peer.answers[stream].status for stream in done} == {Code.RESOURCE_EXHAUSTED}
    peer.h2.update_settings({4: 1 << 20})
    peer.h2.increment_flow_control_window(1 << 20)
    peer.flush()
    for stream in set(streams) - set(done):
        assert len(digest(await peer.end(stream))) == 60_000
    (connection,) = rig.server.connections
    assert connection.unsent == 0


async def test_handlers_that_still_clean_up_count_as_calls(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "MAX_STREAMS", 3)
    peer = await rig.peer()
    for number in range(3):
        stream = peer.open(INFO)
        peer.send(stream, info("dawdle"), end=True)
        await eventually(partial(started, rig.probe, number + 1))
        peer.h2.reset_stream(stream, http2.CANCEL)
        peer.flush()
    answer = await peer.end(peer.open(INFO))
    assert answer.reset == http2.REFUSED_STREAM
    rig.probe.cleaning.set()
    (connection,) = rig.server.connections
    await eventually(lambda: connection.leaving == 0)
    assert digest(await peer.call(INFO, info("x"))) == "x"


async def test_a_rapid_reset_is_told_to_calm_down(rig: Rig) -> None:
    peer, other = await rig.peer(), await rig.peer()
    fields = [(":method", "POST"), (":scheme", "http"), (":path", WRITE), ("content-type", "application/grpc")]
    block = hpack.encode(fields)
    for first in range(1, 6 * http2.RESET_BURST, 200):
        breath = b""
        for stream in range(first, first + 200, 2):
            breath += http2.frame(http2.HEADERS, http2.END_HEADERS, stream, block)
            breath += http2.frame(http2.RST_STREAM, 0, stream, b"\0\0\0\x08")
        peer.raw(breath)
        await asyncio.sleep(0)
        if peer.goaway is not None:
            break
    with pytest.raises(ConnectionError):
        await peer.until(lambda: False)
    assert peer.goaway in (http2.ENHANCE_YOUR_CALM, None)  # None: the hangup overtook it in asyncio
    await eventually(lambda: len(rig.server.connections) == 1)
    assert digest(await other.call(INFO, info("x"))) == "x"


async def test_a_client_that_reads_nothing_and_pings_is_not_read(rig: Rig) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.setblocking(False)
        peer.connect(rig.path)
        peer.send(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0, b""))
        pings, sent, stalled = http2.frame(http2.PING, 0, 0, bytes(8)) * 4000, 0, 0
        while stalled < 20 and sent < 64 << 20:
            try:
                sent += peer.send(pings)
                stalled = 0
            except BlockingIOError:
                stalled += 1
            await asyncio.sleep(0.002)
        assert sent < 8 << 20
        assert digest(await (await rig.peer()).call(INFO, info("x"))) == "x"


# -- connections


async def test_pings(rig: Rig) -> None:
    peer = await rig.peer()
    for number in range(20):
        peer.h2.ping(number.to_bytes(8, "big"))
    peer.flush()
    await peer.until(lambda: len(peer.pongs) == 20)
    assert peer.pongs == [number.to_bytes(8, "big") for number in range(20)]


async def test_a_peer_that_says_nothing_is_hung_up_on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "_HANDSHAKE", 0.1)
    reader, writer = await asyncio.open_unix_connection(rig.path)
    writer.write(http2.PREFACE[:10])
    peer = await rig.peer()
    async with asyncio.timeout(5):
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await reader.readexactly(1 << 20)
    writer.close()
    await asyncio.sleep(0.2)
    assert digest(await peer.call(INFO, info("x"))) == "x"


async def test_who_breaks_the_rules_hears_why_and_its_calls_end(rig: Rig) -> None:
    peer = await rig.peer()
    stream = peer.open(INFO)
    peer.send(stream, info("wait"), end=True)
    await eventually(lambda: rig.probe.started == 1)
    peer.raw(http2.frame(http2.PING, 0, 0, b"1"))
    with pytest.raises(ConnectionError):
        await peer.until(lambda: False)
    assert peer.goaway == http2.FRAME_SIZE_ERROR
    await eventually(lambda: rig.probe.cancelled == 1)
    assert not rig.server.connections


async def test_stopping_lets_calls_finish_and_takes_no_more(rig: Rig) -> None:
    peer, idle = await rig.peer(), await rig.peer()
    stream = peer.open(INFO)
    peer.send(stream, info("go"), end=True)
    await eventually(lambda: rig.probe.started == 1)
    stopping = asyncio.create_task(rig.server.stop(5))
    await peer.until(lambda: peer.goaway is not None)
    await idle.until(lambda: idle.goaway is not None)
    peer.raw(http2.frame(http2.HEADERS, 5, stream + 2, b"\x83"))  # sent before it heard
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
        await rig.peer()
    rig.probe.go.set()
    assert digest(await peer.end(stream)) == "go"
    await asyncio.wait_for(stopping, 2)
    with pytest.raises(ConnectionError):
        await peer.until(lambda: False)


async def test_stopping_waits_for_an_answer_that_is_on_its_way(rig: Rig) -> None:
    peer = await rig.peer(window=100)
    stream = peer.open(INFO)
    peer.send(stream, info("size:1000"), end=True)
    await peer.until(lambda: len(peer.answers[stream].data) == 100)
    stopping = asyncio.create_task(rig.server.stop(5))
    await peer.until(lambda: peer.goaway is not None)
    peer.raw(http2.frame(http2.WINDOW_UPDATE, 0, stream, (5000).to_bytes(4, "big")))
    await asyncio.wait_for(stopping, 2)


async def test_stopping_tells_the_calls_that_go_on(rig: Rig) -> None:
    peer = await rig.peer()
    stream = peer.open(INFO)
    peer.send(stream, info("wait"), end=True)
    await eventually(lambda: rig.probe.started == 1)
    began = time.monotonic()
    await rig.server.stop(0.1)
    assert time.monotonic() - began < 1
    assert rig.probe.cancelled == 1
    await eventually(lambda: peer.answers[stream].headers or peer.closed)
    assert not rig.server.connections or peer.goaway is not None
