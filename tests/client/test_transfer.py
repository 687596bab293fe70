"""Transfers by the client: the daemon asks who the user is, over each kind of connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.registry.conftest import PASSWORD, USER, locked_registry
from tests.wherryd import BUSYBOX, Wherryd
from wherry.client.api import Client
from wherry.client.grpc_async import GrpcTransport
from wherry.client.grpc_blocking import BlockingGrpcTransport
from wherry.client.transfer import Registry
from wherry.client.transport import Transport
from wherry.client.ttrpc_blocking import BlockingTtrpcTransport
from wherry.core.credentials import Credential
from wherry.core.errors import PermissionDenied, Unauthenticated

__all__ = ["locked_registry"]


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
