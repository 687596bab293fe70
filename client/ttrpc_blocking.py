"""ttrpc without threads or an event loop: the command line's way to `wherryd`.

One connection carries all calls. Whoever waits for an answer reads the socket and hands on what belongs to others, so
that a wait for a container's end and the calls made meanwhile share it; `fileno` lets one `select` wait for answers and
for the container's output.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError, Message

from wherry.client.transport import Call, Pending, Response, Stream, Transport
from wherry.core.errors import DeadlineExceeded, Internal, Unavailable, Unimplemented, from_code
from wherry.core.hints import Generic, TypeVar
from wherry.proto.ttrpc import sockets
from wherry.proto.ttrpc.frames import REMOTE_CLOSED, REMOTE_OPEN, Answer, ClientConnection, Payload

if TYPE_CHECKING:
    from _socket import socket

R = TypeVar("R", bound=Message)
# bytes read at once: one full frame of content and a bit
READ = 256 << 10


def _decode(kind: type[R], data: bytes) -> R:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise Internal(f"the daemon's answer is no {kind.DESCRIPTOR.full_name}: {error}") from error


class _Connection:
    """The socket and what came over it for each stream."""

    def __init__(self, sock: socket) -> None:
        self.socket = sock
        self.protocol = ClientConnection()
        self.inbox: dict[int, deque[Answer | Payload]] = {}
        self.lost: Unavailable | None = None
        # streams that are answered while somebody waits for another one
        self.responders: dict[int, Callable[[Answer | Payload], bool]] = {}

    def open(self, call: Call[Any], flags: int) -> int:
        service, _, method = call.path.partition("/")
        nanoseconds = 0 if call.timeout is None else max(1, int(call.timeout * 1e9))
        stream, data = self.protocol.call(
            service, method, call.payload, timeout_nano=nanoseconds, metadata=call.metadata, flags=flags
        )
        self.inbox[stream] = deque()
        self.send(data)
        return stream

    def send(self, data: bytes) -> None:
        """Sends all of it; while the other side doesn't read, what it has to say is taken in, or both would wait."""
        if self.lost is not None:
            raise self.lost
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                readable, _, _ = select.select([self.socket], [self.socket], [])
                if readable:
                    self.pump()
            except OSError as error:
                self._lose(error)
                raise self._unavailable() from error

    def pump(self) -> None:
        """Takes in what the socket has, without waiting."""
        try:
            data = self.socket.recv(READ)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        if not data:
            self._lose(None)
            return
        for event in self.protocol.receive(data):
            box = self.inbox.get(event.stream_id)
            if box is not None:
                box.append(event)

    def next(self, stream: int, deadline: float | None) -> Answer | Payload:
        """The next thing that came for a stream; waits for it. Raises DeadlineExceeded, Unavailable."""
        box = self.inbox[stream]
        while True:
            # here and not where it is taken in, which may be in the middle of sending something else
            self._respond()
            if box:
                return box.popleft()
            if self.lost is not None:
                raise self.lost
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                self.forget(stream)
                raise DeadlineExceeded("the daemon didn't answer in time: context deadline exceeded")
            select.select([self.socket], [], [], left)
            self.pump()

    def _respond(self) -> None:
        for stream, respond in list(self.responders.items()):
            box = self.inbox.get(stream)
            while box:
                if not respond(box.popleft()):
                    self.responders.pop(stream, None)
                    break

    def forget(self, stream: int) -> None:
        """What still comes for this stream is dropped."""
        self.protocol.forget(stream)
        self.inbox.pop(stream, None)
        self.responders.pop(stream, None)

    def close(self) -> None:
        self.socket.close()
        if self.lost is None:
            self.lost = Unavailable("the connection to the daemon was closed here")

    def _lose(self, cause: OSError | None) -> None:
        if self.lost is None:
            why = f": {cause.strerror}" if cause is not None and cause.strerror else ""
            self.lost = Unavailable(f"the connection to the daemon was lost{why}")
            self.socket.close()

    def _unavailable(self) -> Unavailable:
        return self.lost or Unavailable("the connection to the daemon was lost")


def _result(connection: _Connection, stream: int, kind: type[R], deadline: float | None) -> R:
    event = connection.next(stream, deadline)
    connection.forget(stream)
    if not isinstance(event, Answer):
        raise Internal("the daemon streams an answer that should be a single message")
    if event.code:
        raise from_code(event.code, event.message)
    return _decode(kind, event.payload)


class TtrpcPending(Generic[R]):
    """A unary call on its way."""

    def __init__(self, connection: _Connection, stream: int, kind: type[R], deadline: float | None) -> None:
        self._connection = connection
        self._stream = stream
        self._kind = kind
        self._deadline = deadline

    def fileno(self) -> int:
        """The connection's descriptor: when it is readable, `ready` takes in what is there."""
        return self._connection.socket.fileno()

    def ready(self) -> bool:
        """Takes in what came, without waiting; whether `result` would return at once."""
        connection = self._connection
        if not connection.inbox.get(self._stream) and connection.lost is None:
            connection.pump()
        return bool(connection.inbox.get(self._stream)) or connection.lost is not None

    async def result(self) -> R:
        """Waits for the answer."""
        return _result(self._connection, self._stream, self._kind, self._deadline)

    def cancel(self) -> None:
        """Gives it up."""
        self._connection.forget(self._stream)


class TtrpcStream(Generic[R]):
    """A streaming call."""

    def __init__(self, connection: _Connection, stream: int, kind: type[R], deadline: float | None) -> None:
        self._connection = connection
        self._stream = stream
        self._kind = kind
        self._deadline = deadline
        self._over = False

    async def send(self, message: Message) -> None:
        """Sends one message; a call that has failed already says why."""
        protocol = self._connection.protocol
        if self._stream not in protocol.streams:
            await self.receive()
        self._connection.send(protocol.send(self._stream, message.SerializeToString()))

    async def close_send(self) -> None:
        """No more messages."""
        self._connection.send(self._connection.protocol.close_send(self._stream))

    async def receive(self) -> R | None:
        """The next message, None at the end."""
        while not self._over:
            event = self._connection.next(self._stream, self._deadline)
            if isinstance(event, Answer):
                self._finish()
                if event.code:
                    raise from_code(event.code, event.message)
                # a handler that isn't a stream to the library answers a last time in this form; an empty one is the end
                return _decode(self._kind, event.payload) if event.payload else None
            if event.end:
                self._finish()
            if event.payload is not None:
                return _decode(self._kind, event.payload)
        return None

    def answer(self, respond: Callable[[R], Message]) -> None:
        """Whoever waits for another call of this connection answers this one meanwhile."""

        def react(event: Answer | Payload) -> bool:
            if isinstance(event, Answer):
                return False
            if event.payload is not None:
                message = respond(_decode(self._kind, event.payload))
                self._connection.send(self._connection.protocol.send(self._stream, message.SerializeToString()))
            return not event.end

        self._connection.responders[self._stream] = react

    async def close(self) -> None:
        """Drops what still comes; ttrpc can't tell the other side to stop."""
        self._finish()

    def _finish(self) -> None:
        if not self._over:
            self._over = True
            self._connection.forget(self._stream)


class BlockingTtrpcTransport:
    """A connection to ADDRESS.ttrpc.

    containerd listens there too, but serves nothing of the API: where the first call finds no such service, `fall_back`
    gives the transport that takes over.
    """

    def __init__(self, path: str, connect_timeout: float | None = None) -> None:
        self.path = path
        self.fall_back: Callable[[], Transport] | None = None
        self._timeout = connect_timeout
        self._open: _Connection | None = None
        self._other: Transport | None = None
        self._proven = False

    @property
    def ours(self) -> bool:
        """Whether the other side was seen to serve the API by ttrpc, which `wherryd` alone does."""
        return self._proven and self._other is None

    def connect(self) -> None:
        """Connects, where it isn't connected; raises Unavailable."""
        if self._open is None or self._open.lost is not None:
            sock = sockets.connect_plain(self.path, self._timeout)
            sock.setblocking(False)
            self._open = _Connection(sock)

    def _connection(self) -> _Connection:
        self.connect()
        if self._open is None:
            raise Unavailable(f"no connection to {self.path}")
        return self._open

    async def unary(self, call: Call[Response]) -> Response:
        """One request, one answer."""
        if self._other is None:
            try:
                answer = await self._send(call).result()
            except Unimplemented:
                if self._proven or self.fall_back is None:
                    raise
                self._other = self.fall_back()
            else:
                self._proven = True
                return answer
        return await self._other.unary(call)

    def begin(self, call: Call[Response]) -> Pending[Response]:
        """Sends a request now; its answer is asked for later."""
        if self._other is not None:
            return self._other.begin(call)
        return self._send(call)

    async def stream(self, call: Call[Response]) -> Stream[Response]:
        """A call that streams: with a `request` only the other side does, without one both do."""
        if not self._proven and self._other is None:
            await self._prove(call.metadata)
        if self._other is not None:
            return await self._other.stream(call)
        connection = self._connection()
        stream = connection.open(call, REMOTE_OPEN if call.request is None else REMOTE_CLOSED)
        return TtrpcStream(connection, stream, call.response, _deadline(call.timeout))

    async def close(self) -> None:
        """Ends the connection."""
        if self._open is not None:
            self._open.close()
        if self._other is not None:
            await self._other.close()

    def _send(self, call: Call[Response]) -> TtrpcPending[Response]:
        connection = self._connection()
        stream = connection.open(call, 0)
        return TtrpcPending(connection, stream, call.response, _deadline(call.timeout))

    async def _prove(self, metadata: Mapping[str, str]) -> None:
        """Finds out who answers before a stream does: a refusal would come only when it is read."""
        from google.protobuf.empty_pb2 import Empty

        from wherry.proto.version_pb2 import VersionResponse

        path = "containerd.services.version.v1.Version/Version"
        await self.unary(Call(path, Empty(), VersionResponse, metadata, self._timeout))


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout
