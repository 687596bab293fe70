"""Containers as metadata: what would run, not whether it runs (that is a task)."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.empty_pb2 import Empty

from wherry.client.transport import Calls
from wherry.client.values import label_mask, mask, seconds
from wherry.core import typeurl
from wherry.core.tuples import NamedTuple
from wherry.proto import containers_pb2 as pb

_SERVICE = "containerd.services.containers.v1.Containers"


class Container(NamedTuple):
    """A container's record. `spec` is the OCI runtime specification, decoded; None where it is no JSON."""

    id: str
    image: str = ""
    labels: Mapping[str, str] = MappingProxyType({})
    runtime: str = ""
    runtime_options: Packed | None = None
    spec: Mapping[str, Any] | None = None
    snapshotter: str = ""
    snapshot_key: str = ""
    sandbox: str = ""
    created_at: float = 0.0
    updated_at: float = 0.0
    extensions: Mapping[str, Packed] = MappingProxyType({})


def _spec(packed: Packed) -> Mapping[str, Any] | None:
    # containerd takes any Any as the spec of a container; only JSON is of use here
    if not packed.value.lstrip().startswith(b"{"):
        return None
    spec: Mapping[str, Any] = typeurl.unpack_json(packed)
    return spec


def parse(message: pb.Container) -> Container:
    """A container from the wire."""
    return Container(
        id=message.id,
        image=message.image,
        labels=dict(message.labels),
        runtime=message.runtime.name,
        runtime_options=message.runtime.options if message.runtime.HasField("options") else None,
        spec=_spec(message.spec) if message.HasField("spec") else None,
        snapshotter=message.snapshotter,
        snapshot_key=message.snapshot_key,
        sandbox=message.sandbox,
        created_at=seconds(message.created_at),
        updated_at=seconds(message.updated_at),
        extensions=dict(message.extensions),
    )


def to_message(container: Container) -> pb.Container:
    """A container for the wire."""
    message = pb.Container(
        id=container.id,
        labels=dict(container.labels),
        image=container.image,
        snapshotter=container.snapshotter,
        snapshot_key=container.snapshot_key,
        sandbox=container.sandbox,
        extensions=dict(container.extensions),
    )
    if container.runtime:
        message.runtime.name = container.runtime
        if container.runtime_options is not None:
            message.runtime.options.CopyFrom(container.runtime_options)
    if container.spec is not None:
        message.spec.CopyFrom(typeurl.pack_json(typeurl.SPEC, container.spec))
    return message


class Containers:
    """The containers of a namespace."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def list(self, filters: Iterable[str] = ()) -> list[Container]:
        """All containers that one of the filters (containerd's filter language) lets through."""
        request = pb.ListContainersRequest(filters=filters)
        answer = await self._calls.unary(f"{_SERVICE}/List", request, pb.ListContainersResponse)
        return [parse(item) for item in answer.containers]

    async def get(self, container: str) -> Container:
        """One container; raises NotFound."""
        answer = await self._calls.unary(
            f"{_SERVICE}/Get", pb.GetContainerRequest(id=container), pb.GetContainerResponse
        )
        return parse(answer.container)

    async def create(self, container: Container) -> Container:
        """Writes a record; raises AlreadyExists, InvalidArgument."""
        request = pb.CreateContainerRequest(container=to_message(container))
        answer = await self._calls.unary(f"{_SERVICE}/Create", request, pb.CreateContainerResponse)
        return parse(answer.container)

    async def update(self, container: Container, paths: builtins.list[str]) -> Container:
        """Changes the fields that `paths` names (`labels`, `labels.KEY`, `spec`, `extensions`, `image` …)."""
        request = pb.UpdateContainerRequest(container=to_message(container), update_mask=mask(paths))
        answer = await self._calls.unary(f"{_SERVICE}/Update", request, pb.UpdateContainerResponse)
        return parse(answer.container)

    async def label(self, container: str, labels: Mapping[str, str]) -> Container:
        """Sets labels; an empty value takes the label away."""
        request = pb.UpdateContainerRequest(
            container=pb.Container(id=container, labels=dict(labels)), update_mask=label_mask(labels)
        )
        answer = await self._calls.unary(f"{_SERVICE}/Update", request, pb.UpdateContainerResponse)
        return parse(answer.container)

    async def delete(self, container: str) -> None:
        """Removes the record; raises NotFound, FailedPrecondition. Its snapshot is another call's business."""
        await self._calls.unary(f"{_SERVICE}/Delete", pb.DeleteContainerRequest(id=container), Empty)
