"""Leases keep resources from the garbage collector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wherry.daemon.gc import Collector
from wherry.daemon.metadata import Metadata
from wherry.proto import leases_pb2 as pb


class LeaseStore:
    def __init__(self, metadata: Metadata) -> None:
        raise NotImplementedError

    async def create(self, namespace: str, id: str = "", labels: Mapping[str, str] | None = None) -> pb.Lease:  # noqa: A002
        """An id is made up where none is given. An in-process user gives the label `containerd.io/gc.expire` (RFC 3339)."""
        raise NotImplementedError

    async def delete(self, namespace: str, id: str) -> None:  # noqa: A002
        raise NotImplementedError

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[pb.Lease]:
        raise NotImplementedError

    async def add_resource(self, namespace: str, id: str, type: str, resource: str) -> None:  # noqa: A002
        """`type`: content, ingests, images, snapshots/NAME. What is made under a lease is added by its store."""
        raise NotImplementedError

    async def delete_resource(self, namespace: str, id: str, type: str, resource: str) -> None:  # noqa: A002
        raise NotImplementedError

    async def list_resources(self, namespace: str, id: str) -> list[pb.Resource]:  # noqa: A002
        raise NotImplementedError


class LeaseService:
    SERVICE = "containerd.services.leases.v1.Leases"

    def __init__(self, store: LeaseStore, collector: Collector) -> None:
        raise NotImplementedError
