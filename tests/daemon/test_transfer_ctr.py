"""`ctr` of two generations moves images through wherryd: by its own hands, and by the transfer service."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.daemon.transfer_rig import make_image, publish, tar
from tests.peers import need
from tests.registry.conftest import registry
from tests.sid import need_sid
from tests.wherryd import Wherryd

__all__ = ["registry"]
LAYERS = [tar({"etc/a": b"one"}), tar({"etc/b": b"two"})]


class Ctr:
    """One `ctr` on one daemon."""

    def __init__(self, binary: str, wherryd: Wherryd) -> None:
        self._command = [binary, "-a", wherryd.address]

    def __call__(self, *args: str, fails: bool = False) -> str:
        result = subprocess.run([*self._command, *args], capture_output=True, text=True, timeout=60)
        assert (result.returncode != 0) == fails, result.stdout + result.stderr
        return result.stderr if fails else result.stdout

    def images(self) -> list[str]:
        return self("images", "ls", "-q").split()


@pytest.fixture(params=["transfer", "local", "bookworm"])
def way(request: pytest.FixtureRequest, wherryd: Wherryd) -> tuple[Ctr, list[str]]:
    """A `ctr` and the option that says how it works."""
    if request.param == "bookworm":
        return Ctr(need("ctr"), wherryd), []
    return Ctr(need_sid(), wherryd), ["--local"] if request.param == "local" else []


def test_images_come_and_go(way: tuple[Ctr, list[str]], registry: str, tmp_path: Path) -> None:
    import asyncio  # noqa: PLC0415 - the daemon is another process, this test is not a coroutine

    ctr, option = way
    ref = f"{registry}/ctr/image:v1"
    asyncio.run(publish(make_image(LAYERS), ref))
    ctr("images", "pull", *option, "--plain-http", ref)
    assert ctr.images() == [ref]
    assert "complete (3/3)" in ctr("images", "check")
    assert ctr("snapshots", "ls").count("Committed") == 2
    ctr("images", "tag", ref, "other/name:v2")
    archive = str(tmp_path / "image.tar")
    ctr("images", "export", *option, archive, ref)
    ctr("images", "rm", "--sync", ref, "other/name:v2")
    assert ctr.images() == []
    assert ctr("content", "ls", "-q") == ""
    assert "sha256" not in ctr("snapshots", "ls")
    ctr("images", "import", *option, archive)
    assert ctr.images() == [ref]
    pushed = f"{registry}/ctr/pushed:v1"
    ctr("images", "push", *option, "--plain-http", pushed, ref)
    ctr("images", "pull", *option, "--plain-http", pushed)
    assert ctr.images() == sorted([ref, pushed])
    absent = ctr("images", "pull", *option, "--plain-http", f"{registry}/ctr/absent:v1", fails=True)
    assert "not found" in absent
    assert len(ctr("leases", "ls").splitlines()) == 1
