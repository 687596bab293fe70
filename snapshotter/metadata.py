"""The records of a snapshotter: keys, names, parents, labels, usage; SQLite in WAL mode, one file.

A record's `id` is the number of its directory. Numbers are never used twice, so a directory without a record is
garbage, whatever left it. Who makes a directory makes it inside of `write()`, before the record is committed; who
removes one removes it after: a crash leaves directories without a record, never the other way round.

Nothing here syncs on the way of a container's start: commits are written to the WAL without fsync (a power loss may
take the last ones, a crash of the process takes none), and the WAL is checkpointed by `checkpoint()`, which others
call when there is time. `write(durable=True)` syncs; it is for snapshots that are images' layers. The sync comes after
the commit, when others may write again: SQLite finds the end of what is whole in a WAL by checksums, so what one
`fdatasync` of it covers is a prefix of the commits.

The error texts follow containerd's, which clients compare with.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from wherry.core.errors import AlreadyExists, DataLoss, FailedPrecondition, InvalidArgument, NotFound
from wherry.core.filters import compile_filters
from wherry.linux.files import reserve
from wherry.snapshotter.interface import Info, Kind, Usage

SCHEMA_VERSION = 1
CHECKPOINT_BYTES = 4 << 20
"""A WAL of this size is worth the two fsyncs of a checkpoint: about 1,000 commits."""
WAL_RESERVE = 1 << 20
"""Bytes of WAL that the disk keeps room for: on a full disk snapshots must still be removed, which writes records."""

_SCHEMA = """
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    kind INTEGER NOT NULL,
    parent INTEGER REFERENCES snapshots (id),
    labels TEXT NOT NULL,
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    inodes INTEGER NOT NULL DEFAULT 0,
    size INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX snapshots_parent ON snapshots (parent);
"""
_SELECT = (
    "SELECT s.id, s.name, s.kind, s.labels, s.created, s.updated, s.inodes, s.size, s.parent, p.name"
    " FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent"
)
_CHAIN = (
    "WITH RECURSIVE chain (id, parent) AS (SELECT id, parent FROM snapshots WHERE id = ?"
    " UNION ALL SELECT s.id, s.parent FROM snapshots s JOIN chain c ON s.id = c.parent) SELECT id FROM chain"
)
_Row = tuple[int, str, int, str, int, int, int, int, "int | None", "str | None"]


@dataclass(frozen=True, slots=True)
class Record:
    """A snapshot as it is stored. `id` names its directory; `parent_id` that of its parent (None for none)."""

    id: int
    info: Info
    usage: Usage
    parent_id: int | None


class Metadata:
    """Open, or make, the database at `path`. Any thread may call; a lock is held for the time of a transaction."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._db = _connect(path)
        # of its own, so that a checkpoint keeps no writer waiting; kept, because SQLite holds on to the descriptor of a
        # connection that is closed while another one has locks
        self._checkpointer = _connect(path)
        self._checkpointing = threading.Lock()
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA wal_autocheckpoint=0")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._migrate()
            self._checkpointer.execute("PRAGMA synchronous=NORMAL")
            self._checkpointer.execute("PRAGMA schema_version").fetchone()  # opens what it opens now, not later
            self._wal = os.open(path + "-wal", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with suppress(OSError):  # a file system that can't is no reason not to run
                reserve(self._wal, WAL_RESERVE)
        except sqlite3.DatabaseError as error:
            self._close()
            raise DataLoss(f"snapshots' metadata at {path} can't be read: {error}") from error

    def _migrate(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            self._close()
            raise FailedPrecondition(
                f"snapshots' metadata at {self._path} has schema {version}, made by a newer Wherry;"
                f" this one knows up to {SCHEMA_VERSION}"
            )
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")

    def close(self) -> None:
        """Close the database; the WAL is checkpointed with it."""
        self._close()
        if self._wal >= 0:
            os.close(self._wal)
            self._wal = -1

    def _close(self) -> None:
        self._checkpointer.close()
        self._db.close()

    @contextmanager
    def write(self, *, durable: bool = False) -> Iterator[None]:
        """A transaction that may write: committed at the end, rolled back on any exception."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        if durable:
            # without the lock: a busy disk takes its time, and a container's start must not wait for it
            os.fdatasync(self._wal)

    def checkpoint(self) -> None:
        """Move what the WAL holds into the database; from any thread, and without blocking writers."""
        try:
            if os.stat(self._path + "-wal").st_size < CHECKPOINT_BYTES:
                return
        except FileNotFoundError:
            return
        with self._checkpointing:
            self._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    # reading

    def find(self, key: str) -> Record | None:
        """The record under a key or a name, or None."""
        with self._lock:
            row = self._db.execute(f"{_SELECT} WHERE s.name = ?", (key,)).fetchone()
        return None if row is None else _record(row)

    def get(self, key: str) -> Record:
        """The record under a key or a name; NotFound."""
        record = self.find(key)
        if record is None:
            raise NotFound(f'snapshot "{key}" does not exist: not found')
        return record

    def chain(self, snapshot_id: int | None) -> list[int]:
        """The ids from a committed snapshot down to its bottom layer; none for None."""
        if snapshot_id is None:
            return []
        with self._lock:
            return [row[0] for row in self._db.execute(_CHAIN, (snapshot_id,))]

    def ids(self) -> set[int]:
        """The ids of all snapshots: these directories are not garbage."""
        with self._lock:
            return {row[0] for row in self._db.execute("SELECT id FROM snapshots")}

    def walk(self, filters: Sequence[str], changed: Callable[[Record], Info]) -> Iterator[Info]:
        """The snapshots that match, ordered by name; `changed` may add labels that aren't stored."""
        matches = compile_filters(filters)
        with self._lock:
            rows = self._db.execute(f"{_SELECT} ORDER BY s.name").fetchall()
        for row in rows:
            record = _record(row)
            if matches(_adaptor(record.info)):
                yield changed(record)

    # writing, inside of `write()`

    def create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> Record:
        """Record a new active snapshot or view; errors as `Snapshotter.prepare`."""
        if not key:
            raise InvalidArgument("a snapshot's key can't be empty: invalid argument")
        parent_id = None
        if parent:
            above = self.find(parent)
            if above is None:
                raise NotFound(f'missing parent "{parent}" bucket: not found')
            if above.info.kind is not Kind.COMMITTED:
                raise InvalidArgument(f'parent "{parent}" is not committed snapshot: invalid argument')
            parent_id = above.id
        now = time.time_ns()
        info = Info(kind, key, parent, _set_labels(labels), now, now)
        try:
            cursor = self._db.execute(
                "INSERT INTO snapshots (name, kind, parent, labels, created, updated) VALUES (?, ?, ?, ?, ?, ?)",
                (key, int(kind), parent_id, _dump(info.labels), now, now),
            )
        except sqlite3.IntegrityError:
            raise AlreadyExists(f"snapshot {key}: already exists") from None
        if cursor.lastrowid is None:
            raise DataLoss(f'snapshot "{key}" got no number from the database')
        return Record(cursor.lastrowid, info, Usage(), parent_id)

    def commit(self, key: str, name: str, usage: Usage, labels: Mapping[str, str], parent: str) -> None:
        """Make the active `key` the committed `name`; errors as `Snapshotter.commit`."""
        if not name:
            raise InvalidArgument("a snapshot's name can't be empty: invalid argument")
        record = self.find(key)
        if name != key and self.find(name) is not None:
            raise AlreadyExists(f"committed snapshot {name}: already exists")
        if record is None:
            raise NotFound(f'failed to get active snapshot "{key}": not found')
        if record.info.kind is not Kind.ACTIVE:
            raise FailedPrecondition(f'snapshot "{key}" is not active: failed precondition')
        if name == key:
            raise AlreadyExists(f"committed snapshot {name}: already exists")
        parent_id = self._rebase(record, parent)
        now = time.time_ns()
        self._db.execute(
            "UPDATE snapshots SET name = ?, kind = ?, parent = ?, labels = ?, created = ?, updated = ?, inodes = ?,"
            " size = ? WHERE id = ?",
            (
                name,
                int(Kind.COMMITTED),
                parent_id,
                _dump(_set_labels(labels)),
                now,
                now,
                usage.inodes,
                usage.size,
                record.id,
            ),
        )

    def _rebase(self, record: Record, parent: str) -> int | None:
        """The parent's id after a commit that names `parent`: the one it has, or the one it is set on now."""
        if not parent or parent == record.info.parent:
            return record.parent_id
        if record.info.parent:
            raise InvalidArgument(
                f'cannot change parent of active snapshot "{record.info.name}" on commit: invalid argument'
            )
        above = self.find(parent)
        if above is None:
            raise NotFound(f'missing parent "{parent}" of snapshot "{record.info.name}": not found')
        if above.info.kind is not Kind.COMMITTED:
            raise FailedPrecondition(f'parent "{parent}" is not committed: failed precondition')
        return above.id

    def remove(self, key: str) -> Record:
        """Take the record away and return it; errors as `Snapshotter.remove`."""
        record = self.find(key)
        if record is None:
            raise NotFound(f"failed to remove snapshot {key}: snapshot {key}: not found")
        if self._db.execute("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1", (record.id,)).fetchone():
            raise FailedPrecondition(
                f"failed to remove snapshot {key}: cannot remove snapshot with child: failed precondition"
            )
        self._db.execute("DELETE FROM snapshots WHERE id = ?", (record.id,))
        return record

    def update(self, info: Info, fieldpaths: Sequence[str]) -> Record:
        """Change labels; errors as `Snapshotter.update`."""
        record = self.get(info.name)
        labels = dict(record.info.labels) if fieldpaths else dict(info.labels)
        for path in fieldpaths:
            if path == "labels":
                labels = dict(info.labels)
            elif path.startswith("labels."):
                key = path.removeprefix("labels.")
                labels[key] = info.labels.get(key, "")
            else:
                raise InvalidArgument(f'cannot update "{path}" field on snapshot "{info.name}": invalid argument')
        labels = _set_labels(labels)
        now = time.time_ns()
        self._db.execute("UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?", (_dump(labels), now, record.id))
        old = record.info
        return Record(
            record.id, Info(old.kind, old.name, old.parent, labels, old.created, now), record.usage, record.parent_id
        )


def _record(row: _Row) -> Record:
    number, name, kind, labels, created, updated, inodes, size, parent_id, parent = row
    stored: dict[str, str] = json.loads(labels) if labels else {}
    return Record(
        number, Info(Kind(kind), name, parent or "", stored, created, updated), Usage(inodes, size), parent_id
    )


def _set_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Without those that are empty: an empty value is how a label is taken away."""
    return {key: value for key, value in labels.items() if value}


def _dump(labels: Mapping[str, str]) -> str:
    return json.dumps(labels, separators=(",", ":"), sort_keys=True) if labels else ""


def _adaptor(info: Info) -> Callable[[Sequence[str]], str | None]:
    """The fields that filters know (containerd's): `kind`, `name`, `parent`, `labels."key"`."""

    def field(path: Sequence[str]) -> str | None:
        if path[0] == "labels":
            return info.labels.get(".".join(path[1:]))
        if len(path) > 1:
            return None
        return {"kind": info.kind.name.lower(), "name": info.name, "parent": info.parent}.get(path[0])

    return field


def _connect(path: str) -> sqlite3.Connection:
    """A connection for any thread, one at a time."""
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
