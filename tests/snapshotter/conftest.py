from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from wherry.linux.mounts import mountinfo
from wherry.snapshotter.applier import Applier
from wherry.snapshotter.overlayfs import OverlaySnapshotter


@pytest.fixture
async def applier() -> AsyncIterator[Applier]:
    made = Applier()
    yield made
    await made.close()


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[OverlaySnapshotter]:
    made = OverlaySnapshotter(str(tmp_path / "root"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_stays_mounted(tmp_path: Path) -> Iterator[None]:
    yield
    left = [info.target for info in mountinfo() if info.target.startswith(str(tmp_path))]
    assert left == []
