"""`ROOT/network.db`: networks, who is on them, and the addresses that are given out. SQLite, one transaction a change.

For one thread at a time. A record comes before what it describes (an interface, a rule) and goes after it, so that
whoever starts next can tell by the records what should be there. Nothing waits for the disk: after a power loss nothing
that these records describe is there either, and networks that were made are synced.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence

from wherry.core.errors import AlreadyExists, FailedPrecondition, NotFound
from wherry.core.names import quote
from wherry.network.model import Connection, Endpoint, Network, connection_from, network_from, plain
from wherry.network.pools import mac_of, pick_address

_VERSION = 1
_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE networks (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE,
    record TEXT NOT NULL,                           -- model.Network
    last4 TEXT NOT NULL DEFAULT '', last6 TEXT NOT NULL DEFAULT ''   -- the addresses that were given out last
);
CREATE TABLE connections (
    namespace TEXT NOT NULL, container TEXT NOT NULL,
    record TEXT NOT NULL,                           -- model.Connection
    PRIMARY KEY (namespace, container)
);
CREATE TABLE addresses (
    network TEXT NOT NULL REFERENCES networks (id), address TEXT NOT NULL,
    namespace TEXT NOT NULL, container TEXT NOT NULL,
    PRIMARY KEY (network, address)
) WITHOUT ROWID;
CREATE INDEX addresses_owner ON addresses (namespace, container);
PRAGMA user_version = 1;
COMMIT;
"""


class Store:
    """The database. Raises the kinds of wherry.core.errors."""

    def __init__(self, path: str) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        os.chmod(path, 0o600)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("PRAGMA foreign_keys = ON")
        version: int = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > _VERSION:
            self._db.close()
            raise FailedPrecondition(f"{path} has schema version {version}, this Wherry knows up to {_VERSION}")
        if version == 0:
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        self._db.close()

    def setting(self, key: str, default: str) -> str:
        """A value that is made once: `default` the first time, what was kept from then on."""
        self._db.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (key, default))
        row = self._db.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
        return str(row[0])

    # -- networks

    def networks(self) -> list[Network]:
        """All, in the order in which they were made."""
        rows = self._db.execute("SELECT record FROM networks ORDER BY rowid").fetchall()
        return [network_from(json.loads(row[0])) for row in rows]

    def add_network(self, network: Network) -> None:
        """Raises AlreadyExists. Is on disk when it returns."""
        self._db.execute("PRAGMA synchronous = FULL")
        try:
            self._db.execute(
                "INSERT INTO networks (id, name, record) VALUES (?, ?, ?)",
                (network.id, network.name, json.dumps(plain(network))),
            )
        except sqlite3.IntegrityError:
            raise AlreadyExists(f"network {quote(network.name)}: already exists") from None
        finally:
            self._db.execute("PRAGMA synchronous = OFF")

    def remove_network(self, network: Network) -> None:
        """Raises FailedPrecondition while somebody is on it, NotFound."""
        try:
            if self._db.execute("DELETE FROM networks WHERE id = ?", (network.id,)).rowcount == 0:
                raise NotFound(f"network {quote(network.name)}: not found")
        except sqlite3.IntegrityError:
            users = self._users(network)
            raise FailedPrecondition(
                f"network {quote(network.name)} is in use by {', '.join(users)}: failed precondition"
            ) from None

    def _users(self, network: Network) -> list[str]:
        query = "SELECT DISTINCT container FROM addresses WHERE network = ? ORDER BY container LIMIT 5"
        return [quote(row[0]) for row in self._db.execute(query, (network.id,)).fetchall()]

    # -- connections

    def connections(self) -> list[Connection]:
        rows = self._db.execute("SELECT record FROM connections ORDER BY rowid").fetchall()
        return [connection_from(json.loads(row[0])) for row in rows]

    def save(self, connection: Connection) -> None:
        """Record a connection as it is now; addresses of its endpoints must have been taken."""
        self._db.execute(
            "INSERT OR REPLACE INTO connections VALUES (?, ?, ?)",
            (connection.namespace, connection.container, json.dumps(plain(connection))),
        )

    def update(self, connection: Connection) -> None:
        """As `save`, where there is still a record of it."""
        self._db.execute(
            "UPDATE connections SET record = ? WHERE namespace = ? AND container = ?",
            (json.dumps(plain(connection)), connection.namespace, connection.container),
        )

    def take(
        self, connection: Connection, wanted: Sequence[tuple[Network, Endpoint]], *, fresh: bool = True
    ) -> Connection:
        """Give each endpoint its addresses and MAC, and record the connection with them; all or nothing.

        An endpoint comes with the addresses it wants (without length), or "" for any. `fresh`: the container has no
        connection yet. Raises AlreadyExists, FailedPrecondition for an address that another one has, ResourceExhausted.
        """
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if fresh and self._known(connection):
                raise AlreadyExists(f"network of container {quote(connection.container)}: already exists")
            for network, endpoint in wanted:
                self._give(connection, network, endpoint)
                connection.endpoints.append(endpoint)
            self.save(connection)
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        return connection

    def drop(self, connection: Connection) -> None:
        """Forget a connection; its addresses are free. One that isn't there is fine."""
        key = (connection.namespace, connection.container)
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("DELETE FROM addresses WHERE namespace = ? AND container = ?", key)
        self._db.execute("DELETE FROM connections WHERE namespace = ? AND container = ?", key)
        self._db.execute("COMMIT")

    def leave(self, connection: Connection, endpoint: Endpoint) -> None:
        """Forget one endpoint; its addresses are free."""
        connection.endpoints = [item for item in connection.endpoints if item is not endpoint]
        self._db.execute("BEGIN IMMEDIATE")
        for address in (endpoint.address4, endpoint.address6):
            query = "DELETE FROM addresses WHERE network = ? AND address = ?"
            self._db.execute(query, (endpoint.network, address))
        self.save(connection)
        self._db.execute("COMMIT")

    def _known(self, connection: Connection) -> bool:
        query = "SELECT 1 FROM connections WHERE namespace = ? AND container = ?"
        return self._db.execute(query, (connection.namespace, connection.container)).fetchone() is not None

    def _give(self, connection: Connection, network: Network, endpoint: Endpoint) -> None:
        row = self._db.execute("SELECT last4, last6 FROM networks WHERE id = ?", (network.id,)).fetchone()
        if row is None:
            raise NotFound(f"network {quote(network.name)}: not found")
        last4, last6 = row
        taken = self._taken(network)
        if (subnet := network.of(4)) is not None:
            address = pick_address(subnet, taken, last4, endpoint.ipv4)
            self._reserve(connection, network, address)
            last4 = last4 if endpoint.ipv4 else address
            endpoint.ipv4, endpoint.gateway4 = f"{address}/{subnet.prefix}", subnet.gateway
            endpoint.mac = endpoint.mac or mac_of(address)
        if (subnet := network.of(6)) is not None:
            address = pick_address(subnet, taken, last6, endpoint.ipv6)
            self._reserve(connection, network, address)
            last6 = last6 if endpoint.ipv6 else address
            endpoint.ipv6, endpoint.gateway6 = f"{address}/{subnet.prefix}", subnet.gateway
        self._db.execute("UPDATE networks SET last4 = ?, last6 = ? WHERE id = ?", (last4, last6, network.id))

    def _taken(self, network: Network) -> set[str]:
        query = "SELECT address FROM addresses WHERE network = ?"
        return {row[0] for row in self._db.execute(query, (network.id,)).fetchall()}

    def _reserve(self, connection: Connection, network: Network, address: str) -> None:
        try:
            self._db.execute(
                "INSERT INTO addresses VALUES (?, ?, ?, ?)",
                (network.id, address, connection.namespace, connection.container),
            )
        except sqlite3.IntegrityError:
            query = "SELECT container FROM addresses WHERE network = ? AND address = ?"
            owner = self._db.execute(query, (network.id, address)).fetchone()
            raise FailedPrecondition(
                f"address {address} is in use by container {quote(owner[0]) if owner else '?'}: failed precondition"
            ) from None
