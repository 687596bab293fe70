"""Leases keep resources from the garbage collector.

A client makes one, works under it (`containerd-lease` in the call's metadata), and what it makes is added. Labels with
a meaning: `containerd.io/gc.expire` (RFC 3339: from then on the lease counts for nothing and is collected itself),
`containerd.io/gc.flat` (only what is named is kept, not what that references).

A lease that doesn't expire is synced at once. One that expires is not: it becomes durable with the first content that
it protects, because all commits are in one log that is synced in order. Source of the rules: containerd's
core/metadata/leases.go.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Mapping, Sequence

from google.protobuf import empty_pb2

from wherry.core.digest import Digest
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound, Unimplemented
from wherry.core.filters import compile_filters, fields
from wherry.core.labels import GC_EXPIRE
from wherry.core.names import quote
from wherry.daemon.fields import now, settle_labels
from wherry.daemon.gc import Collector
from wherry.daemon.metadata import Metadata
from wherry.daemon.namespaces import ensure_namespace, require_namespace
from wherry.proto import leases_pb2 as pb
from wherry.proto.service import Context

# types of resources; those of snapshots are `snapshots/NAME`
CONTENT = "content"
INGESTS = "ingests"
IMAGES = "images"
SNAPSHOTS = "snapshots"


def hold(connection: sqlite3.Connection, namespace: str, lease: str | None, type: str, id: str) -> bool:  # noqa: A002
    """Within a write: add a resource to the lease that the caller works under, if any; whether there was one.

    Raises NotFound where the lease is gone.
    """
    if lease is None:
        return False
    try:
        connection.execute(
            "INSERT INTO lease_resources VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", (namespace, lease, type, id)
        )
    except sqlite3.IntegrityError:
        raise NotFound(f"lease {quote(lease)} does not exist: not found") from None
    return True


def release(connection: sqlite3.Connection, namespace: str, lease: str | None, type: str, id: str) -> None:  # noqa: A002
    """Within a write: take a resource off the lease that the caller works under, if it is there."""
    if lease is not None:
        connection.execute(
            "DELETE FROM lease_resources WHERE namespace = ? AND lease = ? AND type = ? AND id = ?",
            (namespace, lease, type, id),
        )


class LeaseStore:
    """Leases by namespace and id, and what each holds."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    async def create(
        self,
        namespace: str,
        id: str = "",  # noqa: A002 -- the field's name
        labels: Mapping[str, str] | None = None,
    ) -> pb.Lease:
        """Make a lease; an id is made up where none is given. Raises AlreadyExists.

        An in-process user sets the label `containerd.io/gc.expire` (RFC 3339) so that its crash leaves nothing.
        """
        lease = pb.Lease(id=id or _random_id(), created_at=now(), labels=labels or {})
        settle_labels(lease.labels, "lease.Labels")
        record = lease.SerializeToString()

        def work(connection: sqlite3.Connection) -> None:
            ensure_namespace(connection, namespace)
            try:
                connection.execute("INSERT INTO leases VALUES (?, ?, ?)", (namespace, lease.id, record))
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"lease {quote(lease.id)}: already exists") from None

        await self._metadata.write(work, durable=GC_EXPIRE not in lease.labels)
        return lease

    async def delete(self, namespace: str, id: str) -> None:  # noqa: A002
        """Raises NotFound."""

        def work(connection: sqlite3.Connection) -> None:
            query = "DELETE FROM leases WHERE namespace = ? AND id = ?"
            if connection.execute(query, (namespace, id)).rowcount == 0:
                raise NotFound(f"lease {quote(id)}: not found")

        await self._metadata.write(work, removes=True)

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> Sequence[pb.Lease]:
        """Those that one of the filters matches (`id`, `labels."key"`), by id."""
        matches = compile_filters(filters)
        rows = await self._metadata.rows("SELECT record FROM leases WHERE namespace = ? ORDER BY id", (namespace,))
        leases = [pb.Lease.FromString(row[0]) for row in rows]
        return [lease for lease in leases if matches(fields({"id": lease.id, "labels": lease.labels}))]

    async def add_resource(self, namespace: str, id: str, type: str, resource: str) -> None:  # noqa: A002
        """Have the lease hold `resource`, there or not yet; `type`: content, ingests, images, snapshots/NAME.

        What is made under a lease is added by its store. Raises NotFound (the lease), InvalidArgument, Unimplemented.
        """
        _check_resource(type, resource)

        def work(connection: sqlite3.Connection) -> None:
            _require(connection, namespace, id)
            hold(connection, namespace, id, type, resource)

        # what a client protects by hand is protected from a power loss too
        await self._metadata.write(work, durable=True)

    async def delete_resource(self, namespace: str, id: str, type: str, resource: str) -> None:  # noqa: A002
        """Have the lease not hold it any more; one that it didn't hold is fine. Raises as `add_resource`."""
        _check_resource(type, resource)

        def work(connection: sqlite3.Connection) -> None:
            _require(connection, namespace, id)
            release(connection, namespace, id, type, resource)

        await self._metadata.write(work, removes=True)

    async def list_resources(self, namespace: str, id: str) -> Sequence[pb.Resource]:  # noqa: A002
        """What the lease holds. Raises NotFound."""

        def work(connection: sqlite3.Connection) -> list[tuple[str, str]]:
            _require(connection, namespace, id)
            query = "SELECT id, type FROM lease_resources WHERE namespace = ? AND lease = ? ORDER BY type, id"
            return connection.execute(query, (namespace, id)).fetchall()

        return [pb.Resource(id=row[0], type=row[1]) for row in await self._metadata.read(work)]


def _random_id() -> str:
    """An id as containerd makes them up: the time and chance."""
    return f"{time.time_ns()}-{secrets.token_hex(3)}"


def _require(connection: sqlite3.Connection, namespace: str, id: str) -> None:  # noqa: A002
    query = "SELECT 1 FROM leases WHERE namespace = ? AND id = ?"
    if connection.execute(query, (namespace, id)).fetchone() is None:
        raise NotFound(f"lease {quote(id)}: not found")


def _check_resource(type: str, resource: str) -> None:  # noqa: A002
    kind, *rest = type.split("/")
    if kind in {CONTENT, INGESTS, IMAGES}:
        if rest:
            raise InvalidArgument(f"invalid resource type {type}: invalid argument")
        if kind == CONTENT:
            try:
                Digest.parse(resource)
            except InvalidArgument as error:
                raise InvalidArgument(f"invalid content resource id {resource}: {error.message}") from None
    elif kind == SNAPSHOTS:
        if len(rest) != 1 or not rest[0]:
            raise InvalidArgument(f"invalid snapshot resource type {type}: invalid argument")
    else:
        raise Unimplemented(f"resource type {type} not supported yet: not implemented")


class LeaseService:
    """containerd.services.leases.v1."""

    SERVICE = "containerd.services.leases.v1.Leases"

    def __init__(self, store: LeaseStore, collector: Collector) -> None:
        self._store = store
        self._collector = collector

    async def create(self, request: pb.CreateRequest, context: Context) -> pb.CreateResponse:
        """A new one."""
        namespace = require_namespace(context)
        return pb.CreateResponse(lease=await self._store.create(namespace, request.id, request.labels))

    async def delete(self, request: pb.DeleteRequest, context: Context) -> empty_pb2.Empty:
        """With `sync` the answer comes after what it held alone is gone."""
        await self._store.delete(require_namespace(context), request.id)
        if request.sync:
            await self._collector.collect_all()
        return empty_pb2.Empty()

    async def list(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        """Those that match."""
        return pb.ListResponse(leases=await self._store.list(require_namespace(context), request.filters))

    async def add_resource(self, request: pb.AddResourceRequest, context: Context) -> empty_pb2.Empty:
        """Hold something."""
        resource = request.resource
        await self._store.add_resource(require_namespace(context), request.id, resource.type, resource.id)
        return empty_pb2.Empty()

    async def delete_resource(self, request: pb.DeleteResourceRequest, context: Context) -> empty_pb2.Empty:
        """Let something go."""
        resource = request.resource
        await self._store.delete_resource(require_namespace(context), request.id, resource.type, resource.id)
        return empty_pb2.Empty()

    async def list_resources(self, request: pb.ListResourcesRequest, context: Context) -> pb.ListResourcesResponse:
        """What it holds."""
        resources = await self._store.list_resources(require_namespace(context), request.id)
        return pb.ListResourcesResponse(resources=resources)
