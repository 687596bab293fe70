"""Namespaces: labels, emptiness, and the check that every call goes through."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from tests.daemon.stores import NS, call, container, digest_of, image, stores
from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from wherry.daemon.namespaces import require_namespace
from wherry.proto import namespaces_pb2 as pb


def test_a_call_without_a_namespace_is_refused() -> None:
    with pytest.raises(FailedPrecondition) as error:
        require_namespace(call(None))
    assert error.value.message == "namespace is required: failed precondition"


@pytest.mark.parametrize("name", ["..", "a/b", "-a", "a--b", "ä", "a b", "x" * 300, "a\n"])
def test_a_malformed_namespace_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        require_namespace(call(name))


async def test_create_list_get_update_delete(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        service = all_.namespace_service
        made = pb.Namespace(name="tenant", labels={"a": "1", "b.c": "2"})
        await service.create(pb.CreateNamespaceRequest(namespace=made), call(None))
        with pytest.raises(AlreadyExists, match='namespace "tenant": already exists'):
            await service.create(pb.CreateNamespaceRequest(namespace=made), call(None))
        listed = (await service.list(pb.ListNamespacesRequest(), call(None))).namespaces
        assert [(each.name, dict(each.labels)) for each in listed] == [("tenant", {"a": "1", "b.c": "2"})]

        request = pb.UpdateNamespaceRequest(
            namespace=pb.Namespace(name="tenant", labels={"b.c": "3", "z": "9"}),
            update_mask=FieldMask(paths=["labels.b.c", "labels.a"]),
        )
        updated = (await service.update(request, call(None))).namespace
        assert dict(updated.labels) == {"b.c": "3"}
        request.update_mask.paths[:] = ["name"]
        with pytest.raises(InvalidArgument, match='cannot update "name" field'):
            await service.update(request, call(None))
        request.ClearField("update_mask")
        assert dict((await service.update(request, call(None))).namespace.labels) == {"b.c": "3", "z": "9"}

        await service.delete(pb.DeleteNamespaceRequest(name="tenant"), call(None))
        with pytest.raises(NotFound, match='namespace "tenant": not found'):
            await service.delete(pb.DeleteNamespaceRequest(name="tenant"), call(None))
        assert all_.topics() == [
            "/namespaces/create",
            "/namespaces/update",
            "/namespaces/update",
            "/namespaces/delete",
        ]


async def test_an_unknown_one_reads_as_empty_and_the_first_write_makes_it(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        assert all_.namespaces.get("nobody").labels == {}
        assert await all_.containers.list("nobody") == []
        assert await all_.namespaces.list() == []
        await all_.containers.create("somebody", container("c"))
        assert [each.name for each in await all_.namespaces.list()] == ["somebody"]


async def test_one_that_has_something_is_not_deleted(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await all_.containers.create(NS, container("c"))
        with pytest.raises(FailedPrecondition) as error:
            await all_.namespaces.delete(NS)
        assert error.value.message == (
            'namespace "default" must be empty, but it still has containers: failed precondition'
        )
        await all_.images.create(NS, image("i", digest_of(b"x")))
        await all_.content.put(NS, "ref", b"x")
        await all_.snapshots.prepare(NS, "native", "k")
        with pytest.raises(FailedPrecondition) as error:
            await all_.namespaces.delete(NS)
        assert 'images, blobs, containers, snapshots on "native" snapshotter: f' in error.value.message


@pytest.mark.parametrize("name", ["", "..", "a/b", "x" * 300])
async def test_a_malformed_name_is_not_created(tmp_path: Path, name: str) -> None:
    async with stores(tmp_path) as all_:
        with pytest.raises(InvalidArgument):
            await all_.namespaces.create(name)
        with pytest.raises(InvalidArgument):
            await all_.namespaces.update(pb.Namespace(name=name, labels={"a": "b"}))
        assert await all_.namespaces.list() == []


async def test_a_label_that_is_too_long_is_refused(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        with pytest.raises(InvalidArgument, match=r"namespace\.Labels: label key and value length"):
            await all_.namespaces.create("n", {"k": "v" * 4096})
