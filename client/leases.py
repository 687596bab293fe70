"""Leases keep resources from the garbage collector."""

from __future__ import annotations

import builtins
import os
import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from google.protobuf.empty_pb2 import Empty

from wherry.client.transport import Calls
from wherry.client.values import seconds
from wherry.core.labels import GC_EXPIRE
from wherry.core.tuples import NamedTuple
from wherry.proto import leases_pb2 as pb

_SERVICE = "containerd.services.leases.v1.Leases"


class Lease(NamedTuple):
    """A lease; what it holds is asked for with `Leases.resources`."""

    id: str
    created_at: float = 0.0
    labels: Mapping[str, str] = MappingProxyType({})


class Resource(NamedTuple):
    """What a lease holds: `type` is `content`, `snapshots/NAME` or `ingests`, `id` its digest, key or ref."""

    id: str
    type: str


def _parse(message: pb.Lease) -> Lease:
    return Lease(message.id, seconds(message.created_at), dict(message.labels))


def new_id() -> str:
    """An id that nobody else has: nanoseconds and four random bytes, as containerd's clients make theirs."""
    return f"{time.time_ns() % 1_000_000_000}-{os.urandom(4).hex()}"


def expiry(after: float, now: float | None = None) -> str:
    """The value of the label `containerd.io/gc.expire`, `after` seconds from now (RFC 3339)."""
    at = time.gmtime((time.time() if now is None else now) + after)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", at)


class Leases:
    """The leases of a namespace."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def list(self, filters: Iterable[str] = ()) -> list[Lease]:
        """All leases that one of the filters lets through."""
        answer = await self._calls.unary(f"{_SERVICE}/List", pb.ListRequest(filters=filters), pb.ListResponse)
        return [_parse(item) for item in answer.leases]

    async def create(
        self, lease: str = "", *, labels: Mapping[str, str] | None = None, expires: float | None = None
    ) -> Lease:
        """Makes a lease, under a new id where none is given; `expires` is in seconds from now."""
        all_labels = dict(labels or {})
        if expires:
            all_labels[GC_EXPIRE] = expiry(expires)
        request = pb.CreateRequest(id=lease or new_id(), labels=all_labels)
        answer = await self._calls.unary(f"{_SERVICE}/Create", request, pb.CreateResponse)
        return _parse(answer.lease)

    async def delete(self, lease: str, *, sync: bool = False) -> None:
        """Ends a lease; raises NotFound. With `sync` it returns after the garbage collection."""
        await self._calls.unary(f"{_SERVICE}/Delete", pb.DeleteRequest(id=lease, sync=sync), Empty)

    async def resources(self, lease: str) -> builtins.list[Resource]:
        """What a lease holds."""
        request = pb.ListResourcesRequest(id=lease)
        answer = await self._calls.unary(f"{_SERVICE}/ListResources", request, pb.ListResourcesResponse)
        return [Resource(item.id, item.type) for item in answer.resources]

    async def add(self, lease: str, resource: Resource) -> None:
        """Puts something under a lease."""
        request = pb.AddResourceRequest(id=lease, resource=pb.Resource(id=resource.id, type=resource.type))
        await self._calls.unary(f"{_SERVICE}/AddResource", request, Empty)

    async def remove(self, lease: str, resource: Resource) -> None:
        """Takes something out of a lease."""
        request = pb.DeleteResourceRequest(id=lease, resource=pb.Resource(id=resource.id, type=resource.type))
        await self._calls.unary(f"{_SERVICE}/DeleteResource", request, Empty)
