"""One container's whole life over the gRPC API, the same calls to either daemon.

The calls are written out here, below any client library, so that what is measured is the daemon and not the client.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from bench.daemons import Daemon
from wherry.proto import containers_pb2, service, snapshots_pb2, tasks_pb2

_CONTAINERS = "containerd.services.containers.v1.Containers"
_SNAPSHOTS = "containerd.services.snapshots.v1.Snapshots"
_TASKS = "containerd.services.tasks.v1.Tasks"
_NAMESPACE = (("containerd-namespace", "default"),)
_TEMPLATE = "bench-template"


class Api:
    """A gRPC channel to a daemon, and a container made by `ctr` whose spec and parent snapshot serve as a template."""

    def __init__(self, daemon: Daemon, image: str) -> None:
        self._daemon = daemon
        self._image = image
        self._container = containers_pb2.Container()
        self._parent = ""

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(f"unix://{self._daemon.address}")
        self._calls = {
            method.path: self._channel.unary_unary(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
            for name in (_CONTAINERS, _SNAPSHOTS, _TASKS)
            for method in service.methods(name).values()
            if not (method.client_streaming or method.server_streaming)
        }
        self._daemon.ctr("containers", "create", self._image, _TEMPLATE, "true")
        answer = await self._call(_CONTAINERS, "Get", containers_pb2.GetContainerRequest(id=_TEMPLATE))
        self._container = answer.container
        stat = snapshots_pb2.StatSnapshotRequest(
            snapshotter=self._container.snapshotter, key=self._container.snapshot_key
        )
        self._parent = (await self._call(_SNAPSHOTS, "Stat", stat)).info.parent
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._daemon.ctr("containers", "rm", _TEMPLATE)
        await self._channel.close(None)

    async def _call(self, name: str, method: str, request: Message) -> Any:
        return await self._calls[f"/{name}/{method}"](request, metadata=_NAMESPACE, timeout=30)

    async def run_to_end(self, name: str) -> None:
        """Create, start, wait, delete: nothing of the container is left. Raises where it did not exit with 0.

        The record comes before the snapshot that it names: without a lease only the record keeps the snapshot.
        """
        container = containers_pb2.Container()
        container.CopyFrom(self._container)
        container.id = container.snapshot_key = name
        container.spec.value = container.spec.value.replace(_TEMPLATE.encode(), name.encode())
        await self._call(_CONTAINERS, "Create", containers_pb2.CreateContainerRequest(container=container))
        prepare = snapshots_pb2.PrepareSnapshotRequest(snapshotter=container.snapshotter, key=name, parent=self._parent)
        mounts = await self._call(_SNAPSHOTS, "Prepare", prepare)
        create = tasks_pb2.CreateTaskRequest(container_id=name, rootfs=mounts.mounts)
        await self._call(_TASKS, "Create", create)
        wait = self._calls[f"/{_TASKS}/Wait"](tasks_pb2.WaitRequest(container_id=name), metadata=_NAMESPACE, timeout=30)
        await self._call(_TASKS, "Start", tasks_pb2.StartRequest(container_id=name))
        status = (await wait).exit_status
        await self._call(_TASKS, "Delete", tasks_pb2.DeleteTaskRequest(container_id=name))
        remove = snapshots_pb2.RemoveSnapshotRequest(snapshotter=container.snapshotter, key=name)
        await self._call(_SNAPSHOTS, "Remove", remove)
        await self._call(_CONTAINERS, "Delete", containers_pb2.DeleteContainerRequest(id=name))
        if status:
            raise SystemExit(f"bench: {name} on {self._daemon.kind} exited with {status}")
