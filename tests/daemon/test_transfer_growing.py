"""Layers that are extracted while they are downloaded."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.test_gc_service import Registry, kept, slow_registry, wait_for, wherry
from tests.daemon.transfer_rig import tar
from tests.snapshotter.archives import PLAIN, Archive
from tests.snapshotter.test_apply import bind
from tests.wherryd import Wherryd
from wherry.core.errors import Unavailable, WherryError
from wherry.daemon.transfer_growing import Growing
from wherry.snapshotter.applier import Applier


def files(wherryd: Wherryd) -> list[str]:
    """What stands in the snapshots."""
    return [path.name for path in (wherryd.root / "snapshotter" / "overlayfs").glob("snapshots/*/fs/part/*")]


@pytest.fixture
def large() -> Iterator[str]:
    """An image whose one large layer stays half-way; its reference."""
    chance = random.Random(7)
    layer = tar({f"part/file{number:03}": chance.randbytes(100_000) for number in range(100)})
    with slow_registry(layer) as ref:
        yield ref


def test_files_are_there_before_their_layer_is(wherryd: Wherryd, large: str) -> None:
    command = [sys.executable, "-m", "wherry.cli", "--address", wherryd.address, "pull", "--plain-http", large]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as client:
        wait_for(lambda: len(files(wherryd)) > 30)
        assert len(files(wherryd)) < 70
        assert Registry.slow not in wherryd.ctr("content", "ls", "-q").stdout
        Registry.go_on.set()
        assert client.wait(30) == 0
    assert len(files(wherryd)) == 100
    assert "extract" not in wherryd.ctr("snapshots", "ls").stdout


def test_a_layer_that_turns_out_wrong_leaves_nothing(wherryd: Wherryd, large: str) -> None:
    """All of it was extracted when the last byte says that it isn't what it should be."""
    damaged = bytearray(Registry.blobs[Registry.slow])
    damaged[-1] ^= 1  # of the size that gzip states at its end
    Registry.blobs[Registry.slow] = bytes(damaged)
    Registry.go_on.set()
    said = wherry(wherryd, "pull", "--plain-http", large, fails=True)
    assert Registry.slow in said
    assert files(wherryd) == []
    wherry(wherryd, "gc")
    assert kept(wherryd) == []


async def test_the_end_is_where_the_writer_says(tmp_path: Path) -> None:
    data = Archive().file("a", b"1" * 3000).file("b", b"2" * 5000).plain
    applier = Applier()
    for whole in (True, False):
        path = tmp_path / f"data{whole}"
        path.write_bytes(data[:2000])
        growing = Growing(str(path))
        with growing.follow() as (file, signs):
            task = asyncio.create_task(applier.apply(bind(tmp_path / str(whole)), file, PLAIN, follow=signs))
            with path.open("ab") as more:
                more.write(data[2000:6000])
            growing.more(2 << 20)
            wait = asyncio.create_task(asyncio.sleep(0.2))
            await wait
            assert not task.done()
            if whole:
                with path.open("ab") as more:
                    more.write(data[6000:])
            growing.end(whole=whole)
            if whole:
                assert (await task).size == len(data)
            else:
                with pytest.raises(Unavailable, match="given up"):
                    await task
    # one that begins to look when all is over
    with growing.follow() as (file, signs), pytest.raises(WherryError):
        await applier.apply(bind(tmp_path / "late"), file, PLAIN, follow=signs)
    await applier.close()
    assert [fd for fd in os.listdir("/proc/self/fd") if "data" in _target(fd)] == []


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
