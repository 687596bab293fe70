"""Each implementation through the conformance suite, and what only it does."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.snapshotter.suite import SnapshotterSuite, layer, write
from tests.snapshotter.trees import mounted
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from wherry.linux.mounts import Mount
from wherry.proto.grpc.server import GrpcServer
from wherry.snapshotter.interface import Kind, Snapshotter
from wherry.snapshotter.native import NativeSnapshotter
from wherry.snapshotter.overlayfs import UPPERDIR_LABEL, OverlaySnapshotter
from wherry.snapshotter.proxy import ProxySnapshotter
from wherry.snapshotter.service import SnapshotterService


class TestOverlay(SnapshotterSuite):
    @pytest.fixture
    def snapshotter(self, tmp_path: Path) -> Iterator[Snapshotter]:
        made = OverlaySnapshotter(str(tmp_path / "root"))
        yield made
        made.close()


class TestOverlayWithOptions(SnapshotterSuite):
    """Each option that changes how it works, by itself; `upperdir_label` changes what it shows and has its own test."""

    @pytest.fixture(
        params=[
            {"mount_options": ["xino=off", "metacopy=off"], "async_remove": True},
            {"sync_remove": True},
            {"slow_chown": True},
        ],
        ids="+".join,
    )
    def snapshotter(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Snapshotter]:
        made = OverlaySnapshotter(str(tmp_path / "root"), **request.param)
        yield made
        made.close()


class TestNative(SnapshotterSuite):
    @pytest.fixture(params=[{}, {"async_remove": True}, {"sync_remove": True}], ids="+".join)
    def snapshotter(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Snapshotter]:
        made = NativeSnapshotter(str(tmp_path / "root"), **request.param)
        yield made
        made.close()

    def test_a_copy_is_not_set_on_a_parent(self, snapshotter: Snapshotter) -> None:
        snapshotter.prepare("k")
        snapshotter.commit("base", "k")
        snapshotter.prepare("k")
        with pytest.raises(Unimplemented):
            snapshotter.commit("top", "k", parent="base")
        assert snapshotter.stat("k").kind is Kind.ACTIVE


class TestServed(SnapshotterSuite):
    """The same over a socket: what serves one to others, and what uses others' (proxy plugins)."""

    @pytest.fixture(params=[OverlaySnapshotter, NativeSnapshotter], ids=["overlayfs", "native"])
    def snapshotter(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Snapshotter]:
        address = str(tmp_path / "s.sock")
        with served(request.param(str(tmp_path / "root")), address):
            proxy = Proxy(address, "test")
            proxy.root = str(tmp_path / "root")
            yield proxy
            proxy.close()


class Proxy(ProxySnapshotter):
    root: str


@contextmanager
def served(snapshotter: Snapshotter, address: str) -> Iterator[None]:
    """Serve it from a thread of this process."""
    loop = asyncio.new_event_loop()
    service = SnapshotterService(snapshotter)
    server = GrpcServer([service])
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Coroutine[object, object, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(30)

    run(server.serve_unix(address))
    try:
        yield
    finally:
        run(server.stop(0))
        run(service.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def empties(directory: Path) -> bool:
    """Whether it is empty soon."""
    for _ in range(300):
        if not os.listdir(directory):
            return True
        time.sleep(0.01)
    return False


def test_overlay_mounts_are_containerds(overlay: OverlaySnapshotter, tmp_path: Path) -> None:
    base = f"{tmp_path}/root/snapshots"
    assert overlay.prepare("a") == [Mount("bind", f"{base}/1/fs", options=("rw", "rbind"))]
    overlay.commit("one", "a")
    assert overlay.view("v", "one") == [Mount("bind", f"{base}/1/fs", options=("ro", "rbind"))]
    (mount,) = overlay.prepare("b", "one")
    expected = (f"workdir={base}/3/work", f"upperdir={base}/3/fs", f"lowerdir={base}/1/fs")
    assert (mount.type, mount.source) == ("overlay", "overlay")
    assert tuple(option for option in mount.options if option != "index=off") == expected
    overlay.commit("two", "b")
    (mount,) = overlay.view("w", "two")
    assert tuple(o for o in mount.options if o != "index=off") == (f"lowerdir={base}/3/fs:{base}/1/fs",)
    assert overlay.mounts("w") == [mount]


def test_a_layer_prepared_alone_is_set_on_its_parent_at_the_commit(overlay: OverlaySnapshotter, tmp_path: Path) -> None:
    layer(overlay, tmp_path / "m", "one", "", write("a", "1"))
    with mounted(overlay.prepare("k"), tmp_path / "m") as tree:
        (tree / "b").write_text("2")
    overlay.commit("two", "k", parent="one")
    assert overlay.stat("two").parent == "one"
    with mounted(overlay.view("v", "two"), tmp_path / "v") as tree:
        assert sorted(os.listdir(tree)) == ["a", "b"]
    with pytest.raises(FailedPrecondition):
        overlay.remove("one")
    overlay.prepare("x", "one")
    with pytest.raises(InvalidArgument, match="cannot change parent"):
        overlay.commit("never", "x", parent="two")
    overlay.prepare("y")
    with pytest.raises(NotFound):
        overlay.commit("never", "y", parent="missing")
    overlay.commit("three", "x", parent="one")


def test_upperdir_label(tmp_path: Path) -> None:
    overlay = OverlaySnapshotter(str(tmp_path / "root"), upperdir_label=True)
    overlay.prepare("k", labels={"a": "1"})
    upper = f"{tmp_path}/root/snapshots/1/fs"
    assert dict(overlay.stat("k").labels) == {"a": "1", UPPERDIR_LABEL: upper}
    assert [info.labels[UPPERDIR_LABEL] for info in overlay.walk()] == [upper]
    overlay.close()


def test_removed_files_go_without_being_waited_for(overlay: OverlaySnapshotter, tmp_path: Path) -> None:
    with mounted(overlay.prepare("k"), tmp_path / "m") as tree:
        for number in range(1200):
            (tree / f"{number}").touch()
    overlay.prepare("small")
    for key in ("k", "small"):
        overlay.remove(key)
    assert empties(tmp_path / "root" / "snapshots")


def test_what_a_stop_left_is_deleted_at_the_next_start(tmp_path: Path) -> None:
    lazy = OverlaySnapshotter(str(tmp_path / "root"), async_remove=True)
    lazy.prepare("k")
    lazy.remove("k")
    lazy.close()
    assert os.listdir(tmp_path / "root" / "snapshots") == ["1"]
    overlay = OverlaySnapshotter(str(tmp_path / "root"))
    assert empties(tmp_path / "root" / "snapshots")
    overlay.close()


def test_a_busy_mount_in_a_removed_snapshot_is_detached(overlay: OverlaySnapshotter, tmp_path: Path) -> None:
    overlay.prepare("k")
    inside = tmp_path / "root" / "snapshots" / "1" / "fs" / "proc"
    inside.mkdir()
    Mount("tmpfs", "tmpfs").mount(str(inside))
    overlay.remove("k")
    assert empties(tmp_path / "root" / "snapshots")


def test_overlay_refuses_a_path_that_its_options_cannot_spell(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="comma"):
        OverlaySnapshotter(str(tmp_path / "a,b"))


def test_overlay_says_where_it_does_not_work(tmp_path: Path) -> None:
    """An overlay's own tree can't hold upper directories."""
    for name in ("l", "u", "w"):
        (tmp_path / name).mkdir()
    options = (f"lowerdir={tmp_path}/l", f"upperdir={tmp_path}/u", f"workdir={tmp_path}/w")
    with (
        mounted([Mount("overlay", "overlay", options=options)], tmp_path / "m") as tree,
        pytest.raises(FailedPrecondition, match="overlayfs doesn't work below"),
    ):
        OverlaySnapshotter(str(tree / "root"))


_CRASH = """
import os, sys
from wherry.snapshotter.overlayfs import OverlaySnapshotter
s = OverlaySnapshotter(sys.argv[1])
for n in range(100000):
    s.prepare(f"k{n}")
    if n % 3 == 0:
        s.commit(f"n{n}", f"k{n}")
    elif n % 3 == 1:
        s.remove(f"k{n}")
    if n == 30:
        print("going", flush=True)
"""


def test_after_a_kill_every_record_has_its_directory(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with subprocess.Popen([sys.executable, "-c", _CRASH, str(root)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"going\n"
        time.sleep(0.05)
        process.kill()
    overlay = OverlaySnapshotter(str(root))
    infos = list(overlay.walk())
    assert len(infos) > 20
    overlay.cleanup()
    assert len(os.listdir(root / "snapshots")) == len(infos)
    for info in infos:
        overlay.usage(info.name)
        if info.kind is Kind.ACTIVE:
            with mounted(overlay.mounts(info.name), tmp_path / "m") as tree:
                assert os.listdir(tree) == []
    overlay.close()


def test_a_reopened_snapshotter_has_everything_and_uses_no_number_twice(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    overlay = OverlaySnapshotter(root)
    layer(overlay, tmp_path / "m", "one", "", write("a", "1"))
    overlay.prepare("last")
    overlay.remove("last")
    overlay.close()
    overlay = OverlaySnapshotter(root)
    assert overlay.prepare("k") == [Mount("bind", f"{root}/snapshots/3/fs", options=("rw", "rbind"))]
    with mounted(overlay.view("v", "one"), tmp_path / "v") as tree:
        assert (tree / "a").read_text() == "1"
    overlay.close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    OverlaySnapshotter(str(root)).close()
    db = sqlite3.connect(root / "metadata.db")
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(FailedPrecondition, match="schema 99"):
        OverlaySnapshotter(str(root))


def test_a_checkpoint_opens_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite keeps the descriptor of a connection that is closed while another one has locks: one more after the first
    checkpoint, which looked like a leak."""
    monkeypatch.setattr("wherry.snapshotter.metadata.CHECKPOINT_BYTES", 1)
    made = OverlaySnapshotter(str(tmp_path / "root"))
    try:
        made.prepare("one", "")
        made.remove("one")
        deadline = time.monotonic() + 20
        while any("/snapshots/" in name for name in _open_below(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.01)  # a thread removes it, by its descriptor
        before = _open_below(tmp_path)
        for _ in range(3):
            made._metadata.checkpoint()
        assert _open_below(tmp_path) == before
    finally:
        made.close()


def _open_below(folder: Path) -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if name.startswith(str(folder)))
