"""Images: names for descriptors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from google.protobuf.empty_pb2 import Empty

from wherry.client.transport import Calls
from wherry.client.values import descriptor_from, descriptor_message, label_mask, mask, seconds
from wherry.core.descriptor import Descriptor
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound
from wherry.core.tuples import NamedTuple
from wherry.proto import images_pb2 as pb

_SERVICE = "containerd.services.images.v1.Images"


class Image(NamedTuple):
    """A name and what it stands for: an index or a manifest."""

    name: str
    target: Descriptor
    labels: Mapping[str, str] = MappingProxyType({})
    created_at: float = 0.0
    updated_at: float = 0.0


def _parse(message: pb.Image) -> Image:
    return Image(
        name=message.name,
        target=descriptor_from(message.target),
        labels=dict(message.labels),
        created_at=seconds(message.created_at),
        updated_at=seconds(message.updated_at),
    )


def _message(image: Image) -> pb.Image:
    return pb.Image(name=image.name, labels=dict(image.labels), target=descriptor_message(image.target))


class Images:
    """The images of a namespace."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def list(self, filters: Iterable[str] = ()) -> list[Image]:
        """All images that one of the filters lets through."""
        request = pb.ListImagesRequest(filters=filters)
        answer = await self._calls.unary(f"{_SERVICE}/List", request, pb.ListImagesResponse)
        return [_parse(item) for item in answer.images]

    async def get(self, name: str) -> Image:
        """One image by its full name; raises NotFound."""
        answer = await self._calls.unary(f"{_SERVICE}/Get", pb.GetImageRequest(name=name), pb.GetImageResponse)
        return _parse(answer.image)

    async def find(self, name: str) -> Image:
        """An image by its full name or by the short one that people use (`busybox`); raises NotFound."""
        try:
            return await self.get(name)
        except NotFound as missing:
            from wherry.core.reference import parse_familiar

            try:
                full = str(parse_familiar(name))
            except InvalidArgument:
                # no name that anybody would complete
                raise missing from None
            if full == name:
                raise
        return await self.get(full)

    async def create(self, image: Image) -> Image:
        """Writes a record; raises AlreadyExists."""
        request = pb.CreateImageRequest(image=_message(image))
        answer = await self._calls.unary(f"{_SERVICE}/Create", request, pb.CreateImageResponse)
        return _parse(answer.image)

    async def update(self, image: Image, paths: Iterable[str] = ()) -> Image:
        """Changes the fields that `paths` names; target and labels where it is empty."""
        request = pb.UpdateImageRequest(image=_message(image), update_mask=mask(paths))
        answer = await self._calls.unary(f"{_SERVICE}/Update", request, pb.UpdateImageResponse)
        return _parse(answer.image)

    async def put(self, image: Image) -> Image:
        """Writes a record whether or not there is one of that name."""
        try:
            return await self.create(image)
        except AlreadyExists:
            return await self.update(image, ["target", "labels"])

    async def label(self, name: str, labels: Mapping[str, str], *, replace_all: bool = False) -> Image:
        """Sets labels, an empty value takes one away; with `replace_all` all others go."""
        image = pb.Image(name=name, labels=dict(labels))
        paths = mask(["labels"]) if replace_all else label_mask(labels)
        request = pb.UpdateImageRequest(image=image, update_mask=paths)
        answer = await self._calls.unary(f"{_SERVICE}/Update", request, pb.UpdateImageResponse)
        return _parse(answer.image)

    async def delete(self, name: str, *, sync: bool = False) -> None:
        """Removes a name; raises NotFound. With `sync` it returns after the garbage collection."""
        await self._calls.unary(f"{_SERVICE}/Delete", pb.DeleteImageRequest(name=name, sync=sync), Empty)
