"""The tables of `metadata.db` and how older ones become today's.

Every noun has a table keyed by namespace and name whose column `record` is the noun's message of the API, serialized:
what a client sent is kept whole, reading one is a parse. Columns beside it are those that SQL has to ask for. Times
are nanoseconds since the epoch.
"""

from __future__ import annotations

import sqlite3

from wherry.core.errors import FailedPrecondition

# MIGRATIONS[n] takes the schema from version n to n + 1; what is here is never edited, only added to
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE namespaces (
        name TEXT PRIMARY KEY,
        labels TEXT NOT NULL DEFAULT '{}'          -- JSON object
    ) WITHOUT ROWID;
    CREATE TABLE images (
        namespace TEXT NOT NULL, name TEXT NOT NULL,
        record BLOB NOT NULL,                       -- containerd.services.images.v1.Image
        PRIMARY KEY (namespace, name)
    );
    CREATE TABLE containers (
        namespace TEXT NOT NULL, id TEXT NOT NULL,
        record BLOB NOT NULL,                       -- containerd.services.containers.v1.Container
        PRIMARY KEY (namespace, id)
    );
    CREATE TABLE sandboxes (
        namespace TEXT NOT NULL, id TEXT NOT NULL,
        record BLOB NOT NULL,                       -- containerd.types.Sandbox
        PRIMARY KEY (namespace, id)
    );
    CREATE TABLE leases (
        namespace TEXT NOT NULL, id TEXT NOT NULL,
        record BLOB NOT NULL,                       -- containerd.services.leases.v1.Lease
        PRIMARY KEY (namespace, id)
    );
    CREATE TABLE lease_resources (
        namespace TEXT NOT NULL, lease TEXT NOT NULL, type TEXT NOT NULL, id TEXT NOT NULL,
        PRIMARY KEY (namespace, lease, type, id),
        FOREIGN KEY (namespace, lease) REFERENCES leases (namespace, id) ON DELETE CASCADE
    ) WITHOUT ROWID;
    CREATE TABLE blobs (
        namespace TEXT NOT NULL, digest TEXT NOT NULL,
        record BLOB NOT NULL,                       -- containerd.services.content.v1.Info
        PRIMARY KEY (namespace, digest)
    );
    CREATE INDEX blobs_digest ON blobs (digest);
    CREATE TABLE ingests (
        id INTEGER PRIMARY KEY AUTOINCREMENT,       -- the name of its folder below ingest/; never used twice
        namespace TEXT NOT NULL, ref TEXT NOT NULL,
        total INTEGER NOT NULL,
        expected TEXT NOT NULL,
        shared TEXT NOT NULL DEFAULT '',            -- digest of the blob that it takes over, '' for bytes of its own
        started INTEGER NOT NULL,
        expires INTEGER,                            -- NULL: as long as a lease names it
        UNIQUE (namespace, ref)
    );
    CREATE TABLE snapshots (
        namespace TEXT NOT NULL, snapshotter TEXT NOT NULL, key TEXT NOT NULL,
        backend TEXT NOT NULL,                      -- the snapshotter's own key for it
        parent TEXT NOT NULL,                       -- a key of the same namespace, '' for none
        origin TEXT NOT NULL DEFAULT '',            -- the key that is being committed as this one, '' when it is done
        record BLOB NOT NULL,                       -- containerd.services.snapshots.v1.Info
        PRIMARY KEY (namespace, snapshotter, key)
    );
    CREATE INDEX snapshots_parent ON snapshots (namespace, snapshotter, parent);
    """,
    """
    CREATE TABLE events (
        sequence INTEGER PRIMARY KEY,
        at INTEGER NOT NULL,                        -- when it happened, as its envelope says
        key BLOB,                                   -- the same for an event that is told twice, NULL: never told twice
        envelope BLOB NOT NULL                      -- containerd.types.Envelope
    );
    CREATE UNIQUE INDEX events_key ON events (key) WHERE key IS NOT NULL;
    CREATE INDEX events_at ON events (at);
    CREATE TABLE event_sequence (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        reserved INTEGER NOT NULL,                  -- no number above this one was ever given; on disk before one is
        dropped INTEGER NOT NULL                    -- the last number that is kept no more
    );
    INSERT INTO event_sequence VALUES (1, 0, 0);
    """,
)


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """Bring the schema to today's version, step by step, each in a transaction.

    Raises FailedPrecondition where a later Wherry wrote the file: what it means is not known here.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise FailedPrecondition(
            f"{path} has schema version {version}, this Wherry knows up to {len(MIGRATIONS)}: failed precondition"
        )
    for number in range(version, len(MIGRATIONS)):
        connection.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;")
