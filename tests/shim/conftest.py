"""A busybox root for all tests of shims, and a lab for each."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests import leftovers
from tests.peers import need
from tests.rootfs import build_busybox_rootfs
from tests.shim.harness import Lab, lab_at
from wherry.shim import client

if _seconds := os.environ.get("WHERRY_TESTS_START_SECONDS"):
    # an emulated machine takes as long to walk a shim's ways as it takes; on a busy host more than a daemon waits
    vars(client)["SPAWN_TIMEOUT"] = float(_seconds)


@pytest.fixture(scope="session")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A busybox root filesystem, shared and only read."""
    need("busybox")
    return Path(build_busybox_rootfs(tmp_path_factory.mktemp("shim") / "rootfs"))


@pytest.fixture
def work() -> Iterator[Path]:
    """A short path: sockets are in it."""
    path = Path(tempfile.mkdtemp(prefix="wherry-shim-"))
    yield path
    leftovers.end(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(params=["runc", "bundled"])
async def lab(request: pytest.FixtureRequest, work: Path, rootfs: Path) -> AsyncIterator[Lab]:
    """Shims on each runtime."""
    binary = "" if request.param == "bundled" else need(request.param)
    async with lab_at(work, rootfs, binary) as lab:
        yield lab
