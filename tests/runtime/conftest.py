"""`runtime` is each of the runtimes in turn, `bundle` a folder to write config.json in."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import need
from tests.rootfs import build_busybox_rootfs
from tests.runtime.bundles import Bundle, Runtime, wherry


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if "tests/runtime" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="making containers takes root"))


@pytest.fixture(scope="session")
def rootfs() -> Iterator[str]:
    """Outside of pytest's folders, which only root may enter: the root of a user namespace is somebody else."""
    need("busybox")
    folder = tempfile.mkdtemp(prefix="wherry-rootfs-")
    yield build_busybox_rootfs(folder)
    shutil.rmtree(folder)


@pytest.fixture
def bundle(tmp_path: Path, rootfs: str) -> Bundle:
    folder = tmp_path / "bundle"
    folder.mkdir()
    return Bundle(folder, rootfs)


@pytest.fixture
def own_bundle(tmp_path: Path) -> Bundle:
    """With a rootfs that the test may change."""
    need("busybox")
    folder = tmp_path / "bundle"
    folder.mkdir()
    return Bundle(folder, build_busybox_rootfs(folder / "rootfs"))


@pytest.fixture(params=["wherry-runtime", "runc"])
def runtime(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Runtime]:
    """Both: a test that the reference fails is wrong."""
    if request.param == "runc":
        made = Runtime("runc", [need("runc")], tmp_path / "state")
    else:
        made = wherry(tmp_path / "state")
    yield made
    made.clean()


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[Runtime]:
    """For what runc 1.1 can't do, or does otherwise."""
    made = wherry(tmp_path / "state")
    yield made
    made.clean()
