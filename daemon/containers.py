"""Containers as metadata: what would run, not whether it runs."""

from __future__ import annotations

from collections.abc import Sequence

from wherry.daemon.metadata import Metadata
from wherry.daemon.namespaces import Publish
from wherry.proto import containers_pb2 as pb


class ContainerStore:
    def __init__(self, metadata: Metadata, publish: Publish | None = None) -> None:
        raise NotImplementedError

    def get(self, namespace: str, id: str) -> pb.Container:  # noqa: A002 -- the field's name
        """Raises NotFound (`container "x" in namespace "default": not found`)."""
        raise NotImplementedError

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[pb.Container]:
        raise NotImplementedError

    async def create(self, namespace: str, container: pb.Container) -> pb.Container:
        """Raises AlreadyExists, InvalidArgument."""
        raise NotImplementedError

    async def update(self, namespace: str, container: pb.Container, paths: Sequence[str] = ()) -> pb.Container:
        raise NotImplementedError

    async def delete(self, namespace: str, id: str) -> None:  # noqa: A002
        raise NotImplementedError


class ContainerService:
    SERVICE = "containerd.services.containers.v1.Containers"

    def __init__(self, store: ContainerStore) -> None:
        raise NotImplementedError
