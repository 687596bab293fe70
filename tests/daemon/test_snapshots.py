"""Snapshots for tenants, over the real snapshotters."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from tests.daemon.stores import NS, Stores, call, stores
from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from wherry.daemon.snapshot_records import Scope, begin_commit
from wherry.proto import snapshots_pb2 as pb
from wherry.snapshotter import interface

BOTH = pytest.mark.parametrize("name", ["overlayfs", "native"])


async def layer(all_: Stores, snapshotter: str, name: str, parent: str = "", namespace: str = NS) -> None:
    await all_.snapshots.prepare(namespace, snapshotter, f"prepare {name}", parent)
    await all_.snapshots.commit(namespace, snapshotter, name, f"prepare {name}")


async def directories(root: Path, snapshotter: str, expected: int) -> int:
    """How many snapshots' directories there are, given a moment to become as many as expected."""
    for _ in range(100):
        if len(os.listdir(root / "snapshotter" / snapshotter / "snapshots")) == expected:
            break
        await asyncio.sleep(0.01)
    return len(os.listdir(root / "snapshotter" / snapshotter / "snapshots"))


@BOTH
async def test_the_life_of_a_snapshot(tmp_path: Path, name: str) -> None:
    async with stores(tmp_path) as all_:
        service = all_.snapshot_service
        request = pb.PrepareSnapshotRequest(snapshotter=name, key="k1", labels={"a": "b", "empty": ""})
        mounts = (await service.prepare(request, call())).mounts
        assert mounts[0].type == "bind"
        assert os.listdir(mounts[0].source) == []
        again = (await service.mounts(pb.MountsRequest(snapshotter=name, key="k1"), call())).mounts
        assert list(again) == list(mounts)
        stat = (await service.stat(pb.StatSnapshotRequest(snapshotter=name, key="k1"), call())).info
        assert (stat.name, stat.parent, stat.kind, dict(stat.labels)) == ("k1", "", pb.ACTIVE, {"a": "b"})
        assert stat.created_at.seconds
        (Path(mounts[0].source) / "file").write_bytes(b"x" * 5000)
        usage = await service.usage(pb.UsageRequest(snapshotter=name, key="k1"), call())
        assert usage.size >= 5000
        assert usage.inodes >= 2

        commit = pb.CommitSnapshotRequest(snapshotter=name, name="layer", key="k1", labels={"c": "d"})
        await service.commit(commit, call())
        stat = (await service.stat(pb.StatSnapshotRequest(snapshotter=name, key="layer"), call())).info
        assert (stat.kind, dict(stat.labels)) == (pb.COMMITTED, {"c": "d"})
        with pytest.raises(NotFound, match="snapshot k1 does not exist: not found"):
            await service.stat(pb.StatSnapshotRequest(snapshotter=name, key="k1"), call())

        await service.prepare(pb.PrepareSnapshotRequest(snapshotter=name, key="k2", parent="layer"), call())
        await service.view(pb.ViewSnapshotRequest(snapshotter=name, key="v", parent="layer"), call())
        listed = [block async for block in service.list(pb.ListSnapshotsRequest(snapshotter=name), call())]
        assert [(info.name, info.parent, info.kind) for info in listed[0].info] == [
            ("k2", "layer", pb.ACTIVE),
            ("layer", "", pb.COMMITTED),
            ("v", "layer", pb.VIEW),
        ]
        found = await all_.snapshots.list(NS, name, ["kind==view", 'labels.c=="d"'])
        assert [info.name for info in found] == ["layer", "v"]
        with pytest.raises(FailedPrecondition, match="cannot remove snapshot with child: failed precondition"):
            await service.remove(pb.RemoveSnapshotRequest(snapshotter=name, key="layer"), call())
        for key in ("k2", "v", "layer"):
            await service.remove(pb.RemoveSnapshotRequest(snapshotter=name, key=key), call())
        await service.cleanup(pb.CleanupRequest(snapshotter=name), call())
        assert await directories(tmp_path, name, 0) == 0
        assert (
            all_.topics() == ["/snapshot/prepare", "/snapshot/commit", "/snapshot/prepare"] + ["/snapshot/remove"] * 3
        )


@BOTH
async def test_tenants_do_not_see_each_other(tmp_path: Path, name: str) -> None:
    async with stores(tmp_path) as all_:
        await layer(all_, name, "layer")
        for missing in (
            all_.snapshots.stat("other", name, "layer"),
            all_.snapshots.remove("other", name, "layer"),
            all_.snapshots.prepare("other", name, "k", "layer"),
            all_.snapshots.usage("other", name, "layer"),
        ):
            with pytest.raises(NotFound, match="snapshot layer does not exist: not found"):
                await missing
        # the same names are free to others
        await layer(all_, name, "layer", namespace="other")
        assert len(await all_.snapshots.list("other", name)) == 1
        await all_.snapshots.remove(NS, name, "layer")
        await all_.snapshots.drain()
        assert (await all_.snapshots.stat("other", name, "layer")).kind == pb.COMMITTED


async def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await layer(all_, "native", "layer")
        await all_.snapshots.prepare(NS, "native", "k", "layer")
        with pytest.raises(AlreadyExists, match='snapshot "k": already exists'):
            await all_.snapshots.prepare(NS, "native", "k", "layer")
        with pytest.raises(AlreadyExists, match='snapshot "layer": already exists'):
            await all_.snapshots.commit(NS, "native", "layer", "k")
        assert (await all_.snapshots.stat(NS, "native", "k")).kind == pb.ACTIVE
        # nor by two at once, and the one that came second leaves nothing
        results = await asyncio.gather(
            *(all_.snapshots.prepare(NS, "native", "same", "layer") for _ in range(5)), return_exceptions=True
        )
        assert sum(isinstance(result, AlreadyExists) for result in results) == 4
        await all_.snapshots.cleanup("native")
        assert await directories(tmp_path, "native", 3) == 3


async def test_a_key_can_be_used_again_at_once(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await layer(all_, "overlayfs", "layer")
        for _ in range(20):
            mounts = await all_.snapshots.prepare(NS, "overlayfs", "k", "layer")
            upper = next(option for option in mounts[0].options if option.startswith("upperdir="))
            assert os.listdir(upper.partition("=")[2]) == []
            await all_.snapshots.remove(NS, "overlayfs", "k")


@BOTH
async def test_what_can_not_be_committed(tmp_path: Path, name: str) -> None:
    async with stores(tmp_path) as all_:
        await layer(all_, name, "layer")
        await all_.snapshots.view(NS, name, "v", "layer")
        with pytest.raises(FailedPrecondition):
            await all_.snapshots.commit(NS, name, "n", "v")
        with pytest.raises(FailedPrecondition):
            await all_.snapshots.commit(NS, name, "n", "layer")
        with pytest.raises(NotFound, match="snapshot none does not exist"):
            await all_.snapshots.commit(NS, name, "n", "none")
        with pytest.raises(InvalidArgument, match='parent "v" is not committed snapshot: invalid argument'):
            await all_.snapshots.prepare(NS, name, "k", "v")
        with pytest.raises(FailedPrecondition) as error:
            await all_.snapshots.mounts(NS, name, "layer")
        assert error.value.message == "requested snapshot layer not active nor view: failed precondition"
        assert [info.name for info in await all_.snapshots.list(NS, name)] == ["layer", "v"]


async def test_a_layer_that_was_unpacked_alone_is_set_on_its_parent(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await layer(all_, "overlayfs", "below")
        await all_.snapshots.prepare(NS, "overlayfs", "k")
        await all_.snapshots.commit(NS, "overlayfs", "above", "k", parent="below")
        assert (await all_.snapshots.stat(NS, "overlayfs", "above")).parent == "below"
        mounts = await all_.snapshots.prepare(NS, "overlayfs", "k", "above")
        lower = next(option for option in mounts[0].options if option.startswith("lowerdir="))
        assert lower.count(":") == 1
        with pytest.raises(FailedPrecondition):
            await all_.snapshots.remove(NS, "overlayfs", "below")


async def test_labels_by_mask(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await all_.snapshots.prepare(NS, "native", "k", labels={"a": "1", "containerd.io/snapshot/x": "2"})

        async def update(labels: dict[str, str], *paths: str) -> dict[str, str]:
            request = pb.UpdateSnapshotRequest(
                snapshotter="native", info=pb.Info(name="k", labels=labels), update_mask=FieldMask(paths=paths)
            )
            return dict((await all_.snapshot_service.update(request, call())).info.labels)

        assert await update({"b": "3"}, "labels.a", "labels.b") == {"b": "3", "containerd.io/snapshot/x": "2"}
        assert await update({"c": "4"}, "labels") == {"c": "4"}
        assert dict((await all_.snapshots.stat(NS, "native", "k")).labels) == {"c": "4"}
        with pytest.raises(InvalidArgument, match='cannot update "parent" field on snapshot "k"'):
            await update({}, "parent")
        with pytest.raises(NotFound):
            await all_.snapshots.update(NS, "native", pb.Info(name="none"))


async def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        service = all_.snapshot_service
        with pytest.raises(InvalidArgument, match="snapshotter argument missing"):
            await service.prepare(pb.PrepareSnapshotRequest(key="k"), call())
        with pytest.raises(InvalidArgument, match="snapshotter not loaded: zfs"):
            await service.prepare(pb.PrepareSnapshotRequest(key="k", snapshotter="zfs"), call())
        with pytest.raises(InvalidArgument, match="snapshot key must not be empty"):
            await service.prepare(pb.PrepareSnapshotRequest(snapshotter="native"), call())
        with pytest.raises(NotFound, match="parent snapshot p does not exist: not found"):
            await service.prepare(pb.PrepareSnapshotRequest(snapshotter="native", key="k", parent="p"), call())
        with pytest.raises(FailedPrecondition, match="namespace is required"):
            await service.prepare(pb.PrepareSnapshotRequest(snapshotter="native", key="k"), call(None))
        with pytest.raises(InvalidArgument):
            await service.prepare(pb.PrepareSnapshotRequest(snapshotter="native", key="k"), call("../x"))
        assert await all_.snapshots.list(NS, "native") == []


@pytest.mark.parametrize("key", ["../../x", "a/b", "x" * 300, "\n"])
async def test_a_key_is_any_text_and_no_path(tmp_path: Path, key: str) -> None:
    async with stores(tmp_path) as all_:
        mounts = await all_.snapshots.prepare(NS, "native", key)
        assert (
            Path(mounts[0].source).parent.parent == tmp_path / "snapshotter" / "native" / "snapshots"
            or Path(mounts[0].source).parent == tmp_path / "snapshotter" / "native" / "snapshots"
        )
        assert (await all_.snapshots.stat(NS, "native", key)).name == key


async def test_the_start_removes_what_has_no_record(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await layer(all_, "native", "layer")
        # as if killed between the snapshotter and the record
        backend = all_.snapshots._snapshotters["native"]  # the one that the store drives
        backend.prepare("default/1/orphan", "", {})
    async with stores(tmp_path) as all_:
        await all_.snapshots.drain()
        names = {info.name for info in all_.snapshots._snapshotters["native"].walk()}
        assert len(names) == 1
        assert (await all_.snapshots.stat(NS, "native", "layer")).kind == pb.COMMITTED


@pytest.mark.parametrize("done", [True, False])
async def test_a_commit_that_was_cut_in_two_is_finished_or_taken_back(tmp_path: Path, done: bool) -> None:
    async with stores(tmp_path) as all_:
        mounts = await all_.snapshots.prepare(NS, "native", "k")
        (Path(mounts[0].source) / "precious").write_text("data")
        info = pb.Info(name="layer", kind=pb.COMMITTED)
        scope = Scope(NS, "native")
        record, _ = await all_.metadata.write(
            lambda db: begin_commit(db, scope, info, key="k", backend="default/2/layer", parent="")
        )
        if done:
            all_.snapshots._snapshotters["native"].commit("default/2/layer", record.backend, {})
        assert [each.name for each in await all_.snapshots.list(NS, "native")] == ([] if done else ["k"])
    async with stores(tmp_path) as all_:
        await all_.snapshots.drain()
        [left] = await all_.snapshots.list(NS, "native")
        assert (left.name, left.kind) == (("layer", pb.COMMITTED) if done else ("k", pb.ACTIVE))
        if done:
            mounts = await all_.snapshots.view(NS, "native", "v", "layer")
        else:
            mounts = await all_.snapshots.mounts(NS, "native", "k")
        assert (Path(mounts[0].source) / "precious").read_text() == "data"


async def test_a_snapshotter_that_has_the_layer_itself(tmp_path: Path) -> None:
    """Remote snapshotters answer AlreadyExists to a prepare for a layer that they fetched (snapshot.ref)."""

    class Remote:
        def __init__(self, inner: interface.Snapshotter) -> None:
            self.inner = inner

        def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
            return getattr(self.inner, name)

        def prepare(self, key, parent="", labels=None):  # type: ignore[no-untyped-def]
            target = (labels or {}).get("containerd.io/snapshot.ref")
            if target is None:
                return self.inner.prepare(key, parent, labels)
            self.inner.prepare(key, parent, labels)
            self.inner.commit(f"remote/{target}", key, labels)
            raise AlreadyExists("fetched: already exists")

    async with stores(tmp_path) as all_:
        all_.snapshots._snapshotters["native"] = Remote(all_.snapshots._snapshotters["native"])
        with pytest.raises(AlreadyExists):
            await all_.snapshots.prepare(NS, "native", "k", labels={"containerd.io/snapshot.ref": "sha256:chain"})
        stat = await all_.snapshots.stat(NS, "native", "sha256:chain")
        assert stat.kind == pb.COMMITTED
        await all_.snapshots.prepare(NS, "native", "k", "sha256:chain")


async def test_a_caller_that_goes_away_leaves_nothing_half_made(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await layer(all_, "native", "layer")
        for number in range(20):
            making = asyncio.create_task(all_.snapshots.prepare(NS, "native", f"k{number}", "layer"))
            await asyncio.sleep(number * 0.0001)
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)
        await asyncio.gather(*all_.snapshots._tasks, return_exceptions=True)
        records = {info.name for info in await all_.snapshots.list(NS, "native")}
        backends = {info.name.split("/", 2)[2] for info in all_.snapshots._snapshotters["native"].walk()}
        assert records == backends
