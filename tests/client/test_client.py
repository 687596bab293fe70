"""The client's nouns over wherryd and containerd: what holds on one holds on the other."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from io import BytesIO

import pytest

from tests.client.conftest import IMAGE, NAMESPACE
from wherry.client import Client, connect
from wherry.client.address import connect_blocking
from wherry.client.archive import Naming, load, save
from wherry.client.blocking import drive
from wherry.client.containers import Container
from wherry.client.events import Event
from wherry.client.images import Image
from wherry.client.leases import Resource
from wherry.client.manifests import picture
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    WherryError,
)
from wherry.core.mediatypes import OCI_INDEX
from wherry.core.platforms import Platform


async def test_the_daemon_says_what_it_is(client: Client) -> None:
    assert (await client.version()).version
    assert len((await client.introspection.server()).uuid) == 36
    plugins = await client.introspection.plugins()
    assert ("io.containerd.snapshotter.v1", "overlayfs", "ok") in {(p.type, p.id, p.status) for p in plugins}
    assert all(p.type == "io.containerd.grpc.v1" for p in await client.introspection.plugins(["type~=grpc.v1"]))


async def test_namespaces(client: Client) -> None:
    await client.namespaces.create("other", {"a": "b"})
    try:
        with pytest.raises(AlreadyExists):
            await client.namespaces.create("other")
        labels = (await client.namespaces.label("other", {"c": "d", "a": ""})).labels
        assert dict(labels) == {"c": "d"}
        assert "other" in {item.name for item in await client.namespaces.list()}
        assert await client.within("other").containers.list() == []
    finally:
        await client.namespaces.delete("other")
    assert "other" not in {item.name for item in await client.namespaces.list()}


async def test_content_is_written_in_pieces_and_goes_on_where_it_stopped(client: Client) -> None:
    data = os.urandom(3 << 20)
    digest = Digest.of(data)
    async with client.lease() as leased:
        async with await leased.content.writer("half", total=len(data), digest=digest) as writer:
            await writer.write(data[: 1 << 20])
        assert (await leased.content.status("half")).offset == 1 << 20
        assert "half" in {status.ref for status in await leased.content.statuses()}
        assert await leased.content.write("half", [data], size=len(data), digest=digest, labels={"x": "y"}) == digest
        info = await leased.content.info(digest)
        assert (info.size, dict(info.labels)) == (len(data), {"x": "y"})
        assert b"".join([piece async for piece in leased.content.read(digest)]) == data
        assert b"".join([piece async for piece in leased.content.read(digest, 5, 7)]) == data[5:12]
        assert digest in {item.digest async for item in leased.content.list(["labels.x==y"])}
        await leased.content.delete(digest)
    with pytest.raises(NotFound):
        await client.content.info(digest)


async def test_content_that_is_not_what_was_said_is_refused(client: Client) -> None:
    wrong = Digest.of(b"something else")
    with pytest.raises(FailedPrecondition):
        await client.content.write("wrong", [b"data"], size=4, digest=wrong)
    # containerd keeps what was uploaded, wherryd may have thrown it away
    with suppress(NotFound):
        await client.content.abort("wrong")
    with pytest.raises(NotFound):
        await client.content.status("wrong")


async def test_images_have_names_labels_and_parts(client: Client) -> None:
    image = await client.images.get(IMAGE)
    look = await picture(client.content, image.target)
    assert look.settings["Cmd"] == ["/bin/sh"]
    assert len(look.layers) == len(look.diff_ids) == 1
    await client.images.put(Image("docker.io/library/twin:latest", image.target, {"a": "b"}))
    try:
        with pytest.raises(AlreadyExists):
            await client.images.create(Image("docker.io/library/twin:latest", image.target))
        assert (await client.images.find("twin")).target == image.target
        assert dict((await client.images.label("docker.io/library/twin:latest", {"c": "d"})).labels) == {
            "a": "b",
            "c": "d",
        }
        assert [item.name for item in await client.images.list(["name~=twin"])] == ["docker.io/library/twin:latest"]
    finally:
        await client.images.delete("docker.io/library/twin:latest", sync=True)
    with pytest.raises(NotFound):
        await client.images.find("twin")
    other = {**look.manifest.to_json(), "platform": {"os": "plan9", "architecture": "arm"}}
    data = json.dumps({"schemaVersion": 2, "manifests": [other]}).encode()
    digest = Digest.parse(await client.content.write("index", [data], size=len(data)))
    with pytest.raises(NotFound, match="no match for platform"):
        await picture(client.content, Descriptor(OCI_INDEX, digest, len(data)), Platform("linux", "amd64"))


async def test_an_archive_comes_back_as_it_went(client: Client) -> None:
    image = await client.images.get(IMAGE)
    archive = BytesIO()
    await save(client, [image], archive)
    archive.seek(0)
    names = [item.name for item in await load(client, archive, Naming(base="copy.example/box", digests=True))]
    assert names == [f"copy.example/box@{image.target.digest}"]
    archive.seek(0)
    assert [(item.name, item.target.digest) for item in await load(client, archive)] == [(IMAGE, image.target.digest)]
    await client.images.delete(names[0])


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100])
async def test_what_is_no_archive_is_refused(client: Client, data: bytes) -> None:
    with pytest.raises(InvalidArgument, match="archive"):
        await load(client, BytesIO(data))


async def test_snapshots(client: Client) -> None:
    snapshots = client.snapshots()
    chain = (await picture(client.content, (await client.images.get(IMAGE)).target)).chain_id
    mounts = await snapshots.prepare("work", chain, {"containerd.io/gc.root": "now"})
    assert mounts[0].type == "overlay"
    try:
        assert await snapshots.mounts("work") == mounts
        assert (await snapshots.stat("work")).kind == "Active"
        assert (await snapshots.usage(chain)).size > 0
        with pytest.raises(AlreadyExists):
            await snapshots.prepare("work", chain)
        with pytest.raises(NotFound):
            await snapshots.prepare("orphan", "no-such-parent")
        await snapshots.commit("done", "work", {"containerd.io/gc.root": "now"})
        assert {item.name for item in [item async for item in snapshots.list()]} >= {chain, "done"}
        view = await snapshots.view("look", "done", {"containerd.io/gc.root": "now"})
        layer = await client.diff.compute(await snapshots.view("below", chain), view)
        assert layer.size > 0
        with pytest.raises(FailedPrecondition):
            await snapshots.remove("done")
    finally:
        for key in ("look", "below", "done", "work"):
            try:
                await snapshots.remove(key)
            except NotFound:
                continue


async def test_leases_hold_and_end(client: Client) -> None:
    async with client.lease(expires=60) as leased:
        digest = await leased.content.write("leased", [b"held by a lease"])
        (lease,) = [item for item in await client.leases.list() if item.id == leased.calls.lease]
        assert "containerd.io/gc.expire" in lease.labels
        assert Resource(digest, "content") in await client.leases.resources(lease.id)
    assert lease.id not in {item.id for item in await client.leases.list()}


async def test_containers_are_records(client: Client) -> None:
    spec = {"ociVersion": "1.0.2", "process": {"args": ["true"], "cwd": "/"}}
    made = await client.containers.create(
        Container(id="record", runtime="io.containerd.runc.v2", spec=spec, labels={"a": "b"})
    )
    try:
        assert (made.spec, made.created_at > 0) == (spec, True)
        with pytest.raises(AlreadyExists):
            await client.containers.create(made)
        assert dict((await client.containers.label("record", {"c": "d"})).labels) == {"a": "b", "c": "d"}
        changed = await client.containers.update(Container(id="record", spec={**spec, "hostname": "x"}), ["spec"])
        assert (changed.spec or {})["hostname"] == "x"
        assert [item.id for item in await client.containers.list(["labels.c==d"])] == ["record"]
    finally:
        await client.containers.delete("record")
    with pytest.raises(NotFound, match=f'container "record" in namespace "{NAMESPACE}": not found'):
        await client.containers.get("record")


async def test_events_come_as_they_happen(client: Client) -> None:
    events = client.events.subscribe([f"namespace=={NAMESPACE},topic~=containers"])

    async def next_event() -> Event:
        return await anext(events)

    first = asyncio.create_task(next_event())
    made: list[str] = []
    try:
        async with asyncio.timeout(30):
            while not first.done():  # until the subscription is there nobody hears of them
                made.append(f"noted{len(made)}")
                record = Container(id=made[-1], runtime="io.containerd.runc.v2", spec={"ociVersion": "1.0.2"})
                await client.containers.create(record)
                await asyncio.wait([first], timeout=0.3)
        event = await first
        assert (event.namespace, event.topic) == (NAMESPACE, "/containers/create")
        assert event.fields()["id"] in made
    finally:
        await events.aclose()  # type: ignore[attr-defined]
        for name in made:
            await client.containers.delete(name)


async def test_bad_names_are_refused(client: Client) -> None:
    for name in ("../x", "a/b", "x" * 300, ""):
        with pytest.raises(InvalidArgument):
            await client.containers.create(
                Container(id=name, runtime="io.containerd.runc.v2", spec={"ociVersion": "1"})
            )
    with pytest.raises((InvalidArgument, FailedPrecondition)):
        await client.within("no/such").containers.list()


async def test_nobody_at_the_address(tmp_path: object) -> None:
    with pytest.raises(Unavailable, match="no such socket"):
        await connect(f"{tmp_path}/nobody.sock")
    with pytest.raises(Unavailable):
        connect_blocking(f"{tmp_path}/nobody.sock")


def test_the_same_calls_without_an_event_loop(address: str) -> None:
    async def work() -> None:
        client = Client.over(connect_blocking(address), NAMESPACE, timeout=30)
        try:
            digests = {item.digest async for item in client.content.list()}
            image = await client.images.get(IMAGE)
            assert image.target.digest in digests
            data = os.urandom(2 << 20)
            async with client.lease() as leased:
                digest = await leased.content.write("blocking", [data])
                assert b"".join([piece async for piece in leased.content.read(digest)]) == data
            with pytest.raises(NotFound):
                await client.tasks.get("nobody")
            with pytest.raises(WherryError):
                await client.content.write("blocking-wrong", [b"x"], digest=Digest.of(b"y"))
            with suppress(NotFound):
                await client.content.abort("blocking-wrong")
        finally:
            await client.close()

    drive(work())
