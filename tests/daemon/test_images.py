"""Images: names for descriptors."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from tests.daemon.stores import MANIFEST, NS, call, digest_of, image, stores
from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from wherry.proto import images_pb2 as pb
from wherry.proto import types_pb2

D1, D2 = digest_of(b"1"), digest_of(b"2")
NAME = "docker.io/library/busybox:latest"


async def test_create_get_list_delete(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        service = all_.image_service
        given = image(NAME, D1, a="b", empty="")
        given.target.annotations["org.example"] = "x"
        made = (await service.create(pb.CreateImageRequest(image=given), call())).image
        assert (await service.get(pb.GetImageRequest(name=NAME), call())).image == made
        assert dict(made.labels) == {"a": "b"}
        assert made.created_at == made.updated_at
        with pytest.raises(AlreadyExists, match=f'image "{NAME}": already exists'):
            await service.create(pb.CreateImageRequest(image=given), call())
        await all_.images.create(NS, image("other", D2))
        await all_.images.create("elsewhere", image("third", D2))

        async def names(*filters: str) -> list[str]:
            request = pb.ListImagesRequest(filters=filters)
            return [each.name for each in (await service.list(request, call())).images]

        assert await names() == [NAME, "other"]
        assert await names(f"target.digest=={D2}") == ["other"]
        assert await names(f'target.mediatype=="{MANIFEST}",name~=busy') == [NAME]
        assert await names('annotations."org.example"==x') == [NAME]
        assert await names("labels.a") == [NAME]

        await service.delete(pb.DeleteImageRequest(name=NAME), call())
        with pytest.raises(NotFound) as error:
            await service.get(pb.GetImageRequest(name=NAME), call())
        assert error.value.message == f'image "{NAME}": not found'
        with pytest.raises(NotFound):
            await service.delete(pb.DeleteImageRequest(name=NAME), call())
        assert all_.topics() == ["/images/create"] * 3 + ["/images/delete"]


async def test_source_date_epoch_is_the_time(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        epoch = Timestamp(seconds=1_000_000_000)
        request = pb.CreateImageRequest(image=image(NAME, D1), source_date_epoch=epoch)
        made = (await all_.image_service.create(request, call())).image
        assert made.created_at == made.updated_at == epoch


async def test_update_by_mask(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        first = image(NAME, D1)
        first.labels["a.b"] = "1"
        first.labels["c"] = "2"
        first.target.annotations["x"] = "1"
        made = await all_.images.create(NS, first)
        change = image(NAME, D2, size=9)
        change.labels["a.b"] = "3"
        change.target.annotations["y"] = "2"

        async def update(*paths: str) -> pb.Image:
            request = pb.UpdateImageRequest(image=change, update_mask=FieldMask(paths=paths))
            return (await all_.image_service.update(request, call())).image

        updated = await update("labels.a.b", "labels.c")
        assert (dict(updated.labels), updated.target.digest) == ({"a.b": "3"}, D1)
        updated = await update("annotations.y")
        assert dict(updated.target.annotations) == {"x": "1", "y": "2"}
        updated = await update("annotations")
        assert (dict(updated.target.annotations), updated.target.digest) == ({"y": "2"}, D1)
        updated = await update("target")
        assert (updated.target.digest, updated.target.size) == (D2, 9)
        assert updated.created_at == made.created_at
        with pytest.raises(InvalidArgument, match=f'cannot update "created_at" field on image "{NAME}"'):
            await update("created_at")
        change.labels.clear()
        assert dict((await update()).labels) == {}
        change.name = "none"
        with pytest.raises(NotFound, match='image "none": not found'):
            await update("labels")
        assert set(all_.topics()[1:]) == {"/images/update"}


async def test_put_replaces(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await all_.images.put(NS, image(NAME, D1))
        await all_.images.put(NS, image(NAME, D2))
        assert all_.images.get(NS, NAME).target.digest == D2


async def test_delete_only_if_it_still_points_there(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        await all_.images.create(NS, image(NAME, D1))
        request = pb.DeleteImageRequest(name=NAME, target=types_pb2.Descriptor(digest=D2))
        with pytest.raises(NotFound, match=f"has target {D1}, not {D2}"):
            await all_.image_service.delete(request, call())
        request.target.digest = D1
        await all_.image_service.delete(request, call())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": ""}, "Image.Name required"),
        ({"digest": ""}, "Target.Digest"),
        ({"digest": "sha256:../x"}, "Target.Digest"),
        ({"size": 0}, "Target.Size must be greater than zero"),
        ({"media_type": ""}, "Target.MediaType must be set"),
    ],
)
async def test_what_is_wrong_is_named(tmp_path: Path, change: dict[str, object], text: str) -> None:
    async with stores(tmp_path) as all_:
        bad = image(NAME, D1)
        for field, value in change.items():
            setattr(bad if field == "name" else bad.target, field, value)
        with pytest.raises(InvalidArgument, match=text):
            await all_.image_service.create(pb.CreateImageRequest(image=bad), call())
        assert await all_.images.list(NS) == []


@pytest.mark.parametrize("method", ["get", "list", "create", "update", "delete"])
async def test_every_call_needs_a_namespace(tmp_path: Path, method: str) -> None:
    async with stores(tmp_path) as all_:
        request = {
            "get": pb.GetImageRequest(),
            "list": pb.ListImagesRequest(),
            "create": pb.CreateImageRequest(),
            "update": pb.UpdateImageRequest(),
            "delete": pb.DeleteImageRequest(),
        }[method]
        with pytest.raises(FailedPrecondition, match="namespace is required"):
            await getattr(all_.image_service, method)(request, call(None))
