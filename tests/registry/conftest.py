"""A real registry for each test that asks for one, and one that misbehaves as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from tests.peers import need

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# a user and a password, and the password's hash for htpasswd
USER, PASSWORD = "me", "secret"
HASH = "$2b$04$u2K2EpPhHe93g2iKXEyNeu7T2DyCnsX3Vz6ns20V/PNGZYZalR5.K"


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`127.0.0.1:PORT` of a docker-registry of our own."""
    with running_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="session")
def locked_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same, for USER with PASSWORD alone."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "htpasswd").write_text(f"{USER}:{HASH}\n")
    with running_registry(folder, f'auth: {{htpasswd: {{realm: r, path: "{folder}/htpasswd"}}}}\n') as address:
        yield address


@contextlib.contextmanager
def running_registry(folder: Path, more: str = "", *, name: str = "127.0.0.1", http: str = "") -> Iterator[str]:
    """A docker-registry on a folder, with `more` in its configuration and `http` in that of its door."""
    binary = need("docker-registry")
    port = free_port()
    address = f"{name}:{port}"
    config = folder / "registry.yml"
    config.write_text(
        f"""version: 0.1
log: {{level: error}}
storage: {{cache: {{blobdescriptor: inmemory}}, filesystem: {{rootdirectory: {folder / "data"}}}}}
http: {{addr: "127.0.0.1:{port}"{http}}}
{more}"""
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([binary, "serve", str(config)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    pytest.fail(Path(log.name).read_text())
                time.sleep(0.02)
        yield address
    finally:
        process.kill()
        process.wait()


class Server:
    """An HTTP server whose every answer the test gives; it remembers what was asked."""

    def __init__(self) -> None:
        self.address = ""
        self.seen: list[web.Request] = []
        self.handler: Handler | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(request)
        if self.handler is None:
            raise web.HTTPNotFound
        return await self.handler(request)


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Handler], Awaitable[Server]]]:
    """Starts servers that answer with a handler."""
    runners: list[web.AppRunner] = []

    async def start(handler: Handler) -> Server:
        server = Server()
        server.handler = handler
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", server.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        server.address = f"127.0.0.1:{port}"
        return server

    yield start
    for runner in runners:
        await runner.cleanup()
    await asyncio.sleep(0)
