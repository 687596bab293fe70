"""The garbage collector: what nothing references goes, and it can say why a thing is kept.

A collection marks in the reader thread, on a snapshot of the database, so that nobody waits for it. Where there is
garbage, its records are deleted in one transaction, which first makes sure that nothing was written since the marking;
if something was, it marks again, and the third time within the transaction. Files go after the records.

When it runs follows containerd's scheduler (plugins/gc/scheduler.go), and it runs when something expires. While
nothing happens it sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from wherry.core import topics
from wherry.daemon import gc_graph
from wherry.daemon.gc_graph import CONTENT, IMAGE, INGEST, LEASE, SNAPSHOT, Node
from wherry.daemon.metadata import Metadata
from wherry.proto import events_pb2, images_pb2

if TYPE_CHECKING:
    from wherry.daemon.content import ContentStore
    from wherry.daemon.namespaces import Publish
    from wherry.daemon.snapshots import SnapshotStore

log = structlog.get_logger(__name__)

# markings that may be overtaken by a write before one is done where nobody can write
TRIES = 2
# a collection counts as at least this long when the time to the next is computed: with the default pause threshold
# of 0.02 it runs once a second at most (containerd: 5 ms, four times a second)
MINIMUM_SECONDS = 0.02
# more of its time than this it never takes
MAXIMUM_PAUSE = 0.5
# seconds after a write until one runs though nothing was deleted: what was written may expire
RESCAN = 600.0


@dataclass(frozen=True, slots=True)
class Policy:
    """When it runs by itself: the options of containerd's plugin `io.containerd.gc.v1.scheduler`; times in seconds.

    `pause_threshold`: the share of time that collections may take. `deletion_threshold`: deletions after which one is
    scheduled at once, 0 to let them wait for the next interval. `mutation_threshold`: writes without which an interval
    passes without a collection, where nothing was deleted. `schedule_delay`: how long one that was asked for waits for
    others to join. `startup_delay`: when the first comes.
    """

    pause_threshold: float = 0.02
    deletion_threshold: int = 0
    mutation_threshold: int = 100
    schedule_delay: float = 0.0
    startup_delay: float = 0.1


@dataclass(frozen=True, slots=True)
class Stats:
    """What a collection did: things removed by kind, the seconds it took, the snapshotters that lost snapshots, and the
    things themselves."""

    removed: dict[str, int]
    seconds: float
    snapshotters: frozenset[str]
    things: tuple[Node, ...] = ()


class Collector:
    """Marks, sweeps, schedules, explains."""

    def __init__(
        self,
        metadata: Metadata,
        content: ContentStore,
        snapshots: SnapshotStore,
        policy: Policy | None = None,
        publish: Publish | None = None,
    ) -> None:
        self._metadata = metadata
        self._content = content
        self._snapshots = snapshots
        self._policy = policy or Policy()
        self._publish = publish
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._last = 0.0  # time.monotonic() of the end of the last collection
        self._next_expiry: float | None = None
        self._deletions = 0
        self._mutations = 0
        self._collections = 0
        self._seconds = 0.0
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    async def start(self) -> None:
        """Sweep files without a record, then watch the metadata and run by the policy. Before anything is served."""
        files, uploads, lost = await self._content.sweep()
        orphans, missing = await self._snapshots.sweep()
        if files or uploads or orphans:
            log.info("removed files without a record", blobs=files, uploads=uploads, snapshots=orphans)
        if lost or missing:
            log.error("removed records without files", blobs=lost, snapshots=missing)
        self._metadata.watch(self._changed)
        self._task = asyncio.get_running_loop().create_task(self._schedule())

    async def collect_all(self) -> Stats:
        """Collect now and wait until the files are gone too: what `sync` on Delete asks for."""
        stats = await self.collect()
        for snapshotter in stats.snapshotters:
            await self._snapshots.cleanup(snapshotter)
        return stats

    async def collect(self) -> Stats:
        """Collect now; the directories of snapshots that went are removed in the background."""
        async with self._lock:
            begun = time.monotonic()
            self._deletions = self._mutations = 0
            garbage = await self._sweep()
            removed = await self._remove_files(garbage)
            snapshotters = {node.key.partition("/")[0] for node in garbage if node.kind == SNAPSHOT}
            stats = Stats(removed, time.monotonic() - begun, frozenset(snapshotters), tuple(garbage))
            self._collections += 1
            self._seconds += stats.seconds
            self._last = time.monotonic()
            if any(removed.values()):
                log.debug("garbage collected", seconds=round(stats.seconds, 4), **removed)
            return stats

    async def garbage(self) -> list[Node]:
        """What a collection would remove now."""
        return (await self._mark())[1]

    async def graph(self) -> gc_graph.Graph:
        """Everything and its references, as they are now: for those who ask why a thing is kept."""
        writing = self._content.open_ingests()
        return await self._metadata.read(lambda db: gc_graph.build(db, writing))

    async def why(self, namespace: str, kind: str, id: str) -> list[tuple[str, str, str]]:  # noqa: A002 -- its noun
        """The shortest chain from a root to the thing, each (kind, id, how it is referenced); empty: nothing keeps it.

        `kind`: content, snapshot (its id is SNAPSHOTTER/KEY), image, container, lease, ingest.
        """
        chains = (await self.graph()).chains(Node(kind, namespace, id))
        return [(node.kind, node.key, how) for node, how in chains[0]] if chains else []

    async def close(self) -> None:
        """Stop running by itself; a collection that is under way is finished."""
        self._closing = True
        self._wake.set()
        self._hurry.set()
        if self._task is not None:
            await self._task
        async with self._lock:
            pass

    # -- marking and sweeping

    async def _mark(self) -> tuple[int, list[Node]]:
        """The generation that was marked, and the garbage in it."""
        generation = self._metadata.generation
        writing = self._content.open_ingests()

        def work(connection: sqlite3.Connection) -> tuple[list[Node], float | None]:
            graph = gc_graph.build(connection, writing)
            return graph.garbage(), graph.next_expiry

        garbage, self._next_expiry = await self._metadata.read(work)
        return generation, garbage

    async def _sweep(self) -> dict[Node, str]:
        """Delete the records of all garbage; each with what its files are called."""
        for attempt in range(TRIES + 1):
            generation, garbage = await self._mark()
            if not garbage:
                return {}
            last = attempt == TRIES
            writing = self._content.open_ingests()

            def work(connection: sqlite3.Connection) -> dict[Node, str] | None:
                # the writer thread runs this alone, so nothing is written between the comparison and the deletion
                if self._metadata.generation == generation:  # noqa: B023 -- awaited within the iteration
                    return _delete(connection, garbage)  # noqa: B023
                if last:  # noqa: B023
                    return _delete(connection, gc_graph.build(connection, writing).garbage())  # noqa: B023
                return None

            removed = await self._metadata.write(work, alone=True, durable=True)
            if removed is not None:
                return removed
        return {}

    async def _remove_files(self, removed: dict[Node, str]) -> dict[str, int]:
        counts: dict[str, int] = defaultdict(int)
        snapshots: dict[str, list[str]] = defaultdict(list)
        for node, name in removed.items():
            counts[node.kind] += 1
            if node.kind == SNAPSHOT:
                snapshots[node.key.partition("/")[0]].append(name)
            self._announce(node)
        await self._content.remove_files([node.key for node in removed if node.kind == CONTENT])
        await self._content.remove_ingests([int(name) for node, name in removed.items() if node.kind == INGEST])
        for snapshotter, names in snapshots.items():
            self._snapshots.discard(snapshotter, names)
        await self._snapshots.drain()
        return dict(counts)

    def _announce(self, node: Node) -> None:
        """The events of what goes: containerd publishes those of images and snapshots."""
        if self._publish is None:
            return
        if node.kind == IMAGE:
            self._publish(node.namespace, topics.IMAGE_DELETE, images_pb2.ImageDelete(name=node.key))
        elif node.kind == SNAPSHOT:
            snapshotter, _, key = node.key.partition("/")
            event = events_pb2.SnapshotRemove(key=key, snapshotter=snapshotter)
            self._publish(node.namespace, topics.SNAPSHOT_REMOVE, event)

    # -- scheduling

    def _changed(self, removes: bool) -> None:
        policy = self._policy
        self._mutations += 1
        self._deletions += removes
        if removes or 0 < policy.mutation_threshold <= self._mutations:
            self._wake.set()
        if 0 < policy.deletion_threshold <= self._deletions:
            self._hurry.set()

    async def _schedule(self) -> None:
        """Run until `close`: after the start, then when there may be garbage and enough time has passed."""
        await _either(self._hurry, self._policy.startup_delay)
        while True:
            if not self._closing:
                await asyncio.sleep(self._policy.schedule_delay)
            if self._closing:
                return
            self._wake.clear()
            self._hurry.clear()
            try:
                await self.collect()
            except Exception:
                log.exception("garbage collection failed")
            await _either(self._wake, self._until_expiry())
            # enough time since the last, unless there is so much that it can't wait
            await _either(self._hurry, self._last + self._interval() - time.monotonic())

    def _until_expiry(self) -> float | None:
        """Seconds until something expires, as far as it is known; None: nothing does."""
        waits = [RESCAN] if self._mutations else []
        if self._next_expiry is not None:
            # a moment later: what is compared with the clock should be past
            waits.append(max(self._next_expiry - time.time() + MINIMUM_SECONDS, MINIMUM_SECONDS))
        return min(waits, default=None)

    def _interval(self) -> float:
        """Seconds until the next may run, so that they take their share of time and no more."""
        share = min(max(self._policy.pause_threshold, 0.0), MAXIMUM_PAUSE)
        if not share:
            return 1.0
        average = max(self._seconds / max(self._collections, 1), MINIMUM_SECONDS)
        return average / share - average


async def _either(event: asyncio.Event, seconds: float | None) -> None:
    """Wait until the event is set or the seconds are over, whatever comes first."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


_TABLES = {
    CONTENT: ("blobs", "digest"),
    IMAGE: ("images", "name"),
    LEASE: ("leases", "id"),
}


def _delete(connection: sqlite3.Connection, garbage: list[Node]) -> dict[Node, str]:
    """Delete records; each node with the name of its files (a snapshotter's key, an upload's number)."""
    removed: dict[Node, str] = {}
    for node in garbage:
        if node.kind == SNAPSHOT:
            snapshotter, _, key = node.key.partition("/")
            query = (
                "DELETE FROM snapshots WHERE namespace = ? AND snapshotter = ? AND key = ? AND origin = '' "
                "RETURNING backend"
            )
            rows = connection.execute(query, (node.namespace, snapshotter, key)).fetchall()
        elif node.kind == INGEST:
            query = "DELETE FROM ingests WHERE namespace = ? AND ref = ? RETURNING id"
            rows = connection.execute(query, (node.namespace, node.key)).fetchall()
        else:
            table, column = _TABLES[node.kind]
            query = f"DELETE FROM {table} WHERE namespace = ? AND {column} = ? RETURNING ''"  # noqa: S608 -- our names
            rows = connection.execute(query, (node.namespace, node.key)).fetchall()
        if rows:
            removed[node] = str(rows[0][0])
    return removed
