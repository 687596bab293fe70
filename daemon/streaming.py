"""Streams that a client opens and another call then uses by id: `containerd.services.streaming.v1`.

A client opens a stream with `StreamInit`, is told by an `Empty` that it is known, and names its id in a transfer. Over
it go objects (progress, questions for credentials) or bytes: `Data`, as many as the receiver allowed by `WindowUpdate`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

from google.protobuf.any_pb2 import Any
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from wherry.core import typeurl
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from wherry.core.names import quote, require_namespace
from wherry.proto import streaming_pb2, transfer_types_pb2
from wherry.proto.service import Context

# objects that one side may be ahead of the other, before it waits (or, for progress, the oldest is dropped)
QUEUE = 64
# bytes that a sender of bytes may be ahead of us
WINDOW = 1 << 20
# bytes of one `Data` that we send: what containerd sends too, well below gRPC's limit
CHUNK = 32 << 10
MAX_ID = 256


class Stream:
    """One open stream, from the daemon's side."""

    def __init__(self) -> None:
        self._inbox: asyncio.Queue[Any | None] = asyncio.Queue(QUEUE)
        self._outbox: deque[Any] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.closed = False
        # the client sends no more, though it may listen on; it is gone altogether
        self.ended = False
        self.gone = False

    async def receive(self) -> Any | None:
        """The next object from the client; None when it sends no more."""
        if self.ended and self._inbox.empty():
            return None
        return await self._inbox.get()

    async def send(self, message: Message) -> None:
        """Send an object, waiting while the client is far behind. Raises Unavailable when the client is gone."""
        while len(self._outbox) >= QUEUE and not self.gone:
            self._room.clear()
            await self._room.wait()
        if self.gone or self.closed:
            raise Unavailable("stream is closed: unavailable")
        self._put(message)

    def tell(self, message: Message) -> None:
        """Send an object without waiting; where the client is far behind, the oldest is dropped."""
        if not (self.gone or self.closed):
            if len(self._outbox) >= QUEUE:
                self._outbox.popleft()
            self._put(message)

    def close(self) -> None:
        """No more objects from this side; the client sees the end after what was sent."""
        self.closed = True
        self._changed.set()

    def _put(self, message: Message) -> None:
        self._outbox.append(typeurl.pack(message))
        self._changed.set()

    async def feed(self, requests: AsyncIterator[Any]) -> None:
        """Take in what the client sends; for the service."""
        try:
            async for packed in requests:
                await self._inbox.put(packed)
        finally:
            self._end()

    def leave(self) -> None:
        """The client is gone; for the service."""
        self.gone = True
        self._room.set()
        self._changed.set()
        self._end()

    def _end(self) -> None:
        self.ended = True
        with contextlib.suppress(asyncio.QueueFull):
            self._inbox.put_nowait(None)

    async def outgoing(self) -> AsyncIterator[Any]:
        """What goes to the client, until both are done; for the service."""
        while True:
            while self._outbox:
                packed = self._outbox.popleft()
                self._room.set()
                yield packed
            if self.closed or self.gone:
                return
            self._changed.clear()
            await self._changed.wait()


class StreamManager:
    """The open streams, by namespace and id."""

    def __init__(self) -> None:
        self._streams: dict[tuple[str, str], Stream] = {}

    def get(self, namespace: str, name: str) -> Stream:
        """Raises NotFound."""
        stream = self._streams.get((namespace, name))
        if stream is None:
            raise NotFound(f"stream {quote(name)}: not found")
        return stream

    @contextlib.contextmanager
    def open(self, namespace: str, name: str) -> Iterator[Stream]:
        """A new stream, known inside of the `with`. Raises AlreadyExists."""
        key = (namespace, name)
        if key in self._streams:
            raise AlreadyExists(f"stream {quote(name)}: already exists")
        stream = self._streams[key] = Stream()
        try:
            yield stream
        finally:
            stream.leave()
            stream.close()
            del self._streams[key]


class StreamingService:
    """containerd.services.streaming.v1."""

    SERVICE = "containerd.services.streaming.v1.Streaming"

    def __init__(self, manager: StreamManager) -> None:
        self._manager = manager

    async def stream(self, requests: AsyncIterator[Any], context: Context) -> AsyncGenerator[Any, None]:
        """Open a stream and carry its objects until the daemon's side closes it or the client leaves."""
        namespace = require_namespace(context.namespace)
        first = await anext(requests, None)
        if first is None:
            raise InvalidArgument("no stream was named: invalid argument")
        name = typeurl.unpack_as(first, streaming_pb2.StreamInit).id
        if not name or len(name) > MAX_ID:
            raise InvalidArgument(f"stream id {quote(name[:MAX_ID])} is empty or too long: invalid argument")
        with self._manager.open(namespace, name) as stream:
            yield typeurl.pack(Empty())
            feeding = asyncio.create_task(stream.feed(requests))
            # whoever only listens (to progress) closes its side at once: that alone doesn't end the stream
            try:
                async for packed in stream.outgoing():
                    yield packed
            finally:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)


async def receive_bytes(stream: Stream) -> AsyncIterator[bytes]:
    """The bytes that a client sends, allowing it more as they are taken. Raises InvalidArgument for other objects."""
    allowed = 0
    while True:
        if allowed < WINDOW // 2:
            more = WINDOW - allowed
            with contextlib.suppress(Unavailable):
                await stream.send(transfer_types_pb2.WindowUpdate(update=more))
            allowed += more
        packed = await stream.receive()
        if packed is None:
            return
        data = typeurl.unpack_as(packed, transfer_types_pb2.Data).data
        allowed -= len(data)
        if data:
            yield data


class ByteSender:
    """Sends bytes to a client, as many as it allows. `close` says that all were sent."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._allowed = 0

    async def write(self, data: bytes) -> None:
        """Send all of it, waiting for the client. Raises Unavailable when the client is gone."""
        at = 0
        while at < len(data):
            while self._allowed <= 0:
                packed = await self._stream.receive()
                if packed is None:
                    raise Unavailable("the client closed the stream before it had everything: unavailable")
                self._allowed += max(0, typeurl.unpack_as(packed, transfer_types_pb2.WindowUpdate).update)
            piece = data[at : at + min(CHUNK, self._allowed)]
            await self._stream.send(transfer_types_pb2.Data(data=piece))
            at += len(piece)
            self._allowed -= len(piece)

    def close(self) -> None:
        """End the stream after what was written."""
        self._stream.close()
