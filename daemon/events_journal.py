"""The journal of events: each gets a number that only grows, and is kept for a while in the metadata.

Numbers are reserved in blocks, and a block is on disk before the first of its numbers is given: also after a power loss
none is given twice, though the last few seconds of events may be lost with it (as records of containers are).

    publish ──► add ──► a batch, a few ms later ──► the metadata's writer ──► the tail, and those who wait
                                                    (committed: survives SIGKILL; no sync)

An event that a shim forwards is confirmed only after that, so that the shim tells it again to the next daemon; its
`key` makes the second time go unnoticed. Subscribers with memory are given what is committed and nothing else.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

import structlog

from wherry.core import topics
from wherry.core.errors import OutOfRange, Unavailable, WherryError
from wherry.core.typeurl import unpack
from wherry.daemon.metadata import Metadata
from wherry.proto.types_pb2 import Envelope

log = structlog.get_logger(__name__)

# numbers that one sync reserves; a new block is asked for when half of it is used
BLOCK = 4096
# seconds that an event waits for others of its batch: a container's life has eight, each batch costs a transaction
GATHER = 0.003
# seconds until what could not be written (a full disk) is tried again
RETRY = 1.0
# events that wait while nothing can be written; above that those that matter less go, the oldest first
MAX_WAITING = 16384
# the last events, as they were serialized (some 300 bytes each), for subscribers that are up to date
TAIL = 512
# events that one read of an older part brings, and that one transaction drops
PAGE = 256
DROP_PAGE = 4096
# seconds between looks at what is too old, while events come
TRIM_EVERY = 60.0
# these are never dropped before they were written
MATTER = frozenset({topics.TASK_EXIT, topics.TASK_OOM, topics.TASK_DELETE})


@dataclass(frozen=True, slots=True)
class Retention:
    """How long events are kept: `seconds`, and `count` of them at most; 0: no such limit."""

    seconds: float = 7 * 24 * 3600.0
    count: int = 100_000


@dataclass(slots=True)
class _Waiting:
    at: int
    key: bytes | None
    matters: bool
    envelope: bytes
    written: asyncio.Future[None] | None


Kept = tuple[int, bytes]  # number, serialized envelope


def key_of(envelope: Envelope) -> bytes:
    """What tells that two envelopes are of one event.

    The end of a process may be told by its shim and, when that dies, by the daemon: it is the same by who ended when.
    """
    digest = blake2b(digest_size=16)
    if envelope.topic in (topics.TASK_EXIT, topics.TASK_DELETE):
        try:
            event = unpack(envelope.event)
            at = event.exited_at  # type: ignore[attr-defined]
            who = (envelope.namespace, envelope.topic, event.container_id, event.id or event.container_id)  # type: ignore[attr-defined]
        except (WherryError, AttributeError):
            digest.update(envelope.SerializeToString())
        else:
            digest.update("\0".join((*who, str(at.seconds), str(at.nanos))).encode())
    else:
        digest.update(envelope.SerializeToString())
    return digest.digest()


class Journal:
    """The events that are kept. Belongs to the event loop in whose thread it was opened."""

    def __init__(self, metadata: Metadata, retention: Retention, reserved: int, dropped: int) -> None:
        """Use `open`."""
        self.newest = 0
        """The number of the last event that is committed."""
        self.dropped = dropped
        """The last number that is kept no more."""
        self._metadata = metadata
        self._retention = retention
        self._reserved = reserved
        self._given = reserved  # what an earlier daemon reserved it may have given
        self._reserving: asyncio.Task[None] | None = None
        self._waiting: deque[_Waiting] = deque()
        self._writing: list[_Waiting] = []
        self._tail: deque[Kept] = deque(maxlen=TAIL)
        self._tail_after = 0
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._trim_timer: asyncio.TimerHandle | None = None
        self._trimming: asyncio.Task[None] | None = None
        self._failed = False
        self._closed = False

    @classmethod
    async def open(cls, metadata: Metadata, retention: Retention) -> Journal:
        """Read where the last daemon stopped and reserve the first block."""
        row = metadata.row("SELECT reserved, dropped FROM event_sequence")
        if row is None:
            raise Unavailable(f"{metadata.path} has no row for the sequence of events: unavailable")
        reserved, dropped = row
        (newest,) = metadata.row("SELECT coalesce(max(sequence), 0) FROM events") or (0,)
        journal = cls(metadata, retention, max(reserved, newest), dropped)
        journal.newest = journal._tail_after = max(newest, dropped)
        await journal._reserve()
        journal._schedule_trim()
        return journal

    # -- in

    def add(
        self, envelope: Envelope, *, key: bytes | None = None, confirm: bool = False
    ) -> asyncio.Future[None] | None:
        """Take an event; with `confirm` a future that is done when it is committed (or raises why it isn't)."""
        if self._closed:
            if confirm:
                raise Unavailable("the journal of events is closed: unavailable")
            return None
        written = asyncio.get_running_loop().create_future() if confirm else None
        at = envelope.timestamp.seconds * 10**9 + envelope.timestamp.nanos
        matters = envelope.topic in MATTER
        if len(self._waiting) >= MAX_WAITING:
            self._make_room()
        self._waiting.append(_Waiting(at, key, matters, envelope.SerializeToString(), written))
        if self._timer is None and self._flushing is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER, self._flush)
        return written

    def knows(self, key: bytes) -> bool:
        """Whether an event was taken before."""
        if any(key == item.key for item in (*self._writing, *self._waiting)):
            return True
        return self._metadata.row("SELECT 1 FROM events WHERE key = ?", (key,)) is not None

    def _make_room(self) -> None:
        for index, item in enumerate(self._waiting):
            if not item.matters and item.written is None:
                del self._waiting[index]
                return

    def _flush(self) -> None:
        self._timer = None
        if self._waiting and self._flushing is None:
            self._flushing = asyncio.get_running_loop().create_task(self._write_waiting())
            self._flushing.add_done_callback(self._flushed)

    def _flushed(self, task: asyncio.Task[None]) -> None:
        self._flushing = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the journal of events failed", exc_info=error)
        if self._waiting and not self._closed and self._timer is None:
            delay = RETRY if self._failed else GATHER
            self._timer = asyncio.get_running_loop().call_later(delay, self._flush)

    async def _write_waiting(self) -> None:
        batch = self._writing = list(islice(self._waiting, BLOCK // 2))
        while self._given + len(batch) > self._reserved:
            await self._reserve()
        for _ in batch:
            self._waiting.popleft()
        first = self._given + 1
        rows = [(first + index, item.at, item.key, item.envelope) for index, item in enumerate(batch)]

        def insert(connection: sqlite3.Connection) -> list[int]:
            execute = connection.execute
            return [row[0] for row in rows if execute("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?)", row).rowcount]

        try:
            # a full disk ends the whole transaction: nobody else's work shall be in it while it may be full
            inserted = await self._metadata.write(insert, quiet=True, alone=self._failed)
        except WherryError as error:
            self._not_written(batch, error)
            return
        finally:
            self._writing = []
        self._failed = False
        self._given += len(batch)
        for number in inserted:
            if len(self._tail) == TAIL:
                self._tail_after = self._tail[0][0]
            self._tail.append((number, batch[number - first].envelope))
            self.newest = number
        for item in batch:
            if item.written is not None and not item.written.done():
                item.written.set_result(None)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        if self._reserved - self._given < BLOCK // 2 and self._reserving is None and not self._closed:
            self._reserving = asyncio.get_running_loop().create_task(self._reserve_ahead())

    def _not_written(self, batch: Sequence[_Waiting], error: WherryError) -> None:
        """Those who wait are told, and tell it again; what is only here stays, for the next try."""
        if not self._failed:
            log.error("events can't be written", error=error.message)
        self._failed = True
        self._waiting.extendleft(item for item in reversed(batch) if item.written is None)
        for item in batch:
            if item.written is not None and not item.written.done():
                item.written.set_exception(error)

    async def _reserve(self) -> None:
        wanted = max(self._reserved, self._given) + BLOCK
        sql = "UPDATE event_sequence SET reserved = ?"
        await self._metadata.write(lambda db: db.execute(sql, (wanted,)), durable=True, quiet=True)
        self._reserved = wanted

    async def _reserve_ahead(self) -> None:
        try:
            await self._reserve()
        except WherryError as error:
            log.error("numbers for events can't be reserved", error=error.message)
        finally:
            self._reserving = None

    # -- out

    def place_after(self, number: int) -> int:
        """The place to go on from after an event, 0 for all that is kept.

        Raises OutOfRange where what followed it is kept no more, or where no event can have had that number.
        """
        if number == 0:
            return self.dropped
        if number < self.dropped:
            raise OutOfRange(
                f"events after {number} are not kept any more, only those after {self.dropped}: out of range"
            )
        if number > self._given:
            raise OutOfRange(f"no event has had the number {number} yet, the last one is {self.newest}: out of range")
        return number

    async def place_since(self, at: int) -> int:
        """The place before the first event that isn't older than `at`, in nanoseconds since the epoch."""
        rows = await self._metadata.rows("SELECT min(sequence) FROM events WHERE at >= ?", (at,))
        return self.newest if rows[0][0] is None else int(rows[0][0]) - 1

    async def oldest(self) -> Kept | None:
        """The first event that is kept."""
        rows = await self._metadata.rows("SELECT sequence, envelope FROM events ORDER BY sequence LIMIT 1")
        return rows[0] if rows else None

    async def after(self, place: int, limit: float | None = None) -> Sequence[Kept]:
        """The next events after a place, at least one; waits for it, `limit` seconds at most, then none.

        Raises OutOfRange for a reader that is so slow that what it comes to is kept no more.
        """
        while True:
            if place < self.dropped:
                raise OutOfRange(f"events after {place} are not kept any more, the reader is too slow: out of range")
            if place < self.newest:
                if place >= self._tail_after:
                    return [kept for kept in self._tail if kept[0] > place]
                sql = "SELECT sequence, envelope FROM events WHERE sequence > ? ORDER BY sequence LIMIT ?"
                return await self._metadata.rows(sql, (place, PAGE))
            try:
                async with asyncio.timeout(limit):
                    await self._changed.wait()
            except TimeoutError:
                return ()

    # -- what is too old

    def _schedule_trim(self) -> None:
        self._trim_timer = asyncio.get_running_loop().call_later(TRIM_EVERY, self._begin_trim)

    def _begin_trim(self) -> None:
        self._trimming = asyncio.get_running_loop().create_task(self._trim_and_go_on())

    async def _trim_and_go_on(self) -> None:
        try:
            await self.trim()
        except WherryError as error:
            log.error("old events can't be dropped", error=error.message)
        if not self._closed:
            self._schedule_trim()

    async def trim(self, now: int | None = None) -> int:
        """Drop what the retention says, a page at a time; how many went. `now` in nanoseconds since the epoch."""
        limit = (
            (time.time_ns() if now is None else now) - int(self._retention.seconds * 1e9)
            if self._retention.seconds
            else 0
        )
        went = 0
        while True:
            page = await self._metadata.rows("SELECT sequence, at FROM events ORDER BY sequence LIMIT ?", (DROP_PAGE,))
            too_many = await self._too_many()
            last = 0
            for number, at in page:
                if at >= limit and number > too_many:
                    break
                last = number
            if not last:
                return went
            self.dropped = last

            def drop(connection: sqlite3.Connection, last: int = last) -> int:
                connection.execute("UPDATE event_sequence SET dropped = ?", (last,))
                return connection.execute("DELETE FROM events WHERE sequence <= ?", (last,)).rowcount

            went += await self._metadata.write(drop, quiet=True)
            if last != page[-1][0] or len(page) < DROP_PAGE:
                return went

    async def _too_many(self) -> int:
        """The number up to which events are more than `count`, 0 where they aren't."""
        if not self._retention.count or self.newest - self.dropped <= self._retention.count:
            return 0
        sql = "SELECT sequence FROM events ORDER BY sequence DESC LIMIT 1 OFFSET ?"
        rows = await self._metadata.rows(sql, (self._retention.count,))
        return int(rows[0][0]) if rows else 0

    # -- the end

    async def close(self) -> None:
        """Write what waits, and give back the numbers that weren't used."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._trim_timer is not None:
            self._trim_timer.cancel()
        for task in (self._trimming, self._reserving, self._flushing):
            if task is not None:
                await asyncio.wait([task])
        self._failed = False
        while self._waiting and not self._failed:
            self._flush()
            if self._flushing is not None:
                await asyncio.wait([self._flushing])
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        given = self._given
        await self._metadata.write(
            lambda db: db.execute("UPDATE event_sequence SET reserved = ?", (given,)), durable=True, quiet=True
        )
