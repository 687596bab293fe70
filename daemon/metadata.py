"""The database of everything the daemon knows: SQLite (WAL) in one file, one writer.

Who does what, so that the path that starts a container never waits for a disk:

- **The loop's thread** reads single rows by key with a connection of its own (tens of microseconds).
- **The reader thread** runs what is longer: lists, the garbage collector's marking.
- **The writer thread** is the only one that writes. It takes all that is queued into one transaction, each piece in a
  savepoint of its own, and commits with `synchronous=OFF`: a commit is a `write(2)` into the WAL, so a SIGKILL of the
  daemon loses nothing.
- **The sync thread** makes commits survive a power loss: `fdatasync` of the WAL, one for all who wait. SQLite finds the
  end of what is whole in a WAL by checksums, so what was synced is a prefix of the commits.
- **The checkpoint thread** moves the WAL into the database with `synchronous=FULL` on its own connection (it syncs the
  WAL before it writes pages, and the pages before the WAL starts over), when there is enough of it or nothing to do.
  What was committed without a sync is therefore durable a few seconds later at most.

https://www.sqlite.org/wal.html, https://www.sqlite.org/pragma.html#pragma_synchronous
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from wherry.core.errors import Internal, ResourceExhausted, Unavailable, WherryError
from wherry.daemon.metadata_schema import migrate
from wherry.linux.files import reserve

T = TypeVar("T")

# bytes of WAL from which on it is checkpointed even while others write (SQLite's own default is 1000 pages of 4 KiB)
WAL_LIMIT = 8 << 20
# bytes of WAL that the disk keeps room for: on a full disk things must still be removed, which writes records
WAL_RESERVE = 1 << 20
# seconds after a write at which the WAL is checkpointed at the latest: how much a power loss may take of what nobody
# asked to be durable
CHECKPOINT_DELAY = 4.0
# pieces of work in one transaction: bounds how long the first of them waits for the last
BATCH_LIMIT = 128
# a page cache of 512 KiB a connection (the default is 2 MiB): the kernel's cache holds the file anyway
CACHE_KIB = 512
# milliseconds that the writer waits for a checkpoint that holds the write lock to truncate the WAL
BUSY_TIMEOUT = 10_000


@dataclass(slots=True)
class _Job:
    """A piece of work for the writer and who waits for it. `alone`: in a transaction that holds nothing else."""

    work: Callable[[sqlite3.Connection], Any]
    future: asyncio.Future[Any]
    alone: bool
    removes: bool
    quiet: bool
    result: Any = None
    error: BaseException | None = None


class Metadata:
    """`ROOT/metadata.db`: reads at once in the loop's thread, writes through one writer thread, syncs in a third."""

    def __init__(self, path: str, loop: asyncio.AbstractEventLoop) -> None:
        """Use `open`."""
        self.path = path
        # transactions that changed something since the start; the collector sees by it whether its marking still holds
        self.generation = 0
        self._loop = loop
        self._closed = False
        self._watchers: list[Callable[[bool], None]] = []
        self._writer_connection = _connect(path, "OFF")
        migrate(self._writer_connection, path)
        self._row_connection = _connect(path, "OFF", read_only=True)
        self._reader_connection = _connect(path, "OFF", read_only=True)
        self._checkpoint_connection = _connect(path, "FULL")
        self._wal = os.open(path + "-wal", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._reserve()
        _sync_folder(path)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._reader = ThreadPoolExecutor(1, "metadata-reader")
        self._syncer = ThreadPoolExecutor(1, "metadata-sync")
        self._checkpointer = ThreadPoolExecutor(1, "metadata-checkpoint")
        self._sync_next: asyncio.Future[None] | None = None
        self._sync_running = False
        self._checkpoint_timer: asyncio.TimerHandle | None = None
        self._checkpoint_running = False
        self._thread = threading.Thread(target=self._write_loop, name="metadata-writer", daemon=True)
        self._thread.start()

    @classmethod
    async def open(cls, path: str) -> Metadata:
        """Open or make the database, migrate it forward, start its threads.

        Raises FailedPrecondition where a later version wrote it, Internal where it is no database.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(None, cls, path, loop)
        except sqlite3.Error as error:
            raise _translate(error, path) from error

    def row(self, sql: str, args: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row of a key lookup, read at once in the loop's thread (tens of microseconds)."""
        # fetchall ends the statement: one that is left open would hold back checkpoints
        rows = self._row_connection.execute(sql, args).fetchall()
        return cast(tuple[Any, ...], rows[0]) if rows else None

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in the reader thread, in one snapshot of the database: for what is longer than a key lookup."""
        return await self._loop.run_in_executor(self._reader, self._read, work)

    async def rows(self, sql: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query, read in the reader thread."""
        return await self.read(lambda connection: connection.execute(sql, args).fetchall())

    async def write(
        self,
        work: Callable[[sqlite3.Connection], T],
        *,
        durable: bool = False,
        removes: bool = False,
        alone: bool = False,
        quiet: bool = False,
    ) -> T:
        """Run `work` in the writer thread in a transaction of its own (batched); what it raises rolls back only it.

        `durable`: return after it is on disk. `removes`: tells the garbage collector that there may be garbage (an
        update that takes a reference away doesn't, as in containerd).
        `alone`: nothing else is in the transaction. `quiet`: nothing that the collector has to do with (it neither
        counts as a mutation nor spoils a marking). A cancelled caller's work is done all the same.
        Raises ResourceExhausted for a full disk, Unavailable after `close`, and what `work` raises.
        """
        if self._closed:
            raise Unavailable("the metadata is closed: unavailable")
        job = _Job(work, self._loop.create_future(), alone, removes, quiet)
        self._jobs.put(job)
        result = await job.future
        if durable:
            await self.sync()
        return cast(T, result)

    async def sync(self) -> None:
        """All that was committed before is on disk when this returns."""
        waiting = self._sync_next
        if waiting is None:
            waiting = self._sync_next = self._loop.create_future()
            if not self._sync_running:
                self._start_sync()  # takes the future over
        await asyncio.shield(waiting)

    def watch(self, callback: Callable[[bool], None]) -> None:
        """Have `callback(removes)` called in the loop's thread after each transaction."""
        self._watchers.append(callback)

    async def checkpoint(self) -> None:
        """Move the WAL into the database and empty it where nobody writes meanwhile."""
        await self._loop.run_in_executor(self._checkpointer, self._checkpoint)

    async def close(self) -> None:
        """Finish what is queued, checkpoint, end the threads."""
        if self._closed:
            return
        self._closed = True
        if self._checkpoint_timer is not None:
            self._checkpoint_timer.cancel()
        self._jobs.put(None)
        await self._loop.run_in_executor(None, self._thread.join)
        await self.checkpoint()
        for pool in (self._reader, self._syncer, self._checkpointer):
            pool.shutdown(wait=True)
        for connection in (
            self._row_connection,
            self._reader_connection,
            self._checkpoint_connection,
            self._writer_connection,
        ):
            connection.close()
        os.close(self._wal)
        self._wal = -1

    # -- the reader thread

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._reader_connection
        connection.execute("BEGIN")
        try:
            return work(connection)
        finally:
            connection.execute("ROLLBACK")

    # -- the writer thread

    def _write_loop(self) -> None:
        held: _Job | None = None  # a job that has to be alone, found while a batch was gathered
        while True:
            job = held or self._jobs.get()
            held = None
            if job is None:
                return
            batch = [job]
            while not job.alone and len(batch) < BATCH_LIMIT:
                try:
                    following = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    self._jobs.put(None)
                    break
                if following.alone:
                    held = following
                    break
                batch.append(following)
            self._run(batch)
            # the loop is gone only when the process is about to be
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver, batch)

    def _run(self, batch: list[_Job]) -> None:
        connection = self._writer_connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            for job in batch:
                self._run_one(connection, job, savepoint=len(batch) > 1)
            if len(batch) == 1 and batch[0].error is not None:
                connection.execute("ROLLBACK")
                return
            connection.execute("COMMIT")
            if any(not job.quiet for job in batch):
                self.generation += 1
        except BaseException as error:  # noqa: BLE001 -- whatever it is, those who wait have to be told
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            translated = _translate(error, self.path)
            for job in batch:
                job.error = job.error or translated

    def _run_one(self, connection: sqlite3.Connection, job: _Job, savepoint: bool) -> None:
        if savepoint:
            connection.execute("SAVEPOINT job")
        try:
            job.result = job.work(connection)
        except Exception as error:  # noqa: BLE001 -- handed on to who asked for the work
            job.error = _translate(error, self.path)
            if savepoint:
                connection.execute("ROLLBACK TO job")
        if savepoint:
            connection.execute("RELEASE job")

    # -- back in the loop's thread

    def _deliver(self, batch: list[_Job]) -> None:
        removes = changed = written = False
        for job in batch:
            if job.error is None:
                written = True
                changed = changed or not job.quiet
                removes = removes or job.removes
            if job.future.done():
                continue  # its caller was cancelled
            if job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)
        if written:
            self._schedule_checkpoint()
        if changed:
            for watcher in self._watchers:
                watcher(removes)

    def _start_sync(self) -> None:
        waiting, self._sync_next = self._sync_next, None
        if waiting is None:
            return
        self._sync_running = True
        running = self._loop.run_in_executor(self._syncer, os.fdatasync, self._wal)

        def done(future: asyncio.Future[None]) -> None:
            self._sync_running = False
            error = None if future.cancelled() else future.exception()
            if not waiting.done():
                if error is not None:
                    waiting.set_exception(_translate(error, self.path))
                else:
                    waiting.set_result(None)
            self._start_sync()

        running.add_done_callback(done)

    def _schedule_checkpoint(self) -> None:
        if self._closed or self._checkpoint_running:
            return
        if os.fstat(self._wal).st_size > WAL_LIMIT:
            if self._checkpoint_timer is not None:
                self._checkpoint_timer.cancel()
            self._begin_checkpoint()
        elif self._checkpoint_timer is None:
            self._checkpoint_timer = self._loop.call_later(CHECKPOINT_DELAY, self._begin_checkpoint)

    def _begin_checkpoint(self) -> None:
        self._checkpoint_timer = None
        if self._closed:
            return
        self._checkpoint_running = True
        running = self._loop.run_in_executor(self._checkpointer, self._checkpoint)

        def done(future: asyncio.Future[None]) -> None:
            self._checkpoint_running = False
            # an error here costs nothing but a longer WAL; the next write schedules the next try
            if not future.cancelled():
                future.exception()

        running.add_done_callback(done)

    # -- the checkpoint thread

    def _checkpoint(self) -> None:
        connection = self._checkpoint_connection
        # PASSIVE blocks nobody and does the work with its syncs
        _, log, done = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if log == done and log > 0:
            # nothing is left to copy: what holds the write lock here is only the truncation. Where somebody wrote in
            # between, the file is copied again under the lock; that is rare and a few pages
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            self._reserve()

    def _reserve(self) -> None:
        # a file system that can't, or a disk that is full already, is no reason not to run
        with contextlib.suppress(OSError):
            reserve(self._wal, WAL_RESERVE)


def _connect(path: str, synchronous: str, *, read_only: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT / 1000)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        connection.execute("PRAGMA foreign_keys = ON")
        if read_only:
            connection.execute("PRAGMA query_only = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _sync_folder(path: str) -> None:
    """The names of the database and its WAL are on disk."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _translate(error: BaseException, path: str) -> BaseException:
    """The kind of error that a failure of SQLite or of the disk is to those outside."""
    if isinstance(error, WherryError):
        return error
    if isinstance(error, sqlite3.Error):
        if getattr(error, "sqlite_errorname", "").startswith("SQLITE_FULL"):
            return ResourceExhausted(f"write {path}: no space left on device: resource exhausted")
        return Internal(f"{path}: {error}: internal error")
    return error
