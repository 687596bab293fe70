"""The garbage collector: what is kept, what goes, why, and when."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.daemon.stores import NS, Stores, call, container, digest_of, image, stores
from wherry.daemon.gc import Policy
from wherry.proto import content_pb2, images_pb2, leases_pb2

PAST = {"containerd.io/gc.expire": (datetime.now(UTC) - timedelta(hours=1)).isoformat()}
LATER = {"containerd.io/gc.expire": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
REF = "containerd.io/gc.ref.content"


async def blob(all_: Stores, text: str, labels: dict[str, str] | None = None, **options: str) -> str:
    namespace = options.pop("namespace", NS)
    return (await all_.content.put(namespace, f"ref {text}", text.encode(), labels=labels, **options)).digest


async def left(all_: Stores, namespace: str = NS) -> set[str]:
    """The texts of the blobs that are left; their files must be there."""
    found = await all_.content.list(namespace)
    return {all_.blob(info.digest).read_text() for info in found}


async def layer(all_: Stores, name: str, parent: str = "", **labels: str) -> None:
    await all_.snapshots.prepare(NS, "native", f"prepare {name}", parent)
    await all_.snapshots.commit(NS, "native", name, f"prepare {name}", labels)


async def snapshots(all_: Stores) -> set[str]:
    return {info.name for info in await all_.snapshots.list(NS, "native")}


async def pulled(all_: Stores, name: str) -> str:
    """An image with a config and two unpacked layers, labelled as clients label what they pull; its manifest."""
    layers = [await blob(all_, f"{name} layer{n}") for n in range(2)]
    await layer(all_, f"{name} chain0")
    await layer(all_, f"{name} chain1", f"{name} chain0")
    config = await blob(all_, f"{name} config", {"containerd.io/gc.ref.snapshot.native": f"{name} chain1"})
    manifest = await blob(
        all_,
        f"{name} manifest",
        {f"{REF}.config": config, f"{REF}.l.0": layers[0], f"{REF}.l.1": layers[1]},
    )
    await all_.images.create(NS, image(name, manifest))
    return manifest


async def test_an_image_keeps_its_tree_and_takes_it_along(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await pulled(all_, "a")
        await pulled(all_, "b")
        await blob(all_, "garbage")
        stats = await all_.collector.collect()
        assert stats.removed == {"content": 1}
        assert await left(all_) == {f"{n} {what}" for n in "ab" for what in ("layer0", "layer1", "config", "manifest")}
        assert await snapshots(all_) == {"a chain0", "a chain1", "b chain0", "b chain1"}

        await all_.image_service.delete(images_pb2.DeleteImageRequest(name="a", sync=True), call())
        assert await left(all_) == {f"b {what}" for what in ("layer0", "layer1", "config", "manifest")}
        assert await snapshots(all_) == {"b chain0", "b chain1"}
        assert len(os.listdir(tmp_path / "content" / "blobs" / "sha256")) == 4
        assert len(list(all_.snapshots._snapshotters["native"].walk())) == 2
        assert all_.topics().count("/snapshot/remove") == 2


async def test_a_container_keeps_its_snapshot_and_what_its_labels_name(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await layer(all_, "chain")
        await layer(all_, "unused")
        await all_.snapshots.prepare(NS, "native", "root", "chain")
        kept = await blob(all_, "kept")
        await all_.containers.create(
            NS, container("c", snapshotter="native", snapshot_key="root", labels={f"{REF}.x": kept})
        )
        await all_.collector.collect()
        assert await snapshots(all_) == {"root", "chain"}
        assert await left(all_) == {"kept"}
        await all_.containers.delete(NS, "c")
        await all_.collector.collect()
        assert await snapshots(all_) == set()
        assert await left(all_) == set()


async def test_a_lease_keeps_what_it_holds_until_it_is_deleted(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await all_.leases.create(NS, "l", LATER)
        child = await blob(all_, "child")
        await blob(all_, "held", {f"{REF}.0": child}, lease="l")
        await layer(all_, "below")
        await all_.snapshots.prepare(NS, "native", "k", "below", lease="l")
        await blob(all_, "garbage")
        await all_.collector.collect()
        assert await left(all_) == {"held", "child"}
        assert await snapshots(all_) == {"below", "k"}
        await all_.lease_service.delete(leases_pb2.DeleteRequest(id="l", sync=True), call())
        assert await left(all_) == set()
        assert await snapshots(all_) == set()


async def test_a_flat_lease_keeps_only_what_it_names(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await all_.leases.create(NS, "l", {"containerd.io/gc.flat": "1"})
        child = await blob(all_, "child")
        await blob(all_, "held", {f"{REF}.0": child}, lease="l")
        named = await blob(all_, "named by a snapshot")
        await layer(all_, "below")
        await all_.snapshots.prepare(NS, "native", "k", "below", {f"{REF}.0": named}, lease="l")
        target = await blob(all_, "target", {f"{REF}.0": child})
        await all_.images.create(NS, image("i", target))
        await all_.leases.add_resource(NS, "l", "images", "i")
        expiring = all_.images.get(NS, "i")
        expiring.labels.update(PAST)
        await all_.images.update(NS, expiring, ["labels"])
        await all_.collector.collect()
        assert await left(all_) == {"held", "target"}
        # a snapshot is nothing without its parents
        assert await snapshots(all_) == {"below", "k"}
        assert all_.images.get(NS, "i").name == "i"


async def test_an_expired_lease_goes_with_what_it_held(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await all_.leases.create(NS, "old", PAST)
        await all_.leases.create(NS, "odd", {"containerd.io/gc.expire": "tomorrow"})
        await blob(all_, "old", lease="old")
        await blob(all_, "odd", lease="odd")
        await all_.collector.collect()
        assert await left(all_) == {"odd"}
        assert [lease.id for lease in await all_.leases.list(NS)] == ["odd"]


async def test_an_expired_image_goes_unless_something_references_it(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        for name, labels in {"old": PAST, "new": LATER, "referenced": PAST}.items():
            made = image(name, await blob(all_, name))
            made.labels.update(labels)
            await all_.images.create(NS, made)
        await blob(all_, "root", {"containerd.io/gc.root": "1", "containerd.io/gc.ref.image/x": "referenced"})
        await all_.collector.collect()
        assert [each.name for each in await all_.images.list(NS)] == ["new", "referenced"]
        assert await left(all_) == {"new", "referenced", "root"}
        assert "/images/delete" in all_.topics()


async def test_labels_that_mean_nothing_keep_nothing(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        child = await blob(all_, "child")
        labels = {"containerd.io/gc.root": "1", "containerd.io/gc.ref.contents": child, "containerd.io/gc.ref.x": child}
        await blob(all_, "root", labels)
        await all_.collector.collect()
        assert await left(all_) == {"root"}


async def test_references_backwards(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        target = await blob(all_, "target")
        await all_.images.create(NS, image("i", target))
        await all_.containers.create(NS, container("c"))
        await layer(all_, "chain", **{"containerd.io/gc.root": "1"})
        await blob(all_, "of image", {"containerd.io/gc.bref.image": "i"})
        await blob(all_, "of content", {"containerd.io/gc.bref.content.x": target})
        await blob(all_, "of container", {"containerd.io/gc.bref.container": "c"})
        await blob(all_, "of snapshot", {"containerd.io/gc.bref.snapshot.native": "chain"})
        await blob(all_, "of nothing", {"containerd.io/gc.bref.image": "none"})
        await all_.collector.collect()
        assert await left(all_) == {"target", "of image", "of content", "of container", "of snapshot"}


async def test_nothing_of_one_tenant_keeps_anything_of_another(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        shared = await blob(all_, "shared")
        await blob(all_, "shared", namespace="other")
        await all_.images.create(NS, image("i", shared))
        await all_.collector.collect()
        assert await left(all_) == {"shared"}
        assert await left(all_, "other") == set()
        await all_.images.delete(NS, "i")
        await all_.collector.collect()
        assert os.listdir(tmp_path / "content" / "blobs" / "sha256") == []


async def test_uploads_expire_unless_somebody_writes_or_holds_them(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await all_.leases.create(NS, "l", LATER)
        for ref, lease in {"fresh": None, "stale": None, "held": "l"}.items():
            async with await all_.content.writer(NS, ref, lease=lease) as writer:
                await writer.write(b"x")
        open_writer = await all_.content.writer(NS, "open")
        await all_.metadata.write(
            lambda db: db.execute("UPDATE ingests SET expires = 1 WHERE ref IN ('stale', 'open')")
        )
        await all_.collector.collect()
        assert [status.ref for status in await all_.content.list_statuses(NS)] == ["fresh", "held", "open"]
        await open_writer.close()
        await all_.leases.delete(NS, "l")
        await all_.collector.collect()
        assert [status.ref for status in await all_.content.list_statuses(NS)] == ["fresh"]
        assert len(os.listdir(tmp_path / "content" / "ingest")) == 1


async def test_an_upload_that_stands_for_a_blob_keeps_its_file(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        digest = await blob(all_, "data")
        writer = await all_.content.writer("other", "r", expected=digest)
        await all_.collector.collect()
        assert await left(all_) == set()
        assert (await writer.commit()).digest == digest
        assert await left(all_, "other") == {"data"}


async def test_why(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        manifest = await pulled(all_, "a")
        config = digest_of(b"a config")
        assert await all_.collector.why(NS, "snapshot", "native/a chain0") == [
            ("image", "a", "an image"),
            ("content", manifest, "the image's target"),
            ("content", config, "label containerd.io/gc.ref.content.config"),
            ("snapshot", "native/a chain1", "label containerd.io/gc.ref.snapshot.native"),
            ("snapshot", "native/a chain0", "its parent"),
        ]
        garbage = await blob(all_, "garbage")
        assert await all_.collector.why(NS, "content", garbage) == []
        assert await all_.collector.why("other", "content", config) == []
        assert [node.key for node in await all_.collector.garbage()] == [garbage]


async def test_what_is_written_while_it_marks_is_not_lost(tmp_path: Path) -> None:
    """An image that comes to reference a blob after the marking and before the sweep keeps it."""
    async with stores(tmp_path) as all_:
        digest = await blob(all_, "late")
        real = all_.collector._mark
        marked = 0

        async def overtaken() -> object:
            nonlocal marked
            result = await real()
            marked += 1
            if marked == 1:
                await all_.images.create(NS, image("i", digest))
            return result

        all_.collector._mark = overtaken  # type: ignore[method-assign, assignment]
        await all_.collector.collect()
        assert marked == 2
        assert await left(all_) == {"late"}


async def test_it_comes_to_an_end_under_endless_writes(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await blob(all_, "garbage")
        stop = False

        async def write() -> None:
            number = 0
            while not stop:
                await all_.containers.create(NS, container(f"c{number}"))
                number += 1

        writing = asyncio.create_task(write())
        await all_.collector.collect()
        stop = True
        await writing
        assert await left(all_) == set()


async def collected(all_: Stores, times: int) -> None:
    """Waits until so many collections have run."""
    end = time.monotonic() + 30
    while all_.collector._collections < times:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


async def until_empty(all_: Stores) -> None:
    """Waits until the collector, which runs by itself, has left nothing."""
    end = time.monotonic() + 30
    # it counts when it is through
    while (found := await left(all_)) or all_.collector._lock.locked():
        assert time.monotonic() < end, found
        await asyncio.sleep(0.02)


async def test_it_runs_by_itself_after_the_start_and_after_deletions(tmp_path: Path) -> None:
    policy = Policy(startup_delay=1.0, pause_threshold=0.5)
    async with stores(tmp_path, policy) as all_:
        await all_.images.create(NS, image("i", await blob(all_, "data")))
        await collected(all_, 1)
        assert await left(all_) == {"data"}
        await all_.images.delete(NS, "i")
        await until_empty(all_)


async def test_it_runs_by_itself_when_something_expires(tmp_path: Path) -> None:
    policy = Policy(startup_delay=0.05, pause_threshold=0.5)
    async with stores(tmp_path, policy) as all_:
        soon = datetime.now(UTC) + timedelta(seconds=2)
        await all_.leases.create(NS, "l", {"containerd.io/gc.expire": soon.isoformat()})
        await blob(all_, "data", lease="l")
        await collected(all_, 1)
        there = await left(all_)
        assert there == {"data"} or datetime.now(UTC) > soon
        await until_empty(all_)
        assert await all_.leases.list(NS) == []


async def test_it_sleeps_while_nothing_happens_and_hurries_when_asked(tmp_path: Path) -> None:
    policy = Policy(startup_delay=0.01, pause_threshold=0.001, deletion_threshold=3)
    async with stores(tmp_path, policy) as all_:
        await collected(all_, 1)
        digests = [await blob(all_, f"{number}") for number in range(4)]
        await all_.content.delete(NS, digests[0])
        await asyncio.sleep(0.1)
        assert all_.collector._collections == 1  # 20 seconds since the last one are not over
        await all_.content.delete(NS, digests[1])
        await all_.content.delete(NS, digests[2])
        await until_empty(all_)
        assert all_.collector._collections == 2


async def test_a_start_is_not_held_up_by_a_large_collection(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:

        def many(db):  # type: ignore[no-untyped-def]
            for number in range(5000):
                digest = digest_of(b"%d" % number)
                record = content_pb2.Info(digest=digest, size=1, labels={f"{REF}.l.{n}": digest for n in range(4)})
                db.execute("INSERT INTO blobs VALUES (?, ?, ?)", (NS, digest, record.SerializeToString()))

        await all_.metadata.write(many)
        collecting = asyncio.create_task(all_.collector.garbage())
        waits = []
        number = 0
        while not collecting.done():
            begun = asyncio.get_running_loop().time()
            await all_.containers.create(NS, container(f"c{number}"))
            waits.append(asyncio.get_running_loop().time() - begun)
            number += 1
        assert len(await collecting) == 5000
        assert len(waits) > 3  # others had their turn meanwhile; how fast is for the benchmark


async def test_an_empty_database(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        assert (await all_.collector.collect()).removed == {}
        assert await all_.collector.why(NS, "image", "none") == []


def test_the_policy_is_containerds() -> None:
    assert Policy() == Policy(0.02, 0, 100, 0.0, 0.1)


@pytest.mark.parametrize("text", ["2020-01-01T00:00:00Z", "2020-01-01T00:00:00.5+02:00"])
async def test_times_are_rfc_3339(tmp_path: Path, text: str) -> None:
    async with stores(tmp_path) as all_:
        await all_.leases.create(NS, "l", {"containerd.io/gc.expire": text})
        await all_.collector.collect()
        assert await all_.leases.list(NS) == []
