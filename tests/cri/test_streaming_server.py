"""The streaming server against what no client of Kubernetes sends: garbage, silence, tokens that are no good; and TLS.

In this process, with a runner that is told what to do; the whole of it is in test_streaming.py.
"""

# ruff: noqa: ASYNC110 - tests poll for what another side does

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.peers import need
from wherry.core.errors import FailedPrecondition, NotFound, ResourceExhausted
from wherry.cri.streaming import certificate, front, listening, remote, tokens
from wherry.cri.streaming.carrier import Raw
from wherry.cri.streaming.listening import Listening, StreamServer
from wherry.cri.streaming.remote import EXEC, PORTS, Call, Channels, Sizes
from wherry.cri.streaming.spdy_connection import SpdyConnection, SpdyStream
from wherry.cri.streaming.tokens import Tokens

CALL = Call(EXEC, "box", ("do",), stdin=True, stdout=True, stderr=True)


class Place:
    """A server, what it ran, and what its runner does."""

    def __init__(self) -> None:
        self.ran: list[Call] = []
        self.ended = 0
        self.now = 0.0
        self.tokens = Tokens(lambda: self.now)
        self.server: StreamServer
        self.errors: list[dict[str, Any]] = []
        self.opened: list[asyncio.WriteTransport] = []

    async def run(self, call: Call, channels: Channels) -> int:
        """`cat`, to both outputs; says its terminal's sizes on stderr."""
        self.ran.append(call)
        try:
            if call.command == ("wait",):
                await channels.gone
                return 0
            if call.command == ("fail",):
                raise NotFound("no such program")
            if call.command == ("flood",):
                while channels.stdout is not None:
                    await channels.stdout.write(b"x" * 65536)
            if channels.sizes is not None:
                async for width, height in channels.sizes:
                    assert channels.stdout is not None
                    await channels.stdout.write(f"{width}x{height}\n".encode())
                return 0
            while channels.stdin is not None and (data := await channels.stdin.read()):
                for sink in (channels.stdout, channels.stderr):
                    if sink is not None:
                        await sink.write(data)
            return 0
        finally:
            self.ended += 1

    async def netns(self, pod: str) -> str:
        if pod != "pod":
            raise FailedPrecondition("sandbox container is not running")
        return ""

    def url(self, call: Call = CALL) -> str:
        return self.server.url(call)

    async def raw(self, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self.server.base)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        self.opened.append(writer.transport)
        writer.write(data)
        return reader, writer

    async def answer(self, data: bytes) -> bytes:
        """All that comes for these bytes, until the server closes."""
        reader, writer = await self.raw(data)
        async with asyncio.timeout(20):
            said = await reader.read()
        writer.close()
        return said

    async def upgraded(self, call: Call, version: str, context: ssl.SSLContext | None = None) -> Raw:
        """A connection of ours behind the upgrade."""
        url = urlsplit(self.url(call))
        loop = asyncio.get_running_loop()
        transport, opening = await loop.create_connection(Opening, url.hostname or "", url.port or 0, ssl=context)
        self.opened.append(transport)
        transport.write(upgrade(url.path, version))
        async with asyncio.timeout(20):
            head, rest = await opening.done
        assert b" 101 " in head, head
        return Raw(transport, rest)

    async def spdy(self, call: Call = CALL, version: str = "v4.channel.k8s.io") -> SpdyConnection:
        """Our own client, over the upgrade."""
        return SpdyConnection(await self.upgraded(call, version), client=True)

    async def alive(self) -> None:
        """It serves, and nothing has gone wrong."""
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(self.url(), protocols=["v5.channel.k8s.io"]) as ws,
        ):
            await ws.send_bytes(b"\0hello")
            await ws.send_bytes(b"\xff\0")
            said = [message.data async for message in ws]
        assert b"\1hello" in said
        assert json.loads(said[-1][1:])["status"] == "Success"
        assert self.errors == []


class Opening(asyncio.Protocol):
    """Reads an answer's head."""

    def __init__(self) -> None:
        self._data = b""
        self.done: asyncio.Future[tuple[bytes, bytes]] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, rest = self._data.partition(b"\r\n\r\n")
        if end:
            self.done.set_result((head, rest))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result((self._data, b""))


def upgrade(path: str, *versions: str, method: str = "POST", protocol: str = "SPDY/3.1") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: Upgrade", f"Upgrade: {protocol}"]
    lines += [f"X-Stream-Protocol-Version: {version}" for version in versions]
    return "\r\n".join([*lines, "", ""]).encode()


@contextlib.asynccontextmanager
async def served(**changes: Any) -> AsyncIterator[Place]:
    place = Place()
    place.server = StreamServer(Listening(**changes), place.tokens, place.run, place.netns)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: place.errors.append(context))
    await place.server.start()
    try:
        yield place
    finally:
        await place.server.close()
        for transport in place.opened:
            transport.abort()
        await asyncio.sleep(0.05)  # connections are over when their loop has come to it
        loop.set_exception_handler(None)


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    async with served(idle=60.0, creation=0.3) as place:
        yield place


async def until(found: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not found():
            await asyncio.sleep(0.01)


async def whole(stream: SpdyStream) -> bytes:
    data = b""
    async with asyncio.timeout(20):
        while part := await stream.read():
            data += part
    return data


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_tokens_are_good_once_and_for_a_minute() -> None:
    now = 0.0
    kept = Tokens(lambda: now)
    one, two = kept.put(CALL), kept.put(CALL)
    assert one != two
    assert kept.take(one) is CALL
    assert kept.take(one) is None
    assert kept.take("") is None
    now = tokens.LIFETIME
    assert kept.take(two) is None


def test_as_many_tokens_as_are_kept() -> None:
    now = 0.0
    kept = Tokens(lambda: now)
    for _ in range(tokens.MOST):
        kept.put(CALL)
    with pytest.raises(ResourceExhausted, match="maximum number of in-flight requests exceeded"):
        kept.put(CALL)
    now = tokens.LIFETIME
    kept.put(CALL)


async def test_expired_used_and_strange_tokens_are_not_found(place: Place) -> None:
    expired = urlsplit(place.url()).path
    place.now = tokens.LIFETIME
    used = urlsplit(place.url()).path
    assert b" 400 " in await place.answer(f"GET {used} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    other = urlsplit(place.url()).path.replace("/exec/", "/portforward/")
    for path in (expired, used, other, "/", "/exec/", "/exec", "/exec/x/y", "/exec/" + "x" * 500, "/../etc", "/%2e%2e"):
        assert b" 404 " in await place.answer(upgrade(path, "v4.channel.k8s.io")), path
        plain = await place.answer(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert plain.split(b" ")[1] == b"404", path
    assert place.ran == []
    await place.alive()


# -- what is no request ------------------------------------------------------------------------------------------------


async def test_garbage_closes_its_connection_and_nothing_else(place: Place) -> None:
    chance = random.Random(7)
    parts = [
        b"\r\n\r\n",
        b"\0" * 100 + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n",
    ]
    parts += [chance.randbytes(chance.randrange(1, 3000)) + b"\r\n\r\n" for _ in range(20)]
    for part in parts:
        reader, writer = await place.raw(part)
        writer.write_eof()
        async with asyncio.timeout(20):
            said = await reader.read()
        assert not said or (said.startswith(b"HTTP/1.") and b" 4" in said[:16]), said
        writer.close()
    await place.alive()


async def test_a_head_without_end_is_refused(place: Place) -> None:
    assert b" 431 " in await place.answer(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000)
    await place.alive()


async def test_a_client_that_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_HEAD_SECONDS", 0.1)
    async with served() as place:
        assert await place.answer(b"GET /exec/x HTT") == b""
        await place.alive()


async def test_upgrades_that_can_not_be(place: Place) -> None:
    for head, code in (
        (upgrade("PATH"), b"400"),
        (upgrade("PATH", "v9.channel.k8s.io"), b"403"),
        (upgrade("PATH", "v4.channel.k8s.io", method="DELETE"), b"405"),
        (upgrade("PATH", "v4.channel.k8s.io").replace(b"Connection: Upgrade\r\n", b""), b"400"),
        (upgrade("PATH", "v4.channel.k8s.io", protocol="h2c"), b"400"),
        (upgrade("PATH", protocol="websocket"), b"400"),
    ):
        path = urlsplit(place.url()).path
        said = await place.answer(head.replace(b"PATH", path.encode()))
        assert said.split(b" ")[1] == code, (head, said)
    assert place.ran == []
    await place.alive()


# -- SPDY connections that go wrong ------------------------------------------------------------------------------------


async def test_a_client_that_opens_too_few_streams_is_closed(place: Place) -> None:
    connection = await place.spdy()
    connection.open({"streamtype": "error"})
    connection.open({"streamtype": "nonsense"})
    connection.open({"streamtype": "error"})
    async with asyncio.timeout(20):
        await connection.closed
    assert place.ran == []
    await place.alive()


async def test_garbage_after_the_upgrade(place: Place) -> None:
    chance = random.Random(3)
    for number in range(30):
        carrier = await place.upgraded(CALL, "v4.channel.k8s.io")
        ended = asyncio.Event()
        carrier.attach(lambda data, ended=ended: ended.set() if not data else None)  # type: ignore[misc]
        carrier.write(struct.pack(">II", 1 << 31 | 3 << 16 | number % 11, number) + chance.randbytes(500))
        async with asyncio.timeout(20):
            await ended.wait()
    await place.alive()


async def test_clients_that_vanish_in_the_middle(place: Place) -> None:
    for _ in range(5):
        connection = await place.spdy(Call(EXEC, "box", ("wait",), stdout=True))
        for kind in ("error", "stdout"):
            connection.open({"streamtype": kind})
        await until(lambda: len(place.ran) > place.ended)
        connection._carrier.abort()
        await until(lambda: len(place.ran) == place.ended)
    await place.alive()


async def test_a_client_that_reads_nothing_holds_up_its_own_stream_alone(place: Place) -> None:
    connection = await place.spdy(Call(EXEC, "box", ("flood",), stdout=True))
    for kind in ("error", "stdout"):
        connection.open({"streamtype": kind})
    await until(lambda: connection._held)
    await place.alive()
    connection._carrier.abort()
    await until(lambda: place.ended == len(place.ran))


async def test_one_that_pings_and_never_reads_is_cut_off() -> None:
    async with served(idle=60.0, creation=60.0) as place:
        carrier = await place.upgraded(Call(EXEC, "box", ("wait",), stdout=True), "v4.channel.k8s.io")
        carrier.hold(True)
        ping = struct.pack(">III", 1 << 31 | 3 << 16 | 6, 4, 1) * 50_000
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(20):
                while True:
                    carrier.write(ping)
                    await carrier.drain()
                    await asyncio.sleep(0)  # drain doesn't wait where the end of the connection is only to be told
        carrier.abort()
        await place.alive()


async def test_a_connection_whose_peer_reads_nothing_closes_all_the_same() -> None:
    """Or it would be kept, with what waits to be sent, for as long as the peer likes."""
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    made: list[Raw] = []

    class Sending(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            raw = Raw(cast("asyncio.Transport", transport), b"")
            raw.attach(lambda data: None if data else over.set())
            raw.write(bytes(32 << 20))
            raw.close()
            made.append(raw)

    server = await loop.create_server(Sending, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
    try:
        cast("asyncio.Transport", writer.transport).pause_reading()
        async with asyncio.timeout(20):
            await over.wait()
        assert made
    finally:
        writer.transport.abort()
        server.close()
        await asyncio.sleep(0.05)
    del reader


async def test_an_idle_connection_ends() -> None:
    async with served(idle=0.2) as place:
        connection = await place.spdy(Call(EXEC, "box", ("wait",), stdout=True))
        for kind in ("error", "stdout"):
            connection.open({"streamtype": kind})
        async with asyncio.timeout(20):
            await connection.closed
        await until(lambda: place.ended == 1)


async def test_streams_over_spdy_and_what_failed(place: Place) -> None:
    data = os.urandom(3 << 20)
    connection = await place.spdy()
    opened = {kind: connection.open({"streamtype": kind}) for kind in ("error", "stdin", "stdout", "stderr")}

    async def feed() -> None:
        await opened["stdin"].write(data)
        await opened["stdin"].close()

    feeding = asyncio.create_task(feed())
    out, err = await asyncio.gather(whole(opened["stdout"]), whole(opened["stderr"]))
    await feeding
    assert out == err == data
    assert json.loads(await whole(opened["error"])) == {"metadata": {}, "status": "Success"}
    connection.close()
    connection = await place.spdy(Call(EXEC, "box", ("fail",), stdout=True), "v5.channel.k8s.io")
    error, stdout = connection.open({"streamtype": "error"}), connection.open({"streamtype": "stdout"})
    end = json.loads(await whole(error))
    assert end["message"] == "Internal error occurred: error executing command in container: no such program"
    assert await whole(stdout) == b""
    connection.close()


# -- WebSockets that go wrong ------------------------------------------------------------------------------------------


async def talk(url: str, use: Callable[[aiohttp.ClientWebSocketResponse], Awaitable[None]], *protocols: str) -> None:
    async with (
        asyncio.timeout(20),
        aiohttp.ClientSession() as session,
        session.ws_connect(url, protocols=protocols or ("v5.channel.k8s.io",), max_msg_size=0) as socket,
    ):
        await use(socket)


async def test_messages_that_are_none_close_the_websocket(place: Place) -> None:
    async def empty(socket: aiohttp.ClientWebSocketResponse) -> None:
        await socket.send_bytes(b"")
        assert [message.data async for message in socket][1:] == []
        assert socket.close_code == 1003

    async def no_base64(socket: aiohttp.ClientWebSocketResponse) -> None:
        await socket.send_str("0!!!")
        async for _ in socket:
            pass
        assert socket.close_code == 1003

    async def ignored(socket: aiohttp.ClientWebSocketResponse) -> None:
        for message in (b"\7what", b"\4", b"\xff\2", b"\xff", b"\xfe", b"\0in", b"\xff\0"):
            await socket.send_bytes(message)
        said = [message.data async for message in socket]
        assert b"\1in" in said
        assert socket.close_code == 1000

    await talk(place.url(), empty)
    await talk(place.url(), no_base64, "v4.base64.channel.k8s.io")
    await talk(place.url(), ignored)
    await place.alive()


async def test_a_websocket_that_vanishes(place: Place) -> None:
    async def vanish(socket: aiohttp.ClientWebSocketResponse) -> None:
        await socket.receive()
        transport = socket._writer.transport
        assert transport is not None
        transport.abort()

    for _ in range(3):
        await talk(place.url(Call(EXEC, "box", ("wait",), stdout=True)), vanish)
    await until(lambda: place.ended == 3)
    await place.alive()


async def test_an_idle_websocket_ends() -> None:
    async with served(idle=0.2) as place:

        async def use(socket: aiohttp.ClientWebSocketResponse) -> None:
            async for _ in socket:
                pass
            assert socket.close_code == 1001

        await talk(place.url(Call(EXEC, "box", ("wait",), stdout=True)), use)
        await until(lambda: place.ended == 1)


async def test_megabytes_both_ways_over_a_websocket(place: Place) -> None:
    data = os.urandom(3 << 20)

    async def use(socket: aiohttp.ClientWebSocketResponse) -> None:
        async def feed() -> None:
            for start in range(0, len(data), 32768):
                await socket.send_bytes(b"\0" + data[start : start + 32768])
            await socket.send_bytes(b"\xff\0")

        feeding = asyncio.create_task(feed())
        out: dict[int, bytes] = {}
        async for message in socket:
            out[message.data[0]] = out.get(message.data[0], b"") + message.data[1:]
        await feeding
        assert out[1] == out[2] == data
        assert json.loads(out[3])["status"] == "Success"

    await talk(place.url(), use)


# -- sizes -------------------------------------------------------------------------------------------------------------


async def test_sizes_come_whole_and_the_last_one_counts() -> None:
    sizes = Sizes()
    sizes.feed(b'{"Width":1,"Hei')
    sizes.feed(b'ght":2}{"Width":80,"Height":24}\n{"Width":0,"Height":9}{"Width":99999,"Height":1}{"Wi')
    sizes.end()
    assert [size async for size in sizes] == [(80, 24)]


@pytest.mark.parametrize("text", [b"[1]", b"{" * 5000, b'"x"', b"nonsense" * 1000])
def test_what_is_no_size_ends_them(text: bytes) -> None:
    with pytest.raises(ValueError):
        Sizes().feed(text)


async def test_a_terminal_over_a_websocket(place: Place) -> None:
    async def use(socket: aiohttp.ClientWebSocketResponse) -> None:
        assert (await socket.receive()).data == b"\1"
        await socket.send_bytes(b'\4{"Width":80,"Height":24}')
        assert (await socket.receive()).data == b"\x0180x24\n"
        await socket.close()

    await talk(place.url(Call(EXEC, "box", ("size",), tty=True, stdin=True, stdout=True)), use)
    await until(lambda: place.ended == 1)


# -- port-forward ------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def echoing() -> AsyncIterator[int]:
    """A server that says all back when it has all, and nothing before."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_a_half_closed_connection_is_answered(place: Place) -> None:
    data = os.urandom(2 << 20)
    async with echoing() as port:
        connection = await place.spdy(Call(PORTS, "pod", ports=(port,)), "portforward.k8s.io")

        async def one(number: int) -> None:
            headers = {"port": str(port), "requestid": str(number)}
            error = connection.open({"streamtype": "error", **headers})
            stream = connection.open({"streamtype": "data", **headers})
            await error.close()
            reading = asyncio.create_task(whole(stream))
            await stream.write(data)
            await stream.close()
            assert await reading == data
            assert await whole(error) == b""

        await asyncio.gather(*map(one, range(4)))
        connection.close()
    await place.alive()


async def test_streams_of_port_forward_that_can_not_be(place: Place) -> None:
    connection = await place.spdy(Call(PORTS, "pod", ports=(1,)), "portforward.k8s.io")
    for headers in (
        {"streamtype": "data", "port": "0"},
        {"streamtype": "data", "port": "x"},
        {"streamtype": "data"},
        {"streamtype": "what", "port": "1"},
        {"streamtype": "data", "port": "99999999999999999999999999"},
        {"streamtype": "data", "port": "1", "requestid": "alone"},
    ):
        stream = connection.open(headers)
        assert await whole(stream) == b""
        await until(lambda stream=stream: stream.broken)  # type: ignore[misc]
    assert not connection.closed.done()
    connection.close()
    await place.alive()


async def test_a_pod_that_is_gone_is_told(place: Place) -> None:
    connection = await place.spdy(Call(PORTS, "gone", ports=(1,)), "portforward.k8s.io")
    error = connection.open({"streamtype": "error", "port": "1", "requestid": "a"})
    connection.open({"streamtype": "data", "port": "1", "requestid": "a"})
    assert b"sandbox container is not running" in await whole(error)
    connection.close()


async def test_spdy_in_a_websocket(place: Place) -> None:
    """As kubectl tunnels port-forwards from 1.30 on; the client's session is spoken by our own codec."""
    data = os.urandom(1 << 20)
    async with echoing() as port, aiohttp.ClientSession() as session:
        url = place.url(Call(PORTS, "pod", ports=(port,)))
        socket = await session.ws_connect(url, protocols=["SPDY/3.1+portforward.k8s.io"], max_msg_size=0)
        assert socket.protocol == "SPDY/3.1+portforward.k8s.io"
        carrier = _Messages(socket)
        connection = SpdyConnection(carrier, client=True)
        moving = asyncio.create_task(carrier.move())
        headers = {"port": str(port), "requestid": "0"}
        error = connection.open({"streamtype": "error", **headers})
        stream = connection.open({"streamtype": "data", **headers})
        reading = asyncio.create_task(whole(stream))
        await stream.write(data)
        await stream.close()
        assert await reading == data
        assert await whole(error) == b""
        await socket.close()
        await moving
    await place.alive()


class _Messages:
    """A client's WebSocket as a carrier."""

    congested = False

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._receive: Callable[[bytes], None] = lambda data: None
        self._last: asyncio.Task[None] | None = None

    def attach(self, receive: Callable[[bytes], None]) -> None:
        self._receive = receive

    def write(self, data: bytes) -> None:
        self._last = asyncio.create_task(self._send(self._last, data))

    async def _send(self, before: asyncio.Task[None] | None, data: bytes) -> None:
        if before is not None:
            await before
        await self._socket.send_bytes(data)

    async def drain(self) -> None:
        if self._last is not None:
            await self._last

    def hold(self, held: bool) -> None:
        """The test reads all."""

    def close(self) -> None:
        """The test does."""

    abort = close

    async def move(self) -> None:
        async for message in self._socket:
            self._receive(message.data)
        self._receive(b"")


async def test_garbage_in_a_tunnel(place: Place) -> None:
    async def use(socket: aiohttp.ClientWebSocketResponse) -> None:
        await socket.send_bytes(b"\xff" * 1000)
        async for _ in socket:
            pass

    await talk(place.url(Call(PORTS, "pod", ports=(1,))), use, "SPDY/3.1+portforward.k8s.io")
    await place.alive()


# -- TLS ---------------------------------------------------------------------------------------------------------------


async def test_tls_with_a_certificate_of_its_own() -> None:
    need("openssl")
    context = await certificate.context("", "")
    async with served(tls=context) as place:
        url = place.url()
        assert url.startswith("https://127.0.0.1:")
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(url, protocols=["v5.channel.k8s.io"], ssl=False) as socket,
        ):
            await socket.send_bytes(b"\0safe")
            await socket.send_bytes(b"\xff\0")
            assert b"\1safe" in [message.data async for message in socket]
        trusting = ssl.create_default_context()
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        carrier = await place.upgraded(CALL, "v4.channel.k8s.io", trusting)
        connection = SpdyConnection(carrier, client=True)
        opened = {kind: connection.open({"streamtype": kind}) for kind in ("error", "stdin", "stdout", "stderr")}
        await opened["stdin"].write(b"also safe")
        await opened["stdin"].close()
        assert await whole(opened["stdout"]) == b"also safe"
        connection.close()
        plain = await place.answer(b"GET / HTTP/1.1\r\n\r\n")
        assert b"200" not in plain


async def test_certificates_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="or neither"):
        await certificate.context("cert.pem", "")
    with pytest.raises(FailedPrecondition, match="No such file"):
        await certificate.context(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))


def test_versions_and_protocols_are_complete() -> None:
    assert list(remote.VERSIONS.values()) == [5, 4, 3, 2, 1]
    assert listening.Listening().address == "127.0.0.1"
