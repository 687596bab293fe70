"""The gRPC door: services without a transport, served to gRPC clients over HTTP/2 on a unix socket.

It is our own and not grpcio's server: that one has a thread for its sockets, which wakes the loop for each step of
a call. It took more than half of the daemon's time, and it can't take over a listening socket. What goes over the
wire is the protocol of gRPC over HTTP/2 (PROTOCOL-HTTP2.md of the gRPC project):

    request   HEADERS(:path /package.Service/Method, grpc-timeout, metadata…) DATA(flag, 4 bytes length, message)…
    response  HEADERS(:status 200) DATA… HEADERS(grpc-status, grpc-message)

Errors become a status here, once; the caller's metadata and deadline become a `Context`; where the caller goes away,
the handler's task is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

import structlog

from wherry.core.errors import Unavailable, Unimplemented, WherryError
from wherry.proto.addresses import own, short_path, tight_umask
from wherry.proto.grpc import hpack, http2
from wherry.proto.grpc.call import Call, Handler, percent
from wherry.proto.service import methods

log = structlog.get_logger(__name__)

# bytes of one message where nothing else is said: containerd's default
MAX_MESSAGE: Final = 16 << 20
_BACKLOG: Final = 512
# bytes of one client that wait to be sent, above which its calls wait and its requests aren't read
_WRITE_HIGH: Final = 1 << 20
# seconds that an answer to a client's ping may wait for a response to travel with. Go's client pings with nearly each
# call, to measure; answered at once it would be woken, and again a moment later by the response.
_PING_DELAY: Final = 0.002
# seconds until a peer must have said that it speaks HTTP/2; Go's servers give as many
_HANDSHAKE: Final = 120.0
# seconds that a peer which broke the rules gets to read why
_LINGER: Final = 2.0
# connection-specific fields, which HTTP/2 hasn't (RFC 9113, 8.2.2)
_OTHERS: Final = frozenset(("connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"))
_PSEUDO: Final = frozenset((":method", ":scheme", ":path", ":authority"))


class GrpcServer:
    """The server: `serve_unix` or `serve_socket`, then `stop`."""

    def __init__(
        self,
        services: Iterable[object],
        *,
        max_receive: int = MAX_MESSAGE,
        max_send: int = MAX_MESSAGE,
        logs_calls: Callable[[], bool] = lambda: False,
        lazy: Mapping[str, Callable[[], object]] | None = None,
    ) -> None:
        """`services` as wherry.proto.service describes them; sizes in bytes of one message; `logs_calls` says whether
        each call gets a debug line: it is asked too often to build one that nobody reads. `lazy` are services by name
        that are made at their first call."""
        self.max_receive = max_receive
        self.max_send = max_send
        self.logs_calls = logs_calls
        self._handlers: dict[str, Handler] = {}
        self._names: set[str] = set()
        self._lazy = dict(lazy or {})
        self._servers: list[asyncio.Server] = []
        self._bound: list[tuple[str, int]] = []
        self._idle: asyncio.Event | None = None  # while it stops: set when the last call is answered
        self.connections: set[Connection] = set()
        for service in services:
            self._add(service)

    def _add(self, service: object) -> None:
        """A method that the object lacks answers UNIMPLEMENTED."""
        name: str = service.SERVICE  # type: ignore[attr-defined]
        self._names.add(name)
        for method in methods(name).values():
            if (function := getattr(service, method.attribute, None)) is not None:
                self._handlers[method.path] = Handler(method, function)

    def find(self, path: str) -> Handler:
        """The handler for a path. Raises Unimplemented in the words of Go's servers."""
        handler = self._handlers.get(path)
        if handler is None:
            service, _, name = path.lstrip("/").partition("/")
            if (make := self._lazy.pop(service, None)) is not None:
                self._add(make())
                return self.find(path)
            raise Unimplemented(
                f"unknown method {name} for service {service}"
                if service in self._names
                else f"unknown service {service}"
            )
        return handler

    async def serve_unix(self, path: str, *, uid: int = 0, gid: int = 0) -> None:
        """Listen on a unix socket, with its mode and owner before anybody can connect.

        The caller holds the address's lock: whatever is at the path is replaced. Raises OSError with the path.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            with short_path(path) as short:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(short)
                with tight_umask():
                    sock.bind(short)
                own(short, uid=uid, gid=gid)
            self._bound.append((path, os.stat(path).st_ino))
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"can't listen on {path}: {error.strerror}") from error
        await self.serve_socket(sock)

    async def serve_socket(self, sock: socket.socket) -> None:
        """Serve a socket that is bound, or listens already (handed over by systemd)."""
        loop = asyncio.get_running_loop()
        # from 3.13 on asyncio would remove the file at the end, also when it is the service manager's
        more: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        server = await loop.create_unix_server(lambda: Connection(self, loop), sock=sock, backlog=_BACKLOG, **more)
        self._servers.append(server)

    async def stop(self, grace: float) -> None:
        """Take no more calls; give those that run `grace` seconds, then cancel them. Files that were bound go."""
        for server in self._servers:
            server.close()
        for path, inode in self._bound:
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
        self._idle = asyncio.Event()
        for connection in self.connections:
            connection.refuse_more()
        self.ended()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._idle.wait()
        tasks = [call.task for each in self.connections for call in each.calls.values() if call.task is not None]
        for connection in tuple(self.connections):
            connection.close(Unavailable("wherryd stops: unavailable"))
        if tasks:
            await asyncio.wait(tasks, timeout=1)

    def ended(self) -> None:
        """A call or a connection is over."""
        if self._idle is not None and not any(connection.calls for connection in self.connections):
            self._idle.set()


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: GrpcServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.loop = loop
        self.http = http2.Connection()
        self.calls: dict[int, Call] = {}
        self._served = 0  # the stream that was the last to have something of the connection's window
        self.leaving = 0  # handlers of calls that are over, which still clean up
        self.held = 0  # bytes of requests that wait for their handlers
        self.unsent = 0  # bytes of answers that wait for the client
        self._handshake: asyncio.TimerHandle | None = loop.call_later(_HANDSHAKE, self._mute)
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._flush_at: asyncio.Handle | None = None

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH)
        self.server.connections.add(self)
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._handshake is not None:
            self._handshake.cancel()
        if self._flush_at is not None:
            self._flush_at.cancel()
        self.server.connections.discard(self)
        for call in tuple(self.calls.values()):
            call.cancel()
        self.server.ended()

    def data_received(self, data: bytes) -> None:
        try:
            for event in self.http.receive(data):
                self._event(event)
        except http2.ProtocolError as error:
            log.info("a gRPC client broke the rules of HTTP/2", error=str(error), code=error.code)
            for call in tuple(self.calls.values()):
                call.cancel()
            self.http.goaway(error.code, str(error))
            self.close()
            return
        if self._handshake is not None and self.http.settled:
            self._handshake.cancel()
            self._handshake = None
        if self.http.urgent:
            self.flush()
        elif self._flush_at is None and self.http.pending:
            self._flush_at = self.loop.call_later(_PING_DELAY, self.flush)

    def _event(self, event: http2.Event) -> None:
        if type(event) is http2.Request:
            self._request(event)
        elif type(event) is http2.Body:
            if (call := self.calls.get(event.stream)) is not None:
                call.feed(event.data, event.size, end=event.end)
        elif type(event) is http2.Reset:
            if (call := self.calls.get(event.stream)) is not None:
                call.cancel()
        elif event.stream:
            if (call := self.calls.get(event.stream)) is not None:
                call.push()
        else:
            self._push_all()

    def _push_all(self) -> None:
        # in turn: what one of them takes of the connection's window the next ones can't have
        streams = tuple(self.calls)  # in the order of their numbers
        at = bisect(streams, self._served)
        for stream in streams[at:] + streams[:at]:
            if (call := self.calls.get(stream)) is not None:
                call.push()
            if not self.writable or self.http.window <= 0:
                self._served = stream
                return

    def _mute(self) -> None:
        self._handshake = None
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        # a client that doesn't take its answers gets to ask no more questions
        self._paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        if self._transport is not None:
            self._transport.resume_reading()
        self._push_all()
        self.flush()

    @property
    def writable(self) -> bool:
        """Whether more may be handed to the transport."""
        return not self._paused and self._transport is not None

    def flush(self) -> None:
        """Send what has collected."""
        if self._flush_at is not None:
            self._flush_at.cancel()
            self._flush_at = None
        data = self.http.take()
        if data and self._transport is not None:
            self._transport.write(data)

    def flush_soon(self) -> None:
        """Send what has collected when the tasks that can run now have run, which may have more to say."""
        if type(self._flush_at) is asyncio.Handle:
            return
        if self._flush_at is not None:
            self._flush_at.cancel()
        self._flush_at = self.loop.call_soon(self.flush)

    def refuse_more(self) -> None:
        """The server stops: the client is to open no more streams."""
        self.http.goaway()
        self.flush()

    def close(self, error: WherryError | None = None) -> None:
        """Hang up, after what was written; calls under way end with the error."""
        if error is not None:
            for call in tuple(self.calls.values()):
                call.abort(error)
        self.flush()
        if self._transport is not None:
            self._transport.close()
            # a peer that doesn't read would keep it open for ever
            self.loop.call_later(_LINGER, self._transport.abort)

    # -- calls

    def drop(self, stream: int) -> bool:
        """A call is over; whether it was under way."""
        if self.calls.pop(stream, None) is None:
            return False
        self.server.ended()
        return True

    def left(self, task: asyncio.Task[None]) -> None:
        """A handler that was cancelled has cleaned up."""
        self.leaving -= 1

    def _request(self, event: http2.Request) -> None:
        stream = event.stream
        if not self.http.is_open(stream):
            return
        if len(self.calls) + self.leaving >= http2.MAX_STREAMS:
            self.http.refuse(stream, http2.REFUSED_STREAM)
            return
        sorted_fields = _sort(event.fields)
        if sorted_fields is None:
            self.http.refuse(stream, http2.PROTOCOL_ERROR)
            return
        known, metadata = sorted_fields
        content_type = metadata.get("content-type", "")
        if known[":method"] != "POST":
            self._no_grpc(stream, "405", f"grpc: method {known[':method']!r} is not POST")
        elif content_type[:16] != "application/grpc" or content_type[16:17] not in ("", "+", ";"):
            self._no_grpc(stream, "415", f"grpc: invalid content-type {content_type!r}")
        else:
            call = self.calls[stream] = Call(self, stream)
            try:
                call.begin(self.server.find(known[":path"]), known, metadata)
            except WherryError as error:
                call.finish(error)
                return
            if event.end:
                call.feed(b"", 0, end=True)

    def _no_grpc(self, stream: int, status: str, text: str) -> None:
        """Answer something that isn't gRPC, in words that curl shows too."""
        fields = [(":status", status), ("content-type", "application/grpc"), ("grpc-status", "3")]
        self.http.headers(stream, hpack.encode([*fields, ("grpc-message", percent(text))]), end=True)


def _sort(fields: list[tuple[str, str]]) -> tuple[dict[str, str], dict[str, str]] | None:
    """A request's fields: pseudo-header fields and gRPC's own; the caller's metadata. None: malformed (8.1.1, 8.3.1).

    Of a name that is repeated the first value counts. Metadata of bytes (`-bin`) is for tracing, which isn't done here:
    it is left out.
    """
    known: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for name, value in fields:
        if name[:1] == ":":
            if name in known or metadata or name not in _PSEUDO:
                return None
            known[name] = value
        elif name[:5] == "grpc-":
            known.setdefault(name, value)
        elif name in _OTHERS or (name == "te" and value != "trailers"):
            return None
        elif name[-4:] != "-bin":
            metadata.setdefault(name, value)
    return (known, metadata) if ":method" in known and ":path" in known and ":scheme" in known else None
