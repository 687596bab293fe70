"""The files of the content store: blocking functions that run in its threads.

ROOT/blobs/sha256/HEX     a blob, complete and verified, mode 0444
ROOT/ingest/ID/data       an upload on its way; ID is the number of its record
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from wherry.core.digest import ALGORITHMS, Digest
from wherry.core.errors import ResourceExhausted, WherryError

if TYPE_CHECKING:
    from _hashlib import HASH

# bytes read at once for hashing and copying
CHUNK = 1 << 20
# a full disk or quota: what an OSError's errno may be then
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Tree:
    """Where what is, below the content store's root."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.blobs = os.path.join(root, "blobs")
        self.ingests = os.path.join(root, "ingest")

    def make(self) -> None:
        """Make the folders that aren't there."""
        os.makedirs(self.root, mode=0o755, exist_ok=True)
        for folder in (self.blobs, os.path.join(self.blobs, "sha256"), self.ingests):
            make_folder(folder)

    def blob(self, digest: str) -> str:
        """The path of a blob; `digest` must have been checked."""
        algorithm, _, encoded = digest.partition(":")
        return os.path.join(self.blobs, algorithm, encoded)

    def ingest(self, id: int) -> str:  # noqa: A002 -- the column's name
        """The folder of an upload."""
        return os.path.join(self.ingests, str(id))

    def data(self, id: int) -> str:  # noqa: A002
        """The file of an upload's bytes."""
        return os.path.join(self.ingests, str(id), "data")

    def all_blobs(self) -> Iterator[str]:
        """The digests of all files that are blobs by their names."""
        for algorithm in ALGORITHMS:
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(os.path.join(self.blobs, algorithm)):
                    with contextlib.suppress(WherryError):
                        yield Digest.parse(f"{algorithm}:{name}")

    def all_ingests(self) -> list[str]:
        """The names of all folders of uploads."""
        try:
            return os.listdir(self.ingests)
        except FileNotFoundError:
            return []


def make_folder(path: str) -> None:
    """Make a folder, on disk, if it isn't there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o755)
        sync_folder(os.path.dirname(path))


def sync_folder(path: str) -> None:
    """The names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_data(folder: str, algorithm: str, keep: bool) -> tuple[int, HASH, int]:
    """Open an upload's file to append: its descriptor, the hash and the size of what is there.

    `keep` goes on with what is there, hashing it anew; otherwise it starts from nothing.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (0 if keep else os.O_TRUNC)
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
        fd = os.open(os.path.join(folder, "data"), flags, 0o644)
    except OSError as error:
        raise disk_error(error, "open upload") from error
    try:
        state = hashlib.new(algorithm)
        size = hash_file(fd, state)
        os.lseek(fd, size, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd, state, size


def hash_file(fd: int, state: HASH) -> int:
    """Feed a whole file to a hash; the number of its bytes."""
    size = 0
    while chunk := os.pread(fd, CHUNK, size):
        state.update(chunk)
        size += len(chunk)
    return size


def append(fd: int, chunks: Iterable[bytes], state: HASH) -> None:
    """Write chunks and hash them. Both let go of the GIL. Raises ResourceExhausted for a full disk."""
    for chunk in chunks:
        view = memoryview(chunk)
        while view:
            try:
                done = os.write(fd, view)
            except OSError as error:
                raise disk_error(error, "write content") from error
            view = view[done:]
        state.update(chunk)


def copy(source: str, fd: int, state: HASH) -> int:
    """Copy a blob into an upload, hashing; the number of bytes."""
    size = 0
    with open(source, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            append(fd, [chunk], state)
            size += len(chunk)
    return size


def sync(fd: int) -> None:
    """The bytes of a file are on disk."""
    try:
        os.fsync(fd)
    except OSError as error:
        raise disk_error(error, "sync content") from error


def publish(data: str, target: str) -> None:
    """Make an upload's synced file the blob `target`, on disk; one that is already there is as good."""
    folder = os.path.dirname(target)
    try:
        make_folder(folder)
        os.chmod(data, 0o444)
        os.rename(data, target)
        sync_folder(folder)
    except OSError as error:
        raise disk_error(error, "commit content") from error


def remove_ingest(folder: str) -> None:
    """Remove an upload's folder; one that is gone is fine."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_blob(path: str) -> None:
    """Remove a blob's file; one that is gone is fine."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def read_at(fd: int, offset: int, size: int) -> bytes:
    """At most `size` bytes from `offset`, as many as there are."""
    return os.pread(fd, size, offset)


def open_blob(path: str) -> tuple[int, int]:
    """A blob's descriptor and size."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return fd, os.fstat(fd).st_size
    except BaseException:
        os.close(fd)
        raise


def disk_error(error: OSError, what: str) -> Exception:
    """ResourceExhausted where the disk is full, otherwise the error itself."""
    if error.errno in _FULL:
        return ResourceExhausted(f"{what}: {os.strerror(error.errno or 0).lower()}: resource exhausted")
    return error
