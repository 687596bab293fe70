"""The database of everything the daemon knows: SQLite (WAL) in one file, one writer.

INTERFACE, published first; the implementation follows within the hour.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Metadata:
    """`ROOT/metadata.db`: reads at once in the loop's thread, writes through one writer thread, syncs in a third."""

    @classmethod
    async def open(cls, path: str) -> Metadata:
        """Open or make the database, migrate it forward, start its threads. Raises FailedPrecondition if it is newer."""
        raise NotImplementedError

    def row(self, sql: str, args: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row of a key lookup, read at once in the loop's thread (tens of microseconds)."""
        raise NotImplementedError

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in the reader thread, in one snapshot of the database: for what is longer than a key lookup."""
        raise NotImplementedError

    async def write(self, work: Callable[[sqlite3.Connection], T], *, durable: bool = False, removes: bool = False) -> T:
        """Run `work` in the writer thread in a transaction of its own (batched); what it raises rolls back only it.

        `durable`: return after it is on disk. `removes`: tells the garbage collector that there may be garbage.
        """
        raise NotImplementedError

    async def sync(self) -> None:
        """All that was committed before is on disk when this returns."""
        raise NotImplementedError

    async def close(self) -> None:
        """Finish what is queued, checkpoint, end the threads."""
        raise NotImplementedError
