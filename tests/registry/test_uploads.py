"""Uploads that are cut, over a registry that breaks off and over a relay that does, in front of the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from tests.registry.test_broken import Serve, address_of, at
from tests.registry.test_registry import BLOB, LAYER, content, fetched
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import DeadlineExceeded, Unavailable
from wherry.registry import retry, transport
from wherry.registry.hosts import Host
from wherry.registry.pusher import Pusher
from wherry.registry.resolver import Resolver


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)


class Uploads:
    """A registry for one blob in chunks, whose connections break when they are told to."""

    def __init__(self, breaks: int = 0, *, chunks: bool = True) -> None:
        self.data = bytearray()
        self.breaks, self.chunks = breaks, chunks
        self.done = b""
        self.sent = 0
        self.opened = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        where = {"Location": f"/v2/x/blobs/uploads/{self.opened}?state={len(self.data)}"}
        if request.method == "HEAD":
            return web.Response(status=200 if self.done else 404)
        if request.method == "POST":
            self.opened += 1
            self.data.clear()
            return web.Response(status=202, headers=where)
        if request.method == "GET":
            have = f"0-{max(len(self.data) - 1, 0)}"
            return web.Response(status=204, headers={**where, "Range": have})
        if request.method == "PATCH":
            if not self.chunks:
                return web.Response(status=405)
            assert request.headers["Content-Range"].startswith(f"{len(self.data)}-")
        async for piece in request.content.iter_any():
            self.data += piece
            self.sent += len(piece)
            if self.breaks and len(self.data) > 150_000:
                self.breaks -= 1
                assert request.transport is not None
                request.transport.close()
                return web.Response()
        if request.method == "PATCH":
            return web.Response(status=202, headers=where)
        if Digest.of(bytes(self.data)) != request.query["digest"]:
            return web.json_response({"errors": [{"code": "DIGEST_INVALID", "message": ""}]}, status=400)
        self.done = bytes(self.data)
        return web.Response(status=201)


async def upload(serve: Serve, uploads: Uploads, chunk: int) -> None:
    server = await serve(uploads.handle)
    async with at(server) as resolver:
        whole = resolver.pusher(f"{server.address}/x:y")
        pusher = Pusher(whole._transport, whole._host, whole._reference, chunk_size=chunk)
        assert await pusher.push(LAYER, content(BLOB))
    assert uploads.done == BLOB


async def test_an_upload_that_is_cut_goes_on(serve: Serve) -> None:
    uploads = Uploads(breaks=2)
    await upload(serve, uploads, 100_000)
    assert uploads.opened == 1
    assert uploads.sent < 1.5 * len(BLOB)


async def test_an_upload_in_one_piece_begins_again(serve: Serve) -> None:
    uploads = Uploads(breaks=1)
    await upload(serve, uploads, 1 << 20)
    assert uploads.opened == 2


async def test_registries_without_chunks(serve: Serve) -> None:
    uploads = Uploads(chunks=False)
    await upload(serve, uploads, 100_000)
    assert uploads.opened == 2


async def test_a_real_registry_that_is_cut_off(serve: Serve, registry: str) -> None:
    """A relay in front of docker-registry breaks connections in the middle of chunks."""
    host, _, port = registry.partition(":")
    left = 3

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        up_reader, up_writer = await asyncio.open_connection(host, int(port))

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter, limit: int) -> None:
            nonlocal left
            came = 0
            try:
                while data := await source.read(16_384):
                    came += len(data)
                    if came > limit and left:
                        left -= 1
                        break
                    target.write(data)
                    await target.drain()
            except OSError:
                pass
            finally:
                writer.close()
                up_writer.close()

        await asyncio.gather(copy(reader, up_writer, 60_000), copy(up_reader, writer, 1 << 30))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    address = address_of(server)
    async with Resolver(lambda name: [Host("http", address)]) as resolver:
        whole = resolver.pusher(f"{address}/cut/off:v1")
        pusher = Pusher(whole._transport, whole._host, whole._reference, chunk_size=100_000)
        assert await pusher.push(LAYER, content(BLOB))
    assert left == 0
    server.close()
    async with Resolver() as resolver:
        assert await fetched(resolver, f"{registry}/cut/off:v1", LAYER) == BLOB


async def test_uploads_may_take_long_as_long_as_they_move(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(transport, "HEAD_SECONDS", 0.5)
    uploads = Uploads()

    async def slowly(offset: int) -> AsyncIterator[bytes]:
        for start in range(offset, len(BLOB), 20_000):
            yield BLOB[start : start + 20_000]
            await asyncio.sleep(0.1)

    server = await serve(uploads.handle)
    async with at(server) as resolver:
        assert await resolver.pusher(f"{server.address}/x:y").push(LAYER, slowly)
    assert uploads.done == BLOB
    assert uploads.opened == 1


async def test_who_takes_nothing_in_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "IDLE_SECONDS", 0.3)
    ends = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"HEAD"):
            writer.write(b"HTTP/1.1 404 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        elif head.startswith(b"POST"):
            writer.write(b"HTTP/1.1 202 X\r\nLocation: /up\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        else:
            # the connection is open, and nobody reads from it
            await ends.wait()
        await writer.drain()
        writer.close()

    async def much(offset: int) -> AsyncIterator[bytes]:
        for _ in range(400):
            yield bytes(100_000)

    server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=1 << 12)
    address = address_of(server)
    large = Descriptor(LAYER.media_type, LAYER.digest, 40_000_000)
    try:
        async with Resolver(lambda name: [Host("http", address)]) as resolver:
            with pytest.raises((DeadlineExceeded, Unavailable)):
                await resolver.pusher(f"{address}/x:y").push(large, much)
    finally:
        ends.set()
        server.close()
