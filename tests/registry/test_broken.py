"""Registries that stall, lie, send garbage, are busy or fall over in the middle: clear errors, or done all the same."""

from __future__ import annotations

import asyncio
import email.utils
import re
import time
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from tests.registry.conftest import Handler, Server
from tests.registry.test_registry import BLOB, LAYER, fetched, push_image
from wherry.core import mediatypes
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import (
    Aborted,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    WherryError,
)
from wherry.registry import fetcher, ranges, retry, transport
from wherry.registry.hosts import Host
from wherry.registry.resolver import Resolver

Serve = Callable[[Handler], Awaitable[Server]]
MANIFEST = b'{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []}'


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)


def at(*servers: Server, piece: int = 0) -> Resolver:
    return Resolver(lambda name: [Host("http", server.address) for server in servers], piece=piece)


def address_of(server: asyncio.Server) -> str:
    return "{}:{}".format(*server.sockets[0].getsockname())


def manifest_answer(request: web.Request) -> web.Response:
    headers = {"Docker-Content-Digest": str(Digest.of(MANIFEST))}
    return web.Response(body=MANIFEST, content_type=mediatypes.OCI_INDEX, headers=headers)


def part(request: web.Request, data: bytes = BLOB) -> web.Response:
    """A range as a good server gives it."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if match is None:
        return web.Response(body=data)
    first, last = int(match[1]), int(match[2] or len(data) - 1)
    headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
    return web.Response(status=206, body=data[first : last + 1], headers=headers)


# -- busy


async def test_everything_is_asked_again(serve: Serve) -> None:
    """503 and 429 for each first question: resolving, fetching, tags."""
    seen: set[tuple[str, str]] = set()

    async def handler(request: web.Request) -> web.StreamResponse:
        key = (request.method, request.path)
        if key not in seen:
            seen.add(key)
            return web.Response(status=503 if len(seen) % 2 else 429)
        if request.path.endswith("/tags/list"):
            return web.json_response({"tags": ["a"]})
        return manifest_answer(request) if "/manifests/" in request.path else web.Response(body=BLOB)

    server = await serve(handler)
    ref = f"{server.address}/x:y"
    async with at(server) as resolver:
        _, root = await resolver.resolve(ref)
        assert root.digest == Digest.of(MANIFEST)
        assert await fetched(resolver, ref, LAYER) == BLOB
        assert await resolver.tags(f"{server.address}/x") == ["a"]


def test_retry_after_in_both_forms() -> None:
    assert retry.seconds_of("7") == 7
    assert retry.seconds_of("soon") == retry.seconds_of("") == retry.seconds_of("-1") == 0
    assert 25 < retry.seconds_of(email.utils.formatdate(time.time() + 30, usegmt=True)) <= 30
    assert retry.seconds_of("Wed, 21 Oct 2015 07:28:00 GMT") == 0


async def test_retry_after_is_heeded(serve: Serve) -> None:
    times: list[float] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        times.append(time.monotonic())
        return manifest_answer(request) if len(times) > 1 else web.Response(status=429, headers={"Retry-After": "1"})

    server = await serve(handler)
    async with at(server) as resolver:
        await resolver.resolve(f"{server.address}/x:y")
    assert times[1] - times[0] >= 0.99


# -- stalls and trickles


@pytest.mark.parametrize("way", ["head", "body", "trickle"])
async def test_who_stalls_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(transport, "IDLE_SECONDS", 0.3)

    async def handler(request: web.Request) -> web.StreamResponse:
        if way == "head":
            await asyncio.sleep(30)
        response = web.StreamResponse()
        response.content_length = len(BLOB)
        await response.prepare(request)
        while way == "trickle":
            await response.write(b"x")
            await asyncio.sleep(0.02)
        await asyncio.sleep(30)
        return response

    server = await serve(handler)
    began = time.monotonic()
    async with at(server) as resolver:
        with pytest.raises((DeadlineExceeded, Unavailable)):
            await fetched(resolver, f"{server.address}/x:y", LAYER)
    assert time.monotonic() - began < 20


async def test_heads_that_trickle_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header line every moment, without an end."""
    monkeypatch.setattr(transport, "HEAD_SECONDS", 0.5)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        try:
            for number in range(1000):
                writer.write(b"X-%d: y\r\n" % number)
                await writer.drain()
                await asyncio.sleep(0.05)
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    address = address_of(server)
    async with Resolver(lambda name: [Host("http", address)]) as resolver:
        with pytest.raises(DeadlineExceeded):
            await resolver.resolve(f"{address}/x:y")
    server.close()


# -- garbage and lies


@pytest.mark.parametrize(
    "answer",
    [b"", b"\x00\xff" * 500, b"SSH-2.0-x\r\n", b"HTTP/1.1 999999999 X\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"a" * 70_000,
     b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
     b"HTTP/1.1 401 X\r\nWWW-Authenticate: Bearer realm=\"\r\nContent-Length: 0\r\n\r\n",
     b"HTTP/1.1 307 X\r\nLocation: http://[::\r\nContent-Length: 0\r\n\r\n",
     b"HTTP/1.1 307 X\r\nLocation: gopher://x\r\nContent-Length: 0\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nDocker-Content-Digest: sha256:zz\r\nContent-Length: 3\r\n\r\n"],
)  # fmt: skip
async def test_what_is_no_registry(answer: bytes) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    address = address_of(server)
    async with Resolver(lambda name: [Host("http", address)]) as resolver:
        with pytest.raises(WherryError):
            await resolver.resolve(f"{address}/x:y")
        with pytest.raises(WherryError):
            await fetched(resolver, f"{address}/x:y", LAYER)
        with pytest.raises(WherryError):
            await resolver.tags(f"{address}/x")
        with pytest.raises(WherryError):
            await push_image(resolver, f"{address}/x:y")
    server.close()


async def test_redirects_without_an_end(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=307, headers={"Location": f"{request.path}x"})

    server = await serve(handler)
    async with at(server) as resolver:
        with pytest.raises(Unavailable, match="redirected more than 10 times"):
            await resolver.resolve(f"{server.address}/x:y")
    # and that was all: nobody goes round again
    assert len(server.seen) == 11


async def test_a_login_page_is_no_manifest(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>please log in</html>", content_type="text/html")

    server = await serve(handler)
    async with at(server) as resolver:
        with pytest.raises(InvalidArgument, match="text/html that is no manifest"):
            await resolver.resolve(f"{server.address}/x:y")


async def test_a_manifest_without_an_end(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if request.method == "HEAD":
            return web.Response(status=405)
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(64):
            await response.write(b" " * (1 << 18))
        return response

    server = await serve(handler)
    async with at(server) as resolver:
        with pytest.raises(ResourceExhausted, match="larger than 4194304 bytes"):
            await resolver.resolve(f"{server.address}/x:y")


async def test_another_manifest_than_the_one_asked_for(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return manifest_answer(request)

    server = await serve(handler)
    async with at(server) as resolver:
        with pytest.raises(Aborted):
            await resolver.resolve(f"{server.address}/x@{Digest.of(b'another')}")


@pytest.mark.parametrize("stated", [len(BLOB) // 2, len(BLOB) * 2])
async def test_a_length_that_is_not_true(serve: Serve, stated: int) -> None:
    """Less than announced is cut off and taken up; where nothing more comes, it ends."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = stated
        await response.prepare(request)
        await response.write(BLOB[:stated])
        assert request.transport is not None
        request.transport.close()
        return response

    server = await serve(handler)
    async with at(server) as resolver:
        if stated > len(BLOB):
            # all that is needed came before the lie showed, or after a further attempt
            assert await fetched(resolver, f"{server.address}/x:y", LAYER) == BLOB
        else:
            with pytest.raises(Unavailable):
                await fetched(resolver, f"{server.address}/x:y", LAYER)
    assert len(server.seen) <= 2 * retry.MAX_ATTEMPTS


async def test_ranges_that_are_others(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Range": f"bytes 0-{len(BLOB) - 1}/{len(BLOB)}"}
        return web.Response(status=206, body=BLOB, headers=headers)

    server = await serve(handler)
    async with at(server) as resolver:
        with pytest.raises(Aborted, match="asked for bytes from 1000 on"):
            await fetched(resolver, f"{server.address}/x:y", LAYER, 1000)


async def test_tags_in_pages_and_pages_without_an_end(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        last = request.query.get("last", "")
        if request.path == "/v2/pages/tags/list" and last != "b":
            link = f'</v2/pages/tags/list?last={"b" if last else "a"}>; rel="next"'
            return web.json_response({"tags": [last or "first"]}, headers={"Link": link})
        if "endless" in request.path:
            return web.json_response({"tags": ["x"] * 9000}, headers={"Link": f"<{request.path}>; rel=next"})
        if "away" in request.path:
            return web.json_response({"tags": ["x"]}, headers={"Link": "<http://elsewhere.example/>; rel=next"})
        return web.json_response({"tags": ["last"] if "pages" in request.path else 3})

    server = await serve(handler)
    async with at(server) as resolver:
        assert await resolver.tags(f"{server.address}/pages") == ["a", "first", "last"]
        for name, kind in {"endless": ResourceExhausted, "away": InvalidArgument, "wrong": InvalidArgument}.items():
            with pytest.raises(kind):
                await resolver.tags(f"{server.address}/{name}")


async def test_a_host_that_gives_something_else_is_not_asked_again(serve: Serve) -> None:
    async def liar(request: web.Request) -> web.StreamResponse:
        return web.Response(body=bytes(len(BLOB)))

    async def honest(request: web.Request) -> web.StreamResponse:
        return part(request)

    bad, good = await serve(liar), await serve(honest)
    async with at(bad, good) as resolver:
        source = resolver.fetcher("team.example/x:y")
        assert b"".join([chunk async for chunk in source.fetch(LAYER)]) != BLOB
        assert source.distrust(LAYER)
        assert b"".join([chunk async for chunk in source.fetch(LAYER)]) == BLOB
        assert not source.distrust(LAYER)


# -- several ranges at once


async def test_large_blobs_in_parallel_ranges(serve: Serve) -> None:
    busy, most, cut = 0, 0, 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal busy, most, cut
        busy += 1
        most = max(most, busy)
        try:
            await asyncio.sleep(0.05)
            answer = part(request)
            if cut < 3 and answer.body:
                # the connection breaks after some bytes
                cut += 1
                response = web.StreamResponse(status=206, headers=answer.headers)
                await response.prepare(request)
                await response.write(bytes(answer.body)[:7000])  # type: ignore[arg-type]
                assert request.transport is not None
                request.transport.close()
                return response
            return answer
        finally:
            busy -= 1

    server = await serve(handler)
    async with at(server, piece=20_000) as resolver:
        ref = f"{server.address}/x:y"
        assert await fetched(resolver, ref, LAYER) == BLOB
        assert most == ranges.CONNECTIONS
        assert await fetched(resolver, ref, LAYER, 250_001) == BLOB[250_001:]
        small = Descriptor(mediatypes.OCI_LAYER, Digest.of(BLOB), 20_000)
        server.seen.clear()
        with pytest.raises(Aborted, match="more than its 20000 bytes"):
            await fetched(resolver, ref, small)
    assert len(server.seen) == 1
    assert "Range" not in server.seen[0].headers


async def test_slow_blobs_are_shared_among_connections(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection brings little in a second: others help."""
    monkeypatch.setattr(fetcher, "WATCHED", 0.05)
    monkeypatch.setattr(fetcher, "WORTH_SHARING", 100_000)
    monkeypatch.setattr(fetcher, "PIECE", 30_000)
    # as if it were far away, and this process had nothing else to do
    monkeypatch.setattr(fetcher, "is_local", lambda netloc: False)
    monkeypatch.setattr(fetcher, "BUSY", 100)

    async def handler(request: web.Request) -> web.StreamResponse:
        answer = part(request)
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        await response.prepare(request)
        data = bytes(answer.body or b"")  # type: ignore[arg-type]
        for first in range(0, len(data), 10_000):
            await response.write(data[first : first + 10_000])
            await asyncio.sleep(0.02)
        return response

    server = await serve(handler)
    async with at(server) as resolver:
        assert await fetched(resolver, f"{server.address}/x:y", LAYER) == BLOB
    wished = [request.headers.get("Range") for request in server.seen]
    assert wished[0] is None
    assert len([wish for wish in wished[1:] if wish]) >= 5


@pytest.mark.parametrize("offset", [0, 100_000])
async def test_servers_without_ranges_have_one_connection(serve: Serve, offset: int) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=BLOB)

    server = await serve(handler)
    async with at(server, piece=20_000) as resolver:
        assert await fetched(resolver, f"{server.address}/x:y", LAYER, offset) == BLOB[offset:]
