"""The ttrpc server and both clients over real sockets, and peers that break the rules."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.proto.echo import SERVICE, Echo, Text
from wherry.core.errors import (
    AlreadyExists,
    Code,
    DeadlineExceeded,
    Internal,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from wherry.proto import ttrpc_pb2
from wherry.proto.ttrpc import server as server_module
from wherry.proto.ttrpc import sockets
from wherry.proto.ttrpc.blocking import BlockingClient
from wherry.proto.ttrpc.calls import ClientClosed, ConnectionLost
from wherry.proto.ttrpc.client import TtrpcClient
from wherry.proto.ttrpc.frames import MAX_DATA, REQUEST, Frame, Parser, encode
from wherry.proto.ttrpc.server import TtrpcServer


class Rig:
    """A server on a socket, its service and what it reported."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.echo = Echo()
        self.reports: list[tuple[str, str]] = []
        self.server = TtrpcServer([self.echo], on_error=lambda where, text: self.reports.append((where, text)))


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(str(tmp_path / "sock"))
    await rig.server.serve_unix(rig.path)
    yield rig
    await rig.server.close()
    assert os.listdir(os.path.dirname(rig.path)) == []


@pytest.fixture
async def client(rig: Rig) -> AsyncIterator[TtrpcClient]:
    client = await TtrpcClient.connect(rig.path)
    yield client
    await client.close()


async def test_unary_with_metadata_and_deadline(rig: Rig, client: TtrpcClient) -> None:
    metadata = {"containerd-namespace-ttrpc": "default"}
    answer = await client.call(SERVICE, "Unary", Text(value="hi"), timeout=5, metadata=metadata)
    assert answer == Text(value="hi")
    context = rig.echo.context
    assert context is not None
    assert context.namespace == "default"
    assert context.transport == "ttrpc"
    remaining = context.remaining()
    assert remaining is not None
    assert 3 < remaining <= 5


async def test_streams_of_every_kind(client: TtrpcClient) -> None:
    async with await client.stream(SERVICE, "Count", Text(value="5")) as counted:
        assert [item.value async for item in counted] == ["0", "1", "2", "3", "4"]  # type: ignore[attr-defined]
    async with await client.stream(SERVICE, "Collect") as collected:
        for word in ("a", "", "c"):
            await collected.send(Text(value=word))
        assert await collected.response() == Text(value="a,,c")
    async with await client.stream(SERVICE, "Chat") as chat:
        for word in ("x", "y"):
            await chat.send(Text(value=word))
            assert await anext(chat) == Text(value=word.upper())
        await chat.close_send()
        assert [item async for item in chat] == []


async def test_an_error_in_a_stream_comes_after_its_messages(client: TtrpcClient) -> None:
    got = []
    stream = await client.stream(SERVICE, "Count", Text(value="3"))
    for _ in range(3):
        got.append(await anext(stream))  # noqa: PERF401
    with pytest.raises(NotFound, match="no fourth"):
        await anext(stream)
    assert len(got) == 3


async def test_errors_keep_kind_and_text(rig: Rig, client: TtrpcClient) -> None:
    with pytest.raises(NotFound) as caught:
        await client.call(SERVICE, "Fail", Text(value="é"))
    assert caught.value.message == 'container "é" in namespace "default": not found'
    with pytest.raises(Internal, match="ZeroDivisionError: a bug"):
        await client.call(SERVICE, "Crash", Text())
    ((where, text),) = rig.reports
    assert where == f"/{SERVICE}/Crash"
    assert "Traceback" in text
    with pytest.raises(Unimplemented, match="method Absent"):
        await client.call(SERVICE, "Absent", Text())
    assert await client.call(SERVICE, "Unary", Text(value="still here")) == Text(value="still here")


async def test_an_unknown_service(client: TtrpcClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client._state, "call", lambda service, name, payload, **_: _raw_call(client, "no.Such", name))
    with pytest.raises(Unimplemented, match=r"service no\.Such"):
        await client.call(SERVICE, "Unary", Text())


def _raw_call(client: TtrpcClient, service: str, name: str) -> tuple[int, bytes]:
    return type(client._state).call(client._state, service, name)


async def test_deadlines_hold_on_both_sides(rig: Rig, client: TtrpcClient) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await client.call(SERVICE, "Slow", Text(), timeout=0.1)
    assert time.monotonic() - started < 2
    await asyncio.wait_for(rig.echo.cancelled.wait(), 2)


async def test_the_server_enforces_the_deadline(rig: Rig) -> None:
    request = ttrpc_pb2.Request(service=SERVICE, method="Slow", timeout_nano=50_000_000)
    with sockets.connect(rig.path, timeout=5) as sock:
        sock.sendall(encode(1, REQUEST, 0, request.SerializeToString()))
        frame = await asyncio.to_thread(_read_frame, sock)
    assert ttrpc_pb2.Response.FromString(frame.data).status.code == Code.DEADLINE_EXCEEDED


def _read_frame(sock: socket.socket) -> Frame:
    parser = Parser()
    while True:
        data = sock.recv(1 << 16)
        assert data
        for frame in parser.feed(data):
            assert isinstance(frame, Frame)
            return frame


async def test_calls_overlap_and_a_lost_peer_cancels_its_calls(rig: Rig, client: TtrpcClient) -> None:
    slow = asyncio.create_task(client.call(SERVICE, "Slow", Text()))
    await rig.echo.started.wait()
    answers = await asyncio.gather(*(client.call(SERVICE, "Unary", Text(value=str(n))) for n in range(100)))
    assert [answer.value for answer in answers] == [str(n) for n in range(100)]  # type: ignore[attr-defined]
    await client.close()
    with pytest.raises(ClientClosed):
        await slow
    with pytest.raises(ClientClosed):
        await client.call(SERVICE, "Unary", Text())
    await asyncio.wait_for(rig.echo.cancelled.wait(), 2)


async def test_a_server_that_goes_away_is_another_error(rig: Rig, client: TtrpcClient) -> None:
    slow = asyncio.create_task(client.call(SERVICE, "Slow", Text()))
    stream = await client.stream(SERVICE, "Chat")
    await rig.echo.started.wait()
    await rig.server.close()
    with pytest.raises(ConnectionLost):
        await slow
    with pytest.raises(ConnectionLost):
        await anext(stream)
    assert isinstance(await client.wait_closed(), Unavailable)
    with pytest.raises(Unavailable, match="no such file"):
        await TtrpcClient.connect(rig.path)


async def test_large_messages(client: TtrpcClient) -> None:
    fits = Text(value="x" * (MAX_DATA - 200))
    assert await client.call(SERVICE, "Unary", fits) == fits
    with pytest.raises(ResourceExhausted, match="exceed maximum message size"):
        await client.call(SERVICE, "Unary", Text(value="x" * MAX_DATA))


async def test_a_large_frame_is_drained_and_answered(rig: Rig) -> None:
    with sockets.connect(rig.path, timeout=5) as sock:

        def talk() -> tuple[Frame, Frame]:
            sock.sendall(struct.pack(">IIBB", MAX_DATA + 9, 1, REQUEST, 0) + bytes(MAX_DATA + 9))
            first = _read_frame(sock)
            request = ttrpc_pb2.Request(service=SERVICE, method="Unary")
            sock.sendall(encode(3, REQUEST, 0, request.SerializeToString()))
            return first, _read_frame(sock)

        first, second = await asyncio.to_thread(talk)
    assert ttrpc_pb2.Response.FromString(first.data).status.code == Code.RESOURCE_EXHAUSTED
    assert ttrpc_pb2.Response.FromString(second.data).status.code == Code.OK


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.0\r\n\r\n", b"\xfe" * 4096, bytes(9)])
async def test_garbage_harms_only_its_own_connection(rig: Rig, client: TtrpcClient, garbage: bytes) -> None:
    with sockets.connect(rig.path, timeout=5) as sock:
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.to_thread(sock.recv, 100) == b""
    assert await client.call(SERVICE, "Unary", Text(value="ok")) == Text(value="ok")


async def test_a_flood_that_reads_no_answers_is_held(rig: Rig, client: TtrpcClient) -> None:
    request = ttrpc_pb2.Request(service=SERVICE, method="Unary", payload=Text(value="x" * 60_000).SerializeToString())
    with sockets.connect(rig.path, timeout=0.5) as sock:

        def flood() -> int:
            sent = 0
            try:
                for stream_id in range(1, 4001, 2):
                    sock.sendall(encode(stream_id, REQUEST, 0, request.SerializeToString()))
                    sent += 1
            except TimeoutError:
                pass
            return sent

        sent = await asyncio.to_thread(flood)
        assert sent < 500
        assert await client.call(SERVICE, "Unary", Text(value="ok"), timeout=5) == Text(value="ok")


async def test_a_stream_that_nobody_takes_is_failed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STALL_SECONDS", 0.1)
    client = await TtrpcClient.connect(rig.path)
    stream = await client.stream(SERVICE, "Ignore")
    for _ in range(server_module.MAX_BACKLOG + 2):
        await stream.send(Text(value="x"))
    with pytest.raises(ResourceExhausted, match="stream buffer full"):
        await asyncio.wait_for(anext(stream), 3)
    assert await client.call(SERVICE, "Unary", Text(value="ok")) == Text(value="ok")
    await client.close()


async def test_too_many_calls_at_once(rig: Rig, client: TtrpcClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CALLS", 2)
    slow = [asyncio.create_task(client.call(SERVICE, "Slow", Text())) for _ in range(2)]
    await rig.echo.started.wait()
    with pytest.raises(ResourceExhausted):
        await client.call(SERVICE, "Unary", Text())
    await client.close()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_a_slow_reader_of_a_long_stream_gets_it_all(client: TtrpcClient) -> None:
    stream = await client.stream(SERVICE, "Count", Text(value="2000"))
    await asyncio.sleep(0.2)
    assert len([item async for item in stream]) == 2000


async def test_the_blocking_client(rig: Rig) -> None:
    def talk() -> None:
        with BlockingClient(f"unix://{rig.path}") as client:
            assert client.call(SERVICE, "Unary", Text(value="hi"), timeout=5) == Text(value="hi")
            with pytest.raises(NotFound, match="in namespace"):
                client.call(SERVICE, "Fail", Text(value="x"))
            with pytest.raises(DeadlineExceeded):
                client.call(SERVICE, "Slow", Text(), timeout=0.1)
            with client.stream(SERVICE, "Count", Text(value="4")) as counted:
                assert [item.value for item in counted] == list("0123")  # type: ignore[attr-defined]
            with client.stream(SERVICE, "Chat") as chat:
                chat.send(Text(value="a"))
                assert client.call(SERVICE, "Unary", Text(value="between")) == Text(value="between")
                assert chat.step() == Text(value="A")
                chat.close_send()
                assert chat.step() is None
            collected = client.stream(SERVICE, "Collect")
            collected.send(Text(value="1"))
            assert collected.response() == Text(value="1")
        with pytest.raises(ClientClosed):
            client.call(SERVICE, "Unary", Text())

    await asyncio.to_thread(talk)
    with pytest.raises(Unavailable, match="no such file"):
        BlockingClient(rig.path + ".absent")


def test_the_blocking_client_against_a_server_that_hangs_up(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with sockets.bind(path) as listener:
        listener.setblocking(True)

        def hang_up() -> None:
            peer, _ = listener.accept()
            peer.recv(100)
            peer.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with BlockingClient(path) as client, pytest.raises(ConnectionLost):
            client.call(SERVICE, "Unary", Text())
        thread.join()


def test_the_blocking_client_imports_no_asyncio() -> None:
    code = "import sys, wherry.proto.ttrpc.blocking; print('asyncio' in sys.modules, 'grpc' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_a_socket_has_its_mode_from_the_first_moment(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    before = os.umask(0)
    try:
        sockets.bind(str(path)).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_paths_longer_than_sun_path(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    folder.mkdir(parents=True)
    path = str(folder / "sock")
    with sockets.bind(path), sockets.connect(path):
        assert Path(path).is_socket()


def test_a_socket_that_is_served_is_not_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with sockets.bind(path), pytest.raises(AlreadyExists, match="address already in use"):
        sockets.bind(path, replace=True)
    with sockets.bind(path, replace=True), sockets.connect(path):
        pass
