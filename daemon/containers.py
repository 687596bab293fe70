"""Containers as metadata: what would run, not whether it runs.

Rules and texts are containerd's (core/metadata/containers.go). Writing one is on the path that starts a container: no
sync; a power loss may take what was written in the last seconds, a crash of the daemon nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence

from google.protobuf import empty_pb2

from wherry.core import container_logs, topics
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound
from wherry.core.failpoints import reach
from wherry.core.filters import Adaptor, compile_filters, fields
from wherry.core.labels import CONTAINER_NAME, LOG_URI
from wherry.core.names import check_identifier, quote
from wherry.daemon.fields import apply_mask, now, settle_labels
from wherry.daemon.metadata import Metadata
from wherry.daemon.namespaces import Publish, ensure_namespace, require_namespace, unheard
from wherry.proto import containers_pb2 as pb
from wherry.proto import events_pb2
from wherry.proto.service import Context

# what an update without a mask replaces, by containerd's spelling of the path
_MUTABLE = {
    "labels": "labels",
    "spec": "spec",
    "extensions": "extensions",
    "image": "image",
    "snapshotkey": "snapshot_key",
}
# what a mask may name: the spelling of the proto file too
_FIELDS = {**_MUTABLE, "snapshot_key": "snapshot_key"}


class ContainerStore:
    """Containers by namespace and id."""

    def __init__(self, metadata: Metadata, publish: Publish | None = None) -> None:
        self._metadata = metadata
        self._publish = publish or unheard

    def get(self, namespace: str, id: str) -> pb.Container:  # noqa: A002 -- the field's name
        """Raises NotFound (`container "x" in namespace "default": not found`)."""
        row = self._metadata.row("SELECT record FROM containers WHERE namespace = ? AND id = ?", (namespace, id))
        if row is None:
            raise NotFound(f"container {quote(id)} in namespace {quote(namespace)}: not found")
        return pb.Container.FromString(row[0])

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> Sequence[pb.Container]:
        """Those that one of the filters matches (`id`, `image`, `runtime.name`, `labels."key"`), by id."""
        matches = compile_filters(filters)
        query = "SELECT record FROM containers WHERE namespace = ? ORDER BY id"

        def work(connection: sqlite3.Connection) -> list[pb.Container]:
            found = (pb.Container.FromString(row[0]) for row in connection.execute(query, (namespace,)))
            return [container for container in found if matches(_fields(container))]

        return await self._metadata.read(work)

    async def create(self, namespace: str, container: pb.Container) -> pb.Container:
        """Store a new container, with this moment as its times. Raises AlreadyExists, InvalidArgument."""
        made = pb.Container()
        made.CopyFrom(container)
        try:
            _settle(made)
        except InvalidArgument as error:
            raise InvalidArgument(f"create container failed validation: {error.message}") from None
        made.created_at.CopyFrom(now())
        made.updated_at.CopyFrom(made.created_at)
        record = made.SerializeToString()

        def work(connection: sqlite3.Connection) -> None:
            ensure_namespace(connection, namespace)
            if CONTAINER_NAME in made.labels:
                _refuse_name(connection, namespace, made)
            try:
                connection.execute("INSERT INTO containers VALUES (?, ?, ?)", (namespace, made.id, record))
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"container {quote(made.id)}: already exists") from None

        await self._metadata.write(work)
        event = events_pb2.ContainerCreate(id=made.id, image=made.image)
        event.runtime.name = made.runtime.name
        if made.runtime.HasField("options"):
            event.runtime.options.CopyFrom(made.runtime.options)
        reach("daemon.record.created")
        self._publish(namespace, topics.CONTAINER_CREATE, event)
        return made

    async def update(self, namespace: str, container: pb.Container, paths: Sequence[str] = ()) -> pb.Container:
        """Replace what `paths` names (`labels`, `labels.KEY`, `spec`, `image`, `snapshotkey`, `extensions[.KEY]`).

        Without paths all of these are replaced. Raises NotFound; InvalidArgument for what can't be changed.
        """
        id = container.id  # noqa: A001
        if not id:
            raise InvalidArgument("must specify a container id: invalid argument")

        def work(connection: sqlite3.Connection) -> pb.Container:
            query = "SELECT record FROM containers WHERE namespace = ? AND id = ?"
            row = connection.execute(query, (namespace, id)).fetchone()
            if row is None:
                raise NotFound(f"container {quote(id)}: not found")
            updated = pb.Container.FromString(row[0])
            if not paths and updated.snapshotter != container.snapshotter:
                raise InvalidArgument("container.Snapshotter field is immutable: invalid argument")
            if not paths and updated.runtime.name != container.runtime.name:
                raise InvalidArgument("container.Runtime.Name field is immutable: invalid argument")
            apply_mask(
                updated,
                container,
                paths or tuple(_MUTABLE),
                fields=_FIELDS,
                maps=("labels", "extensions"),
                what=quote(id),
            )
            try:
                _settle(updated)
            except InvalidArgument as error:
                raise InvalidArgument(f"update failed validation: {error.message}") from None
            if f"labels.{CONTAINER_NAME}" in paths:
                _refuse_name(connection, namespace, updated)
            updated.updated_at.CopyFrom(now())
            connection.execute(
                "UPDATE containers SET record = ? WHERE namespace = ? AND id = ?",
                (updated.SerializeToString(), namespace, id),
            )
            return updated

        updated = await self._metadata.write(work)
        event = events_pb2.ContainerUpdate(
            id=id, image=updated.image, labels=updated.labels, snapshot_key=updated.snapshot_key
        )
        self._publish(namespace, topics.CONTAINER_UPDATE, event)
        return updated

    async def delete(self, namespace: str, id: str) -> None:  # noqa: A002
        """Raises NotFound."""

        row = self._metadata.row("SELECT record FROM containers WHERE namespace = ? AND id = ?", (namespace, id))

        def work(connection: sqlite3.Connection) -> None:
            query = "DELETE FROM containers WHERE namespace = ? AND id = ?"
            if connection.execute(query, (namespace, id)).rowcount == 0:
                raise NotFound(f"container {quote(id)} in namespace {quote(namespace)}: not found")

        # Before the record: it alone says where the log is, and nothing collects what is left in /var/log, which other
        # daemons share. Who is killed in between has a record without a log, and is asked again.
        if row is not None and (uri := pb.Container.FromString(row[0]).labels.get(LOG_URI)):
            container_logs.remove(uri)  # a few files at most
        reach("daemon.record.logless")
        await self._metadata.write(work, removes=True)
        reach("daemon.record.deleted")
        self._publish(namespace, topics.CONTAINER_DELETE, events_pb2.ContainerDelete(id=id))


def _refuse_name(connection: sqlite3.Connection, namespace: str, made: pb.Container) -> None:
    """Raises AlreadyExists where another container has the name that people call this one by.

    A record is looked into only where the name's bytes are in it: names are short, records have kilobytes.
    """
    name = made.labels[CONTAINER_NAME]
    query = "SELECT record FROM containers WHERE namespace = ? AND instr(record, ?) > 0"
    for (record,) in connection.execute(query, (namespace, name.encode())):
        other = pb.Container.FromString(record)
        if other.id != made.id and (other.labels.get(CONTAINER_NAME) == name or other.id == name):
            raise AlreadyExists(
                f"the container name {quote(name)} is in use by container {quote(other.id)}: already exists"
            )


def _fields(container: pb.Container) -> Adaptor:
    return fields(
        {
            "id": container.id,
            "image": container.image,
            "runtime": {"name": container.runtime.name},
            "labels": container.labels,
        }
    )


def _settle(container: pb.Container) -> None:
    """Check a container that is about to be stored. Raises InvalidArgument."""
    check_identifier("container.ID", container.id)
    if "" in container.extensions:
        raise InvalidArgument("container.Extension keys must not be zero-length: invalid argument")
    settle_labels(container.labels, "containers.Labels")
    if not container.runtime.name:
        raise InvalidArgument("container.Runtime.Name must be set: invalid argument")
    if not container.HasField("spec"):
        raise InvalidArgument("container.Spec must be set: invalid argument")
    if container.snapshot_key and not container.snapshotter:
        raise InvalidArgument("container.Snapshotter must be set if container.SnapshotKey is set: invalid argument")


class ContainerService:
    """containerd.services.containers.v1."""

    SERVICE = "containerd.services.containers.v1.Containers"

    def __init__(self, store: ContainerStore) -> None:
        self._store = store

    async def get(self, request: pb.GetContainerRequest, context: Context) -> pb.GetContainerResponse:
        """One container."""
        return pb.GetContainerResponse(container=self._store.get(require_namespace(context), request.id))

    async def list(self, request: pb.ListContainersRequest, context: Context) -> pb.ListContainersResponse:
        """Those that match."""
        found = await self._store.list(require_namespace(context), request.filters)
        return pb.ListContainersResponse(containers=found)

    async def list_stream(
        self, request: pb.ListContainersRequest, context: Context
    ) -> AsyncIterator[pb.ListContainerMessage]:
        """Those that match, one by one: a list may be larger than a message."""
        for container in await self._store.list(require_namespace(context), request.filters):
            yield pb.ListContainerMessage(container=container)

    async def create(self, request: pb.CreateContainerRequest, context: Context) -> pb.CreateContainerResponse:
        """A new one."""
        namespace = require_namespace(context)
        return pb.CreateContainerResponse(container=await self._store.create(namespace, request.container))

    async def update(self, request: pb.UpdateContainerRequest, context: Context) -> pb.UpdateContainerResponse:
        """What the mask names."""
        namespace = require_namespace(context)
        if not request.container.id:
            raise InvalidArgument("Container.ID required")
        updated = await self._store.update(namespace, request.container, request.update_mask.paths)
        return pb.UpdateContainerResponse(container=updated)

    async def delete(self, request: pb.DeleteContainerRequest, context: Context) -> empty_pb2.Empty:
        """Its metadata; whether a task is there is not asked, as in containerd."""
        await self._store.delete(require_namespace(context), request.id)
        return empty_pb2.Empty()
