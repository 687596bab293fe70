"""Leases: what is made under one is held by it, and when it is synced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.daemon.stores import NS, call, digest_of, image, stores
from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from wherry.proto import leases_pb2 as pb

D = digest_of(b"d")
LATER = {"containerd.io/gc.expire": "2999-01-01T00:00:00Z"}


async def test_create_list_delete(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        service = all_.lease_service
        made = (await service.create(pb.CreateRequest(id="l1", labels={"a": "b"}), call())).lease
        assert (made.id, dict(made.labels)) == ("l1", {"a": "b"})
        assert made.created_at.seconds
        named = (await service.create(pb.CreateRequest(), call())).lease
        assert named.id
        with pytest.raises(AlreadyExists, match='lease "l1": already exists'):
            await service.create(pb.CreateRequest(id="l1"), call())
        listed = (await service.list(pb.ListRequest(filters=["labels.a==b"]), call())).leases
        assert [lease.id for lease in listed] == ["l1"]
        await service.delete(pb.DeleteRequest(id="l1"), call())
        with pytest.raises(NotFound, match='lease "l1": not found'):
            await service.delete(pb.DeleteRequest(id="l1", sync=True), call())


async def test_resources(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        service = all_.lease_service
        await all_.leases.create(NS, "l")
        wanted = [("content", D), ("images", "i"), ("ingests", "r"), ("snapshots/overlayfs", "k")]
        for type_, id_ in wanted:
            request = pb.AddResourceRequest(id="l", resource=pb.Resource(type=type_, id=id_))
            await service.add_resource(request, call())
            await service.add_resource(request, call())
        listed = (await service.list_resources(pb.ListResourcesRequest(id="l"), call())).resources
        assert [(each.type, each.id) for each in listed] == wanted
        await service.delete_resource(
            pb.DeleteResourceRequest(id="l", resource=pb.Resource(type="content", id=D)), call()
        )
        listed = (await service.list_resources(pb.ListResourcesRequest(id="l"), call())).resources
        assert len(listed) == 3
        with pytest.raises(NotFound, match='lease "none": not found'):
            await service.list_resources(pb.ListResourcesRequest(id="none"), call())
        with pytest.raises(NotFound, match='lease "l": not found'):
            await service.list_resources(pb.ListResourcesRequest(id="l"), call("other"))


@pytest.mark.parametrize(
    ("type_", "id_", "kind", "text"),
    [
        ("content", "nope", InvalidArgument, "invalid content resource id nope"),
        ("content/x", D, InvalidArgument, "invalid resource type content/x"),
        ("snapshots", "k", InvalidArgument, "invalid snapshot resource type snapshots"),
        ("snapshots/a/b", "k", InvalidArgument, "invalid snapshot resource type"),
        ("weather", "k", Unimplemented, "resource type weather not supported yet"),
    ],
)
async def test_what_can_not_be_held(tmp_path: Path, type_: str, id_: str, kind: type[Exception], text: str) -> None:
    async with stores(tmp_path) as all_:
        await all_.leases.create(NS, "l")
        with pytest.raises(kind, match=text):
            await all_.leases.add_resource(NS, "l", type_, id_)
        with pytest.raises(kind, match=text):
            await all_.leases.delete_resource(NS, "l", type_, id_)


async def test_what_is_made_under_a_lease_is_held_by_it(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await all_.leases.create(NS, "l", LATER)
        await all_.content.put(NS, "r", b"d", lease="l")
        async with await all_.content.writer(NS, "going", lease="l"):
            pass
        await all_.snapshots.prepare(NS, "native", "k", lease="l")
        await all_.snapshots.commit(NS, "native", "layer", "k", lease="l")
        await all_.snapshots.view(NS, "native", "v", "layer", lease="l")
        expiring = image("i", D)
        expiring.labels.update(LATER)
        await all_.images.create(NS, expiring, lease="l")
        await all_.images.create(NS, image("root by itself", D), lease="l")
        held = [(each.type, each.id) for each in await all_.leases.list_resources(NS, "l")]
        assert held == [
            ("content", D),
            ("images", "i"),
            ("ingests", "going"),
            ("snapshots/native", "layer"),
            ("snapshots/native", "v"),
        ]


async def test_what_is_there_already_is_held_too(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await all_.leases.create(NS, "l", LATER)
        await all_.content.put(NS, "r", b"d")
        await all_.snapshots.prepare(NS, "native", "k")
        await all_.snapshots.commit(NS, "native", "layer", "k")
        with pytest.raises(AlreadyExists):
            await all_.content.writer(NS, "r", expected=D, lease="l")
        with pytest.raises(AlreadyExists, match='target snapshot "layer": already exists'):
            await all_.snapshots.prepare(NS, "native", "x", labels={"containerd.io/snapshot.ref": "layer"}, lease="l")
        held = [(each.type, each.id) for each in await all_.leases.list_resources(NS, "l")]
        assert held == [("content", D), ("snapshots/native", "layer")]


async def test_a_lease_that_is_gone_is_said_and_nothing_is_made(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        with pytest.raises(NotFound, match='lease "l" does not exist'):
            await all_.content.put(NS, "r", b"d", lease="l")
        with pytest.raises(NotFound, match='lease "l" does not exist'):
            await all_.snapshots.prepare(NS, "native", "k", lease="l")
        assert await all_.content.list(NS) == []
        assert await all_.snapshots.list(NS, "native") == []
        await all_.snapshots.drain()
        await all_.leases.create(NS, "l", LATER)
        writer = await all_.content.writer(NS, "r", lease="l")
        await writer.write(b"d")
        await all_.leases.delete(NS, "l")
        with pytest.raises(NotFound, match='lease "l" does not exist'):
            await writer.commit()
        assert await all_.content.list(NS) == []


async def test_a_lease_that_expires_is_synced_with_the_first_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fdatasync

    def counted(fd: int) -> None:
        synced.append(fd)
        real(fd)

    async with stores(tmp_path) as all_:
        monkeypatch.setattr(os, "fdatasync", counted)
        await all_.leases.create(NS, "temporary", LATER)
        await all_.snapshots.prepare(NS, "native", "k", lease="temporary")
        await all_.leases.delete(NS, "temporary")
        await all_.leases.create(NS, "pull", LATER)
        assert synced == []
        await all_.content.put(NS, "r", b"d", lease="pull")
        assert len(synced) == 1
        await all_.leases.create(NS, "for ever")
        assert len(synced) == 2


@pytest.mark.parametrize("method", ["create", "delete", "list", "add_resource", "delete_resource", "list_resources"])
async def test_every_call_needs_a_namespace(tmp_path: Path, method: str) -> None:
    async with stores(tmp_path) as all_:
        request = {
            "create": pb.CreateRequest(),
            "delete": pb.DeleteRequest(),
            "list": pb.ListRequest(),
            "add_resource": pb.AddResourceRequest(),
            "delete_resource": pb.DeleteResourceRequest(),
            "list_resources": pb.ListResourcesRequest(),
        }[method]
        with pytest.raises(FailedPrecondition, match="namespace is required"):
            await getattr(all_.lease_service, method)(request, call(None))
