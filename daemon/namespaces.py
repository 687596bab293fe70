"""Namespaces, the tenants: their store, their service, and the check that every call goes through.

A namespace that nobody made reads as empty, and the first write into it makes it; making one by its own service is for
its labels. The texts are containerd's (core/metadata/namespaces.go, pkg/namespaces).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence

from google.protobuf import empty_pb2
from google.protobuf.message import Message

from wherry.core import names, topics
from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from wherry.core.filters import compile_filters, fields
from wherry.core.names import check_identifier, quote
from wherry.daemon.fields import settle_labels
from wherry.daemon.metadata import Metadata
from wherry.proto import events_pb2
from wherry.proto import namespaces_pb2 as pb
from wherry.proto.service import Context

# publish(namespace, topic, message): hands an event to the bus at once (`events.Exchange.publish`)
Publish = Callable[[str, str, Message], object]


def unheard(namespace: str, topic: str, message: Message) -> None:
    """A `Publish` for stores without a bus."""


def require_namespace(context: Context) -> str:
    """The call's namespace, checked.

    Raises FailedPrecondition where it is missing, InvalidArgument where it is malformed, with containerd's texts.
    """
    return names.require_namespace(context.namespace)


def ensure_namespace(connection: sqlite3.Connection, name: str) -> None:
    """Make the namespace if it isn't there; the first step of every write that creates something in it."""
    connection.execute("INSERT OR IGNORE INTO namespaces (name) VALUES (?)", (name,))


class NamespaceStore:
    """Namespaces and their labels. Every store's first write into a namespace makes it."""

    def __init__(self, metadata: Metadata, publish: Publish | None = None) -> None:
        self._metadata = metadata
        self._publish = publish or unheard

    def labels(self, name: str) -> dict[str, str]:
        """The labels of a namespace; empty for an unknown one (cheap: for defaults such as the runtime)."""
        row = self._metadata.row("SELECT labels FROM namespaces WHERE name = ?", (name,))
        return dict(json.loads(row[0])) if row else {}

    def get(self, name: str) -> pb.Namespace:
        """The namespace; an unknown one has no labels."""
        return pb.Namespace(name=name, labels=self.labels(name))

    async def list(self, filter: str = "") -> Sequence[pb.Namespace]:  # noqa: A002 -- the field's name
        """All that exist, by name; with a filter (`name`, `labels."key"`) those that match."""
        matches = compile_filters([filter] if filter else [])
        found = []
        for name, text in await self._metadata.rows("SELECT name, labels FROM namespaces ORDER BY name"):
            labels = json.loads(text)
            if matches(fields({"name": name, "labels": labels})):
                found.append(pb.Namespace(name=name, labels=labels))
        return found

    async def create(self, name: str, labels: Mapping[str, str] | None = None) -> pb.Namespace:
        """Make a namespace. Raises InvalidArgument (its name, a label), AlreadyExists."""
        check_identifier("", name)
        settled = dict(labels or {})
        settle_labels(settled, "namespace.Labels")

        def work(connection: sqlite3.Connection) -> None:
            try:
                connection.execute("INSERT INTO namespaces VALUES (?, ?)", (name, json.dumps(settled)))
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"namespace {quote(name)}: already exists") from None

        await self._metadata.write(work, durable=True)
        self._publish(name, topics.NAMESPACE_CREATE, events_pb2.NamespaceCreate(name=name, labels=settled))
        return pb.Namespace(name=name, labels=settled)

    async def update(self, namespace: pb.Namespace, paths: Sequence[str] = ()) -> pb.Namespace:
        """Set all labels, or those that `paths` names as `labels.KEY`; the namespace is made if it isn't there.

        Raises InvalidArgument for another path.
        """
        name = check_identifier("", namespace.name)
        given = dict(namespace.labels)

        def work(connection: sqlite3.Connection) -> dict[str, str]:
            ensure_namespace(connection, name)
            text = connection.execute("SELECT labels FROM namespaces WHERE name = ?", (name,)).fetchone()[0]
            labels: dict[str, str] = json.loads(text) if paths else given
            for path in paths:
                head, dot, key = path.partition(".")
                if path == "labels":
                    labels = dict(given)
                elif head == "labels" and dot:
                    labels[key] = given.get(key, "")
                else:
                    raise InvalidArgument(f"cannot update {quote(path)} field: invalid argument")
            settle_labels(labels, "namespace.Labels")
            connection.execute("UPDATE namespaces SET labels = ? WHERE name = ?", (json.dumps(labels), name))
            return labels

        labels = await self._metadata.write(work, durable=True)
        self._publish(name, topics.NAMESPACE_UPDATE, events_pb2.NamespaceUpdate(name=name, labels=labels))
        return pb.Namespace(name=name, labels=labels)

    async def delete(self, name: str) -> None:
        """Delete an empty namespace, and the leases and unfinished uploads that are left in it.

        Raises NotFound, and FailedPrecondition for one that still has images, blobs, containers or snapshots.
        """

        def work(connection: sqlite3.Connection) -> None:
            left = _left_in(connection, name)
            if left:
                raise FailedPrecondition(
                    f"namespace {quote(name)} must be empty, but it still has {', '.join(left)}: failed precondition"
                )
            if connection.execute("DELETE FROM namespaces WHERE name = ?", (name,)).rowcount == 0:
                raise NotFound(f"namespace {quote(name)}: not found")
            for table in ("leases", "ingests", "sandboxes"):
                connection.execute(f"DELETE FROM {table} WHERE namespace = ?", (name,))  # noqa: S608 -- our own names

        await self._metadata.write(work, durable=True, removes=True)
        self._publish(name, topics.NAMESPACE_DELETE, events_pb2.NamespaceDelete(name=name))


def _left_in(connection: sqlite3.Connection, name: str) -> list[str]:
    """What keeps a namespace from being deleted, in containerd's words."""
    left = []
    for table in ("images", "blobs", "containers"):
        query = f"SELECT 1 FROM {table} WHERE namespace = ? LIMIT 1"  # noqa: S608 -- our own names
        if connection.execute(query, (name,)).fetchone():
            left.append(table)
    rows = connection.execute("SELECT DISTINCT snapshotter FROM snapshots WHERE namespace = ? ORDER BY 1", (name,))
    left += [f"snapshots on {quote(row[0])} snapshotter" for row in rows.fetchall()]
    return left


class NamespaceService:
    """containerd.services.namespaces.v1; needs no namespace in the call."""

    SERVICE = "containerd.services.namespaces.v1.Namespaces"

    def __init__(self, store: NamespaceStore) -> None:
        self._store = store

    async def get(self, request: pb.GetNamespaceRequest, context: Context) -> pb.GetNamespaceResponse:
        """One namespace."""
        return pb.GetNamespaceResponse(namespace=self._store.get(request.name))

    async def list(self, request: pb.ListNamespacesRequest, context: Context) -> pb.ListNamespacesResponse:
        """All of them."""
        return pb.ListNamespacesResponse(namespaces=await self._store.list(request.filter))

    async def create(self, request: pb.CreateNamespaceRequest, context: Context) -> pb.CreateNamespaceResponse:
        """A new one."""
        made = await self._store.create(request.namespace.name, request.namespace.labels)
        return pb.CreateNamespaceResponse(namespace=made)

    async def update(self, request: pb.UpdateNamespaceRequest, context: Context) -> pb.UpdateNamespaceResponse:
        """Its labels."""
        updated = await self._store.update(request.namespace, list(request.update_mask.paths))
        return pb.UpdateNamespaceResponse(namespace=updated)

    async def delete(self, request: pb.DeleteNamespaceRequest, context: Context) -> empty_pb2.Empty:
        """An empty one."""
        await self._store.delete(request.name)
        return empty_pb2.Empty()
