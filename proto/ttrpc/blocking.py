"""A small client without asyncio, for programs that must start fast: the command line, a shim's publisher.

One thread at a time; whoever waits in one call and wants to make another meanwhile opens a second connection, or asks
`fileno()` with select.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Self

from google.protobuf.message import Message

from wherry.core.errors import DeadlineExceeded, Internal, from_code
from wherry.proto.service import Method
from wherry.proto.ttrpc import sockets
from wherry.proto.ttrpc.calls import ClientClosed, ConnectionLost, find_method, nanoseconds, parse_response
from wherry.proto.ttrpc.frames import REMOTE_CLOSED, REMOTE_OPEN, Answer, ClientConnection, Payload

# bytes of one read; a frame of the largest kind comes in few of them
READ_SIZE = 1 << 16
CONNECT_SECONDS = 10.0


class BlockingClient:
    """One connection to a ttrpc server's unix socket. Raises Unavailable where nobody listens."""

    def __init__(self, path: str, timeout: float | None = CONNECT_SECONDS) -> None:
        self.path = sockets.strip_scheme(path)
        self._socket: socket.socket | None = sockets.connect(self.path, timeout)
        self._state = ClientConnection()
        self._inboxes: dict[int, deque[Answer | Payload]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; for the server that is also how calls are cancelled."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def fileno(self) -> int:
        """The socket's descriptor, for select; readable means that `step` of a stream won't block."""
        return -1 if self._socket is None else self._socket.fileno()

    def call(
        self,
        service: str,
        name: str,
        request: Message,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Message:
        """Call a unary method and wait; `timeout` in seconds.

        Raises the server's error as its WherryError, DeadlineExceeded, ConnectionLost; ClientClosed after `close`.
        """
        stream = self._start(service, name, request, timeout=timeout, metadata=metadata, flags=0)
        return stream.response()

    def stream(
        self,
        service: str,
        name: str,
        request: Message | None = None,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> BlockingStream:
        """Start a call that streams; `request` is given where only the answers stream. Errors as for `call`."""
        opened = find_method(service, name).client_streaming
        flags = REMOTE_OPEN if opened else REMOTE_CLOSED
        return self._start(service, name, request, timeout=timeout, metadata=metadata, flags=flags)

    def _start(
        self,
        service: str,
        name: str,
        request: Message | None,
        *,
        timeout: float | None,
        metadata: Mapping[str, str] | None,
        flags: int,
    ) -> BlockingStream:
        method = find_method(service, name)
        deadline = None if timeout is None else time.monotonic() + timeout
        payload = b"" if request is None else request.SerializeToString()
        stream_id, data = self._state.call(
            service, name, payload, timeout_nano=nanoseconds(timeout), metadata=metadata, flags=flags
        )
        self._inboxes[stream_id] = deque()
        self._send(data, deadline)
        return BlockingStream(self, stream_id, method, deadline)

    def _open(self, deadline: float | None) -> socket.socket:
        """The socket, its timeout set for what is left until the deadline."""
        if self._socket is None:
            raise ClientClosed(f"{self.path}: ttrpc: closed by this side")
        if deadline is None:
            self._socket.settimeout(None)
        else:
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded("context deadline exceeded")
            self._socket.settimeout(left)
        return self._socket

    def _send(self, data: bytes, deadline: float | None) -> None:
        sock = self._open(deadline)
        try:
            sock.sendall(data)
        except TimeoutError as error:
            # a frame may have gone in part: nothing can follow it
            self.close()
            raise DeadlineExceeded("context deadline exceeded") from error
        except OSError as error:
            raise ConnectionLost(f"{self.path}: ttrpc: closed by the other side: {error}") from error

    def _receive(self, stream_id: int, deadline: float | None) -> Answer | Payload:
        """The next event of a stream; those of others are kept for them."""
        inbox = self._inboxes[stream_id]
        while not inbox:
            sock = self._open(deadline)
            try:
                data = sock.recv(READ_SIZE)
            except TimeoutError as error:
                raise DeadlineExceeded("context deadline exceeded") from error
            except OSError as error:
                raise ConnectionLost(f"{self.path}: ttrpc: {error}") from error
            if not data:
                raise ConnectionLost(f"{self.path}: ttrpc: closed by the other side")
            for event in self._state.receive(data):
                if event.stream_id in self._inboxes:
                    self._inboxes[event.stream_id].append(event)
        return inbox.popleft()

    def _forget(self, stream_id: int) -> None:
        self._inboxes.pop(stream_id, None)
        self._state.forget(stream_id)


class BlockingStream:
    """A call that streams: iterate over its answers, `send` and `close_send` where requests stream."""

    def __init__(self, client: BlockingClient, stream_id: int, method: Method, deadline: float | None) -> None:
        self._client = client
        self._id = stream_id
        self._method = method
        self._deadline = deadline
        self._ended = False

    def send(self, request: Message) -> None:
        """Send one more request."""
        self._client._send(self._client._state.send(self._id, request.SerializeToString()), self._deadline)

    def close_send(self) -> None:
        """Say that no more requests follow."""
        data = self._client._state.close_send(self._id)
        if data:
            self._client._send(data, self._deadline)

    def response(self) -> Message:
        """The one answer of a method that doesn't stream answers; closes the requests' side first."""
        self.close_send()
        try:
            message = self.step()
        finally:
            self.close()
        if message is None:
            raise Internal(f"{self._method.path}: ended without a response")
        return message

    def step(self) -> Message | None:
        """Wait for the next answer; None at the end. Raises the server's error, DeadlineExceeded, ConnectionLost."""
        while not self._ended:
            event = self._client._receive(self._id, self._deadline)
            if isinstance(event, Answer):
                self._ended = True
                if event.code:
                    raise from_code(event.code, event.message)
                if event.payload or not self._method.server_streaming:
                    return parse_response(self._method, event.payload)
                continue
            self._ended = event.end
            if event.payload is not None:
                return parse_response(self._method, event.payload)
        return None

    def close(self) -> None:
        """Nobody wants more of it; the server learns of it when the connection closes (ttrpc has no way to cancel)."""
        self._ended = True
        self._client._forget(self._id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Message]:
        while (message := self.step()) is not None:
            yield message
