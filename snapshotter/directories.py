"""What the snapshotters have in common that keep each snapshot in a directory of its own.

    ROOT/metadata.db        the records
    ROOT/snapshots/N/fs     the files of snapshot number N, or what it changed of its parent's
    ROOT/snapshots/N/…      what else an implementation needs

Order of things: a directory is made before its record is committed and deleted after its record is gone. So whatever
stands in `snapshots/` under a number without a record is garbage, and `cleanup()` may always delete it.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from wherry.core.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, WherryError
from wherry.linux.mounts import Mount
from wherry.snapshotter import remap
from wherry.snapshotter.deleting import delete_tree
from wherry.snapshotter.interface import Info, Kind, Usage
from wherry.snapshotter.metadata import Metadata, Record
from wherry.snapshotter.usage import disk_usage

log = logging.getLogger("wherry.snapshotter")

# <linux/fs.h>, for processors with the common encoding of ioctl numbers
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_TOPDIR_FL = 0x00020000

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class DirectorySnapshotter:
    """The base of `OverlaySnapshotter` and `NativeSnapshotter`; the contract is `interface.Snapshotter`.

    The directories of removed snapshots are deleted by a thread at once; `async_remove`: they wait for `cleanup()`;
    `sync_remove`: they are gone when `remove` returns.
    """

    rebases = False

    def __init__(self, root: str, *, async_remove: bool = False, sync_remove: bool = False) -> None:
        if not os.path.isabs(root):
            raise InvalidArgument(f"a snapshotter's root must be an absolute path: {root}")
        self.root = root
        self._directory = os.path.join(root, "snapshots")
        os.makedirs(root, mode=0o700, exist_ok=True)
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        _spread(self._directory)
        self._held = _hold(root)
        try:
            self._metadata = Metadata(os.path.join(root, "metadata.db"))
        except BaseException:
            os.close(self._held)
            raise
        self.remaps = remap.supported()
        self._sync_remove = sync_remove
        self._janitor = None if async_remove else _Janitor(self._metadata)
        if self._janitor is not None:
            for directory in self._garbage():
                self._janitor.delete(directory)

    # what an implementation brings

    def _make(self, record: Record, directory: str) -> None:
        """Fill the new, empty `directory` of a snapshot."""
        raise FailedPrecondition(f"{type(self).__name__} makes no snapshots")

    def _mounts_of(self, record: Record, chain: Sequence[int]) -> list[Mount]:
        """The mounts of an active snapshot or a view; `chain` are the numbers of its parents, the nearest first."""
        raise FailedPrecondition(f"{type(self).__name__} mounts no snapshots")

    def _commit_on(self, record: Record, parent: Record) -> None:
        """A snapshot that was prepared without a parent becomes a child of `parent`."""

    def _shown(self, record: Record) -> Info:
        """A record's info as callers see it."""
        return record.info

    # the contract

    def stat(self, key: str) -> Info:
        return self._shown(self._metadata.get(key))

    def update(self, info: Info, fieldpaths: Sequence[str] = ()) -> Info:
        with self._metadata.write():
            record = self._metadata.update(info, fieldpaths)
        return self._shown(record)

    def usage(self, key: str) -> Usage:
        record = self._metadata.get(key)
        if record.info.kind is Kind.ACTIVE:
            return self._measure(record)
        return record.usage

    def mounts(self, key: str) -> list[Mount]:
        record = self._metadata.get(key)
        if record.info.kind is Kind.COMMITTED:
            raise FailedPrecondition(f"requested snapshot {key} not active nor view: failed precondition")
        return self._mounts_of(record, self._metadata.chain(record.parent_id))

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        return self._create(Kind.ACTIVE, key, parent, labels or {})

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        return self._create(Kind.VIEW, key, parent, labels or {})

    def _create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        directory = ""
        if self.remaps:
            remap.check(labels)
        try:
            with self._metadata.write():
                record = self._metadata.create(kind, key, parent, labels)
                directory = self.directory(record.id)
                self._new_directory(directory)
                self._make(record, directory)
        except BaseException as error:
            if directory:
                self._discard(directory)
            if isinstance(error, OSError):
                raise _explained(error, f'snapshot "{key}"') from error
            raise
        return self._mounts_of(record, self._metadata.chain(record.parent_id))

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = "") -> None:
        try:
            # measured outside of the transaction: a large layer takes a while
            active = self._metadata.find(key)
            usage = Usage()
            if active is not None and active.info.kind is Kind.ACTIVE and self._metadata.find(name) is None:
                usage = self._measure(active)
            with self._metadata.write(durable=True):
                self._metadata.commit(key, name, usage, labels or {}, parent)
                if active is not None and parent and not active.info.parent:
                    self._commit_on(active, self._metadata.get(parent))
        except WherryError as error:
            raise type(error)(f"failed to commit snapshot {key}: {error.message}") from error
        except OSError as error:
            raise _explained(error, f'snapshot "{key}"') from error
        self._metadata.checkpoint()

    def remove(self, key: str) -> None:
        with self._metadata.write():
            record = self._metadata.remove(key)
        if self._sync_remove:
            self._discard(self.directory(record.id))
        elif self._janitor is not None:
            self._janitor.delete(self.directory(record.id))

    def walk(self, filters: Sequence[str] = ()) -> Iterator[Info]:
        return self._metadata.walk(filters, self._shown)

    def cleanup(self) -> None:
        if self._janitor is not None:
            self._janitor.wait()
        for directory in self._garbage():
            self._discard(directory)
        self._metadata.checkpoint()

    def close(self) -> None:
        if self._janitor is not None:
            self._janitor.close()
        self._metadata.close()
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    # directories

    def _garbage(self) -> list[str]:
        """The directories that no snapshot has, under names that no snapshot will get."""
        found = []
        # in a transaction: no directory is being made meanwhile, which may take the place of one without a record
        with self._metadata.write():
            known = self._metadata.ids()
            for name in os.listdir(self._directory):
                path = f"{self._directory}/{name}"
                if not name.isdecimal():
                    found.append(path)
                elif int(name) not in known:
                    aside = f"{path}.removed-{time.time_ns()}"
                    os.rename(path, aside)
                    found.append(aside)
        return found

    def directory(self, number: int) -> str:
        """The directory of the snapshot with that number."""
        return f"{self._directory}/{number}"

    def content(self, number: int) -> str:
        """Where its files are."""
        return f"{self._directory}/{number}/fs"

    def _measure(self, record: Record) -> Usage:
        return disk_usage(self.content(record.id))

    def _new_directory(self, directory: str) -> None:
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            # the record that it had was lost with the power, or its making was cut short
            self._discard(directory)
            os.mkdir(directory, 0o700)

    def _discard(self, directory: str) -> None:
        try:
            delete_tree(directory)
        except OSError as error:
            log.warning("directory %s couldn't be deleted: %s", directory, error)


class _Janitor:
    """A thread that deletes directories and checkpoints the WAL, so that `remove` doesn't wait for either."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._queue: queue.SimpleQueue[str | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = False

    def delete(self, directory: str) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="snapshots-janitor", daemon=True)
            self._thread.start()
        self._queue.put(directory)

    def _run(self) -> None:
        while (directory := self._queue.get()) is not None:
            if isinstance(directory, threading.Event):
                directory.set()
                continue
            if self._closing:
                continue
            try:
                delete_tree(directory)
                self._metadata.checkpoint()
            except Exception as error:  # noqa: BLE001 - whatever it is, the next directory must still be deleted
                log.warning("directory %s couldn't be deleted: %s", directory, error)

    def wait(self) -> None:
        """Until all that is queued now is deleted."""
        if self._thread is not None:
            reached = threading.Event()
            self._queue.put(reached)
            reached.wait()

    def close(self) -> None:
        """After the directory at work; the others are found at the next start."""
        if self._thread is not None:
            self._closing = True
            self._queue.put(None)
            self._thread.join()
            self._thread = None


def _spread(directory: str) -> None:
    """Have ext4 put each snapshot's inodes in another part of the disk (`chattr +T`, ext4(5): top of a hierarchy).

    Without it all snapshots are in the group of their parent, where ext4 looks for free inodes one by one past all that
    were deleted in the last minutes: unpacking an image right after another was removed took ten times as long.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flags = array.array("L", [0])
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, flags)
        flags[0] |= FS_TOPDIR_FL
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags)
    except OSError as error:
        log.debug("no hint for the placing of snapshots below %s: %s", directory, error)  # another file system
    finally:
        os.close(fd)


def _hold(root: str) -> int:
    """Keep others from serving the same snapshots: a lock that ends with this process. FailedPrecondition."""
    fd = os.open(os.path.join(root, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise FailedPrecondition(
            f"the snapshots in {root} are served by another process: failed precondition"
        ) from None
    return fd


def _explained(error: OSError, what: str) -> WherryError:
    if error.errno in _FULL:
        return ResourceExhausted(f"{what}: {error.strerror}: {error.filename}: resource exhausted")
    return FailedPrecondition(f"{what}: {error}")
