"""The store of sandboxes (their controller is the tasks' business): containerd.services.sandbox.v1.Store.

Rules and texts are containerd's (core/metadata/sandbox.go).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound
from wherry.core.filters import compile_filters, fields
from wherry.core.names import check_identifier, quote
from wherry.daemon.fields import apply_mask, now, settle_labels
from wherry.daemon.metadata import Metadata
from wherry.daemon.namespaces import ensure_namespace, require_namespace
from wherry.proto import sandbox_pb2 as pb
from wherry.proto import types_pb2
from wherry.proto.service import Context

_GET = "SELECT record FROM sandboxes WHERE namespace = ? AND id = ?"
_FIELDS = {name: name for name in ("labels", "extensions", "spec", "runtime")}


class SandboxStore:
    """Sandboxes by namespace and id."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def get(self, namespace: str, id: str) -> types_pb2.Sandbox:  # noqa: A002 -- the field's name
        """Raises NotFound."""
        row = self._metadata.row(_GET, (namespace, id))
        if row is None:
            raise NotFound(f"sandbox {quote(id)}: not found")
        return types_pb2.Sandbox.FromString(row[0])

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> Sequence[types_pb2.Sandbox]:
        """Those that one of the filters matches (`id`, `labels."key"`), by id."""
        matches = compile_filters(filters)
        rows = await self._metadata.rows("SELECT record FROM sandboxes WHERE namespace = ? ORDER BY id", (namespace,))
        found = [types_pb2.Sandbox.FromString(row[0]) for row in rows]
        return [box for box in found if matches(fields({"id": box.sandbox_id, "labels": box.labels}))]

    async def create(self, namespace: str, sandbox: types_pb2.Sandbox) -> types_pb2.Sandbox:
        """Store a new sandbox, with this moment as its times. Raises AlreadyExists, InvalidArgument."""
        made = types_pb2.Sandbox()
        made.CopyFrom(sandbox)
        _settle(made)
        made.created_at.CopyFrom(now())
        made.updated_at.CopyFrom(made.created_at)
        record = made.SerializeToString()

        def work(connection: sqlite3.Connection) -> None:
            ensure_namespace(connection, namespace)
            try:
                connection.execute("INSERT INTO sandboxes VALUES (?, ?, ?)", (namespace, made.sandbox_id, record))
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"sandbox {quote(made.sandbox_id)}: already exists") from None

        await self._metadata.write(work)
        return made

    async def update(self, namespace: str, sandbox: types_pb2.Sandbox, paths: Sequence[str] = ()) -> types_pb2.Sandbox:
        """Replace what `paths` names (`labels[.KEY]`, `extensions[.KEY]`, `spec`, `runtime`), or all of these.

        Raises NotFound, InvalidArgument.
        """
        id = sandbox.sandbox_id  # noqa: A001

        def work(connection: sqlite3.Connection) -> types_pb2.Sandbox:
            row = connection.execute(_GET, (namespace, id)).fetchone()
            if row is None:
                raise NotFound(f"sandbox {quote(id)}: not found")
            updated = types_pb2.Sandbox.FromString(row[0])
            if not paths and updated.runtime.name != sandbox.runtime.name:
                raise InvalidArgument("sandbox.Runtime.Name field is immutable: invalid argument")
            what = f"sandbox {quote(id)}"
            maps = ("labels", "extensions")
            apply_mask(updated, sandbox, paths or tuple(_FIELDS), fields=_FIELDS, maps=maps, what=what)
            _settle(updated)
            updated.updated_at.CopyFrom(now())
            connection.execute(
                "UPDATE sandboxes SET record = ? WHERE namespace = ? AND id = ?",
                (updated.SerializeToString(), namespace, id),
            )
            return updated

        return await self._metadata.write(work)

    async def delete(self, namespace: str, id: str) -> None:  # noqa: A002
        """Raises NotFound."""

        def work(connection: sqlite3.Connection) -> None:
            query = "DELETE FROM sandboxes WHERE namespace = ? AND id = ?"
            if connection.execute(query, (namespace, id)).rowcount == 0:
                raise NotFound(f"failed to delete sandbox {quote(id)}: not found")

        await self._metadata.write(work, removes=True)


def _settle(sandbox: types_pb2.Sandbox) -> None:
    check_identifier("invalid sandbox ID", sandbox.sandbox_id)
    settle_labels(sandbox.labels, "sandbox.Labels")


class SandboxService:
    """containerd.services.sandbox.v1.Store."""

    SERVICE = "containerd.services.sandbox.v1.Store"

    def __init__(self, store: SandboxStore) -> None:
        self._store = store

    async def create(self, request: pb.StoreCreateRequest, context: Context) -> pb.StoreCreateResponse:
        """A new one."""
        return pb.StoreCreateResponse(sandbox=await self._store.create(require_namespace(context), request.sandbox))

    async def update(self, request: pb.StoreUpdateRequest, context: Context) -> pb.StoreUpdateResponse:
        """What the fields name."""
        updated = await self._store.update(require_namespace(context), request.sandbox, request.fields)
        return pb.StoreUpdateResponse(sandbox=updated)

    async def get(self, request: pb.StoreGetRequest, context: Context) -> pb.StoreGetResponse:
        """One sandbox."""
        return pb.StoreGetResponse(sandbox=self._store.get(require_namespace(context), request.sandbox_id))

    async def list(self, request: pb.StoreListRequest, context: Context) -> pb.StoreListResponse:
        """Those that match."""
        return pb.StoreListResponse(list=await self._store.list(require_namespace(context), request.filters))

    async def delete(self, request: pb.StoreDeleteRequest, context: Context) -> pb.StoreDeleteResponse:
        """Its record."""
        await self._store.delete(require_namespace(context), request.sandbox_id)
        return pb.StoreDeleteResponse()
