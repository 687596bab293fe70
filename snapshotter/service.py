"""A snapshotter served to others: what containerd calls a proxy plugin of type `snapshot`.

Keys come as the other daemon's metadata makes them (`NAMESPACE/NUMBER/KEY`), so there are no namespaces here, and the
request's field `snapshotter` is whatever that daemon calls us.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from google.protobuf import empty_pb2

from wherry.proto import snapshots_pb2 as pb
from wherry.proto.service import Context
from wherry.snapshotter.interface import Snapshotter
from wherry.snapshotter.wire import SERVICE as SNAPSHOTS
from wherry.snapshotter.wire import info_from_proto, info_to_proto, mounts_to_proto

T = TypeVar("T")
LIST_BLOCK = 100
"""Infos in one message of a list, as containerd sends them."""
THREADS = 4


class SnapshotterService:
    """containerd.services.snapshots.v1 over one snapshotter, which blocks: so it is called in threads."""

    SERVICE = SNAPSHOTS

    def __init__(self, snapshotter: Snapshotter) -> None:
        """`close` closes the snapshotter, too."""
        self._snapshotter = snapshotter
        self._threads = ThreadPoolExecutor(THREADS, "snapshotter")
        # the deletion of a removed tree may take long, and is asked for while containers start
        self._slow = ThreadPoolExecutor(2, "snapshotter-slow")

    async def close(self) -> None:
        """Wait for what runs, then close the snapshotter."""
        for threads in (self._threads, self._slow):
            await asyncio.to_thread(threads.shutdown, wait=True)
        self._snapshotter.close()

    async def _run(self, work: Callable[[], T], *, slow: bool = False) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._slow if slow else self._threads, work)

    async def prepare(self, request: pb.PrepareSnapshotRequest, context: Context) -> pb.PrepareSnapshotResponse:
        """An active snapshot."""
        mounts = await self._run(lambda: self._snapshotter.prepare(request.key, request.parent, dict(request.labels)))
        return pb.PrepareSnapshotResponse(mounts=mounts_to_proto(mounts))

    async def view(self, request: pb.ViewSnapshotRequest, context: Context) -> pb.ViewSnapshotResponse:
        """A snapshot to read."""
        mounts = await self._run(lambda: self._snapshotter.view(request.key, request.parent, dict(request.labels)))
        return pb.ViewSnapshotResponse(mounts=mounts_to_proto(mounts))

    async def mounts(self, request: pb.MountsRequest, context: Context) -> pb.MountsResponse:
        """How to see one."""
        return pb.MountsResponse(mounts=mounts_to_proto(await self._run(lambda: self._snapshotter.mounts(request.key))))

    async def commit(self, request: pb.CommitSnapshotRequest, context: Context) -> empty_pb2.Empty:
        """An active snapshot becomes a layer."""
        labels = dict(request.labels)
        await self._run(lambda: self._snapshotter.commit(request.name, request.key, labels, request.parent), slow=True)
        return empty_pb2.Empty()

    async def remove(self, request: pb.RemoveSnapshotRequest, context: Context) -> empty_pb2.Empty:
        """Its record now, its files soon."""
        await self._run(lambda: self._snapshotter.remove(request.key))
        return empty_pb2.Empty()

    async def stat(self, request: pb.StatSnapshotRequest, context: Context) -> pb.StatSnapshotResponse:
        """What is known of one."""
        return pb.StatSnapshotResponse(info=info_to_proto(await self._run(lambda: self._snapshotter.stat(request.key))))

    async def update(self, request: pb.UpdateSnapshotRequest, context: Context) -> pb.UpdateSnapshotResponse:
        """Its labels."""
        wanted, paths = info_from_proto(request.info), list(request.update_mask.paths)
        info = await self._run(lambda: self._snapshotter.update(wanted, paths))
        return pb.UpdateSnapshotResponse(info=info_to_proto(info))

    async def list(self, request: pb.ListSnapshotsRequest, context: Context) -> AsyncIterator[pb.ListSnapshotsResponse]:
        """Those that match, in blocks."""
        filters = list(request.filters)
        found = await self._run(lambda: [info_to_proto(info) for info in self._snapshotter.walk(filters)])
        for start in range(0, len(found), LIST_BLOCK):
            yield pb.ListSnapshotsResponse(info=found[start : start + LIST_BLOCK])

    async def usage(self, request: pb.UsageRequest, context: Context) -> pb.UsageResponse:
        """What one takes by itself."""
        usage = await self._run(lambda: self._snapshotter.usage(request.key), slow=True)
        return pb.UsageResponse(size=usage.size, inodes=usage.inodes)

    async def cleanup(self, request: pb.CleanupRequest, context: Context) -> empty_pb2.Empty:
        """Wait for the files of what was removed to be gone."""
        await self._run(self._snapshotter.cleanup, slow=True)
        return empty_pb2.Empty()
