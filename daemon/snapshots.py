"""Snapshots for tenants: the asynchronous, namespaced face of the snapshotters.

A tenant's key is the snapshotter's key `NAMESPACE/NUMBER/KEY`, with a number that is never used twice, so that tenants
don't see each other's snapshots and a key can be used again at once while the old files are still being removed. The
snapshotters block, so each has a thread of its own, and what takes long has another: the commit of a large layer must
not hold up a container's start.

Files come before records and go after them. Of a commit, which has to change both, the record says first what it will
be (`origin`), so that a crash in between is finished or taken back at the next start. Rules and texts are containerd's
(core/metadata/snapshot.go).
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import structlog

from wherry.core import topics
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound, WherryError
from wherry.core.filters import compile_filters, fields
from wherry.core.labels import SNAPSHOT_REF
from wherry.core.names import quote
from wherry.daemon.fields import apply_mask, now, settle_labels
from wherry.daemon.metadata import Metadata
from wherry.daemon.namespaces import Publish, unheard
from wherry.daemon.snapshot_records import (
    Record,
    Scope,
    adopt,
    begin_commit,
    end_commit,
    insert,
    lookup,
    pending_commits,
    remove,
    undo_commit,
)
from wherry.linux.mounts import Mount
from wherry.proto import events_pb2
from wherry.proto import snapshots_pb2 as pb
from wherry.snapshotter import interface
from wherry.snapshotter.interface import Snapshotter

T = TypeVar("T")
log = structlog.get_logger(__name__)

# labels that are passed on to the snapshotter; others are between the client and the metadata
_INHERITED_PREFIX = "containerd.io/snapshot/"


class SnapshotStore:
    """The snapshots of all namespaces, by snapshotter and key."""

    def __init__(
        self,
        metadata: Metadata,
        snapshotters: Mapping[str, Snapshotter],
        publish: Publish | None = None,
        *,
        proxies: Mapping[str, Snapshotter] | None = None,
    ) -> None:
        """`snapshotters` by name; `proxies` are those of other processes, which may be gone or mute: nobody but their
        own users waits for them. All are closed with this store."""
        self._metadata = metadata
        self._publish = publish or unheard
        self._proxies = dict(proxies or {})
        self._snapshotters = {**snapshotters, **self._proxies}
        self._threads = {name: ThreadPoolExecutor(1, f"snapshotter-{name}") for name in snapshotters}
        self._threads |= {name: ThreadPoolExecutor(4, f"snapshotter-{name}") for name in self._proxies}
        self._slow = ThreadPoolExecutor(2, "snapshotters-slow")
        self._last_number = 0
        # backend keys that are being made: no record yet, but no garbage either
        self._making: set[str] = set()
        # backend keys whose records are gone and whose files are not yet
        self._garbage: dict[str, set[str]] = {name: set() for name in self._snapshotters}
        self._draining: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def names(self) -> list[str]:
        """The snapshotters there are."""
        return sorted(self._snapshotters)

    def rebases(self, snapshotter: str) -> bool:
        """Whether a snapshot that was prepared without a parent may be set on one at its commit."""
        return self._backend(snapshotter).rebases

    async def stat(self, namespace: str, snapshotter: str, key: str) -> pb.Info:
        """What is known of a snapshot, with the labels that the snapshotter itself shows. Raises NotFound."""
        record = self._record(namespace, snapshotter, key)
        backend = self._backend(snapshotter)
        return _shown(record.info, await self._run(snapshotter, partial(backend.stat, record.backend)))

    async def prepare(
        self,
        namespace: str,
        snapshotter: str,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        *,
        lease: str | None = None,
    ) -> Sequence[Mount]:
        """Make an active snapshot; the lease holds it.

        Raises AlreadyExists (the key, or the name in the label `containerd.io/snapshot.ref`; the lease holds that
        then), NotFound (the parent, the lease), InvalidArgument.
        """
        made = self._make(pb.ACTIVE, Scope(namespace, snapshotter, lease), key, parent, labels)
        mounts = await self._whole(made)
        event = events_pb2.SnapshotPrepare(key=key, parent=parent, snapshotter=snapshotter)
        self._publish(namespace, topics.SNAPSHOT_PREPARE, event)
        return mounts

    async def view(
        self,
        namespace: str,
        snapshotter: str,
        key: str,
        parent: str = "",
        labels: Mapping[str, str] | None = None,
        *,
        lease: str | None = None,
    ) -> Sequence[Mount]:
        """Make a snapshot that can only be read; errors as `prepare`."""
        return await self._whole(self._make(pb.VIEW, Scope(namespace, snapshotter, lease), key, parent, labels))

    async def mounts(self, namespace: str, snapshotter: str, key: str) -> Sequence[Mount]:
        """The mounts that show an active snapshot or a view. Raises NotFound, FailedPrecondition."""
        record = self._record(namespace, snapshotter, key)
        backend = self._backend(snapshotter)
        with _called({record.backend: key}):
            return await self._run(snapshotter, lambda: list(backend.mounts(record.backend)))

    async def commit(
        self,
        namespace: str,
        snapshotter: str,
        name: str,
        key: str,
        labels: Mapping[str, str] | None = None,
        *,
        parent: str = "",
        lease: str | None = None,
    ) -> None:
        """Turn the active snapshot `key` into the committed snapshot `name`; on return it is on disk.

        `parent` as in `Snapshotter.commit`. Raises AlreadyExists (the name), NotFound, FailedPrecondition.
        """
        scope = Scope(namespace, snapshotter, lease)
        if not name:
            raise InvalidArgument("snapshot name must not be empty: invalid argument")
        await self._whole(self._commit(scope, name, key, labels, parent))
        event = events_pb2.SnapshotCommit(key=key, name=name, snapshotter=snapshotter)
        self._publish(namespace, topics.SNAPSHOT_COMMIT, event)

    async def remove(self, namespace: str, snapshotter: str, key: str, *, lease: str | None = None) -> None:
        """The record goes now, the files soon after. Raises NotFound, FailedPrecondition (has children)."""
        self._backend(snapshotter)
        scope = Scope(namespace, snapshotter, lease)
        backend_key = await self._metadata.write(lambda db: remove(db, scope, key), removes=True)
        event = events_pb2.SnapshotRemove(key=key, snapshotter=snapshotter)
        self._publish(namespace, topics.SNAPSHOT_REMOVE, event)
        self.discard(snapshotter, [backend_key])

    async def update(self, namespace: str, snapshotter: str, info: pb.Info, paths: Sequence[str] = ()) -> pb.Info:
        """Set labels: all (`labels` or no path) or some (`labels.KEY`; an empty value removes).

        Raises NotFound, InvalidArgument for another path.
        """
        backend = self._backend(snapshotter)
        if not info.name:
            raise InvalidArgument("snapshot name must not be empty: invalid argument")
        what = f"snapshot {quote(info.name)}"

        def work(connection: sqlite3.Connection) -> Record:
            record = lookup(connection, Scope(namespace, snapshotter), info.name)
            labels = {"labels": "labels"}
            apply_mask(record.info, info, paths or ("labels",), fields=labels, maps=("labels",), what=what)
            settle_labels(record.info.labels, "info.Labels")
            record.info.updated_at.CopyFrom(now())
            connection.execute(
                "UPDATE snapshots SET record = ? WHERE namespace = ? AND snapshotter = ? AND key = ?",
                (record.info.SerializeToString(), namespace, snapshotter, info.name),
            )
            return record

        record = await self._metadata.write(work)
        inherited = _inherited(record.info.labels)
        inner = interface.Info(kind=interface.Kind(record.info.kind), name=record.backend, labels=inherited)
        await self._run(snapshotter, lambda: backend.update(inner))
        return record.info

    async def usage(self, namespace: str, snapshotter: str, key: str) -> tuple[int, int]:
        """(bytes, inodes) of the snapshot alone. Raises NotFound."""
        record = self._record(namespace, snapshotter, key)
        backend = self._backend(snapshotter)
        found = await self._run_slow(snapshotter, lambda: backend.usage(record.backend))
        return found.size, found.inodes

    async def list(self, namespace: str, snapshotter: str, filters: Sequence[str] = ()) -> Sequence[pb.Info]:
        """Those that one of the filters matches (`kind`, `name`, `parent`, `labels."key"`), by key."""
        backend = self._backend(snapshotter)
        matches = compile_filters(filters)
        query = (
            "SELECT backend, record FROM snapshots WHERE namespace = ? AND snapshotter = ? AND origin = '' ORDER BY key"
        )
        rows = await self._metadata.rows(query, (namespace, snapshotter))

        def work() -> list[pb.Info]:
            # asked after the records: what has gone meanwhile is left out, what came is not in the records
            there = {info.name: info for info in backend.walk()}
            found = (_shown(pb.Info.FromString(row[1]), there[row[0]]) for row in rows if row[0] in there)
            return [
                info
                for info in found
                if matches(
                    fields(
                        {
                            "kind": pb.Kind.Name(info.kind).lower(),
                            "name": info.name,
                            "parent": info.parent,
                            "labels": info.labels,
                        }
                    )
                )
            ]

        return await self._run(snapshotter, work)

    async def cleanup(self, snapshotter: str) -> None:
        """Remove what no record names any more, and wait for it."""
        backend = self._backend(snapshotter)
        # the snapshotter is asked first: what it makes after that is not among what is removed
        there = await self._run(snapshotter, lambda: {info.name for info in backend.walk()})
        rows = await self._metadata.rows("SELECT backend FROM snapshots WHERE snapshotter = ?", (snapshotter,))
        self.discard(snapshotter, there - {row[0] for row in rows} - self._making)
        await self.drain(snapshotter)
        await self._run_slow(snapshotter, backend.cleanup)

    async def sweep(self) -> tuple[int, int]:
        """Make files and records agree, before anything is served: what a crash left.

        Returns how many snapshots without a record, and records without a snapshot, it removed.
        """
        found = [await self._sweep(name) for name in self.names if name not in self._proxies]
        for name in self._proxies:
            self._in_background(self._meet(name))
        return sum(orphans for orphans, _ in found), sum(lost for _, lost in found)

    def discard(self, snapshotter: str, backend_keys: Iterable[str]) -> None:
        """Have the files of these, whose records are gone, removed soon. For the garbage collector, too."""
        self._garbage.setdefault(snapshotter, set()).update(backend_keys)
        task = self._draining.get(snapshotter)
        if self._garbage[snapshotter] and snapshotter in self._snapshotters and (task is None or task.done()):
            self._draining[snapshotter] = asyncio.get_running_loop().create_task(self._drain(snapshotter))

    async def drain(self, snapshotter: str | None = None) -> None:
        """Wait until what was discarded is gone, as far as it can go; of all snapshotters but proxies, or of one."""
        for name in [snapshotter] if snapshotter else [each for each in self.names if each not in self._proxies]:
            self.discard(name, ())
            task = self._draining.get(name)
            if task is not None:
                await asyncio.shield(task)

    async def close(self) -> None:
        """End the threads and close the snapshotters. What is not removed yet is found at the next start."""
        for proxy in self._proxies.values():
            proxy.close()  # calls under way end with it
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for task in self._draining.values():
            task.cancel()
        await asyncio.gather(*self._draining.values(), return_exceptions=True)
        self._slow.shutdown(wait=True)
        for name, backend in self._snapshotters.items():
            if name not in self._proxies:
                await self._run(name, backend.close)
            self._threads[name].shutdown(wait=True)

    # -- inner things

    async def _sweep(self, snapshotter: str) -> tuple[int, int]:
        backend = self._backend(snapshotter)
        there = await self._run(snapshotter, lambda: {info.name for info in backend.walk()})
        lost = await self._metadata.write(lambda db: _reconcile(db, snapshotter, there), alone=True)
        rows = await self._metadata.rows("SELECT backend FROM snapshots WHERE snapshotter = ?", (snapshotter,))
        garbage = there - {row[0] for row in rows}
        self.discard(snapshotter, garbage)
        return len(garbage), lost

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _meet(self, snapshotter: str) -> None:
        """What `_sweep` does, for a proxy, which may not be there yet: commits are settled, what is nobody's goes. A
        record whose snapshot isn't there stays: the other side may have lost it for a while only."""
        query = "SELECT namespace, key, backend FROM snapshots WHERE snapshotter = ? AND origin <> ''"
        pending = await self._metadata.rows(query, (snapshotter,))
        backend = self._backend(snapshotter)
        try:
            there = await self._run(snapshotter, lambda: {info.name for info in backend.walk()})

            def settle(db: sqlite3.Connection) -> None:
                for namespace, name, key in pending:
                    end = end_commit if key in there else undo_commit
                    end(db, Scope(namespace, snapshotter), name)

            if pending:
                await self._metadata.write(settle, alone=True)
            await self.cleanup(snapshotter)
        except WherryError as error:
            log.warning("proxied snapshotter doesn't answer", snapshotter=snapshotter, error=error.message)

    async def _make(
        self, kind: pb.Kind, scope: Scope, key: str, parent: str, labels: Mapping[str, str] | None
    ) -> Sequence[Mount]:
        namespace, snapshotter, _ = scope
        backend = self._backend(snapshotter)
        if not key:
            raise InvalidArgument("snapshot key must not be empty: invalid argument")
        info = pb.Info(name=key, parent=parent, kind=kind, labels=labels or {}, created_at=now())
        info.updated_at.CopyFrom(info.created_at)
        settle_labels(info.labels, "info.Labels")
        await self._refuse_known(scope, "target snapshot", info.labels.get(SNAPSHOT_REF, ""))
        await self._refuse_known(scope, "snapshot", key)
        below = ""
        if parent:
            try:
                record = self._record(namespace, snapshotter, parent)
            except NotFound:
                raise NotFound(f"parent snapshot {parent} does not exist: not found") from None
            if record.info.kind != pb.COMMITTED:
                raise InvalidArgument(f"parent {quote(parent)} is not committed snapshot: invalid argument")
            below = record.backend
        make = backend.view if kind == pb.VIEW else backend.prepare
        backend_key = self._backend_key(namespace, key)
        inherited = _inherited(info.labels)
        self._making.add(backend_key)
        try:
            try:
                with _called({backend_key: key, below: parent}):
                    mounts = await self._run(snapshotter, lambda: list(make(backend_key, below, inherited)))
            except AlreadyExists:
                await self._adopt(scope, info, below)
                raise
            try:
                await self._metadata.write(lambda db: insert(db, scope, info, backend_key, below))
            except BaseException:
                self.discard(snapshotter, [backend_key])
                raise
            return mounts
        finally:
            self._making.discard(backend_key)

    async def _commit(self, scope: Scope, name: str, key: str, labels: Mapping[str, str] | None, parent: str) -> None:
        snapshotter = scope.snapshotter
        backend = self._backend(snapshotter)
        info = pb.Info(name=name, kind=pb.COMMITTED, labels=labels or {}, created_at=now())
        info.updated_at.CopyFrom(info.created_at)
        settle_labels(info.labels, "info.Labels")
        target = self._backend_key(scope.namespace, name)
        self._making.add(target)
        try:
            record, below = await self._metadata.write(
                lambda db: begin_commit(db, scope, info, key=key, backend=target, parent=parent)
            )
            inherited = _inherited(info.labels)
            try:
                with _called({record.backend: key, target: name, below: parent}):
                    await self._run_slow(snapshotter, lambda: backend.commit(target, record.backend, inherited, below))
            except WherryError:
                await self._metadata.write(lambda db: undo_commit(db, scope, name))
                raise
            await self._metadata.write(lambda db: end_commit(db, scope, name), durable=True)
        finally:
            self._making.discard(target)

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Do all of what changes files and records, also when its caller is cancelled half-way."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _refuse_known(self, scope: Scope, what: str, key: str) -> None:
        """Raise AlreadyExists for what is there, after the lease got hold of it."""
        query = "SELECT 1 FROM snapshots WHERE namespace = ? AND snapshotter = ? AND key = ?"
        if key and self._metadata.row(query, scope.at(key)) is not None:
            await self._metadata.write(lambda db: scope.hold(db, key))
            raise AlreadyExists(f"{what} {quote(key)}: already exists")

    async def _adopt(self, scope: Scope, info: pb.Info, below: str) -> None:
        """A snapshotter that fetches layers itself has the wanted one: take it into the namespace's records.

        It says so by AlreadyExists to a `prepare` with the label `containerd.io/snapshot.ref` (containerd's remote
        snapshotters). Returns in every case: the caller passes AlreadyExists on.
        """
        target = info.labels.get(SNAPSHOT_REF, "")
        if not target:
            return
        backend = self._backend(scope.snapshotter)

        def find() -> interface.Info | None:
            for found in backend.walk():
                same = found.labels.get(SNAPSHOT_REF) == target and found.parent == below
                if same and found.kind == interface.Kind.COMMITTED:
                    return found
            return None

        found = await self._run(scope.snapshotter, find)
        if found is not None:
            known = found
            await self._metadata.write(lambda db: adopt(db, scope, info, target, known))

    async def _drain(self, snapshotter: str) -> None:
        """Remove discarded snapshots until nothing goes any more: a parent goes only after its children."""
        backend = self._backend(snapshotter)
        garbage = self._garbage[snapshotter]
        while garbage:
            progress = False
            # newer ones first: children are newer than their parents
            for key in sorted(garbage, reverse=True):
                try:
                    await self._run(snapshotter, partial(backend.remove, key))
                except NotFound:
                    pass
                except (WherryError, OSError) as error:
                    log.debug("snapshot not removed yet", snapshotter=snapshotter, key=key, error=str(error))
                    continue
                garbage.discard(key)
                progress = True
            if not progress:
                log.warning("snapshots not removed", snapshotter=snapshotter, count=len(garbage))
                return

    def _record(self, namespace: str, snapshotter: str, key: str) -> Record:
        self._backend(snapshotter)
        query = (
            "SELECT backend, parent, record FROM snapshots "
            "WHERE namespace = ? AND snapshotter = ? AND key = ? AND origin = ''"
        )
        row = self._metadata.row(query, (namespace, snapshotter, key))
        if row is None:
            raise NotFound(f"snapshot {key} does not exist: not found")
        return Record(row[0], row[1], pb.Info.FromString(row[2]))

    def _backend(self, snapshotter: str) -> Snapshotter:
        if not snapshotter:
            raise InvalidArgument("snapshotter argument missing: invalid argument")
        try:
            return self._snapshotters[snapshotter]
        except KeyError:
            raise InvalidArgument(f"snapshotter not loaded: {snapshotter}: invalid argument") from None

    def _backend_key(self, namespace: str, key: str) -> str:
        """A key for the snapshotter; the clock keeps its number from being used twice, over restarts too."""
        self._last_number = max(self._last_number + 1, time.time_ns())
        return f"{namespace}/{self._last_number}/{key}"

    async def _run(self, snapshotter: str, work: Callable[[], T]) -> T:
        """Run short work of a snapshotter in its thread. A cancelled caller's work is done all the same."""
        return await asyncio.get_running_loop().run_in_executor(self._threads[snapshotter], work)

    async def _run_slow(self, snapshotter: str, work: Callable[[], T]) -> T:
        """Run what walks trees or waits for the disk, beside what containers' starts wait for."""
        threads = self._threads[snapshotter] if snapshotter in self._proxies else self._slow
        return await asyncio.get_running_loop().run_in_executor(threads, work)


@contextlib.contextmanager
def _called(names: Mapping[str, str]) -> Iterator[None]:
    """Have errors of the snapshotter speak of a tenant's keys: its own are nobody's business."""
    try:
        yield
    except WherryError as error:
        text = error.message
        for inner, outer in names.items():
            text = text.replace(inner, outer) if inner else text
        raise type(error)(text) from error


def _shown(info: pb.Info, inner: interface.Info) -> pb.Info:
    """A record as clients see it: the snapshotter may have labels of its own to show."""
    for key, value in inner.labels.items():
        if key not in info.labels:
            info.labels[key] = value
    return info


def _inherited(labels: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if key == SNAPSHOT_REF or key.startswith(_INHERITED_PREFIX)}


def _reconcile(connection: sqlite3.Connection, snapshotter: str, there: set[str]) -> int:
    """Finish or take back commits that a crash cut in two; drop records whose snapshot is gone; how many of those."""
    for namespace, name, backend in pending_commits(connection, snapshotter):
        if backend in there:
            end_commit(connection, Scope(namespace, snapshotter), name)
        else:
            undo_commit(connection, Scope(namespace, snapshotter), name)
    rows = connection.execute("SELECT rowid, backend FROM snapshots WHERE snapshotter = ?", (snapshotter,)).fetchall()
    lost = [(rowid,) for rowid, backend in rows if backend not in there]
    connection.executemany("DELETE FROM snapshots WHERE rowid = ?", lost)
    return len(lost)
