"""Both daemons, one of each for all tests here: the client must not notice which one it drives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests import busybox
from tests.containerd import Containerd
from tests.peers import need
from tests.wherryd import Wherryd
from wherry.client import Client, connect
from wherry.client.archive import load
from wherry.client.manifests import picture
from wherry.client.unpack import unpack

IMAGE = busybox.NAME
NAMESPACE = "client-tests"


async def _import(address: str, archive: Path) -> None:
    async with await connect(address, namespace=NAMESPACE) as client:
        with archive.open("rb") as file:
            for image in await load(client, file):
                await unpack(client, await picture(client.content, image.target), "overlayfs")


@pytest.fixture(scope="session", params=["wherryd", "containerd"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The socket of a daemon that has busybox."""
    need("busybox")
    daemon = Wherryd() if request.param == "wherryd" else Containerd()
    try:
        daemon.start()
        archive = tmp_path_factory.mktemp("image") / "busybox.tar"
        busybox.write_archive(archive)
        asyncio.run(_import(daemon.address, archive))
        yield daemon.address
    finally:
        daemon.close()


@pytest.fixture
def ours(request: pytest.FixtureRequest, address: str) -> bool:
    """Whether it is wherryd that is driven, not the reference."""
    return bool(request.node.callspec.params["address"] == "wherryd")


@pytest_asyncio.fixture
async def client(address: str) -> AsyncIterator[Client]:
    """A client over gRPC."""
    async with await connect(address, namespace=NAMESPACE, timeout=30) as connected:
        yield connected
