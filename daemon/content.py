"""Blobs by digest and the uploads on their way to become one. `ContentStore` in-process, `ContentService` for doors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from wherry.daemon.metadata import Metadata
from wherry.daemon.namespaces import Publish
from wherry.proto import content_pb2 as pb


class ContentWriter:
    """One upload; holds its ref until `close`. Not for two tasks at once. An async context manager (closes)."""

    ref: str
    offset: int  # bytes taken so far
    total: int  # 0 where unknown
    expected: str  # digest, "" where unknown

    def status(self) -> pb.Status:
        raise NotImplementedError

    async def digest(self) -> str:
        """The digest of what was written so far."""
        raise NotImplementedError

    async def write(self, data: bytes) -> int:
        """Append; returns the new offset. Returns before the bytes are on disk; an error comes with a later call."""
        raise NotImplementedError

    async def truncate(self, size: int) -> None:
        """Start over from 0 (only 0 is supported, as in containerd)."""
        raise NotImplementedError

    async def commit(self, size: int = 0, expected: str = "", labels: Mapping[str, str] | None = None) -> pb.Info:
        """Verify, sync, record. Raises FailedPrecondition (size, digest), AlreadyExists (the upload is then gone)."""
        raise NotImplementedError

    async def close(self) -> None:
        """Give up the ref; the upload stays for `writer(ref)` to go on with, until `abort` or a day is over."""
        raise NotImplementedError

    async def __aenter__(self) -> ContentWriter:
        raise NotImplementedError

    async def __aexit__(self, *error: object) -> None:
        raise NotImplementedError


class ContentStore:
    """`ROOT/blobs/sha256/HEX` and `ROOT/ingest/ID/data`, and their records."""

    def __init__(self, metadata: Metadata, root: str, publish: Publish | None = None) -> None:
        """`root` is the content folder itself (`/var/lib/wherry/content`); made where missing."""
        raise NotImplementedError

    def info(self, namespace: str, digest: str) -> pb.Info:
        """Raises NotFound."""
        raise NotImplementedError

    def exists(self, namespace: str, digest: str) -> bool:
        raise NotImplementedError

    def path(self, namespace: str, digest: str) -> str:
        """The path of the blob's file, for workers that read it. Raises NotFound."""
        raise NotImplementedError

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[pb.Info]:
        raise NotImplementedError

    async def update(self, namespace: str, info: pb.Info, paths: Sequence[str] = ()) -> pb.Info:
        """Set labels: all (`labels` or no path) or some (`labels.KEY`; an empty value removes)."""
        raise NotImplementedError

    async def delete(self, namespace: str, digest: str) -> None:
        """The record goes now, the file when no namespace has it."""
        raise NotImplementedError

    def read(self, namespace: str, digest: str, offset: int = 0, size: int = 0) -> AsyncIterator[bytes]:
        """Chunks of at most 1 MiB; size 0: to the end. Raises NotFound, OutOfRange."""
        raise NotImplementedError

    async def read_all(self, namespace: str, digest: str, limit: int = 8 << 20) -> bytes:
        """A small blob whole (manifests, configs). Raises ResourceExhausted above `limit` bytes."""
        raise NotImplementedError

    async def writer(
        self, namespace: str, ref: str, *, total: int = 0, expected: str = "", lease: str | None = None
    ) -> ContentWriter:
        """Start or resume an upload. Raises AlreadyExists (namespace has `expected`), Unavailable (ref is in use)."""
        raise NotImplementedError

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
        """Write a blob in one go; one that is already there is fine (its labels are added to)."""
        raise NotImplementedError

    async def status(self, namespace: str, ref: str) -> pb.Status:
        raise NotImplementedError

    async def list_statuses(self, namespace: str, filters: Sequence[str] = ()) -> list[pb.Status]:
        raise NotImplementedError

    async def abort(self, namespace: str, ref: str) -> None:
        raise NotImplementedError


class ContentService:
    SERVICE = "containerd.services.content.v1.Content"

    def __init__(self, store: ContentStore) -> None:
        raise NotImplementedError
