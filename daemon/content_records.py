"""The records of blobs and uploads: what `ContentStore` writes, each function within one transaction."""

from __future__ import annotations

import sqlite3
import time
from typing import TYPE_CHECKING

from wherry.daemon.leases import CONTENT, INGESTS, hold, release
from wherry.daemon.namespaces import ensure_namespace
from wherry.proto import content_pb2 as pb

if TYPE_CHECKING:
    from wherry.daemon.content_writer import ContentWriter

# seconds that an upload which no lease holds stays after it was begun
INGEST_LIFETIME = 24 * 3600
GET = "SELECT record FROM blobs WHERE namespace = ? AND digest = ?"
# the blob of another namespace: of any, or of those that offer theirs (containerd's label for that)
_OTHERS = "SELECT record FROM blobs WHERE digest = ? LIMIT 1"
_OFFERED = (
    "SELECT record FROM blobs JOIN namespaces ON namespaces.name = blobs.namespace WHERE digest = ? "
    """AND json_extract(labels, '$."containerd.io/namespace.shareable"') = 'true' LIMIT 1"""
)
STATUS = "SELECT id, ref, total, expected, shared, started FROM ingests WHERE namespace = ?"


def begin(
    connection: sqlite3.Connection,
    namespace: str,
    ref: str,
    *,
    total: int,
    expected: str,
    lease: str | None,
    isolated: bool = False,
) -> tuple[int, int, int, int | None] | None:
    """Find or make the record of an upload: (id, total, started, size of the blob that it stands for).

    None where the namespace has the expected blob; the lease holds that then. With `isolated` it stands for the blobs
    of those namespaces only that offer theirs.
    """
    ensure_namespace(connection, namespace)
    shared = ""
    shared_size = None
    if expected:
        if connection.execute(GET, (namespace, expected)).fetchone() is not None:
            hold(connection, namespace, lease, CONTENT, expected)
            return None
        other = connection.execute(_OFFERED if isolated else _OTHERS, (expected,)).fetchone()
        if other is not None:
            size = pb.Info.FromString(other[0]).size
            if total in {0, size}:
                shared, shared_size = expected, size
    leased = hold(connection, namespace, lease, INGESTS, ref)
    expires = None if leased else time.time_ns() + INGEST_LIFETIME * 10**9
    row = connection.execute(
        "SELECT id, total, started FROM ingests WHERE namespace = ? AND ref = ?", (namespace, ref)
    ).fetchone()
    if row is not None:
        id_, known_total, started = row
        connection.execute(
            "UPDATE ingests SET total = ?, expected = ?, shared = ?, expires = ? WHERE id = ?",
            (total or known_total, expected, shared, expires, id_),
        )
        return id_, known_total, started, shared_size
    started = time.time_ns()
    cursor = connection.execute(
        "INSERT INTO ingests (namespace, ref, total, expected, shared, started, expires) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (namespace, ref, total, expected, shared, started, expires),
    )
    return cursor.lastrowid or 0, total, started, shared_size


def finish(connection: sqlite3.Connection, writer: ContentWriter, digest: str, record: bytes) -> bool:
    """Replace the record of an upload by that of its blob; False where the namespace had the blob already."""
    namespace, ref = writer.namespace, writer.ref
    connection.execute("DELETE FROM ingests WHERE id = ?", (writer.id,))
    release(connection, namespace, writer.lease, INGESTS, ref)
    hold(connection, namespace, writer.lease, CONTENT, digest)
    ensure_namespace(connection, namespace)
    made = connection.execute("INSERT INTO blobs VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (namespace, digest, record))
    return made.rowcount == 1


def is_used(connection: sqlite3.Connection, digest: str) -> bool:
    """Whether a record names a blob, or an upload stands for it."""
    query = "SELECT 1 FROM blobs WHERE digest = ?1 UNION ALL SELECT 1 FROM ingests WHERE shared = ?1 LIMIT 1"
    return connection.execute(query, (digest,)).fetchone() is not None
