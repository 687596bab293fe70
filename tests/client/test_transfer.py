"""Transfers by the client: the daemon asks who the user is, over each kind of connection."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.registry.conftest import PASSWORD, USER, locked_registry, registry, serve
from tests.registry.test_doors import Tokens, authority, tokens
from tests.wherryd import BUSYBOX, Wherryd
from wherry.client.api import Client
from wherry.client.grpc_async import GrpcTransport
from wherry.client.grpc_blocking import BlockingGrpcTransport
from wherry.client.transfer import Registry
from wherry.client.transport import Transport
from wherry.client.ttrpc_blocking import BlockingTtrpcTransport
from wherry.core.credentials import Credential, from_docker_config
from wherry.core.errors import NotFound, PermissionDenied, Unauthenticated

__all__ = ["authority", "locked_registry", "registry", "serve", "tokens"]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Wherryd]:
    daemon = Wherryd()
    try:
        daemon.start()
        daemon.import_busybox()
        yield daemon
    finally:
        daemon.close()


@pytest_asyncio.fixture(params=["ttrpc", "grpc", "asyncio"])
async def client(request: pytest.FixtureRequest, daemon: Wherryd) -> AsyncIterator[Client]:
    """A client over one kind of connection; what doesn't suspend an event loop can be run in one, too."""
    transport: Transport
    if request.param == "ttrpc":
        transport = BlockingTtrpcTransport(f"{daemon.address}.ttrpc")
    else:
        transport = (GrpcTransport if request.param == "asyncio" else BlockingGrpcTransport)(daemon.address)
    client = Client.over(transport)
    try:
        yield client
    finally:
        await client.close()


async def test_the_daemon_asks_who_the_user_is(client: Client, locked_registry: str) -> None:
    asked: list[str] = []

    def lookup(host: str) -> Credential:
        asked.append(host)
        return Credential(USER, PASSWORD)

    name = f"{locked_registry}/box:1"
    registry = Registry(name, scheme="http", credentials=lookup)
    done = [step.event async for step in client.transfer.push(registry, name=BUSYBOX)]
    assert done[-1].startswith("Completed push")
    done = [step.event async for step in client.transfer.pull(registry)]
    assert done[-1].startswith("Completed pull")
    assert asked == [locked_registry, locked_registry]


async def test_a_lookup_that_fails_or_finds_nothing(client: Client, locked_registry: str) -> None:
    def fail(host: str) -> Credential:
        raise PermissionDenied("the helper is broken")

    name = f"{locked_registry}/none:1"
    with pytest.raises(PermissionDenied, match="the helper is broken"):
        [step async for step in client.transfer.pull(Registry(name, scheme="http", credentials=fail))]
    with pytest.raises(Unauthenticated):
        [step async for step in client.transfer.pull(Registry(name, scheme="http", credentials=lambda host: None))]


async def test_copies_inspections_and_tags(client: Client, locked_registry: str, registry: str) -> None:
    """Two registries in one call, each of which asks for its own user."""
    source, target = f"{locked_registry}/source/box:1", f"{registry}/target/box:2"
    asked: list[str] = []

    def lookup(host: str) -> Credential | None:
        asked.append(host)
        return Credential(USER, PASSWORD) if host == locked_registry else None

    old, new = (Registry(name, scheme="http", credentials=lookup) for name in (source, target))
    [step async for step in client.transfer.push(old, name=BUSYBOX)]
    steps = [step async for step in client.transfer.copy(old, new)]
    assert steps[-1].event.startswith("Completed copy")
    assert set(asked) == {locked_registry}
    root, config = await client.registries.inspect(new)
    assert root.value["config"]["digest"] == config.target.digest
    assert root == (await client.registries.inspect(old))[0]
    assert await client.registries.tags(new._replace(reference=f"{registry}/target/box")) == ["2"]
    with pytest.raises(NotFound):
        await client.registries.tags(new._replace(reference=f"{registry}/target/none"))


async def test_an_identity_token_is_traded_for_a_token(
    daemon: Wherryd, tokens: tuple[str, Tokens], tmp_path: Path
) -> None:
    """What `docker login` to a registry with OAuth2 leaves, through the daemon, at a real registry."""
    address, server = tokens
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"auths": {address: {"identitytoken": "fresh"}}}))
    registry = Registry(f"{address}/private/box:1", scheme="http", credentials=from_docker_config(str(config)))
    client = Client.over(GrpcTransport(daemon.address))
    try:
        [step async for step in client.transfer.push(registry, name=BUSYBOX)]
        [step async for step in client.transfer.pull(registry)]
    finally:
        await client.close()
    assert {method for method, _ in server.asked} == {"POST"}
