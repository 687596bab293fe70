"""Snapshots to clients: containerd.services.snapshots.v1."""

from __future__ import annotations

from collections.abc import AsyncIterator

from google.protobuf import empty_pb2

from wherry.daemon.namespaces import require_namespace
from wherry.daemon.snapshots import SnapshotStore
from wherry.proto import snapshots_pb2 as pb
from wherry.proto.service import Context
from wherry.snapshotter.wire import mounts_to_proto

# infos in one message of a list, as containerd sends them
LIST_BLOCK = 100


class SnapshotService:
    """containerd.services.snapshots.v1."""

    SERVICE = "containerd.services.snapshots.v1.Snapshots"

    def __init__(self, store: SnapshotStore) -> None:
        self._store = store

    async def prepare(self, request: pb.PrepareSnapshotRequest, context: Context) -> pb.PrepareSnapshotResponse:
        """An active snapshot."""
        mounts = await self._store.prepare(
            require_namespace(context),
            request.snapshotter,
            request.key,
            request.parent,
            request.labels,
            lease=context.lease,
        )
        return pb.PrepareSnapshotResponse(mounts=mounts_to_proto(mounts))

    async def view(self, request: pb.ViewSnapshotRequest, context: Context) -> pb.ViewSnapshotResponse:
        """A snapshot to read."""
        mounts = await self._store.view(
            require_namespace(context),
            request.snapshotter,
            request.key,
            request.parent,
            request.labels,
            lease=context.lease,
        )
        return pb.ViewSnapshotResponse(mounts=mounts_to_proto(mounts))

    async def mounts(self, request: pb.MountsRequest, context: Context) -> pb.MountsResponse:
        """How to see one."""
        mounts = await self._store.mounts(require_namespace(context), request.snapshotter, request.key)
        return pb.MountsResponse(mounts=mounts_to_proto(mounts))

    async def commit(self, request: pb.CommitSnapshotRequest, context: Context) -> empty_pb2.Empty:
        """An active snapshot becomes a layer."""
        await self._store.commit(
            require_namespace(context),
            request.snapshotter,
            request.name,
            request.key,
            request.labels,
            parent=request.parent,
            lease=context.lease,
        )
        return empty_pb2.Empty()

    async def remove(self, request: pb.RemoveSnapshotRequest, context: Context) -> empty_pb2.Empty:
        """Its record now, its files soon."""
        await self._store.remove(require_namespace(context), request.snapshotter, request.key, lease=context.lease)
        return empty_pb2.Empty()

    async def stat(self, request: pb.StatSnapshotRequest, context: Context) -> pb.StatSnapshotResponse:
        """What is known of one."""
        info = await self._store.stat(require_namespace(context), request.snapshotter, request.key)
        return pb.StatSnapshotResponse(info=info)

    async def update(self, request: pb.UpdateSnapshotRequest, context: Context) -> pb.UpdateSnapshotResponse:
        """Its labels."""
        namespace = require_namespace(context)
        info = await self._store.update(namespace, request.snapshotter, request.info, request.update_mask.paths)
        return pb.UpdateSnapshotResponse(info=info)

    async def list(self, request: pb.ListSnapshotsRequest, context: Context) -> AsyncIterator[pb.ListSnapshotsResponse]:
        """Those that match, in blocks."""
        found = await self._store.list(require_namespace(context), request.snapshotter, request.filters)
        for start in range(0, len(found), LIST_BLOCK):
            yield pb.ListSnapshotsResponse(info=found[start : start + LIST_BLOCK])

    async def usage(self, request: pb.UsageRequest, context: Context) -> pb.UsageResponse:
        """What one takes by itself."""
        size, inodes = await self._store.usage(require_namespace(context), request.snapshotter, request.key)
        return pb.UsageResponse(size=size, inodes=inodes)

    async def cleanup(self, request: pb.CleanupRequest, context: Context) -> empty_pb2.Empty:
        """Wait for the files of what was removed to be gone."""
        require_namespace(context)
        await self._store.cleanup(request.snapshotter)
        return empty_pb2.Empty()
