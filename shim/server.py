"""The shim's ttrpc server: any number of connections on one loop, each call a coroutine.

A peer that breaks the protocol, or goes away, harms only its own connection; one that doesn't read its answers is cut
off once too much waits for it. A call with a deadline is answered at that time whatever its handler still does.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from google.protobuf.message import DecodeError, Message

from wherry.core.errors import Code, WherryError
from wherry.proto.ttrpc.frames import Call, ProtocolError, Reply, ServerConnection
from wherry.shim.log import log, log_exception

if TYPE_CHECKING:
    from wherry.shim.loop import Job, Loop, Timer

# answers are a few hundred bytes; who lets so much pile up doesn't read
MAX_UNSENT: Final = 8 << 20
_CHUNK: Final = 65536


class Handler(NamedTuple):
    """A method: the class of its request, and the coroutine function that answers it."""

    request: type[Message]
    function: Callable[[Any], Coroutine[Any, None, Message]]


Services = Mapping[str, Mapping[str, Handler]]
"""Full service name → bare method name → handler."""


class Server:
    """Serves `services`; `connected` is called for each new connection, `left` for each that ended, `answered` after
    each answer."""

    def __init__(
        self,
        loop: Loop,
        services: Services,
        connected: Callable[[], None],
        left: Callable[[], None],
        answered: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._services = services
        self._listener: socket.SocketType | None = None
        self._connected = connected
        self._left = left
        self._answered = answered
        self._connections: set[_Connection] = set()

    def listen(self, listener: socket.SocketType) -> None:
        """Accept on a listening, non-blocking socket, which is the server's from now on."""
        self._listener = listener
        self._loop.on_read(listener.fileno(), self._accept)

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            # without the object that socket.accept makes around it
            peer, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:  # it went away again, or no descriptor is left; the backlog keeps it
            return
        os.set_blocking(peer, False)
        self.adopt(peer)

    def adopt(self, peer: int) -> None:
        """Serve a connected, non-blocking socket, given as a descriptor that is the server's from now on."""
        self._connections.add(_Connection(self._loop, self._services, peer, self._gone, self._answered))
        self._connected()

    def _gone(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._left()

    @property
    def unsent(self) -> bool:
        """True while answers wait to be sent."""
        return any(connection.unsent for connection in self._connections)

    @property
    def connected(self) -> bool:
        """True while somebody is connected."""
        return bool(self._connections)

    @property
    def lone(self) -> bool:
        """True while one is connected and no other."""
        return len(self._connections) == 1

    def stop_listening(self) -> None:
        """Take no more connections."""
        if self._listener is not None:
            self._loop.forget(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        """Stop listening and cut all connections."""
        self.stop_listening()
        for connection in list(self._connections):
            connection.close()


class _Connection:
    def __init__(
        self,
        loop: Loop,
        services: Services,
        peer: int,
        closed: Callable[[_Connection], None],
        answered: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._services = services
        self._peer = peer
        self._closed = closed
        self._answered = answered
        self._protocol = ServerConnection()
        self._out = bytearray()
        self._open = True
        loop.on_read(peer, self._readable)

    @property
    def unsent(self) -> bool:
        return self._open and bool(self._out)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.forget(self._peer)
            os.close(self._peer)
            self._closed(self)

    def _readable(self) -> None:
        try:
            data = os.read(self._peer, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        try:
            events = self._protocol.receive(data)
        except ProtocolError as error:
            log("warning", f"a connection was cut: {error}")
            self.close()
            return
        for event in events:
            if isinstance(event, Reply):
                self._send(event.data)
            elif isinstance(event, Call):
                self._call(event)

    def _call(self, call: Call) -> None:
        handler = self._services.get(call.service, {}).get(call.method)
        if handler is None:
            kind = "method" if call.service in self._services else "service"
            name = f"{call.service}/{call.method}" if kind == "method" else call.service
            self._fail(call.stream_id, Code.UNIMPLEMENTED, f"{kind} {name}")
            return
        try:
            request = handler.request.FromString(call.payload)
        except DecodeError as error:
            self._fail(call.stream_id, Code.INVALID_ARGUMENT, f"request of {call.method}: {error}")
            return
        timer = None
        if call.timeout_nano > 0:
            late = partial(self._fail, call.stream_id, Code.DEADLINE_EXCEEDED, "context deadline exceeded")
            timer = self._loop.later(call.timeout_nano / 1e9, late)
        job = self._loop.spawn(handler.function(request))
        job.add_callback(partial(self._answer, call, job, timer))

    def _answer(self, call: Call, job: Job[Message], timer: Timer | None) -> None:
        if timer is not None:
            timer.cancel()
        try:
            response = job.result()
        except WherryError as error:
            self._fail(call.stream_id, error.code, error.message)
        except Exception as error:  # noqa: BLE001  # a bug of a handler is answered, and seen in the log
            log_exception(error)
            self._fail(call.stream_id, Code.UNKNOWN, f"{call.method}: {error}")
        else:
            self._send(self._protocol.answer(call.stream_id, response.SerializeToString()))

    def _fail(self, stream_id: int, code: int, message: str) -> None:
        self._send(self._protocol.fail(stream_id, code, message))

    def _send(self, data: bytes) -> None:
        if not self._open or not data:
            return
        self._answered()
        waited = bool(self._out)
        self._out += data
        if len(self._out) > MAX_UNSENT:
            self.close()
        elif not waited:
            self._writable()

    def _writable(self) -> None:
        try:
            sent = os.write(self._peer, self._out)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.close()
            return
        del self._out[:sent]
        self._loop.on_write(self._peer, self._writable if self._out else None)
