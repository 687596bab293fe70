"""Images: names for descriptors."""

from __future__ import annotations

from collections.abc import Sequence

from wherry.daemon.gc import Collector
from wherry.daemon.metadata import Metadata
from wherry.daemon.namespaces import Publish
from wherry.proto import images_pb2 as pb
from wherry.proto import types_pb2


class ImageStore:
    def __init__(self, metadata: Metadata, publish: Publish | None = None) -> None:
        raise NotImplementedError

    def get(self, namespace: str, name: str) -> pb.Image:
        """Raises NotFound."""
        raise NotImplementedError

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[pb.Image]:
        raise NotImplementedError

    async def create(self, namespace: str, image: pb.Image, *, lease: str | None = None) -> pb.Image:
        """Raises AlreadyExists, InvalidArgument."""
        raise NotImplementedError

    async def update(self, namespace: str, image: pb.Image, paths: Sequence[str] = ()) -> pb.Image:
        """No paths: target and labels are replaced. Raises NotFound, InvalidArgument."""
        raise NotImplementedError

    async def put(self, namespace: str, image: pb.Image, *, lease: str | None = None) -> pb.Image:
        """Create it, or update target and labels where the name is there (what a pull does)."""
        raise NotImplementedError

    async def delete(self, namespace: str, name: str, target: types_pb2.Descriptor | None = None) -> None:
        """With `target`: only if it still points there. Raises NotFound."""
        raise NotImplementedError


class ImageService:
    SERVICE = "containerd.services.images.v1.Images"

    def __init__(self, store: ImageStore, collector: Collector) -> None:
        raise NotImplementedError
