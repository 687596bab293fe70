"""The content store to clients: containerd.services.content.v1."""

from __future__ import annotations

from collections.abc import AsyncIterator

from google.protobuf import empty_pb2

from wherry.core.digest import Digest
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound, OutOfRange
from wherry.core.names import quote
from wherry.daemon.content import ContentStore
from wherry.daemon.content_writer import ContentWriter
from wherry.daemon.namespaces import require_namespace
from wherry.proto import content_pb2 as pb
from wherry.proto.service import Context

# infos in one message of a list, as containerd sends them
LIST_BLOCK = 100


class ContentService:
    """containerd.services.content.v1; texts and codes of its contentserver."""

    SERVICE = "containerd.services.content.v1.Content"

    def __init__(self, store: ContentStore) -> None:
        self._store = store

    async def info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        """What is known of a blob."""
        namespace = require_namespace(context)
        return pb.InfoResponse(info=self._store.info(namespace, _digest(request.digest)))

    async def update(self, request: pb.UpdateRequest, context: Context) -> pb.UpdateResponse:
        """Its labels."""
        namespace = require_namespace(context)
        _digest(request.info.digest)
        return pb.UpdateResponse(info=await self._store.update(namespace, request.info, request.update_mask.paths))

    async def list(self, request: pb.ListContentRequest, context: Context) -> AsyncIterator[pb.ListContentResponse]:
        """Those that match, in blocks."""
        found = await self._store.list(require_namespace(context), request.filters)
        for start in range(0, len(found), LIST_BLOCK):
            yield pb.ListContentResponse(info=found[start : start + LIST_BLOCK])

    async def delete(self, request: pb.DeleteContentRequest, context: Context) -> empty_pb2.Empty:
        """A blob, whoever references it."""
        namespace = require_namespace(context)
        await self._store.delete(namespace, _digest(request.digest), lease=context.lease)
        return empty_pb2.Empty()

    async def read(self, request: pb.ReadContentRequest, context: Context) -> AsyncIterator[pb.ReadContentResponse]:
        """A blob's bytes, or a range of them."""
        namespace = require_namespace(context)
        offset = max(request.offset, 0)
        async for chunk in self._store.read(namespace, _digest(request.digest), offset, request.size):
            yield pb.ReadContentResponse(offset=offset, data=chunk)
            offset += len(chunk)

    async def status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        """How far an upload is."""
        namespace = require_namespace(context)
        try:
            return pb.StatusResponse(status=await self._store.status(namespace, request.ref))
        except NotFound as error:
            raise NotFound(f"could not get status for ref {quote(request.ref)}: {error.message}") from None

    async def list_statuses(self, request: pb.ListStatusesRequest, context: Context) -> pb.ListStatusesResponse:
        """How far all are."""
        statuses = await self._store.list_statuses(require_namespace(context), request.filters)
        return pb.ListStatusesResponse(statuses=statuses)

    async def abort(self, request: pb.AbortRequest, context: Context) -> empty_pb2.Empty:
        """Throw an upload away."""
        await self._store.abort(require_namespace(context), request.ref, lease=context.lease)
        return empty_pb2.Empty()

    async def write(
        self, requests: AsyncIterator[pb.WriteContentRequest], context: Context
    ) -> AsyncIterator[pb.WriteContentResponse]:
        """An upload: each request is answered with the offset; the first names the ref; COMMIT ends it.

        A call that ends without COMMIT leaves the upload to be gone on with.
        """
        namespace = require_namespace(context)
        first = await anext(requests, None)
        if first is None:
            return
        if not first.ref:
            raise InvalidArgument("first message must have a reference")
        session = _Session(self._store, namespace, first)
        async with await self._store.writer(
            namespace, first.ref, total=first.total, expected=first.expected, lease=context.lease
        ) as writer:
            yield await session.step(writer, first)
            if first.action == pb.COMMIT:
                return
            async for request in requests:
                yield await session.step(writer, request)
                if request.action == pb.COMMIT:
                    return


class _Session:
    """What one call of Write knows beside its writer: the size and the digest that were announced last."""

    def __init__(self, store: ContentStore, namespace: str, first: pb.WriteContentRequest) -> None:
        self._store = store
        self._namespace = namespace
        self._total = first.total
        self._expected = first.expected

    async def step(self, writer: ContentWriter, request: pb.WriteContentRequest) -> pb.WriteContentResponse:
        """Do one request. Raises AlreadyExists, OutOfRange, and what writer and commit raise."""
        answer = pb.WriteContentResponse(action=request.action, offset=writer.offset)
        if request.expected:
            self._expected = Digest.parse(request.expected)
            if self._store.exists(self._namespace, self._expected):
                await self._store.abort(self._namespace, writer.ref, lease=writer.lease)
                raise AlreadyExists(f"blob with expected digest {request.expected} exists: already exists")
        if request.total > 0:
            self._total = request.total
        if request.action == pb.STAT:
            answer.digest = await writer.digest()
            answer.started_at.CopyFrom(writer.started_at)
            answer.updated_at.CopyFrom(writer.updated_at)
            answer.total = self._total
            return answer
        await self._write(writer, request)
        answer.offset = writer.offset
        if request.action == pb.COMMIT:
            info = await writer.commit(self._total, self._expected, request.labels)
            answer.digest = info.digest
        else:
            # clients commit by the digest that they were told last (containerd's walking differ does)
            answer.digest = await writer.digest()
        return answer

    async def _write(self, writer: ContentWriter, request: pb.WriteContentRequest) -> None:
        if request.offset != writer.offset:
            # an offset of 0 means "not given" with COMMIT, and "from the start" where data comes with it
            if request.offset != 0:
                raise OutOfRange(f"write @{request.offset} must occur at current offset {writer.offset}")
            if request.action == pb.WRITE or request.data:
                await writer.truncate()
        if request.data:
            await writer.write(request.data)


def _digest(text: str) -> str:
    try:
        return Digest.parse(text)
    except InvalidArgument:
        raise InvalidArgument(f"{quote(text)} failed validation: invalid argument") from None
