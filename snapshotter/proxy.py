"""A snapshotter behind somebody else's socket: containerd's proxy plugin of type `snapshot`, from the daemon's side.

The contract is `interface.Snapshotter`; what the other side answers is passed on, errors too. The namespace of a key
(`NAMESPACE/NUMBER/KEY`) goes along as the call's, as containerd has it: some snapshotters want one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

from google.protobuf.message import Message

from wherry.core.errors import Unimplemented, WherryError
from wherry.linux.mounts import Mount
from wherry.proto import snapshots_pb2 as pb
from wherry.proto.grpc.blocking import GrpcClient
from wherry.proto.service import GRPC_NAMESPACE
from wherry.snapshotter.interface import Info, Usage
from wherry.snapshotter.wire import SERVICE, info_from_proto, info_to_proto, mounts_from_proto

M = TypeVar("M", bound=Message)
T = TypeVar("T")
CALL_SECONDS = 30.0
"""For what a container's start waits for; a mute plugin must not hold up a caller for ever."""
SLOW_SECONDS = 600.0
"""For commits, sizes and cleaning up, which may walk a whole image."""


class ProxySnapshotter:
    """The snapshotter at `address`, which calls it `name`. Errors are the other side's; Unavailable where nobody is
    there, DeadlineExceeded for one that doesn't answer. It connects at the first call, and again when it was gone."""

    rebases = False

    def __init__(self, address: str, name: str, *, namespaces: Iterable[str] = ()) -> None:
        """`namespaces` are those in which there are snapshots of an earlier time: a plugin that wants a namespace with
        a list (containerd's own service) is asked for each of them."""
        self.address = address
        self._name = name
        self._client = GrpcClient(address)
        self._namespaces = set(namespaces)

    def stat(self, key: str) -> Info:
        request = pb.StatSnapshotRequest(snapshotter=self._name, key=key)
        return info_from_proto(self._call("Stat", request, key, pb.StatSnapshotResponse).info)

    def update(self, info: Info, fieldpaths: Sequence[str] = ()) -> Info:
        request = pb.UpdateSnapshotRequest(snapshotter=self._name, info=info_to_proto(info))
        if fieldpaths:
            request.update_mask.paths.extend(fieldpaths)
        return info_from_proto(self._call("Update", request, info.name, pb.UpdateSnapshotResponse).info)

    def usage(self, key: str) -> Usage:
        request = pb.UsageRequest(snapshotter=self._name, key=key)
        found = self._call("Usage", request, key, pb.UsageResponse, SLOW_SECONDS)
        return Usage(found.inodes, found.size)

    def mounts(self, key: str) -> list[Mount]:
        request = pb.MountsRequest(snapshotter=self._name, key=key)
        return mounts_from_proto(self._call("Mounts", request, key, pb.MountsResponse).mounts)

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        request = pb.PrepareSnapshotRequest(snapshotter=self._name, key=key, parent=parent, labels=labels or {})
        # a copy of the parent may be made (native), or a layer fetched (remote snapshotters)
        return mounts_from_proto(self._call("Prepare", request, key, pb.PrepareSnapshotResponse, SLOW_SECONDS).mounts)

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        request = pb.ViewSnapshotRequest(snapshotter=self._name, key=key, parent=parent, labels=labels or {})
        return mounts_from_proto(self._call("View", request, key, pb.ViewSnapshotResponse, SLOW_SECONDS).mounts)

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = "") -> None:
        request = pb.CommitSnapshotRequest(
            snapshotter=self._name, name=name, key=key, labels=labels or {}, parent=parent
        )
        self._call("Commit", request, key, Message, SLOW_SECONDS)

    def remove(self, key: str) -> None:
        self._call("Remove", pb.RemoveSnapshotRequest(snapshotter=self._name, key=key), key, Message, SLOW_SECONDS)

    def walk(self, filters: Sequence[str] = ()) -> Iterator[Info]:
        request = pb.ListSnapshotsRequest(snapshotter=self._name, filters=filters)
        return iter(self._everywhere(lambda metadata: self._list(request, metadata)))

    def _list(self, request: pb.ListSnapshotsRequest, metadata: Mapping[str, str]) -> list[Info]:
        answers = self._client.stream(SERVICE, "List", request, timeout=SLOW_SECONDS, metadata=metadata)
        return [info_from_proto(info) for answer in answers for info in cast("pb.ListSnapshotsResponse", answer).info]

    def cleanup(self) -> None:
        """Ask for it; a plugin that knows nothing of it (containerd's interface leaves it open) has nothing to do."""
        request = pb.CleanupRequest(snapshotter=self._name)

        def clean(metadata: Mapping[str, str]) -> list[Message]:
            return [self._client.call(SERVICE, "Cleanup", request, timeout=SLOW_SECONDS, metadata=metadata)]

        with contextlib.suppress(Unimplemented):
            self._everywhere(clean)

    def _everywhere(self, ask: Callable[[Mapping[str, str]], list[T]]) -> list[T]:
        """What is asked of no namespace, and of each where the other side wants one."""
        try:
            return ask({})
        except WherryError as error:
            # containerd's service, whose code for it isn't the same in all calls
            if "namespace is required" not in error.message:
                raise
        return [item for namespace in sorted(self._namespaces) for item in ask({GRPC_NAMESPACE: namespace})]

    def close(self) -> None:
        self._client.close()

    def _call(self, name: str, request: Message, key: str, kind: type[M], timeout: float = CALL_SECONDS) -> M:
        namespace, slash, _ = key.partition("/")
        metadata = {}
        if slash:
            self._namespaces.add(namespace)
            metadata[GRPC_NAMESPACE] = namespace
        return cast("M", self._client.call(SERVICE, name, request, timeout=timeout, metadata=metadata))
