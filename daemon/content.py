"""Blobs by digest and the uploads on their way to become one.

Files are shared by all namespaces, records are not: a namespace sees what was committed in it. What another namespace
has need not be sent again: an upload whose expected digest is there already stands for that blob (containerd's policy
"shared"). With the policy "isolated" it must be sent, as proof that the sender has it, unless the other namespace has
the label `containerd.io/namespace.shareable=true`. The rules and texts are containerd's (core/metadata/content.go,
plugins/content/local).

The order on disk: a blob is verified and synced, then renamed to its place, the folder is synced, then its record is
written and synced. Away it goes the other way round: the record, then the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from wherry.core import topics
from wherry.core.digest import Digest
from wherry.core.errors import (
    AlreadyExists,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)
from wherry.core.filters import compile_filters, fields
from wherry.daemon import content_files as files
from wherry.daemon.content_records import GET, STATUS, begin, finish, is_used
from wherry.daemon.content_writer import ContentWriter
from wherry.daemon.fields import apply_mask, now, settle_labels, timestamp
from wherry.daemon.leases import CONTENT, INGESTS, hold, release
from wherry.daemon.metadata import Metadata
from wherry.daemon.namespaces import Publish, unheard
from wherry.proto import content_pb2 as pb
from wherry.proto import events_pb2

# threads for files: two or three layers at once, each waiting for the disk most of the time
THREADS = 6
# bytes in one message of Read: below gRPC's default limit of 4 MiB, and little to hold
READ_CHUNK = 1 << 20
# blobs up to this size (manifests, configs) are kept in memory once read: every start of a container reads them
CACHED_BLOB = 64 << 10
CACHED_TOTAL = 1 << 20


class ContentStore:
    """`ROOT/blobs/sha256/HEX` and `ROOT/ingest/ID/data`, and their records."""

    def __init__(
        self, metadata: Metadata, root: str, publish: Publish | None = None, *, isolated: bool = False
    ) -> None:
        """`root` is the content folder itself (`/var/lib/wherry/content`); made where missing."""
        self._isolated = isolated
        self.tree = files.Tree(root)
        self.tree.make()
        self._metadata = metadata
        self._publish = publish or unheard
        self._threads = ThreadPoolExecutor(THREADS, "content")
        self._open: dict[tuple[str, str], tuple[float, ContentWriter | None]] = {}
        # commits and removals of one blob's file exclude each other
        self._file_locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cache_size = 0
        self._tasks: set[asyncio.Task[None]] = set()

    # -- blobs

    def info(self, namespace: str, digest: str) -> pb.Info:
        """Raises NotFound."""
        row = self._metadata.row(GET, (namespace, digest))
        if row is None:
            raise NotFound(f"content digest {digest}: not found")
        return pb.Info.FromString(row[0])

    def exists(self, namespace: str, digest: str) -> bool:
        """Whether the namespace has the blob."""
        return self._metadata.row(GET, (namespace, digest)) is not None

    def path(self, namespace: str, digest: str) -> str:
        """The path of the blob's file, for workers that read it. Raises NotFound."""
        self.info(namespace, digest)
        return self.tree.blob(digest)

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> Sequence[pb.Info]:
        """Those that one of the filters matches (`digest`, `size`, `labels."key"`), by digest."""
        matches = compile_filters(filters)
        query = "SELECT record FROM blobs WHERE namespace = ? ORDER BY digest"

        def work(connection: sqlite3.Connection) -> list[pb.Info]:
            found = (pb.Info.FromString(row[0]) for row in connection.execute(query, (namespace,)))
            return [
                info
                for info in found
                if matches(fields({"digest": info.digest, "size": str(info.size), "labels": info.labels}))
            ]

        return await self._metadata.read(work)

    async def update(self, namespace: str, info: pb.Info, paths: Sequence[str] = ()) -> pb.Info:
        """Set labels: all (`labels` or no path) or some (`labels.KEY`; an empty value removes).

        Raises NotFound, InvalidArgument for another path or a label that is too long.
        """
        what = f'content info "{info.digest}"'

        def work(connection: sqlite3.Connection) -> pb.Info:
            row = connection.execute(GET, (namespace, info.digest)).fetchone()
            if row is None:
                raise NotFound(f"content digest {info.digest}: not found")
            updated = pb.Info.FromString(row[0])
            apply_mask(updated, info, paths or ("labels",), fields={"labels": "labels"}, maps=("labels",), what=what)
            settle_labels(updated.labels, "info.Labels")
            updated.updated_at.CopyFrom(now())
            connection.execute(
                "UPDATE blobs SET record = ? WHERE namespace = ? AND digest = ?",
                (updated.SerializeToString(), namespace, info.digest),
            )
            return updated

        # not synced by itself: what is worth keeping is named by an image, and that is synced with all before it
        return await self._metadata.write(work)

    async def delete(self, namespace: str, digest: str, *, lease: str | None = None) -> None:
        """The record goes now, the file right after when no namespace has it any more. Raises NotFound."""

        def work(connection: sqlite3.Connection) -> None:
            query = "DELETE FROM blobs WHERE namespace = ? AND digest = ?"
            if connection.execute(query, (namespace, digest)).rowcount == 0:
                raise NotFound(f"content digest {digest}: not found")
            release(connection, namespace, lease, CONTENT, digest)

        await self._metadata.write(work, removes=True)
        self._publish(namespace, topics.CONTENT_DELETE, events_pb2.ContentDelete(digest=digest))
        self._spawn(self.remove_files([digest]))

    async def read(self, namespace: str, digest: str, offset: int = 0, size: int = 0) -> AsyncIterator[bytes]:
        """Chunks of at most 1 MiB; size 0: to the end, and never past it. Raises NotFound, OutOfRange."""
        length = self.info(namespace, digest).size
        offset = max(offset, 0)
        if offset > length:
            raise OutOfRange(f"read past object length {length} bytes")
        end = length if size <= 0 else min(length, offset + size)
        if length <= CACHED_BLOB:
            yield (await self._small(digest))[offset:end]
            return
        fd, actual = await self._open_file(digest)
        try:
            if actual != length:
                raise Internal(f"blob {digest} has {actual} bytes on disk, {length} in its record: internal error")
            while offset < end:
                chunk: bytes = await self.run(files.read_at, fd, offset, min(READ_CHUNK, end - offset))
                if not chunk:
                    raise Internal(f"blob {digest} ended at {offset} of {length} bytes: internal error")
                yield chunk
                offset += len(chunk)
        finally:
            os.close(fd)

    async def read_all(self, namespace: str, digest: str, limit: int = 8 << 20) -> bytes:
        """A small blob whole (manifests, configs). Raises NotFound, ResourceExhausted above `limit` bytes."""
        length = self.info(namespace, digest).size
        if length > limit:
            raise ResourceExhausted(f"blob {digest} has {length} bytes, more than {limit}: resource exhausted")
        return b"".join([chunk async for chunk in self.read(namespace, digest)])

    async def put(
        self,
        namespace: str,
        ref: str,
        data: bytes,
        *,
        expected: str = "",
        labels: Mapping[str, str] | None = None,
        lease: str | None = None,
    ) -> pb.Info:
        """Write a blob in one go; one that is already there is fine (labels are added to it, the lease holds it)."""
        digest = expected or Digest.of(data)
        try:
            async with await self.writer(namespace, ref, total=len(data), expected=digest, lease=lease) as writer:
                if not writer.shared:
                    await writer.truncate()
                    await writer.write(data)
                return await self.commit_or_label(writer, len(data), digest, labels)
        except AlreadyExists:
            return await self._label(namespace, digest, labels)

    async def commit_or_label(
        self, writer: ContentWriter, size: int, digest: str, labels: Mapping[str, str] | None = None
    ) -> pb.Info:
        """Commit; where the blob is there already, add the labels to it. Raises what `commit` raises otherwise."""
        try:
            return await writer.commit(size, digest, labels)
        except AlreadyExists:
            return await self._label(writer.namespace, digest, labels)

    # -- uploads

    async def writer(
        self, namespace: str, ref: str, *, total: int = 0, expected: str = "", lease: str | None = None
    ) -> ContentWriter:
        """Start an upload, or go on with the one that the ref names.

        Raises AlreadyExists (the namespace has `expected`; the lease holds it then), Unavailable (somebody writes to
        the ref), InvalidArgument, NotFound (the lease).
        """
        if not ref:
            raise InvalidArgument("ref must not be empty: invalid argument")
        if total < 0:
            raise InvalidArgument(f"total must not be negative, it is {total}: invalid argument")
        if expected:
            Digest.parse(expected)
        key = (namespace, ref)
        if expected and self.exists(namespace, expected):
            await self._metadata.write(lambda db: hold(db, namespace, lease, CONTENT, expected))
            raise AlreadyExists(f"content {expected}: already exists")
        if key in self._open:
            since = self._open[key][0]
            raise Unavailable(f"ref {ref} locked for {time.monotonic() - since:.3f}s: unavailable")
        entry: tuple[float, ContentWriter | None] = (time.monotonic(), None)
        self._open[key] = entry
        writer: ContentWriter | None = None
        try:
            row = await self._metadata.write(
                lambda db: begin(
                    db, namespace, ref, total=total, expected=expected, lease=lease, isolated=self._isolated
                )
            )
            if row is None:
                raise AlreadyExists(f"content {expected}: already exists")
            id_, known_total, started, shared_size = row
            writer = ContentWriter(
                self,
                namespace,
                ref,
                id=id_,
                total=total or known_total,
                expected=expected,
                started=started,
                lease=lease,
            )
            if shared_size is not None:
                writer.stand_for(expected, shared_size)
            else:
                await writer.open(keep=not (total and known_total and total != known_total))
            self._open[key] = (entry[0], writer)
            return writer
        except BaseException:
            if writer is not None:
                await writer.close()
            if self._open.get(key) is entry:
                del self._open[key]
            raise

    async def record(self, writer: ContentWriter, info: pb.Info) -> pb.Info:
        """The last step of a commit: the verified and synced file becomes a blob, then gets its record.

        For the writer. Raises AlreadyExists, NotFound (the lease).
        """
        target = self.tree.blob(info.digest)
        info.created_at.CopyFrom(now())
        info.updated_at.CopyFrom(info.created_at)
        record = info.SerializeToString()

        def work(connection: sqlite3.Connection) -> bool:
            return finish(connection, writer, info.digest, record)

        async with self._file_lock(info.digest):
            if writer.aborted:
                raise NotFound(f"reference {writer.ref}: not found")
            if writer.shared:
                if not await self.run(os.path.exists, target):
                    raise NotFound(f"content {writer.shared}: not found")
            else:
                await self.run(files.publish, self.tree.data(writer.id), target)
            try:
                made = await self._metadata.write(work, durable=True)
            except BaseException:
                # a file without a record, unless another namespace has one
                self._spawn(self.remove_files([info.digest]))
                raise
        await self.run(files.remove_ingest, self.tree.ingest(writer.id))
        if not made:
            raise AlreadyExists(f"content {info.digest}: already exists")
        event = events_pb2.ContentCreate(digest=info.digest, size=info.size)
        self._publish(writer.namespace, topics.CONTENT_CREATE, event)
        return info

    async def status(self, namespace: str, ref: str) -> pb.Status:
        """Raises NotFound."""
        entry = self._open.get((namespace, ref))
        if entry is not None and entry[1] is not None:
            return entry[1].status()
        row = self._metadata.row(f"{STATUS} AND ref = ?", (namespace, ref))
        if row is None:
            raise NotFound(f"reference {ref}: not found")
        found: pb.Status = await self.run(self._status, row)
        return found

    async def list_statuses(self, namespace: str, filters: Sequence[str] = ()) -> Sequence[pb.Status]:
        """Those that one of the filters matches (`ref`), by ref."""
        matches = compile_filters(filters)
        found = []
        for row in await self._metadata.rows(f"{STATUS} ORDER BY ref", (namespace,)):
            if matches(fields({"ref": row[1]})):
                entry = self._open.get((namespace, row[1]))
                live = entry[1] if entry is not None else None
                found.append(live.status() if live is not None else await self.run(self._status, row))
        return found

    async def abort(self, namespace: str, ref: str, *, lease: str | None = None) -> None:
        """Throw an upload away, also under somebody who writes to it. Raises NotFound."""

        def work(connection: sqlite3.Connection) -> int:
            query = "DELETE FROM ingests WHERE namespace = ? AND ref = ? RETURNING id"
            rows = connection.execute(query, (namespace, ref)).fetchall()
            if not rows:
                raise NotFound(f"reference {ref}: not found")
            release(connection, namespace, lease, INGESTS, ref)
            return int(rows[0][0])

        id_ = await self._metadata.write(work)
        entry = self._open.pop((namespace, ref), None)
        if entry is not None and entry[1] is not None:
            entry[1].aborted = True
        await self.run(files.remove_ingest, self.tree.ingest(id_))

    # -- for the writers

    def unlock(self, writer: ContentWriter) -> None:
        """Give up a writer's ref."""
        key = (writer.namespace, writer.ref)
        entry = self._open.get(key)
        if entry is not None and entry[1] is writer:
            del self._open[key]

    async def forget(self, writer: ContentWriter) -> None:
        """Throw a writer's upload away: what was written is wrong."""
        # files first: on a full disk the record's removal needs the room
        await self.run(files.remove_ingest, self.tree.ingest(writer.id))
        with contextlib.suppress(NotFound):
            await self.abort(writer.namespace, writer.ref, lease=writer.lease)

    def run(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Run blocking work in one of the store's threads."""
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    # -- for the garbage collector

    def open_ingests(self) -> Sequence[tuple[str, str]]:
        """(namespace, ref) of the uploads that somebody writes to now."""
        return tuple(self._open)

    async def remove_files(self, digests: Collection[str]) -> None:
        """Remove the files of blobs that no record names any more; those that one names stay."""
        for digest in digests:
            async with self._file_lock(digest):
                # asked in the writer's queue: behind every commit that is on its way, also a cancelled caller's
                if await self._metadata.write(partial(is_used, digest=digest)):
                    continue
                self._drop_cached(digest)
                await self.run(files.remove_blob, self.tree.blob(digest))

    async def remove_ingests(self, ids: Collection[int]) -> None:
        """Remove the folders of uploads whose records are gone."""
        for id_ in ids:
            await self.run(files.remove_ingest, self.tree.ingest(id_))

    async def sweep(self) -> tuple[int, int, int]:
        """Make files and records agree, before anything is served: what a crash left.

        Returns how many files without a record, uploads without a record, and records without a file it removed. The
        last has no right to be more than 0.
        """
        return await self._metadata.write(self._sweep, alone=True)

    async def close(self) -> None:
        """End the threads. What is open stays for the next start."""
        for _, writer in [*self._open.values()]:
            if writer is not None:
                await writer.close()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        self._threads.shutdown(wait=True)

    # -- inner things

    async def _label(self, namespace: str, digest: str, labels: Mapping[str, str] | None) -> pb.Info:
        if not labels:
            return self.info(namespace, digest)
        return await self.update(namespace, pb.Info(digest=digest, labels=labels), [f"labels.{key}" for key in labels])

    def _sweep(self, connection: sqlite3.Connection) -> tuple[int, int, int]:
        recorded = {row[0] for row in connection.execute("SELECT DISTINCT digest FROM blobs")}
        there = set(self.tree.all_blobs())
        for digest in there - recorded:
            files.remove_blob(self.tree.blob(digest))
        for digest in recorded - there:
            connection.execute("DELETE FROM blobs WHERE digest = ?", (digest,))
        ids = {str(row[0]) for row in connection.execute("SELECT id FROM ingests")}
        orphans = [name for name in self.tree.all_ingests() if name not in ids]
        for name in orphans:
            files.remove_ingest(os.path.join(self.tree.ingests, name))
        return len(there - recorded), len(orphans), len(recorded - there)

    def _status(self, row: tuple[Any, ...]) -> pb.Status:
        id_, ref, total, expected, shared, started = row
        status = pb.Status(ref=ref, total=total, expected=expected or shared, started_at=timestamp(started))
        try:
            found = os.stat(self.tree.blob(shared) if shared else self.tree.data(id_))
        except FileNotFoundError:
            status.updated_at.CopyFrom(status.started_at)
        else:
            status.offset = found.st_size
            status.updated_at.FromNanoseconds(max(started, found.st_mtime_ns))
        return status

    async def _open_file(self, digest: str) -> tuple[int, int]:
        try:
            opened: tuple[int, int] = await self.run(files.open_blob, self.tree.blob(digest))
        except FileNotFoundError:
            raise NotFound(f"blob {digest} is recorded, but its file is gone: not found") from None
        return opened

    async def _small(self, digest: str) -> bytes:
        """A small blob from memory, or from disk into memory: what a digest names never changes."""
        cached = self._cache.get(digest)
        if cached is not None:
            self._cache.move_to_end(digest)
            return cached
        fd, size = await self._open_file(digest)
        try:
            data: bytes = await self.run(files.read_at, fd, 0, size)
        finally:
            os.close(fd)
        if digest not in self._cache:
            self._cache[digest] = data
            self._cache_size += len(data)
            while self._cache_size > CACHED_TOTAL:
                self._drop_cached(next(iter(self._cache)))
        return data

    def _drop_cached(self, digest: str) -> None:
        self._cache_size -= len(self._cache.pop(digest, b""))

    @contextlib.asynccontextmanager
    async def _file_lock(self, digest: str) -> AsyncIterator[None]:
        lock, users = self._file_locks.get(digest) or (asyncio.Lock(), 0)
        self._file_locks[digest] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._file_locks[digest]
            if users == 1:
                del self._file_locks[digest]
            else:
                self._file_locks[digest] = (lock, users - 1)

    def _spawn(self, work: Any) -> None:
        """Do something soon that nobody waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
