"""A docker-registry behind TLS, and one that wants a token: hosts.toml and the token flow against the real thing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from tests.registry.certificates import Authority, token
from tests.registry.conftest import Handler, Server, free_port, running_registry
from tests.registry.test_registry import BLOB, LAYER, content, fetched, push_image
from wherry.core.errors import FailedPrecondition, InvalidArgument, Unauthenticated, Unavailable
from wherry.registry import transport
from wherry.registry.credentials import Credential, Credentials, fixed
from wherry.registry.hosts import Host, hosts_for
from wherry.registry.resolver import Resolver

Serve = Callable[[Handler], Awaitable[Server]]


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def tls_registry(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry with a certificate that only our authority vouches for."""
    cert, key = authority.issue("server", "DNS:localhost", "IP:127.0.0.1")
    http = f', tls: {{certificate: "{cert}", key: "{key}"}}'
    with running_registry(tmp_path_factory.mktemp("tls"), http=http) as address:
        yield address


@pytest.fixture(scope="session")
def guarded_registry(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One that also wants to see a certificate of the client."""
    cert, key = authority.issue("guarded", "IP:127.0.0.1")
    http = f', tls: {{certificate: "{cert}", key: "{key}", clientcas: ["{authority.cert}"]}}'
    with running_registry(tmp_path_factory.mktemp("guarded"), http=http) as address:
        yield address


def hosts_from(folder: Path, name: str, text: str, scheme: str = "") -> Callable[[str], list[Host]]:
    """What a hosts.toml for a registry's name says."""
    place = folder / name
    place.mkdir(exist_ok=True)
    (place / "hosts.toml").write_text(text)
    return lambda wanted: hosts_for(wanted, config_dir=str(folder), default_scheme=scheme)


async def refused(resolver: Resolver, ref: str, text: str) -> None:
    with pytest.raises(Unavailable, match=text):
        await resolver.resolve(ref)


# -- TLS


async def test_an_authority_of_ones_own(tls_registry: str, authority: Authority, tmp_path: Path) -> None:
    ref = "team.example/tls/app:v1"
    server = f'server = "https://{tls_registry}"\n'
    async with Resolver(hosts_from(tmp_path, "team.example", server)) as resolver:
        await refused(resolver, ref, "certificate verify failed")
    async with Resolver(hosts_from(tmp_path, "team.example", server + f'ca = ["{authority.cert}"]\n')) as resolver:
        pushed = await push_image(resolver, ref)
        assert (await resolver.resolve(ref))[1] == pushed
        assert await fetched(resolver, ref, LAYER) == BLOB
    async with Resolver(hosts_from(tmp_path, "team.example", server + "skip_verify = true\n")) as resolver:
        assert (await resolver.resolve(ref))[1] == pushed


async def test_a_name_that_the_certificate_does_not_have(
    guarded_registry: str, authority: Authority, tmp_path: Path
) -> None:
    port = guarded_registry.partition(":")[2]
    text = f'server = "https://localhost:{port}"\nca = "{authority.cert}"\n'
    async with Resolver(hosts_from(tmp_path, "team.example", text)) as resolver:
        await refused(resolver, "team.example/a:b", "match|mismatch")


async def test_certificates_of_the_client(guarded_registry: str, authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("client")
    ref = "team.example/guarded/app:v1"
    text = f'server = "https://{guarded_registry}"\nca = "{authority.cert}"\n'
    async with Resolver(hosts_from(tmp_path, "team.example", text)) as resolver:
        with pytest.raises(Unavailable):
            await resolver.resolve(ref)
    pair = f'client = [["{cert}", "{key}"]]\n'
    async with Resolver(hosts_from(tmp_path, "team.example", text + pair)) as resolver:
        pushed = await push_image(resolver, ref)
    # one file with both, and paths that are relative to the folder
    (tmp_path / "team.example" / "both.pem").write_bytes(cert.read_bytes() + key.read_bytes())
    async with Resolver(hosts_from(tmp_path, "team.example", text + 'client = "both.pem"\n')) as resolver:
        assert (await resolver.resolve(ref))[1] == pushed
    (tmp_path / "team.example" / "both.pem").write_text("nothing")
    async with Resolver(hosts_from(tmp_path, "team.example", text + 'client = "both.pem"\n')) as resolver:
        with pytest.raises(InvalidArgument, match=r"both\.pem"):
            await resolver.resolve(ref)


async def test_certificates_as_docker_lays_them(guarded_registry: str, authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("laid")
    folder = tmp_path / guarded_registry
    folder.mkdir()
    for name, source in {"ca.crt": authority.cert, "client.cert": cert, "client.key": key}.items():
        (folder / name).write_bytes(source.read_bytes())
    async with Resolver(lambda name: hosts_for(name, config_dir=str(tmp_path))) as resolver:
        await push_image(resolver, f"{guarded_registry}/laid/app:v1")


async def test_loopback_needs_no_word_about_tls(tls_registry: str, registry: str) -> None:
    for address in (tls_registry, registry):
        async with Resolver() as resolver:
            await push_image(resolver, f"{address}/either/app:v1")
            assert await resolver.tags(f"{address}/either/app") == ["v1"]


async def test_a_plain_server_that_waits_for_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It doesn't know what a handshake is, and says nothing to it."""
    monkeypatch.setattr(transport, "PROBE_SECONDS", 0.3)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            body = b'{"tags": ["a"]}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with Resolver() as resolver:
        assert await resolver.tags(f"127.0.0.1:{server.sockets[0].getsockname()[1]}/x") == ["a"]
    server.close()


async def test_plain_http_where_tls_was_configured(registry: str, authority: Authority, tmp_path: Path) -> None:
    text = f'server = "http://{registry}"\nca = "{authority.cert}"\n'
    async with Resolver(hosts_from(tmp_path, "team.example", text)) as resolver:
        await push_image(resolver, "team.example/plain/app:v1")


async def test_a_redirect_takes_nothing_private_along(authority: Authority, tmp_path: Path) -> None:
    """To another host with TLS: its authority counts there, too, the client's certificate and the rest stay."""
    cert, key = authority.issue("both", "IP:127.0.0.1")
    own, own_key = authority.issue("me")
    seen: dict[str, list[tuple[bool, dict[str, str]]]] = {"registry": [], "storage": []}
    runners = []
    ports = {}

    async def start(name: str, answer: Callable[[], web.Response]) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.cert))
        context.load_cert_chain(cert, key)
        context.verify_mode = ssl.CERT_OPTIONAL

        async def handle(request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            shown = bool(request.transport.get_extra_info("peercert"))
            seen[name].append((shown, dict(request.headers)))
            if name == "registry" and "Authorization" not in request.headers:
                return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
            return answer()

        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        ports[name] = free_port()
        await web.TCPSite(runner, "127.0.0.1", ports[name], ssl_context=context).start()

    await start("storage", lambda: web.Response(body=BLOB))
    target = f"https://127.0.0.1:{ports['storage']}/blob"
    await start("registry", lambda: web.Response(status=307, headers={"Location": target}))
    server = f"https://127.0.0.1:{ports['registry']}"
    text = (
        f'server = "{server}"\nca = "{authority.cert}"\nclient = [["{own}", "{own_key}"]]\n[header]\nx-secret = "1"\n'
    )
    name = f"127.0.0.1:{ports['registry']}"
    async with Resolver(hosts_from(tmp_path, name, text), fixed("me", "secret")) as resolver:
        assert await fetched(resolver, f"{name}/a:b", LAYER) == BLOB
    for runner in runners:
        await runner.cleanup()
    shown, headers = seen["registry"][-1]
    assert shown
    assert headers["x-secret"] == "1"
    ((shown, headers),) = seen["storage"]
    assert not shown
    assert not {"authorization", "x-secret"} & {key.lower() for key in headers}


# -- mirrors


async def test_what_mirrors_may_and_are_told(
    serve: Serve, registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    mirror = await serve(handler)
    text = f"""
server = "http://{registry}"
[host."http://{mirror.address}/some/prefix"]
  capabilities = ["pull", "resolve"]
  override_path = true
  [host."http://{mirror.address}/some/prefix".header]
    x-team = ["a", "b"]
[host."http://127.0.0.1:1"]
  capabilities = ["pull", "resolve"]
"""
    ref = "team.example/mirrored/app:v1"
    async with Resolver(hosts_from(tmp_path, "team.example", text), fixed("me", "secret")) as resolver:
        pushed = await push_image(resolver, ref)
        assert mirror.seen == []
        assert (await resolver.resolve(ref))[1] == pushed
        assert await fetched(resolver, ref, LAYER) == BLOB
    assert {request.method for request in mirror.seen} == {"HEAD", "GET"}
    for request in mirror.seen:
        assert request.path.startswith("/some/prefix/mirrored/app/")
        assert request.query_string == "ns=team.example"
        assert request.headers["x-team"] == "a, b"
        assert "Authorization" not in request.headers
    # a busy mirror isn't waited for as long as the registry itself
    assert len(mirror.seen) <= 4
    only = f'server = "http://{registry}"\ncapabilities = ["pull"]\n'
    async with Resolver(hosts_from(tmp_path, "team.example", only)) as resolver:
        with pytest.raises(FailedPrecondition, match="push"):
            resolver.pusher(ref)
        with pytest.raises(FailedPrecondition, match="resolve"):
            await resolver.resolve(ref)
        assert await fetched(resolver, ref, LAYER) == BLOB


# -- a token server, and a registry that believes it


@dataclass
class Tokens:
    """An authorization server: it knows one user, and one refresh token."""

    cert: Path
    key: Path
    asked: list[tuple[str, list[str]]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        fields = await request.post() if request.method == "POST" else request.query
        scopes = " ".join(str(item) for item in fields.getall("scope", [])).split()
        self.asked.append((request.method, scopes))
        basic = "Basic " + base64.b64encode(b"me:secret").decode()
        user = request.headers.get("Authorization") == basic or fields.get("refresh_token") == "fresh"
        if not user and (request.headers.get("Authorization") or request.method == "POST"):
            return web.json_response({"errors": [{"code": "UNAUTHORIZED", "message": "who?"}]}, status=401)
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            allowed = [action for action in actions.split(",") if user or action == "pull"]
            if user or name.startswith("public/"):
                access.append({"type": kind, "name": name, "actions": allowed})
        claims = {"iss": "tests", "sub": "me" if user else "", "aud": "the registry", "access": access}
        made = token(self.cert, self.key, claims)
        # as long as tokens of large companies: more than one segment of TCP
        return web.json_response({"padding": "x" * 200_000, "access_token": made, "expires_in": 300})


@pytest.fixture
async def tokens(authority: Authority, serve: Serve, tmp_path: Path) -> AsyncIterator[tuple[str, Tokens]]:
    """A registry's address, and the server that it sends people to."""
    cert, key = authority.issue("signer", "DNS:signer")
    made = Tokens(cert, key)
    server = await serve(made.handle)
    (tmp_path / "data").mkdir()
    more = (
        f'auth: {{token: {{realm: "http://{server.address}/token", service: "the registry", issuer: tests, '
        f'rootcertbundle: "{authority.cert}"}}}}\n'
    )
    with running_registry(tmp_path / "data", more) as address:
        yield address, made


def plain(name: str) -> list[Host]:
    return hosts_for(name, default_scheme="http")


@pytest.mark.parametrize("credentials", [fixed("me", "secret"), fixed("", "fresh")])
async def test_tokens_for_a_real_registry(tokens: tuple[str, Tokens], credentials: Credentials) -> None:
    address, server = tokens
    ref = f"{address}/public/app:v1"
    async with Resolver(plain, credentials) as resolver:
        pushed = await push_image(resolver, ref)
        # mounted: the token says that the other repository may be read, too

        def never(offset: int) -> AsyncIterator[bytes]:
            raise AssertionError("content was opened")

        other = resolver.pusher(f"{address}/private/app:v1")
        assert await other.push(LAYER, never, mount_from=["public/app"])
    assert len(server.asked) == 3
    assert sorted(server.asked[-1][1]) == ["repository:private/app:pull,push", "repository:public/app:pull"]
    async with Resolver(plain) as resolver:
        assert (await resolver.resolve(ref))[1] == pushed
        assert await fetched(resolver, ref, LAYER) == BLOB
        with pytest.raises(Unauthenticated):
            await resolver.resolve(f"{address}/private/app:v1")
        with pytest.raises(Unauthenticated):
            await resolver.pusher(ref).push_manifest(pushed, content(b"{}"), "v2")


async def test_a_wrong_password_says_so(tokens: tuple[str, Tokens]) -> None:
    address, _ = tokens
    async with Resolver(plain, fixed("me", "wrong")) as resolver:
        with pytest.raises(Unauthenticated, match=r"failed to authorize.*401.*who\?"):
            await resolver.resolve(f"{address}/public/app:v1")


async def test_a_password_is_not_carried_on_from_the_token_server(serve: Serve) -> None:
    async def thief(request: web.Request) -> web.StreamResponse:
        return web.json_response({"token": "t"})

    elsewhere = await serve(thief)

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            return web.Response(status=307, headers={"Location": f"http://{elsewhere.address}/token"})
        challenge = f'Bearer realm="http://{server.address}/token"'
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})

    server = await serve(handler)
    for credentials in (fixed("me", "secret"), fixed("", "refresh")):
        async with Resolver(plain, credentials) as resolver:
            with pytest.raises(Exception, match="307"):
                await resolver.resolve(f"{server.address}/a:b")
    assert elsewhere.seen == []


async def test_no_password_for_a_token_server_without_tls(
    serve: Serve, tls_registry: str, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked by a registry with TLS; on loopback it would be let through, so the name is another one."""
    resolver = Resolver(plain, fixed("me", "secret"))
    host = Host("https", "team.example")
    with pytest.raises(Unauthenticated, match="has no TLS"):
        await resolver._transport._token(host, "http://auth.example/t", {}, {"Authorization": "Basic x"}, post=False)


async def test_a_helper_of_ones_own(tokens: tuple[str, Tokens]) -> None:
    address, _ = tokens
    asked = []

    async def look_up(host: str, challenges: Sequence[str]) -> Credential | None:
        asked.append(host)
        return Credential("me", "secret")

    async with Resolver(plain, look_up) as resolver:
        await push_image(resolver, f"{address}/private/app:v1")
        await push_image(resolver, f"{address}/private/two:v1")
    assert asked == [address]
