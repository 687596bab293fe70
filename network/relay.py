"""Published ports: sockets that hold them, and relays for what the kernel's NAT doesn't lead to the container.

A socket on each published port keeps it from others and says at once when somebody has it. The rules (rules.py) lead
packets past it, except those to ::1, which the kernel never routes, those of IPv6 to a container without it, and all of
them while somebody has flushed the rules. These arrive here and are passed on.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Any

from wherry.network import inside
from wherry.network.loop import READ, WRITE, Loop, Timer

# bytes taken at once, and held back for a side that is slow
_CHUNK = 128 << 10
_HELD = 512 << 10
# connections at once on one port
_LIMIT = 4096
# seconds that a client over UDP is remembered without a packet, as the kernel's conntrack has it for a stream
_UDP_SECONDS = 180.0
_UDP_LIMIT = 1024
_TURN = 64

Target = tuple[str, int]


def listening(protocol: str, address: str, port: int) -> socket.socket:
    """A socket that holds a port of the host; `port` 0 is any free one. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    sock = socket.socket(family, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if protocol == "tcp":
            # only against what is left of connections of before; a socket that listens is in the way as ever
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        if protocol == "tcp":
            sock.listen(512)
    except BaseException:
        sock.close()
        raise
    return sock


def _dial(make: inside.Make, kind: int, target: Target) -> socket.socket:
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    sock = make(family, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(target)
    except BlockingIOError:
        pass  # under way
    except OSError:
        sock.close()
        raise
    return sock


class TcpRelay:
    """Accepts on a held port and passes connections on, by sockets that `make` makes."""

    def __init__(self, loop: Loop, sock: socket.socket, target: Target, make: inside.Make = inside.here) -> None:
        self._loop, self._sock, self._target, self._make = loop, sock, target, make
        self._pairs: set[_Pair] = set()
        loop.watch(sock, READ, self._accept)

    def close(self) -> None:
        """Frees the port; connections end too: their container is gone."""
        self._loop.close(self._sock)
        for pair in list(self._pairs):
            pair.close()

    def _accept(self, _: int) -> None:
        for _turn in range(_TURN):
            try:
                sock, _source = self._sock.accept()
            except OSError:
                return
            if len(self._pairs) >= _LIMIT:
                sock.close()
                continue
            sock.setblocking(False)
            try:
                other = _dial(self._make, socket.SOCK_STREAM, self._target)
            except OSError:
                sock.close()
                continue
            self._pairs.add(_Pair(self._loop, sock, other, self._pairs.discard))


class _Way:
    """One direction of a connection: what was taken from one side and waits for the other."""

    __slots__ = ("ended", "held", "sink", "source")

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source, self.sink = source, sink
        self.held = bytearray()
        self.ended = False

    def pull(self) -> None:
        try:
            chunk = self.source.recv(_CHUNK)
        except BlockingIOError:
            return
        if chunk:
            self.held += chunk
        else:
            self.ended = True
            if not self.held:
                self._shut()

    def push(self) -> None:
        with contextlib.suppress(BlockingIOError):
            del self.held[: self.sink.send(self.held)]
        if self.ended and not self.held:
            self._shut()

    def _shut(self) -> None:
        # the other direction may go on for long: half-closed connections are ordinary
        with contextlib.suppress(OSError):
            self.sink.shutdown(socket.SHUT_WR)


class _Pair:
    """A connection and the one to the container."""

    def __init__(
        self, loop: Loop, client: socket.socket, target: socket.socket, ended: Callable[[_Pair], None]
    ) -> None:
        self._loop, self._ended = loop, ended
        self._client, self._target = client, target
        self._up, self._down = _Way(client, target), _Way(target, client)
        self._connected = False
        self._watch()

    def close(self) -> None:
        for sock in (self._client, self._target):
            self._loop.close(sock)
        self._ended(self)

    def _ready(self, sock: socket.socket, events: int) -> None:
        outgoing, incoming = (self._up, self._down) if sock is self._client else (self._down, self._up)
        try:
            if sock is self._target and not self._connected:
                if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(error, "connect")
                self._connected = True
            if events & READ and not outgoing.ended:
                outgoing.pull()
                if outgoing.held and (outgoing.sink is not self._target or self._connected):
                    outgoing.push()
            if events & WRITE and incoming.held:
                incoming.push()
        except OSError:
            self.close()
            return
        if self._up.ended and self._down.ended and not self._up.held and not self._down.held:
            self.close()
        else:
            self._watch()

    def _watch(self) -> None:
        for sock, takes, gives, callback in (
            (self._client, self._up, self._down, self._client_ready),
            (self._target, self._down, self._up, self._target_ready),
        ):
            events = READ if not takes.ended and len(takes.held) < _HELD else 0
            if gives.held or (sock is self._target and not self._connected):
                events |= WRITE
            self._loop.watch(sock, events, callback)

    def _client_ready(self, events: int) -> None:
        self._ready(self._client, events)

    def _target_ready(self, events: int) -> None:
        self._ready(self._target, events)


class UdpRelay:
    """Passes datagrams on, with a socket for each client, so that answers find back."""

    def __init__(self, loop: Loop, sock: socket.socket, target: Target, make: inside.Make = inside.here) -> None:
        self._loop, self._sock, self._target, self._make = loop, sock, target, make
        self._clients: dict[Any, tuple[socket.socket, Timer]] = {}
        loop.watch(sock, READ, self._packets)

    def close(self) -> None:
        self._loop.close(self._sock)
        for sock, timer in self._clients.values():
            timer.cancel()
            self._loop.close(sock)
        self._clients.clear()

    def _packets(self, _: int) -> None:
        for _turn in range(_TURN):
            try:
                data, source = self._sock.recvfrom(65535)
            except OSError:
                return
            sock = self._towards(source)
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.send(data)

    def _towards(self, source: Any) -> socket.socket | None:
        known = self._clients.get(source)
        if known is not None:
            known[1].cancel()
            sock = known[0]
        elif len(self._clients) >= _UDP_LIMIT:
            return None
        else:
            try:
                sock = _dial(self._make, socket.SOCK_DGRAM, self._target)
            except OSError:
                return None
            self._loop.watch(sock, READ, lambda _: self._back(sock, source))
        self._clients[source] = (sock, self._loop.later(_UDP_SECONDS, lambda: self._forget(source)))
        return sock

    def _back(self, sock: socket.socket, source: Any) -> None:
        for _turn in range(_TURN):
            try:
                data = sock.recv(65535)
            except BlockingIOError:
                return
            except OSError:  # nobody listens in the container (yet)
                return
            with contextlib.suppress(OSError):
                self._sock.sendto(data, source)

    def _forget(self, source: Any) -> None:
        known = self._clients.pop(source, None)
        if known is not None:
            self._loop.close(known[0])
