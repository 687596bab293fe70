"""One upload into the content store.

Bytes are taken into a small buffer and written and hashed in a thread while the next ones arrive; what is
acknowledged may therefore be lost when the daemon is killed, and its client goes on from the offset that `Status` says.
Only `commit` makes promises.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self, TypeVar

from wherry.core.digest import Digest
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, WherryError
from wherry.daemon import content_files as files
from wherry.daemon.fields import now, settle_labels, timestamp
from wherry.proto import content_pb2 as pb

if TYPE_CHECKING:
    from _hashlib import HASH

    from wherry.daemon.content import ContentStore

T = TypeVar("T")

# bytes that are gathered before a thread writes them: a hop to a thread costs about as much as hashing 50 KiB
FLUSH_SIZE = 1 << 20


class ContentWriter:
    """One upload; holds its ref until `close`. Not for two tasks at once. An async context manager (closes)."""

    def __init__(
        self,
        store: ContentStore,
        namespace: str,
        ref: str,
        *,
        id: int,  # noqa: A002 -- the column's name
        total: int,
        expected: str,
        started: int,
        lease: str | None,
    ) -> None:
        """Made by `ContentStore.writer`, which opens it."""
        self.namespace = namespace
        self.ref = ref
        self.id = id
        self.total = total  # bytes, 0 where unknown
        self.expected = expected  # digest, "" where unknown
        self.lease = lease
        self.offset = 0  # bytes taken so far
        self.shared = ""  # the blob of another namespace that this upload stands for, until something is written
        self.aborted = False
        self.started_at = timestamp(started)
        self.updated_at = timestamp(started)
        self._store = store
        self._algorithm = Digest.parse(expected).algorithm if expected else "sha256"
        self._fd = -1
        self._hash: HASH | None = None
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._flushing: asyncio.Future[None] | None = None
        self._discard = False  # what was written is of no use to anybody
        self._closed = False

    async def open(self, *, keep: bool) -> None:
        """Open the file; `keep` goes on with what is there. For the store."""
        opening = self._store.run(files.open_data, self._store.tree.ingest(self.id), self._algorithm, keep)
        try:
            await self._ended(opening)
        finally:
            # also when cancelled: what the thread opened is closed by `close`
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                self._fd, self._hash, self.offset = opening.result()
        if self.offset:
            self.updated_at.FromNanoseconds(os.fstat(self._fd).st_mtime_ns)

    def stand_for(self, digest: str, size: int) -> None:
        """Have this upload be complete with the bytes of a blob that another namespace has. For the store."""
        self.shared = self.expected = digest
        self.offset = self.total = size

    def status(self) -> pb.Status:
        """As `ContentStore.status`, without asking the disk."""
        return pb.Status(
            ref=self.ref,
            offset=self.offset,
            total=self.total,
            expected=self.expected,
            started_at=self.started_at,
            updated_at=self.updated_at,
        )

    async def digest(self) -> str:
        """The digest of what was written so far."""
        if self.shared:
            return self.shared
        await self._drain()
        return Digest.of_hash(self._need_hash())

    async def write(self, data: bytes) -> int:
        """Append; returns the new offset. Returns before the bytes are on disk; an error comes with a later call.

        Raises ResourceExhausted for a full disk, NotFound after an `abort`.
        """
        self._check_open()
        if data:
            if self.shared:
                await self._unshare()
            self._pending.append(data)
            self._pending_size += len(data)
            self.offset += len(data)
            if self._pending_size >= FLUSH_SIZE:
                await self._flush()
        self.updated_at.CopyFrom(now())
        return self.offset

    async def truncate(self, size: int = 0) -> None:
        """Start over from 0 (only 0 is supported, as in containerd: a hash can't go back)."""
        self._check_open()
        if size != 0:
            raise InvalidArgument(f"truncate to {size}: only 0 is supported: invalid argument")
        await self._drain()
        if self.shared:
            self.shared = ""
        elif self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        await self.open(keep=False)

    async def adopt(self) -> None:
        """Take the file at `path` as it is now for what was written: somebody else wrote it."""
        self._check_open()
        await self._drain()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        await self.open(keep=True)

    @property
    def path(self) -> str:
        """The file that the bytes go to, for a worker that writes them itself; `adopt` after it."""
        return self._store.tree.data(self.id)

    async def commit(self, size: int = 0, expected: str = "", labels: Mapping[str, str] | None = None) -> pb.Info:
        """Verify, sync, record; the writer is closed whatever happens.

        `size` 0 and `expected` "" are not compared. Raises FailedPrecondition (size, digest: what was written is then
        thrown away, except where it is only not complete yet), AlreadyExists (the upload is then gone), NotFound (it
        was aborted), ResourceExhausted.
        """
        self._check_open()
        info = pb.Info(labels=labels or {})
        try:
            settle_labels(info.labels, "info.Labels")
            info.digest, info.size = await self._verify(size, expected)
            return await self._store.record(self, info)
        finally:
            await self.close()

    async def close(self) -> None:
        """Give up the ref; the upload stays for `writer(ref)` to go on with, until `abort` or a day is over."""
        if self._closed:
            return
        self._closed = True
        try:
            # a full disk was told to who wrote, or will be when it goes on
            with contextlib.suppress(WherryError, OSError):
                await self._drain()
            # before the upload is thrown away: a file that is open takes room
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            if self._discard and not self.aborted:
                await self._store.forget(self)
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self._store.unlock(self)

    async def discard(self) -> None:
        """Close, and throw the upload away: nobody is going to go on with it."""
        self._discard = True
        await self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _verify(self, size: int, expected: str) -> tuple[str, int]:
        if expected:
            Digest.parse(expected)
        await self._drain()
        if size and size != self.offset:
            # what is too short may be gone on with, what is too long is wrong
            self._discard = self.offset > size
            raise FailedPrecondition(f"unexpected commit size {self.offset}, expected {size}: failed precondition")
        digest = await self.digest()
        if expected and expected != digest and expected.partition(":")[0] != self._algorithm and not self.shared:
            digest = await self._ended(self._store.run(_rehash, self._fd, expected.partition(":")[0]))
        if expected and expected != digest:
            self._discard = True
            raise FailedPrecondition(f"unexpected commit digest {digest}, expected {expected}: failed precondition")
        if not self.shared:
            await self._ended(self._store.run(files.sync, self._fd))
        return digest, self.offset

    async def _flush(self) -> None:
        """Have a thread write what is gathered, after what it is writing now."""
        await self._settle()
        chunks, self._pending, self._pending_size = self._pending, [], 0
        if chunks:
            self._flushing = self._store.run(files.append, self._fd, chunks, self._need_hash())

    async def _settle(self) -> None:
        """Wait for the write that is under way; its error is raised here."""
        flushing, self._flushing = self._flushing, None
        if flushing is None:
            return
        try:
            # shielded: a thread can't be called back, and nobody may close its descriptor meanwhile
            await asyncio.shield(flushing)
        except asyncio.CancelledError:
            self._flushing = flushing
            raise
        except ResourceExhausted:
            # nobody can use the room that it takes
            self._discard = True
            raise

    async def _drain(self) -> None:
        await self._flush()
        await self._settle()

    async def _unshare(self) -> None:
        """Have bytes of its own: what it stood for is copied before more is written behind it."""
        source = self._store.tree.blob(self.shared)
        self.shared = ""
        await self.open(keep=False)
        self.offset = await self._ended(self._store.run(files.copy, source, self._fd, self._need_hash()))

    def _need_hash(self) -> HASH:
        if self._hash is None:
            raise FailedPrecondition(f"upload {self.ref} isn't open: failed precondition")
        return self._hash

    def _check_open(self) -> None:
        if self.aborted:
            raise NotFound(f"reference {self.ref}: not found")
        if self._closed:
            raise FailedPrecondition("cannot commit on closed writer: failed precondition")

    async def _ended(self, work: asyncio.Future[T]) -> T:
        """What a thread's work comes to. It is waited for also when cancelled: nobody may close its descriptor."""
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise


def _rehash(fd: int, algorithm: str) -> str:
    """The digest of a file with another algorithm than the upload was begun with."""
    state = hashlib.new(algorithm)
    files.hash_file(fd, state)
    return Digest.of_hash(state)
