"""Snapshots for tenants: the asynchronous, namespaced face of the snapshotters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from wherry.daemon.metadata import Metadata
from wherry.daemon.namespaces import Publish
from wherry.proto import snapshots_pb2 as pb

if TYPE_CHECKING:
    from wherry.linux.mounts import Mount
    from wherry.snapshotter.interface import Snapshotter


class SnapshotStore:
    def __init__(
        self, metadata: Metadata, snapshotters: Mapping[str, Snapshotter], publish: Publish | None = None
    ) -> None:
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        """The snapshotters there are."""
        raise NotImplementedError

    async def stat(self, namespace: str, snapshotter: str, key: str) -> pb.Info:
        raise NotImplementedError

    async def prepare(
        self,
        namespace: str,
        snapshotter: str,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        *,
        lease: str | None = None,
    ) -> list[Mount]:
        raise NotImplementedError

    async def view(
        self,
        namespace: str,
        snapshotter: str,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        *,
        lease: str | None = None,
    ) -> list[Mount]:
        raise NotImplementedError

    async def mounts(self, namespace: str, snapshotter: str, key: str) -> list[Mount]:
        raise NotImplementedError

    async def commit(
        self,
        namespace: str,
        snapshotter: str,
        name: str,
        key: str,
        labels: Mapping[str, str] | None = None,
        *,
        lease: str | None = None,
    ) -> None:
        raise NotImplementedError

    async def remove(self, namespace: str, snapshotter: str, key: str) -> None:
        """The record goes now, the files soon after. Raises NotFound, FailedPrecondition (has children)."""
        raise NotImplementedError

    async def update(self, namespace: str, snapshotter: str, info: pb.Info, paths: Sequence[str] = ()) -> pb.Info:
        raise NotImplementedError

    async def usage(self, namespace: str, snapshotter: str, key: str) -> tuple[int, int]:
        """(bytes, inodes) of the snapshot alone."""
        raise NotImplementedError

    async def list(self, namespace: str, snapshotter: str, filters: Sequence[str] = ()) -> list[pb.Info]:
        raise NotImplementedError

    async def cleanup(self, snapshotter: str) -> None:
        """Remove what no record names any more, and wait for it."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class SnapshotService:
    SERVICE = "containerd.services.snapshots.v1.Snapshots"

    def __init__(self, store: SnapshotStore) -> None:
        raise NotImplementedError
