"""Content: blobs by digest, and the uploads (ingests) on their way to become one."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from types import MappingProxyType
from typing import Self

from google.protobuf.empty_pb2 import Empty

from wherry.client.transport import Calls, Stream
from wherry.client.values import label_mask, seconds
from wherry.core.errors import AlreadyExists, DataLoss, Internal
from wherry.core.tuples import NamedTuple
from wherry.proto import content_pb2 as pb

_SERVICE = "containerd.services.content.v1.Content"
# bytes in one message of a write: far from the 4 MiB that a frame of ttrpc holds, and large enough to be rare
CHUNK = 1 << 20


class Info(NamedTuple):
    """A blob's record; `size` in bytes."""

    digest: str
    size: int
    labels: Mapping[str, str] = MappingProxyType({})
    created_at: float = 0.0
    updated_at: float = 0.0


class Status(NamedTuple):
    """An upload: `offset` bytes are there of `total` (0 where nobody said)."""

    ref: str
    offset: int
    total: int
    expected: str
    started_at: float
    updated_at: float


def _info(message: pb.Info) -> Info:
    return Info(
        digest=message.digest,
        size=message.size,
        labels=dict(message.labels),
        created_at=seconds(message.created_at),
        updated_at=seconds(message.updated_at),
    )


def _status(message: pb.Status) -> Status:
    return Status(
        ref=message.ref,
        offset=message.offset,
        total=message.total,
        expected=message.expected,
        started_at=seconds(message.started_at),
        updated_at=seconds(message.updated_at),
    )


class Writer:
    """One upload. It survives its writer: the same ref goes on at `offset` later."""

    def __init__(self, stream: Stream[pb.WriteContentResponse], ref: str, offset: int, total: int) -> None:
        self._stream = stream
        self.ref = ref
        self.offset = offset
        self.total = total

    async def write(self, data: bytes) -> int:
        """Appends bytes and returns the new offset."""
        for start in range(0, len(data), CHUNK):
            request = pb.WriteContentRequest(
                action=pb.WRITE, offset=self.offset, data=data[start : start + CHUNK], total=self.total
            )
            answer = await self._ask(request)
            self.offset = answer.offset
        return self.offset

    async def commit(self, size: int = 0, digest: str = "", labels: Mapping[str, str] | None = None) -> str:
        """Makes a blob of what was written, and returns its digest.

        `size` and `digest` are checked where they are given. Raises FailedPrecondition where they differ, AlreadyExists
        where the blob is there (then nothing is lost).
        """
        request = pb.WriteContentRequest(
            action=pb.COMMIT, total=size, expected=digest, offset=self.offset, labels=dict(labels or {})
        )
        answer = await self._ask(request)
        return answer.digest or digest

    async def close(self) -> None:
        """Leaves the upload as it is."""
        await self._stream.close()

    async def _ask(self, request: pb.WriteContentRequest) -> pb.WriteContentResponse:
        await self._stream.send(request)
        answer = await self._stream.receive()
        if answer is None:
            raise Internal(f"the daemon ended the upload {self.ref} without an answer")
        return answer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Content:
    """The content of a namespace."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def info(self, digest: str) -> Info:
        """One blob; raises NotFound."""
        answer = await self._calls.unary(f"{_SERVICE}/Info", pb.InfoRequest(digest=digest), pb.InfoResponse)
        return _info(answer.info)

    async def list(self, filters: Iterable[str] = ()) -> AsyncIterator[Info]:
        """All blobs that one of the filters lets through, as the daemon sends them."""
        request = pb.ListContentRequest(filters=filters)
        async for answer in self._calls.messages(f"{_SERVICE}/List", request, pb.ListContentResponse):
            for item in answer.info:
                yield _info(item)

    async def read(self, digest: str, offset: int = 0, size: int = 0) -> AsyncIterator[bytes]:
        """A blob's bytes in pieces; `size` 0 reads to the end. Raises NotFound, OutOfRange."""
        request = pb.ReadContentRequest(digest=digest, offset=offset, size=size)
        async for answer in self._calls.messages(f"{_SERVICE}/Read", request, pb.ReadContentResponse):
            yield answer.data

    async def blob(self, digest: str, limit: int = 8 << 20) -> bytes:
        """A whole small blob (a manifest, a configuration); raises DataLoss beyond `limit` bytes.

        It isn't checked against its digest: a store verifies what it takes in, and hashes cost a command's start time.
        """
        pieces: builtins.list[bytes] = []
        length = 0
        async for piece in self.read(digest):
            pieces.append(piece)
            length += len(piece)
            if length > limit:
                raise DataLoss(f"content {digest} has more than the {limit} bytes that it may have here")
        return b"".join(pieces)

    async def writer(self, ref: str, *, total: int = 0, digest: str = "") -> Writer:
        """Opens an upload, at the offset that an earlier one under the same ref came to.

        Raises AlreadyExists where a blob of that digest is there, Unavailable where somebody else writes under the ref.
        """
        stream = await self._calls.stream(f"{_SERVICE}/Write", None, pb.WriteContentResponse)
        try:
            await stream.send(pb.WriteContentRequest(action=pb.STAT, ref=ref, total=total, expected=digest))
            answer = await stream.receive()
            if answer is None:
                raise Internal(f"the daemon ended the upload {ref} without an answer")
        except BaseException:
            await stream.close()
            raise
        return Writer(stream, ref, answer.offset, total)

    async def write(
        self,
        ref: str,
        pieces: AsyncIterable[bytes] | Iterable[bytes],
        *,
        size: int = 0,
        digest: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> str:
        """Uploads a blob from its start to its end, returns its digest; a blob that is there is no error."""
        try:
            async with await self.writer(ref, total=size, digest=digest) as writer:
                skip = writer.offset
                async for piece in _pieces(pieces):
                    rest = piece[skip:]
                    skip = max(0, skip - len(piece))
                    if rest:
                        await writer.write(rest)
                return await writer.commit(size, digest, labels)
        except AlreadyExists:
            if not digest:
                raise
            if labels:
                await self.label(digest, labels)
            return digest

    async def label(self, digest: str, labels: Mapping[str, str]) -> Info:
        """Sets labels; an empty value takes one away."""
        request = pb.UpdateRequest(info=pb.Info(digest=digest, labels=dict(labels)), update_mask=label_mask(labels))
        answer = await self._calls.unary(f"{_SERVICE}/Update", request, pb.UpdateResponse)
        return _info(answer.info)

    async def delete(self, digest: str) -> None:
        """Removes a blob; raises NotFound."""
        await self._calls.unary(f"{_SERVICE}/Delete", pb.DeleteContentRequest(digest=digest), Empty)

    async def status(self, ref: str) -> Status:
        """One upload; raises NotFound."""
        answer = await self._calls.unary(f"{_SERVICE}/Status", pb.StatusRequest(ref=ref), pb.StatusResponse)
        return _status(answer.status)

    async def statuses(self, filters: Iterable[str] = ()) -> builtins.list[Status]:
        """The uploads on their way."""
        request = pb.ListStatusesRequest(filters=filters)
        answer = await self._calls.unary(f"{_SERVICE}/ListStatuses", request, pb.ListStatusesResponse)
        return [_status(item) for item in answer.statuses]

    async def abort(self, ref: str) -> None:
        """Throws an upload away; raises NotFound."""
        await self._calls.unary(f"{_SERVICE}/Abort", pb.AbortRequest(ref=ref), Empty)


async def _pieces(pieces: AsyncIterable[bytes] | Iterable[bytes]) -> AsyncIterator[bytes]:
    if isinstance(pieces, AsyncIterable):
        async for piece in pieces:
            yield piece
    else:
        for piece in pieces:
            yield piece
