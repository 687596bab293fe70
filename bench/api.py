"""One container's whole life over the gRPC API, the same calls to either daemon.

The calls are written out here, below any client library, so that what is measured is the daemon and not the client.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Self

from google.protobuf import any_pb2
from google.protobuf.message import Message

from bench.channel import CallFailed, Channel
from bench.daemons import Daemon
from wherry.proto import containers_pb2, service, snapshots_pb2, tasks_pb2

_CONTAINERS = "containerd.services.containers.v1.Containers"
_SNAPSHOTS = "containerd.services.snapshots.v1.Snapshots"
_TASKS = "containerd.services.tasks.v1.Tasks"
_METHODS = {name: service.methods(name) for name in (_CONTAINERS, _SNAPSHOTS, _TASKS)}
_TEMPLATE = "bench-template"


class Failed(RuntimeError):
    """A daemon refused what it should do, or what it ran failed."""


class Api:
    """A connection to a daemon, and a container made by `ctr` whose spec and parent snapshot serve as a template."""

    def __init__(self, daemon: Daemon, image: str) -> None:
        self._daemon = daemon
        self._image = image
        self._container = containers_pb2.Container()
        self._parent = ""

    @property
    def kind(self) -> str:
        """Which daemon it is. Two must not have containers of one name at a time: they would share a cgroup."""
        return self._daemon.kind

    async def __aenter__(self) -> Self:
        self._channel = await Channel.open(self._daemon.address, "default")
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
        self._channel.close()

    async def _call(self, name: str, method: str, request: Message) -> Any:
        try:
            return await self._channel.call(_METHODS[name][method], request)
        except CallFailed as error:
            raise Failed(f"{self._daemon.kind}: {error}") from None

    def _wait(self, container: str) -> Awaitable[tasks_pb2.WaitResponse]:
        return self._channel.call(_METHODS[_TASKS]["Wait"], tasks_pb2.WaitRequest(container_id=container))

    async def run_to_end(self, name: str) -> float:
        """Create, start, wait, delete: nothing of the container is left. Raises where it did not exit with 0.

        Returns the seconds that it took until Start was answered.
        """
        begun = time.perf_counter()
        await self._create(name)
        wait = self._wait(name)
        await self._call(_TASKS, "Start", tasks_pb2.StartRequest(container_id=name))
        started = time.perf_counter() - begun
        status = (await wait).exit_status
        await self._remove(name)
        if status:
            raise Failed(f"{name} on {self._daemon.kind} exited with {status}")
        return started

    async def sleep(self, name: str) -> None:
        """A container that runs until `end`."""
        await self._create(name, ["sleep", "100000"])
        await self._call(_TASKS, "Start", tasks_pb2.StartRequest(container_id=name))

    async def end(self, name: str) -> None:
        """Kill a container and remove all of it."""
        wait = self._wait(name)
        await self._call(_TASKS, "Kill", tasks_pb2.KillRequest(container_id=name, signal=9))
        await wait
        await self._remove(name)

    async def exec_true(self, name: str, exec_id: str) -> None:
        """Run `true` in a running container to its end; raises where it did not exit with 0."""
        spec = any_pb2.Any(type_url="types.containerd.io/opencontainers/runtime-spec/1/Process")
        spec.value = json.dumps({"args": ["true"], "cwd": "/", "env": ["PATH=/bin"], "user": {}}).encode()
        request = tasks_pb2.ExecProcessRequest(container_id=name, exec_id=exec_id, spec=spec)
        await self._call(_TASKS, "Exec", request)
        await self._call(_TASKS, "Start", tasks_pb2.StartRequest(container_id=name, exec_id=exec_id))
        wait = tasks_pb2.WaitRequest(container_id=name, exec_id=exec_id)
        status = (await self._call(_TASKS, "Wait", wait)).exit_status
        delete = tasks_pb2.DeleteProcessRequest(container_id=name, exec_id=exec_id)
        await self._call(_TASKS, "DeleteProcess", delete)
        if status:
            raise Failed(f"exec in {name} on {self._daemon.kind} exited with {status}")

    async def _create(self, name: str, args: list[str] | None = None) -> None:
        """The record comes before the snapshot that it names: without a lease only the record keeps the snapshot."""
        container = containers_pb2.Container()
        container.CopyFrom(self._container)
        container.id = container.snapshot_key = name
        container.spec.value = container.spec.value.replace(_TEMPLATE.encode(), name.encode())
        if args is not None:
            spec = json.loads(container.spec.value)
            spec["process"]["args"] = args
            container.spec.value = json.dumps(spec).encode()
        await self._call(_CONTAINERS, "Create", containers_pb2.CreateContainerRequest(container=container))
        prepare = snapshots_pb2.PrepareSnapshotRequest(snapshotter=container.snapshotter, key=name, parent=self._parent)
        mounts = await self._call(_SNAPSHOTS, "Prepare", prepare)
        create = tasks_pb2.CreateTaskRequest(container_id=name, rootfs=mounts.mounts)
        await self._call(_TASKS, "Create", create)

    async def _remove(self, name: str) -> None:
        await self._call(_TASKS, "Delete", tasks_pb2.DeleteTaskRequest(container_id=name))
        remove = snapshots_pb2.RemoveSnapshotRequest(snapshotter=self._container.snapshotter, key=name)
        await self._call(_SNAPSHOTS, "Remove", remove)
        await self._call(_CONTAINERS, "Delete", containers_pb2.DeleteContainerRequest(id=name))
