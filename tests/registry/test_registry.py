"""Resolve, fetch and push, with a real registry and with one that breaks off, redirects and asks who we are."""

from __future__ import annotations

import base64
import json
import os
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from aiohttp import web

from tests.registry.conftest import Handler, Server
from wherry.core import mediatypes
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import (
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from wherry.registry import retry
from wherry.registry.credentials import Credential, fixed
from wherry.registry.hosts import Host, hosts_for
from wherry.registry.pusher import Pusher
from wherry.registry.resolver import Resolver
from wherry.registry.transport import Transport

BLOB = os.urandom(300_000)
LAYER = Descriptor(mediatypes.OCI_LAYER, Digest.of(BLOB), len(BLOB))
Serve = Callable[[Handler], Awaitable[Server]]


def content(data: bytes) -> Callable[[int], AsyncIterator[bytes]]:
    async def read(offset: int) -> AsyncIterator[bytes]:
        for at in range(offset, len(data), 65536):
            yield data[at : at + 65536]

    return read


async def fetched(resolver: Resolver, ref: str, descriptor: Descriptor, offset: int = 0) -> bytes:
    return b"".join([chunk async for chunk in resolver.fetcher(ref).fetch(descriptor, offset)])


async def push_image(resolver: Resolver, ref: str, blob: bytes = BLOB) -> Descriptor:
    """Push a manifest of one layer under the reference's tag."""
    pusher = resolver.pusher(ref)
    config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
    layer = Descriptor(mediatypes.OCI_LAYER, Digest.of(blob), len(blob))
    config_descriptor = Descriptor(mediatypes.OCI_CONFIG, Digest.of(config), len(config))
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": mediatypes.OCI_MANIFEST,
            "config": config_descriptor.to_json(),
            "layers": [layer.to_json()],
        }
    ).encode()
    descriptor = Descriptor(mediatypes.OCI_MANIFEST, Digest.of(manifest), len(manifest))
    await pusher.push(layer, content(blob))
    await pusher.push(config_descriptor, content(config))
    await pusher.push_manifest(descriptor, content(manifest), ref.rpartition(":")[2])
    return descriptor


# -- a real registry


async def test_what_is_pushed_resolves_and_comes_back(registry: str) -> None:
    ref = f"{registry}/test/one:v1"
    async with Resolver() as resolver:
        pushed = await push_image(resolver, ref)
        assert await resolver.resolve(ref) == (ref, pushed)
        by_digest = f"{registry}/test/one@{pushed.digest}"
        assert await resolver.resolve(by_digest) == (by_digest, pushed)
        assert await fetched(resolver, ref, LAYER) == BLOB
        assert await fetched(resolver, ref, LAYER, 299_990) == BLOB[299_990:]
        assert await fetched(resolver, ref, LAYER, len(BLOB)) == b""
        manifest = json.loads(await fetched(resolver, ref, pushed))
        assert manifest["layers"][0]["digest"] == LAYER.digest


async def test_pushing_again_sends_nothing_and_mounts_from_neighbours(registry: str) -> None:
    async with Resolver() as resolver:
        await push_image(resolver, f"{registry}/test/two:v1")
        again = resolver.pusher(f"{registry}/test/two:v1")

        def never(offset: int) -> AsyncIterator[bytes]:
            raise AssertionError("content was opened")

        assert not await again.push(LAYER, never)
        assert await resolver.pusher(f"{registry}/test/three:v1").push(LAYER, never, mount_from=["test/two"])
        assert await fetched(resolver, f"{registry}/test/three:v1", LAYER) == BLOB


async def test_chunked_uploads(registry: str) -> None:
    async with Resolver() as resolver:
        ref = f"{registry}/test/chunks:v1"
        whole = resolver.pusher(ref)
        pusher = Pusher(whole._transport, whole._host, whole._reference, chunk_size=100_001)
        assert await pusher.push(LAYER, content(BLOB))
        assert await fetched(resolver, ref, LAYER) == BLOB


async def test_a_wrong_digest_is_refused_by_the_registry(registry: str) -> None:
    async with Resolver() as resolver:
        wrong = Descriptor(mediatypes.OCI_LAYER, Digest.of(b"other"), len(BLOB))
        with pytest.raises(InvalidArgument, match="DIGEST_INVALID"):
            await resolver.pusher(f"{registry}/test/wrong:v1").push(wrong, content(BLOB))


@pytest.mark.parametrize("suffix", ["nothing:here", "nothing@sha256:" + "0" * 64])
async def test_what_is_not_there(registry: str, suffix: str) -> None:
    async with Resolver() as resolver:
        with pytest.raises(NotFound) as caught:
            await resolver.resolve(f"{registry}/test/{suffix}")
        assert caught.value.message == f"{registry}/test/{suffix}: not found"
        with pytest.raises(NotFound):
            await fetched(resolver, f"{registry}/test/nothing:x", LAYER)
        with pytest.raises(OutOfRange):
            await fetched(resolver, f"{registry}/test/nothing:x", LAYER, LAYER.size + 1)


async def test_references_that_are_none() -> None:
    async with Resolver() as resolver:
        for ref in ("busybox", "host/x", "", "host/X:y", "http://host/x:y"):
            with pytest.raises(InvalidArgument):
                await resolver.resolve(ref)
        with pytest.raises(Unavailable):
            await resolver.resolve("127.0.0.1:1/x:y")


# -- a registry that does as the test says


def resolver_for(server: Server, **options: object) -> Resolver:
    return Resolver(lambda name: [Host("http", server.address)], **options)  # type: ignore[arg-type]


async def test_a_cut_connection_is_taken_up_where_it_broke(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)

    async def handler(request: web.Request) -> web.StreamResponse:
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        response = web.StreamResponse(status=206 if start else 200)
        response.content_length = len(BLOB) - start
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{len(BLOB) - 1}/{len(BLOB)}"
        await response.prepare(request)
        await response.write(BLOB[start : start + 110_000])
        if start + 110_000 < len(BLOB):
            transport = request.transport
            assert transport is not None
            transport.close()
        return response

    server = await serve(handler)
    async with resolver_for(server) as resolver:
        assert await fetched(resolver, f"{server.address}/x:y", LAYER) == BLOB
    assert [request.headers.get("Range") for request in server.seen] == [None, "bytes=110000-", "bytes=220000-"]


async def test_a_server_without_ranges_is_read_past_what_is_there(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=BLOB)

    server = await serve(handler)
    async with resolver_for(server) as resolver:
        assert await fetched(resolver, f"{server.address}/x:y", LAYER, 200_000) == BLOB[200_000:]


async def test_a_registry_that_is_down_for_a_moment_is_asked_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)

    async def handler(request: web.Request) -> web.StreamResponse:
        if len(server.seen) < 3:
            return web.Response(status=503 if len(server.seen) == 1 else 429, headers={"Retry-After": "0"})
        return web.Response(body=BLOB)

    server = await serve(handler)
    async with resolver_for(server) as resolver:
        assert await fetched(resolver, f"{server.address}/x:y", LAYER) == BLOB


async def test_one_that_stays_down_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=500, text='{"errors":[{"code":"UNKNOWN","message":"the disk is gone"}]}')

    server = await serve(handler)
    async with resolver_for(server) as resolver:
        with pytest.raises(Unavailable, match="500 Internal Server Error: UNKNOWN: the disk is gone"):
            await fetched(resolver, f"{server.address}/x:y", LAYER)


async def test_more_bytes_than_announced_are_not_taken(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(body=BLOB + b"x")

    server = await serve(handler)
    async with resolver_for(server) as resolver:
        with pytest.raises(Exception, match="more than its 300000 bytes"):
            await fetched(resolver, f"{server.address}/x:y", LAYER)


async def test_a_head_that_tells_too_little_is_followed_by_a_get(serve: Serve) -> None:
    manifest = b'{"schemaVersion": 2}'

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.method == "HEAD" and request.path.endswith("/none"):
            raise web.HTTPMethodNotAllowed("HEAD", ["GET"])
        return web.Response(body=manifest, content_type=mediatypes.OCI_MANIFEST)

    server = await serve(handler)
    async with resolver_for(server) as resolver:
        for tag in ("some", "none"):
            _, descriptor = await resolver.resolve(f"{server.address}/x:{tag}")
            assert descriptor == Descriptor(mediatypes.OCI_MANIFEST, Digest.of(manifest), len(manifest))
    assert [request.method for request in server.seen] == ["HEAD", "GET", "HEAD", "GET"]


async def test_redirects_get_no_authorization(serve: Serve) -> None:
    async def storage(request: web.Request) -> web.StreamResponse:
        return web.Response(body=BLOB)

    elsewhere = await serve(storage)

    async def handler(request: web.Request) -> web.StreamResponse:
        if "Authorization" not in request.headers:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        return web.Response(status=307, headers={"Location": f"http://{elsewhere.address}/blob?sig=a%2Fb"})

    server = await serve(handler)
    hosts = [Host("http", server.address, headers={"X-Secret": "1"})]
    async with Resolver(lambda name: hosts, fixed("user", "pass")) as resolver:
        assert await fetched(resolver, f"{server.address}/x:y", LAYER) == BLOB
    assert server.seen[-1].headers["Authorization"] == "Basic " + base64.b64encode(b"user:pass").decode()
    assert server.seen[-1].headers["X-Secret"] == "1"
    (request,) = elsewhere.seen
    assert "Authorization" not in request.headers
    assert "X-Secret" not in request.headers
    assert request.raw_path == "/blob?sig=a%2Fb"


async def test_the_token_flow(serve: Serve) -> None:
    asked: list[dict[str, str]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            asked.append({**request.query, "auth": request.headers.get("Authorization", "")})
            return web.json_response({"token": f"t-{request.query['scope']}", "expires_in": 300})
        if request.headers.get("Authorization") != "Bearer t-repository:a/b:pull":
            challenge = (
                f'Bearer realm="http://{server.address}/token",service="the, service",scope="repository:a/b:pull"'
            )
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        return web.Response(body=BLOB)

    server = await serve(handler)
    async with resolver_for(server, credentials=fixed("u", "p")) as resolver:
        for _ in range(2):
            assert await fetched(resolver, f"{server.address}/a/b:y", LAYER) == BLOB
    basic = "Basic " + base64.b64encode(b"u:p").decode()
    assert asked == [{"scope": "repository:a/b:pull", "service": "the, service", "account": "u", "auth": basic}]


async def test_a_refresh_token_is_traded_in(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            form = dict(urllib.parse.parse_qsl(await request.text()))
            assert request.method == "POST"
            assert form["grant_type"] == "refresh_token"
            assert form["refresh_token"] == "r"
            return web.json_response({"access_token": "fresh"})
        if request.headers.get("Authorization") != "Bearer fresh":
            challenge = f'Bearer realm="http://{server.address}/token"'
            return web.Response(status=401, headers={"WWW-Authenticate": challenge})
        return web.Response(body=BLOB)

    server = await serve(handler)
    async with resolver_for(server, credentials=fixed("", "r")) as resolver:
        assert await fetched(resolver, f"{server.address}/a/b:y", LAYER) == BLOB


@pytest.mark.parametrize("challenge", ['Basic realm="x"', "Negotiate", 'Bearer realm="file:///etc/passwd"', ""])
async def test_who_is_not_let_in(serve: Serve, challenge: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        headers = {"WWW-Authenticate": challenge} if challenge else {}
        return web.Response(status=401, headers=headers)

    server = await serve(handler)
    async with resolver_for(server, credentials=fixed("u", "wrong")) as resolver:
        with pytest.raises((Unauthenticated, InvalidArgument)):
            await resolver.resolve(f"{server.address}/a/b:y")
    assert len(server.seen) <= 3


async def test_forbidden(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=403)

    server = await serve(handler)
    async with resolver_for(server) as resolver:
        with pytest.raises(PermissionDenied):
            await resolver.resolve(f"{server.address}/a/b:y")


async def test_a_mirror_first_then_the_registry(serve: Serve, tmp_path: Path) -> None:
    async def empty(request: web.Request) -> web.StreamResponse:
        raise web.HTTPNotFound

    async def full(request: web.Request) -> web.StreamResponse:
        return web.Response(body=BLOB)

    mirror, upstream = await serve(empty), await serve(full)
    folder = tmp_path / "example.com"
    folder.mkdir()
    (folder / "hosts.toml").write_text(
        f'server = "http://{upstream.address}"\n[host."http://{mirror.address}"]\ncapabilities = ["pull"]\n'
        '[host."http://127.0.0.1:1"]\ncapabilities = ["pull"]\n'
    )
    async with Resolver(lambda name: hosts_for(name, config_dir=str(tmp_path))) as resolver:
        assert await fetched(resolver, "example.com/x:y", LAYER) == BLOB
    assert mirror.seen[0].query_string == "ns=example.com"


# -- files


def test_hosts_toml(tmp_path: Path) -> None:
    folder = tmp_path / "r.example_5000_"
    folder.mkdir()
    (folder / "hosts.toml").write_text(
        """
server = "https://r.example:5000"
skip_verify = true
[host."https://mirror.example/prefix"]
  capabilities = ["pull", "resolve"]
  ca = "m.crt"
  client = [["c.cert", "c.key"], ["both.pem", ""]]
  dial_timeout = "500ms"
  override_path = true
  [host."https://mirror.example/prefix".header]
    x-one = ["a", "b"]
"""
    )
    mirror, server = hosts_for("r.example:5000", config_dir=f"/nonexistent:{tmp_path}")
    assert mirror.root == "https://mirror.example/prefix"
    assert mirror.ca == (str(folder / "m.crt"),)
    assert mirror.client == ((str(folder / "c.cert"), str(folder / "c.key")), (str(folder / "both.pem"), ""))
    assert mirror.headers == {"x-one": "a, b"}
    assert mirror.dial_seconds == 0.5
    assert (server.root, server.skip_verify) == ("https://r.example:5000/v2", True)


def test_hosts_without_a_file(tmp_path: Path) -> None:
    assert hosts_for("docker.io")[0].root == "https://registry-1.docker.io/v2"
    local = hosts_for("127.0.0.1:5000")[0]
    assert (local.scheme, local.plain_ok, local.skip_verify) == ("https", True, True)
    assert not hosts_for("localhost:443")[0].plain_ok
    assert hosts_for("localhost:80")[0].scheme == "http"
    assert hosts_for("r.example", default_scheme="http")[0].root == "http://r.example/v2"
    folder = tmp_path / "r.example"
    folder.mkdir()
    (folder / "ca.crt").touch()
    assert hosts_for("r.example", config_dir=str(tmp_path))[0].ca == (str(folder / "ca.crt"),)


@pytest.mark.parametrize(
    ("text", "seconds"), [("1m30s", 90), ("1.5s", 1.5), ("300us", 0.0003), (".5h", 1800), ("2s", 2)]
)
def test_durations_are_gos(tmp_path: Path, text: str, seconds: float) -> None:
    (tmp_path / "_default").mkdir()
    (tmp_path / "_default" / "hosts.toml").write_text(f'dial_timeout = "{text}"')
    (host,) = hosts_for("x.example", config_dir=str(tmp_path))
    assert host.dial_seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    "bad",
    [
        'dial_timeout = "1 s"',
        'dial_timeout = ""',
        "x = [",
        'capabilities = ["fly"]',
        'server = "ftp://x"',
        "host = 1",
        "client = 3",
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, bad: str) -> None:
    folder = tmp_path / "_default"
    folder.mkdir()
    (folder / "hosts.toml").write_text(bad)
    with pytest.raises(InvalidArgument, match=r"hosts\.toml"):
        hosts_for("x.example", config_dir=str(tmp_path))


async def test_dockers_registry_as_a_mirror_is_a_mirror() -> None:
    asked: list[str] = []

    async def credentials(host: str, challenges: Sequence[str]) -> Credential | None:
        asked.append(host)
        return None

    transport = Transport(credentials)
    hub = Host("https", "registry-1.docker.io")
    for name, own in (("docker.io", "docker.io"), ("quay.example", "registry-1.docker.io")):
        await transport._authorizer(name, hub)._credential_of_user()
        assert asked.pop() == own
