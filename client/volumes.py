"""Volumes: folders of the daemon that outlive containers."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from wherry.client.transport import Calls
from wherry.client.values import seconds
from wherry.core.errors import Unimplemented
from wherry.core.tuples import NamedTuple
from wherry.proto import volumes_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from wherry.client.transport import Response

_SERVICE = "wherry.volumes.v1.Volumes"


class Volume(NamedTuple):
    """A volume. `mountpoint` is its folder on the daemon's host, `containers` the ids of those whose records name it.

    `anonymous`: nobody gave it a name.
    """

    name: str
    mountpoint: str = ""
    labels: Mapping[str, str] = MappingProxyType({})
    options: Mapping[str, str] = MappingProxyType({})
    created_at: float = 0.0
    anonymous: bool = False
    containers: Sequence[str] = ()


def _parse(message: pb.Volume) -> Volume:
    return Volume(
        name=message.name,
        mountpoint=message.mountpoint,
        labels=dict(message.labels),
        options=dict(message.options),
        created_at=seconds(message.created_at),
        anonymous=message.anonymous,
        containers=list(message.containers),
    )


class Volumes:
    """The volumes of a namespace. A daemon that isn't `wherryd` has none: every call raises Unimplemented."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def _call(self, method: str, request: Message, response: type[Response]) -> Response:
        try:
            return await self._calls.unary(f"{_SERVICE}/{method}", request, response)
        except Unimplemented:
            raise Unimplemented("this daemon has no volumes (is it containerd?): use -v with a folder's path") from None

    async def create(
        self, name: str = "", *, labels: Mapping[str, str] | None = None, options: Mapping[str, str] | None = None
    ) -> Volume:
        """Makes a volume, "" has a name made up; one of that name is returned as it is. Raises InvalidArgument."""
        request = pb.CreateVolumeRequest(name=name, labels=dict(labels or {}), options=dict(options or {}))
        return _parse((await self._call("Create", request, pb.VolumeResponse)).volume)

    async def get(self, name: str) -> Volume:
        """One volume; raises NotFound."""
        return _parse((await self._call("Get", pb.GetVolumeRequest(name=name), pb.VolumeResponse)).volume)

    async def list(self) -> builtins.list[Volume]:
        """All of them, by name."""
        answer = await self._call("List", pb.ListVolumesRequest(), pb.ListVolumesResponse)
        return [_parse(item) for item in answer.volumes]

    async def remove(self, name: str) -> None:
        """Removes a volume with what is in it; raises NotFound, FailedPrecondition where a container names it."""
        await self._call("Remove", pb.RemoveVolumeRequest(name=name), Empty)

    async def prune(self, *, every: bool = False, labels: Iterable[str] = ()) -> tuple[builtins.list[str], int]:
        """Removes those that no container names and (without `every`) nobody gave a name: their names, bytes freed."""
        answer = await self._call("Prune", pb.PruneVolumesRequest(all=every, labels=labels), pb.PruneVolumesResponse)
        return list(answer.names), answer.freed

    async def usage(self, name: str) -> int:
        """Bytes on disk."""
        return (await self._call("Usage", pb.GetVolumeRequest(name=name), pb.VolumeUsageResponse)).size
