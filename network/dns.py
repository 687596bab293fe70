"""Names of containers: a name server on each named network's gateway; what it doesn't know it asks the host's servers.

Who asks is known by the address. A container sees the names of the networks that it is on, and no others; one that is
on internal networks alone gets nothing from outside, since a question is a way out (CVE-2024-29018 was that).
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wherry.network import dns_message as wire
from wherry.network import inside
from wherry.network.loop import READ, WRITE, Loop, Timer
from wherry.network.resolv import servers

# seconds until the next server is asked, and how often the list is gone through
_PATIENCE = 2.0
_ROUNDS = 2
# questions under way to servers outside: of all containers, and of one
_LIMIT = 2048
_LIMIT_EACH = 256
# connections over TCP at once, and the seconds that one may take
_TCP_LIMIT = 256
_TCP_SECONDS = 10.0
# packets that are taken from one socket before others have their turn
_TURN = 64
_IP_FREEBIND = 15  # <linux/in.h>: the address may come later than its socket

Reply = Callable[[bytes], None]


class Names:
    """Who is on which network under which names."""

    def __init__(self) -> None:
        self.networks: dict[str, Mapping[str, Any]] = {}
        self._owners: dict[str, Mapping[str, Any]] = {}
        self._by_address: dict[str, Mapping[str, Any]] = {}
        self._by_name: dict[tuple[str, str], dict[str, list[str]]] = {}

    def set(self, key: str, owner: Mapping[str, Any] | None) -> None:
        """A container's part, None without it: `dns`, and `endpoints` with `network`, `addresses` and `names`."""
        old = self._owners.pop(key, None)
        if old is not None:
            self._index(key, old, add=False)
        if owner is not None:
            self._owners[key] = owner
            self._index(key, owner, add=True)

    def keys(self) -> list[str]:
        return list(self._owners)

    def _index(self, key: str, owner: Mapping[str, Any], *, add: bool) -> None:
        for endpoint in owner["endpoints"]:
            addresses = list(endpoint["addresses"])
            for address in addresses:
                if add:
                    self._by_address[address] = owner
                else:
                    self._by_address.pop(address, None)
            for name in {text.lower() for text in endpoint["names"]}:
                known = self._by_name.setdefault((endpoint["network"], name), {})
                if add:
                    known[key] = addresses
                else:
                    known.pop(key, None)
                if not known:
                    del self._by_name[endpoint["network"], name]

    def owner(self, address: str) -> Mapping[str, Any] | None:
        """The container with this address."""
        return self._by_address.get(address)

    def addresses(self, owner: Mapping[str, Any], name: str) -> list[str] | None:
        """The addresses of a name on the networks of who asks; None for a name that nobody there has."""
        found: list[str] | None = None
        for endpoint in owner["endpoints"]:
            for addresses in self._by_name.get((endpoint["network"], name), {}).values():
                found = (found or []) + [item for item in addresses if item not in (found or [])]
        return found

    def name(self, owner: Mapping[str, Any], address: str) -> str | None:
        """The name of who has an address, where both are on a network together."""
        shared = {item["network"] for item in owner["endpoints"]}
        for endpoint in (self._by_address.get(address) or {"endpoints": ()})["endpoints"]:
            if address in endpoint["addresses"] and endpoint["network"] in shared and endpoint["names"]:
                return str(endpoint["names"][0])
        return None

    def may_ask_outside(self, owner: Mapping[str, Any]) -> bool:
        """Not where all networks are internal."""
        return any(not self.networks.get(item["network"], {}).get("internal", False) for item in owner["endpoints"])


class Server:
    """The name server of one network's gateway address, over UDP and TCP on the same port."""

    def __init__(
        self, loop: Loop, names: Names, forwarder: Forwarder, address: str, make: inside.Make = inside.here
    ) -> None:
        """Raises OSError where no port of the address is free."""
        self._loop, self._names, self._forwarder, self._make = loop, names, forwarder, make
        self._family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._connections: set[socket.socket] = set()
        try:
            self.port = self._bind(address, 53)
        except OSError:
            # a name server of the host has port 53 on all addresses: ours are led elsewhere by a rule
            self.port = self._bind(address, 0)
        loop.watch(self._udp, READ, self._packets)
        loop.watch(self._tcp, READ, self._accept)

    def _bind(self, address: str, port: int) -> int:
        self._udp = _socket(self._family, socket.SOCK_DGRAM, make=self._make)
        self._tcp = _socket(self._family, socket.SOCK_STREAM, make=self._make)
        try:
            self._udp.bind((address, port))
            port = self._udp.getsockname()[1]
            self._tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._tcp.bind((address, port))
            self._tcp.listen(64)
        except OSError:
            self._udp.close()
            self._tcp.close()
            raise
        return int(port)

    def close(self) -> None:
        for sock in (self._udp, self._tcp, *self._connections):
            self._loop.close(sock)

    def _packets(self, _: int) -> None:
        for _turn in range(_TURN):
            try:
                data, source = self._udp.recvfrom(4096)
            except OSError:
                return

            def reply(message: bytes, source: Any = source, asked: bytes = data) -> None:
                if len(message) > _udp_size(asked):
                    message = _shortened(asked, message)
                with contextlib.suppress(OSError):  # a full queue is a lost packet; the container asks again
                    self._udp.sendto(message, source)

            self._answer(data, source[0], reply, tcp=False)

    def _accept(self, _: int) -> None:
        try:
            sock, source = self._tcp.accept()
        except OSError:
            return
        if len(self._connections) >= _TCP_LIMIT:
            sock.close()
            return
        sock.setblocking(False)
        self._connections.add(sock)
        _Stream(self._loop, sock, lambda data, reply: self._answer(data, source[0], reply, tcp=True), self._ended)

    def _ended(self, sock: socket.socket) -> None:
        self._connections.discard(sock)

    def _answer(self, data: bytes, source: str, reply: Reply, *, tcp: bool) -> None:
        try:
            query = wire.parse(data)
        except ValueError:
            if (refused := wire.refuse(data, wire.FORMERR)) is not None:
                reply(refused)
            return
        owner = self._names.owner(source)
        if owner is None:
            # nobody that we know: the network's names and the host's servers are for its containers alone
            reply(wire.answer(query, code=wire.REFUSED))
        elif query.opcode != 0:
            reply(wire.answer(query, code=wire.NOTIMP))
        elif (known := _known(self._names, owner, query)) is not None:
            reply(known)
        elif self._names.may_ask_outside(owner):
            self._forwarder.ask(data, query, owner, reply, tcp=tcp)
        else:
            reply(wire.answer(query, code=wire.NXDOMAIN))


def _known(names: Names, owner: Mapping[str, Any], query: wire.Query) -> bytes | None:
    """The answer that needs nobody else; None where somebody else has to be asked."""
    if query.kind_class not in (wire.IN, wire.ANY):
        return None
    if (address := wire.reversed_address(query.name)) is not None:
        name = names.name(owner, address)
        try:
            return wire.answer(query, [wire.name(name)]) if name and query.kind in (wire.PTR, wire.ANY) else None
        except ValueError:
            return None
    addresses = names.addresses(owner, query.name)
    if addresses is None:
        return None
    records = [record for record in map(wire.address, addresses) if query.kind in (record[0], wire.ANY)]
    random.shuffle(records)  # several containers under one name share the work
    return wire.answer(query, records)


class Forwarder:
    """Asks the servers that a container was given, or else the host's."""

    def __init__(self, loop: Loop, resolv_conf: str = "/etc/resolv.conf") -> None:
        self._loop = loop
        self._path = resolv_conf
        self._stamp: tuple[int, int] | None = None
        self._servers: list[str] = []
        self._pending: dict[int, int] = {}

    def ask(self, data: bytes, query: wire.Query, owner: Mapping[str, Any], reply: Reply, *, tcp: bool) -> None:
        """Passes a question on and its answer back; without an answer SERVFAIL."""
        asked = list(owner["dns"]) or self._of_host()
        count = self._pending.get(id(owner), 0)
        if not asked or count >= _LIMIT_EACH or sum(self._pending.values()) >= _LIMIT:
            reply(wire.answer(query, code=wire.SERVFAIL))
            return
        self._pending[id(owner)] = count + 1

        def done(message: bytes | None) -> None:
            left = self._pending.pop(id(owner), 1) - 1
            if left:
                self._pending[id(owner)] = left
            reply(message if message is not None else wire.answer(query, code=wire.SERVFAIL))

        (_TcpQuestion if tcp else _Question)(self._loop, data, query, asked * _ROUNDS, done)

    def _of_host(self) -> list[str]:
        """The host's servers as they are now: a laptop's change with the place where it is."""
        try:
            info = os.stat(self._path)
            stamp = (info.st_mtime_ns, info.st_ino)
            if stamp != self._stamp:
                with open(self._path, encoding="utf-8", errors="replace") as file:
                    self._servers = servers(file.read())
                self._stamp = stamp
        except OSError:
            self._servers, self._stamp = [], None
        return self._servers


class _Question:
    """One question over UDP, to one server after the other."""

    def __init__(
        self, loop: Loop, data: bytes, query: wire.Query, asked: Sequence[str], done: Callable[[bytes | None], None]
    ) -> None:
        self._loop, self._data, self._query, self._done = loop, data, query, done
        self._left = list(asked)
        self._sock: socket.socket | None = None
        self._timer: Timer | None = None
        # an id and a port of its own for each try: what doesn't match both is no answer
        self._id = 0
        self._next()

    def _next(self) -> None:
        self._end()
        if not self._left:
            self._done(None)
            return
        server = self._left.pop(0)
        self._id = int.from_bytes(os.urandom(2), "big")
        try:
            self._sock = sock = _socket(
                socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM, free=False
            )
            sock.connect((server, 53))
            sock.send(wire.with_id(self._data, self._id))
        except OSError:
            self._timer = self._loop.later(0, self._next)
            return
        self._loop.watch(sock, READ, self._ready)
        self._timer = self._loop.later(_PATIENCE, self._next)

    def _ready(self, _: int) -> None:
        if self._sock is None:
            return
        try:
            message = self._sock.recv(65535)
        except BlockingIOError:
            return
        except OSError:  # nobody listens there
            self._next()
            return
        if not wire.is_answer_to(message, self._id, self._query.question):
            return
        self._end()
        self._done(wire.with_id(message, self._query.id))

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._sock is not None:
            self._loop.close(self._sock)
            self._sock = None


class _TcpQuestion:
    """One question over TCP: what came by TCP has an answer that UDP has no room for."""

    def __init__(
        self, loop: Loop, data: bytes, query: wire.Query, asked: Sequence[str], done: Callable[[bytes | None], None]
    ) -> None:
        self._loop, self._done = loop, done
        self._out = struct.pack("!H", len(data)) + data
        self._in = bytearray()
        self._left = list(asked)
        self._sock: socket.socket | None = None
        self._timer: Timer | None = None
        self._next()

    def _next(self) -> None:
        self._end()
        if not self._left:
            self._done(None)
            return
        server = self._left.pop(0)
        self._in.clear()
        self._sock = sock = _socket(
            socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_STREAM, free=False
        )
        try:
            sock.connect((server, 53))
        except BlockingIOError:
            pass  # under way
        except OSError:
            self._timer = self._loop.later(0, self._next)
            return
        self._loop.watch(sock, WRITE, self._connected)
        self._timer = self._loop.later(_PATIENCE * 2, self._next)

    def _connected(self, _: int) -> None:
        if self._sock is None:
            return
        try:
            # a few hundred bytes into an empty buffer
            self._sock.send(self._out)
        except OSError:
            self._next()
            return
        self._loop.watch(self._sock, READ, self._ready)

    def _ready(self, _: int) -> None:
        if self._sock is None:
            return
        try:
            chunk = self._sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        self._in += chunk
        if len(self._in) >= 2 and len(self._in) >= 2 + (size := int.from_bytes(self._in[:2], "big")):
            self._end()
            self._done(bytes(self._in[2 : 2 + size]))
        elif not chunk:
            self._next()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._sock is not None:
            self._loop.close(self._sock)
            self._sock = None


class _Stream:
    """A container's connection: messages with their length before them (RFC 1035, 4.2.2)."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        answer: Callable[[bytes, Reply], None],
        ended: Callable[[socket.socket], None],
    ) -> None:
        self._loop, self._sock, self._answer, self._ended = loop, sock, answer, ended
        self._in = bytearray()
        self._out = bytearray()
        self._timer = loop.later(_TCP_SECONDS, self._close)
        loop.watch(sock, READ, self._ready)

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE and self._out:
                del self._out[: self._sock.send(self._out)]
            if events & READ:
                chunk = self._sock.recv(4096)
                if not chunk:
                    self._close()
                    return
                self._in += chunk
        except BlockingIOError:
            return
        except OSError:
            self._close()
            return
        while len(self._in) >= 2 and len(self._in) >= 2 + (size := int.from_bytes(self._in[:2], "big")):
            message = bytes(self._in[2 : 2 + size])
            del self._in[: 2 + size]
            self._answer(message, self._reply)
        self._watch()

    def _reply(self, message: bytes) -> None:
        if self._sock.fileno() != -1 and len(message) <= 65535:
            self._out += struct.pack("!H", len(message)) + message
            self._watch()

    def _watch(self) -> None:
        if self._sock.fileno() != -1:
            self._loop.watch(self._sock, READ | (WRITE if self._out else 0), self._ready)

    def _close(self) -> None:
        self._timer.cancel()
        self._loop.close(self._sock)
        self._ended(self._sock)


def _socket(family: int, kind: int, *, free: bool = True, make: inside.Make = inside.here) -> socket.socket:
    sock = make(family, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    if free:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND, <linux/in6.h>
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
    return sock


def _udp_size(asked: bytes) -> int:
    """What the client takes over UDP: as its EDNS record says (RFC 6891, 6.1.2), which is the last one in practice."""
    if len(asked) > 12 and asked[10:12] != b"\0\0":
        at = asked.rfind(b"\0\0\x29", 12)
        if at != -1 and at + 5 <= len(asked):
            return max(wire.UDP_SIZE, int.from_bytes(asked[at + 3 : at + 5], "big"))
    return wire.UDP_SIZE


def _shortened(asked: bytes, message: bytes) -> bytes:
    try:
        return wire.truncated(wire.parse(asked))
    except ValueError:
        return message[: wire.UDP_SIZE]
