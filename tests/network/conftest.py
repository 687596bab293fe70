"""A wherryd whose networks are out of the way of everybody else's, and what it did to the host undone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import busybox, networks
from tests.cli.conftest import Wherry
from tests.peers import need
from tests.wherryd import Wherryd

CONFIG = '[network]\npools = ["10.247.0.0/16/24"]\n'
# seconds for a start: in a virtual machine that is emulated everything takes ten times its time
START = 120.0
_FORWARDING = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")


def _settings() -> dict[Path, str]:
    paths = [Path("/proc/sys", name) for name in _FORWARDING]
    paths += Path("/proc/sys/net/ipv6/conf").glob("*/accept_ra")
    return {path: path.read_text() for path in paths if path.exists()}


@pytest.fixture(scope="session", autouse=True)
def host() -> Iterator[None]:
    """The host's settings are afterwards as they were."""
    before = _settings()
    yield
    for path, value in before.items():
        if path.exists() and path.read_text() != value:
            path.write_text(value)


def make_daemon(**options: object) -> Wherryd:
    """A daemon that isn't started yet."""
    if os.geteuid() != 0:
        pytest.skip("networks take root")
    need("busybox")
    need("nft")
    return Wherryd(config=CONFIG, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def daemon() -> Iterator[Wherryd]:
    """A daemon with an image, for the tests that leave it alone."""
    daemon = make_daemon()
    try:
        daemon.start(START)
        import_image(daemon)
        yield daemon
    finally:
        daemon.close()
        assert networks.left(daemon.state) == []


def import_image(daemon: Wherryd, name: str = busybox.NAME, exposed: tuple[str, ...] = ()) -> None:
    """Imports busybox with our own command: these tests run where no ctr is, too (tests/vm)."""
    archive = daemon.folder / "image.tar"
    busybox.write_archive(archive, name=name, exposed=exposed)
    Wherry(daemon.address).run("images", "import", str(archive))


def clear(wherry: Wherry) -> None:
    """Removes containers and networks."""
    if names := wherry.run("ps", "-aq").stdout.split():
        wherry.run("rm", "-f", *names)
    wherry.run("network", "prune", "-f")


@pytest.fixture
def wherry(daemon: Wherryd) -> Iterator[Wherry]:
    """The command; afterwards there are no containers and no named networks."""
    wherry = Wherry(daemon.address)
    try:
        yield wherry
    finally:
        clear(wherry)
