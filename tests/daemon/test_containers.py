"""Containers' metadata: what is stored, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from tests.daemon.stores import NS, call, container, stores
from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from wherry.proto import containers_pb2 as pb
from wherry.proto import events_pb2


async def test_create_get_delete(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        service = all_.container_service
        given = container("c1", labels={"a": "b", "empty": ""}, snapshotter="overlayfs", snapshot_key="k")
        given.extensions["x"].type_url = "t"
        answer = (await service.create(pb.CreateContainerRequest(container=given), call())).container
        assert answer.created_at.seconds > 1_600_000_000
        assert answer.created_at == answer.updated_at
        got = (await service.get(pb.GetContainerRequest(id="c1"), call())).container
        assert got == answer
        assert dict(got.labels) == {"a": "b"}
        assert got.spec == given.spec
        assert got.extensions["x"].type_url == "t"
        with pytest.raises(AlreadyExists, match='container "c1": already exists'):
            await service.create(pb.CreateContainerRequest(container=given), call())
        await service.delete(pb.DeleteContainerRequest(id="c1"), call())
        with pytest.raises(NotFound) as error:
            await service.get(pb.GetContainerRequest(id="c1"), call())
        assert error.value.message == 'container "c1" in namespace "default": not found'
        with pytest.raises(NotFound):
            await service.delete(pb.DeleteContainerRequest(id="c1"), call())
        assert all_.topics() == ["/containers/create", "/containers/delete"]
        created = all_.events[0][2]
        assert isinstance(created, events_pb2.ContainerCreate)
        assert (created.id, created.image, created.runtime.name) == ("c1", "img", "io.containerd.runc.v2")


async def test_what_survives_a_restart(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        made = await all_.containers.create(NS, container("c1"))
    async with stores(tmp_path) as all_:
        assert all_.containers.get(NS, "c1") == made


async def test_list_filters_and_streams(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        service = all_.container_service
        for number in range(5):
            await all_.containers.create(NS, container(f"c{number}", labels={"very odd": str(number)}))
        await all_.containers.create("other", container("c9"))

        async def ids(*filters: str) -> list[str]:
            request = pb.ListContainersRequest(filters=filters)
            listed = [each.id for each in (await service.list(request, call())).containers]
            streamed = [each.container.id async for each in service.list_stream(request, call())]
            assert listed == streamed
            return listed

        assert await ids() == ["c0", "c1", "c2", "c3", "c4"]
        assert await ids('labels."very odd"==3') == ["c3"]
        assert await ids("id==c1", "id~=c[34]") == ["c1", "c3", "c4"]
        assert await ids("runtime.name==io.containerd.runc.v2,image==img,id!=c0") == ["c1", "c2", "c3", "c4"]
        with pytest.raises(InvalidArgument):
            await ids("id=x")


async def test_update_by_mask(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        service = all_.container_service
        given = container("c1", labels={"a": "1", "b.c": "2"}, snapshotter="native", snapshot_key="k")
        await all_.containers.create(NS, given)
        change = container("c1", labels={"b.c": "3", "d": "4"}, snapshot_key="other")
        change.image = "new"
        change.extensions["e"].type_url = "t"

        async def update(*paths: str) -> pb.Container:
            request = pb.UpdateContainerRequest(container=change, update_mask=FieldMask(paths=paths))
            return (await service.update(request, call())).container

        updated = await update("labels.b.c", "labels.a")
        assert (dict(updated.labels), updated.image) == ({"b.c": "3"}, "img")
        updated = await update("labels", "image", "snapshotkey", "extensions.e")
        assert dict(updated.labels) == {"b.c": "3", "d": "4"}
        assert (updated.image, updated.snapshot_key, updated.extensions["e"].type_url) == ("new", "other", "t")
        assert updated.updated_at.ToNanoseconds() > updated.created_at.ToNanoseconds()
        for path in ("runtime", "id", "sandbox", "labelsx", "snapshotter"):
            with pytest.raises(InvalidArgument, match=f'cannot update "{path}" field on "c1"'):
                await update(path)
        assert all_.topics()[-1] == "/containers/update"


async def test_an_update_of_everything_keeps_what_is_immutable(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await all_.containers.create(NS, container("c1", snapshotter="native", snapshot_key="k"))
        with pytest.raises(InvalidArgument, match=r"container\.Snapshotter field is immutable"):
            await all_.containers.update(NS, container("c1", snapshotter="overlayfs"))
        other = container("c1", snapshotter="native")
        other.runtime.name = "io.containerd.other.v1"
        with pytest.raises(InvalidArgument, match=r"container\.Runtime\.Name field is immutable"):
            await all_.containers.update(NS, other)
        updated = await all_.containers.update(NS, container("c1", snapshotter="native", labels={"x": "y"}))
        assert (dict(updated.labels), updated.snapshot_key) == ({"x": "y"}, "")
        with pytest.raises(NotFound, match='container "none": not found'):
            await all_.containers.update(NS, container("none"))
        with pytest.raises(InvalidArgument, match="must specify a container id"):
            await all_.containers.update(NS, pb.Container())


@pytest.mark.parametrize("id_", ["", "..", ".", "a/b", "../../etc", "x" * 300, "a b", "a\n", "-", "a_", "é"])
async def test_a_bad_id_is_refused(tmp_path: Path, id_: str) -> None:
    async with stores(tmp_path) as all_:
        with pytest.raises(InvalidArgument, match=r"container\.ID: identifier"):
            await all_.containers.create(NS, container(id_))
        assert await all_.containers.list(NS) == []


async def test_what_is_missing_is_named(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        bad = container("c")
        bad.runtime.name = ""
        with pytest.raises(InvalidArgument, match=r"container\.Runtime\.Name must be set"):
            await all_.containers.create(NS, bad)
        bad = container("c")
        bad.ClearField("spec")
        with pytest.raises(InvalidArgument, match=r"container\.Spec must be set"):
            await all_.containers.create(NS, bad)
        with pytest.raises(InvalidArgument, match=r"container\.Snapshotter must be set if"):
            await all_.containers.create(NS, container("c", snapshot_key="k"))
        with pytest.raises(InvalidArgument, match=r"containers\.Labels: label key and value length"):
            await all_.containers.create(NS, container("c", labels={"k" * 5000: "v"}))
        bad = container("c")
        bad.extensions[""].type_url = "t"
        with pytest.raises(InvalidArgument, match=r"Extension keys must not be zero-length"):
            await all_.containers.create(NS, bad)
        assert await all_.containers.list(NS) == []
        assert all_.events == []


@pytest.mark.parametrize("method", ["get", "list", "create", "update", "delete"])
async def test_every_call_needs_a_namespace(tmp_path: Path, method: str) -> None:
    async with stores(tmp_path) as all_:
        request = {
            "get": pb.GetContainerRequest(id="c"),
            "list": pb.ListContainersRequest(),
            "create": pb.CreateContainerRequest(container=container("c")),
            "update": pb.UpdateContainerRequest(container=container("c")),
            "delete": pb.DeleteContainerRequest(id="c"),
        }[method]
        with pytest.raises(FailedPrecondition, match="namespace is required"):
            await getattr(all_.container_service, method)(request, call(None))
        with pytest.raises(InvalidArgument):
            await getattr(all_.container_service, method)(request, call("../x"))
