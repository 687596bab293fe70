"""Snapshots: the file systems of images and containers."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Iterable, Mapping
from types import MappingProxyType

from google.protobuf.empty_pb2 import Empty

from wherry.client.transport import Calls
from wherry.client.values import Mount, label_mask, seconds
from wherry.core.tuples import NamedTuple
from wherry.proto import snapshots_pb2 as pb

_SERVICE = "containerd.services.snapshots.v1.Snapshots"
KINDS = {pb.UNKNOWN: "Unknown", pb.VIEW: "View", pb.ACTIVE: "Active", pb.COMMITTED: "Committed"}


class Snapshot(NamedTuple):
    """A snapshot's record. `kind` is `View`, `Active` or `Committed`."""

    name: str
    parent: str
    kind: str
    labels: Mapping[str, str] = MappingProxyType({})
    created_at: float = 0.0
    updated_at: float = 0.0


class Usage(NamedTuple):
    """What a snapshot itself uses, without its parents: bytes on disk and inodes."""

    size: int
    inodes: int


def _parse(message: pb.Info) -> Snapshot:
    return Snapshot(
        name=message.name,
        parent=message.parent,
        kind=KINDS.get(message.kind, "Unknown"),
        labels=dict(message.labels),
        created_at=seconds(message.created_at),
        updated_at=seconds(message.updated_at),
    )


class Snapshots:
    """The snapshots of a namespace in one snapshotter."""

    def __init__(self, calls: Calls, snapshotter: str) -> None:
        self._calls = calls
        self.snapshotter = snapshotter

    async def list(self, filters: Iterable[str] = ()) -> AsyncIterator[Snapshot]:
        """All snapshots that one of the filters lets through, as the daemon sends them."""
        request = pb.ListSnapshotsRequest(snapshotter=self.snapshotter, filters=filters)
        async for answer in self._calls.messages(f"{_SERVICE}/List", request, pb.ListSnapshotsResponse):
            for item in answer.info:
                yield _parse(item)

    async def stat(self, key: str) -> Snapshot:
        """One snapshot; raises NotFound."""
        request = pb.StatSnapshotRequest(snapshotter=self.snapshotter, key=key)
        answer = await self._calls.unary(f"{_SERVICE}/Stat", request, pb.StatSnapshotResponse)
        return _parse(answer.info)

    async def sizes(self, key: str) -> tuple[int, int]:
        """The bytes of a snapshot itself, and with all those below it; raises NotFound."""
        own = (await self.usage(key)).size
        total, parent = own, (await self.stat(key)).parent
        while parent:
            total += (await self.usage(parent)).size
            parent = (await self.stat(parent)).parent
        return own, total

    async def prepare(
        self, key: str, parent: str = "", labels: Mapping[str, str] | None = None
    ) -> builtins.list[Mount]:
        """Makes a writable snapshot; raises AlreadyExists, NotFound for the parent."""
        request = pb.PrepareSnapshotRequest(
            snapshotter=self.snapshotter, key=key, parent=parent, labels=dict(labels or {})
        )
        answer = await self._calls.unary(f"{_SERVICE}/Prepare", request, pb.PrepareSnapshotResponse)
        return [Mount.parse(item) for item in answer.mounts]

    async def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> builtins.list[Mount]:
        """Makes a read-only snapshot; raises AlreadyExists, NotFound for the parent."""
        request = pb.ViewSnapshotRequest(
            snapshotter=self.snapshotter, key=key, parent=parent, labels=dict(labels or {})
        )
        answer = await self._calls.unary(f"{_SERVICE}/View", request, pb.ViewSnapshotResponse)
        return [Mount.parse(item) for item in answer.mounts]

    async def mounts(self, key: str) -> builtins.list[Mount]:
        """How a view or an active snapshot is mounted; raises NotFound."""
        request = pb.MountsRequest(snapshotter=self.snapshotter, key=key)
        answer = await self._calls.unary(f"{_SERVICE}/Mounts", request, pb.MountsResponse)
        return [Mount.parse(item) for item in answer.mounts]

    async def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None) -> None:
        """Turns the active snapshot `key` into the committed one `name`; raises AlreadyExists."""
        request = pb.CommitSnapshotRequest(snapshotter=self.snapshotter, name=name, key=key, labels=dict(labels or {}))
        await self._calls.unary(f"{_SERVICE}/Commit", request, Empty)

    async def remove(self, key: str) -> None:
        """Removes a snapshot; raises NotFound, FailedPrecondition where it has children."""
        request = pb.RemoveSnapshotRequest(snapshotter=self.snapshotter, key=key)
        await self._calls.unary(f"{_SERVICE}/Remove", request, Empty)

    async def label(self, key: str, labels: Mapping[str, str]) -> Snapshot:
        """Sets labels; an empty value takes one away."""
        request = pb.UpdateSnapshotRequest(
            snapshotter=self.snapshotter, info=pb.Info(name=key, labels=dict(labels)), update_mask=label_mask(labels)
        )
        answer = await self._calls.unary(f"{_SERVICE}/Update", request, pb.UpdateSnapshotResponse)
        return _parse(answer.info)

    async def usage(self, key: str) -> Usage:
        """What a snapshot uses."""
        request = pb.UsageRequest(snapshotter=self.snapshotter, key=key)
        answer = await self._calls.unary(f"{_SERVICE}/Usage", request, pb.UsageResponse)
        return Usage(answer.size, answer.inodes)

    async def cleanup(self) -> None:
        """Removes directories that no record needs."""
        await self._calls.unary(f"{_SERVICE}/Cleanup", pb.CleanupRequest(snapshotter=self.snapshotter), Empty)
