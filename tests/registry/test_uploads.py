"""Uploads that are cut, over a registry that breaks off and over a relay that does, in front of the real one."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from tests.registry.test_broken import Serve, address_of, at
from tests.registry.test_registry import BLOB, LAYER, content, fetched
from wherry.core.digest import Digest
from wherry.registry import retry
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
