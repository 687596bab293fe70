"""The records of snapshots: what `SnapshotStore` writes, each function within one transaction."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import NamedTuple

from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from wherry.core.names import quote
from wherry.daemon.fields import timestamp
from wherry.daemon.leases import SNAPSHOTS, hold, release
from wherry.daemon.namespaces import ensure_namespace
from wherry.proto import snapshots_pb2 as pb
from wherry.snapshotter import interface

_SELECT = "SELECT backend, parent, record FROM snapshots WHERE namespace = ? AND snapshotter = ? AND key = ?"
_INSERT = (
    "INSERT INTO snapshots (namespace, snapshotter, key, backend, parent, origin, record) VALUES (?, ?, ?, ?, ?, ?, ?)"
)
_DELETE = "DELETE FROM snapshots WHERE namespace = ? AND snapshotter = ? AND key = ?"


class Scope(NamedTuple):
    """Whose snapshots a write is about, and the lease that its caller works under."""

    namespace: str
    snapshotter: str
    lease: str | None = None

    def hold(self, connection: sqlite3.Connection, key: str) -> None:
        """Have the caller's lease hold a snapshot. Raises NotFound where the lease is gone."""
        hold(connection, self.namespace, self.lease, f"{SNAPSHOTS}/{self.snapshotter}", key)

    def release(self, connection: sqlite3.Connection, key: str) -> None:
        """Have the caller's lease hold a snapshot no more."""
        release(connection, self.namespace, self.lease, f"{SNAPSHOTS}/{self.snapshotter}", key)

    def at(self, key: str) -> tuple[str, str, str]:
        """The columns that name a snapshot."""
        return self.namespace, self.snapshotter, key


@dataclass(slots=True)
class Record:
    """A snapshot: the snapshotter's key for it, its parent's key in the namespace, and what clients see."""

    backend: str
    parent: str
    info: pb.Info


def lookup(connection: sqlite3.Connection, scope: Scope, key: str, what: str = "snapshot") -> Record:
    """Raises NotFound; `what` leads its message."""
    row = connection.execute(f"{_SELECT} AND origin = ''", scope.at(key)).fetchone()
    if row is None:
        raise NotFound(f"{what} {key} does not exist: not found")
    return Record(row[0], row[1], pb.Info.FromString(row[2]))


def insert(connection: sqlite3.Connection, scope: Scope, info: pb.Info, backend: str, below: str) -> None:
    """Record what the snapshotter has made as `backend` on `below`, its key for the parent.

    Raises AlreadyExists; NotFound where the parent went meanwhile; InvalidArgument where another took its name.
    """
    ensure_namespace(connection, scope.namespace)
    if info.parent:
        parent = lookup(connection, scope, info.parent, "parent snapshot")
        if parent.backend != below:
            raise InvalidArgument(f"mismatched parent {info.parent}: invalid argument")
    scope.hold(connection, info.name)
    try:
        connection.execute(_INSERT, (*scope.at(info.name), backend, info.parent, "", info.SerializeToString()))
    except sqlite3.IntegrityError:
        raise AlreadyExists(f"snapshot {quote(info.name)}: already exists") from None


def adopt(connection: sqlite3.Connection, scope: Scope, wanted: pb.Info, target: str, found: interface.Info) -> None:
    """Record a committed snapshot that the snapshotter had already, under the name that was wanted."""
    info = pb.Info(name=target, parent=wanted.parent, kind=pb.COMMITTED, labels={**found.labels, **wanted.labels})
    info.created_at.CopyFrom(timestamp(found.created))
    info.updated_at.CopyFrom(timestamp(found.updated))
    insert(connection, scope, info, found.name, found.parent)


def begin_commit(
    connection: sqlite3.Connection, scope: Scope, info: pb.Info, *, key: str, backend: str, parent: str
) -> tuple[Record, str]:
    """Record that `key` is about to be committed as `info.name`; the key stays what it was until `end_commit`.

    Returns the key's record and the snapshotter's key of a parent that it is to be set on ("" where it stays on its
    own). Raises AlreadyExists, NotFound, FailedPrecondition.
    """
    record = lookup(connection, scope, key)
    if record.info.kind != pb.ACTIVE:
        raise FailedPrecondition(f"snapshot {key} is not active: failed precondition")
    if parent and record.parent not in {"", parent}:
        raise InvalidArgument(f"snapshot {key} has the parent {record.parent}, not {parent}: invalid argument")
    info.parent = record.parent or parent
    below = ""
    if info.parent:
        below = lookup(connection, scope, info.parent, "parent snapshot").backend
    scope.hold(connection, info.name)
    try:
        connection.execute(_INSERT, (*scope.at(info.name), backend, info.parent, key, info.SerializeToString()))
    except sqlite3.IntegrityError:
        raise AlreadyExists(f"snapshot {quote(info.name)}: already exists") from None
    return record, below if not record.parent else ""


def end_commit(connection: sqlite3.Connection, scope: Scope, name: str) -> None:
    """The snapshotter has committed: the key is no more, the name is there."""
    query = "SELECT origin FROM snapshots WHERE namespace = ? AND snapshotter = ? AND key = ?"
    row = connection.execute(query, scope.at(name)).fetchone()
    if row is None:
        raise NotFound(f"snapshot {name} does not exist: not found")
    connection.execute(_DELETE, scope.at(row[0]))
    scope.release(connection, row[0])
    query = "UPDATE snapshots SET origin = '' WHERE namespace = ? AND snapshotter = ? AND key = ?"
    connection.execute(query, scope.at(name))


def undo_commit(connection: sqlite3.Connection, scope: Scope, name: str) -> None:
    """The snapshotter has not committed: the name isn't there."""
    connection.execute(f"{_DELETE} AND origin <> ''", scope.at(name))
    scope.release(connection, name)


def pending_commits(connection: sqlite3.Connection, snapshotter: str) -> list[tuple[str, str, str]]:
    """(namespace, name, snapshotter's key) of commits that were begun and not ended."""
    query = "SELECT namespace, key, backend FROM snapshots WHERE snapshotter = ? AND origin <> ''"
    return [(row[0], row[1], row[2]) for row in connection.execute(query, (snapshotter,)).fetchall()]


def remove(connection: sqlite3.Connection, scope: Scope, key: str) -> str:
    """Drop a record; the snapshotter's key whose files are to go. Raises NotFound, FailedPrecondition (children)."""
    record = lookup(connection, scope, key)
    query = "SELECT 1 FROM snapshots WHERE namespace = ? AND snapshotter = ? AND parent = ? LIMIT 1"
    if connection.execute(query, scope.at(key)).fetchone() is not None:
        raise FailedPrecondition("cannot remove snapshot with child: failed precondition")
    connection.execute(_DELETE, scope.at(key))
    scope.release(connection, key)
    return record.backend
