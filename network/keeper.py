"""The process that keeps what containers need while no daemon is there: their names, and their published ports.

It is started by exec and outlives the daemon, which finds it again by its socket and tells it all once more; it ends
when it keeps nothing and no daemon speaks with it. It has one thread (an ordinary user's has two, inside.py), and of
root's rights only the one to bind low ports. Killed, it is started again by the daemon and told all; meanwhile the
rules still lead to published ports, and names are away for that moment.

A request is a line of JSON: `{"op": "sync", "networks": {ID: …}, "owners": {KEY: …}}` for everything, `network` and
`owner` for one of them (`null` takes it away). The answer to each is a line, too (`_Daemon`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from wherry.linux import capabilities
from wherry.linux import syscalls as sc
from wherry.network import inside
from wherry.network.dns import Forwarder, Names, Server
from wherry.network.loop import READ, WRITE, Loop
from wherry.network.protocol import VERSION
from wherry.network.relay import TcpRelay, UdpRelay, listening

# tries to find a port that is free in both families, or in a range
_TRIES = 32
_BOTH = ("0.0.0.0", "::")
_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)

Relay = TcpRelay | UdpRelay


class Keeper:
    """Names and ports, as the daemon wants them."""

    def __init__(self, loop: Loop, make: inside.Make = inside.here) -> None:
        """`make` makes sockets where the containers are reached."""
        self._loop = loop
        self._make = make
        self._names = Names()
        self._forwarder = Forwarder(loop)
        self._servers: dict[str, dict[str, Server]] = {}
        self._relays: dict[str, dict[str, Relay]] = {}

    @property
    def idle(self) -> bool:
        """Whether there is nothing to keep."""
        return not self._relays and not self._names.keys()

    def handle(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a request asks for; the answer to it."""
        operation = request.get("op")
        if operation == "hello":
            return {"version": VERSION, "pid": os.getpid()}
        if operation == "network":
            return {"port": self._network(request["id"], request["network"])}
        if operation == "owner":
            return {"ports": self._owner(request["key"], request["owner"])}
        if operation == "sync":
            return self._sync(request)
        raise ValueError(f"unknown operation {operation!r}")

    def _sync(self, request: Mapping[str, Any]) -> dict[str, Any]:
        networks, owners = request["networks"], request["owners"]
        for key in {*self._relays, *self._names.keys()} - set(owners):
            self._owner(key, None)
        for key in set(self._names.networks) - set(networks):
            self._network(key, None)
        ports = {key: self._network(key, network) for key, network in networks.items()}
        failed = {}
        for key, owner in owners.items():
            try:
                self._owner(key, owner)
            except OSError as error:
                failed[key] = str(error)
        return {"ports": ports, "failed": failed}

    # -- names

    def _network(self, identity: str, network: Mapping[str, Any] | None) -> int:
        """Serves a network's names on its `listen` addresses; the port, 0 where no address can be had."""
        if network is None:
            self._names.networks.pop(identity, None)
            wanted: list[str] = []
        else:
            self._names.networks[identity] = network
            wanted = list(network["listen"])
        servers = self._servers.setdefault(identity, {})
        for address in set(servers) - set(wanted):
            servers.pop(address).close()
        for address in wanted:
            if address not in servers:
                with contextlib.suppress(OSError):
                    servers[address] = Server(self._loop, self._names, self._forwarder, address, self._make)
        if not servers:
            self._servers.pop(identity, None)
        return next((server.port for server in servers.values()), 0)

    # -- ports

    def _owner(self, key: str, owner: Mapping[str, Any] | None) -> list[int]:
        """A container's names and ports; the host's ports in the order in which they were asked for.

        Raises OSError where one can't be had; then the container has what it had.
        """
        wanted = [] if owner is None else list(owner["ports"])
        held = self._relays.get(key, {})
        kept: dict[str, Relay] = {}
        found: list[int] = []
        try:
            for port in wanted:
                number, relays = self._publish(port, held)
                kept.update(relays)
                found.append(number)
        except OSError:
            for name, relay in kept.items():
                if name not in held:
                    relay.close()
            raise
        for name, relay in held.items():
            if name not in kept:
                relay.close()
        if kept:
            self._relays[key] = kept
        else:
            self._relays.pop(key, None)
        self._names.set(key, owner if owner is not None and owner["endpoints"] else None)
        return found

    def _publish(self, port: Mapping[str, Any], held: Mapping[str, Relay]) -> tuple[int, dict[str, Relay]]:
        first, last = int(port["host_port"]), int(port["host_port_end"] or port["host_port"])
        if port["protocol"] not in ("tcp", "udp"):
            return first, {}  # the rules do it alone
        addresses = [port["host_ip"]] if port["host_ip"] else list(_BOTH)
        candidates = range(first, last + 1) if first else range(_TRIES)
        error: OSError | None = None
        for candidate in candidates:
            try:
                return self._bind(port, addresses, candidate if first else 0, held)
            except OSError as refused:
                error = refused
        where = port["host_ip"] or "the host"
        shown = f"{first}-{last}" if last != first else str(first or "any")
        reason = os.strerror(error.errno) if error is not None and error.errno else str(error)
        raise OSError(error.errno if error else 0, f"port {shown}/{port['protocol']} of {where}: {reason}")

    def _bind(
        self, port: Mapping[str, Any], addresses: list[str], number: int, held: Mapping[str, Relay]
    ) -> tuple[int, dict[str, Relay]]:
        made: dict[str, Relay] = {}
        kept: dict[str, Relay] = {}
        try:
            for address in addresses:
                name = f"{port['protocol']} {address} {number} {port['targets']} {port['container_port']}"
                if number and name in held:
                    kept[name] = held[name]
                    continue
                try:
                    sock = listening(port["protocol"], address, number)
                except OSError as error:
                    if len(addresses) > 1 and error.errno in _NO_FAMILY:
                        continue  # a host without that family
                    raise
                number = int(sock.getsockname()[1])
                name = f"{port['protocol']} {address} {number} {port['targets']} {port['container_port']}"
                made[name] = self._relay(port, sock, address)
        except OSError:
            for relay in made.values():
                relay.close()
            raise
        return number, {**kept, **made}

    def _relay(self, port: Mapping[str, Any], sock: socket.socket, address: str) -> Relay:
        targets = list(port["targets"])
        same = [item for item in targets if (":" in item) == (":" in address)]
        target = ((same or targets)[0], int(port["container_port"]))
        return (TcpRelay if port["protocol"] == "tcp" else UdpRelay)(self._loop, sock, target, self._make)


class _Daemon:
    """A connection from a daemon: requests and answers, a line each; `{"error": [ERRNO, TEXT]}` where it can't be."""

    def __init__(self, loop: Loop, keeper: Keeper, sock: socket.socket, daemons: set[_Daemon]) -> None:
        self._loop, self._keeper, self._sock, self._daemons = loop, keeper, sock, daemons
        self._in = bytearray()
        self._out = bytearray()
        daemons.add(self)
        loop.watch(sock, READ, self._ready)

    def _ready(self, events: int) -> None:
        try:
            if events & WRITE:
                del self._out[: self._sock.send(self._out)]
            if events & READ:
                chunk = self._sock.recv(1 << 20)
                if not chunk:
                    self._close()
                    return
                self._in += chunk
        except BlockingIOError:
            return
        except OSError:
            self._close()
            return
        while (end := self._in.find(b"\n")) != -1:
            line = bytes(self._in[:end])
            del self._in[: end + 1]
            self._out += json.dumps(self._answer(line)).encode() + b"\n"
        self._loop.watch(self._sock, READ | (WRITE if self._out else 0), self._ready)

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            return self._keeper.handle(json.loads(line))
        except OSError as error:
            return {"error": [error.errno or 0, error.strerror or str(error)]}
        except (ValueError, KeyError, TypeError) as error:
            return {"error": [errno.EINVAL, f"network keeper: {type(error).__name__}: {error}"]}

    def _close(self) -> None:
        self._loop.close(self._sock)
        self._daemons.discard(self)
        if not self._daemons and self._keeper.idle:
            self._loop.stopped = True


def serve(listener: socket.socket, make: inside.Make = inside.here) -> None:
    """Keeps until nothing is left to keep and nobody is there who would bring more."""
    loop = Loop()
    keeper = Keeper(loop, make)
    daemons: set[_Daemon] = set()

    def accept(_: int) -> None:
        with contextlib.suppress(OSError):
            sock, _source = listener.accept()
            sock.setblocking(False)
            _Daemon(loop, keeper, sock, daemons)

    listener.setblocking(False)
    loop.watch(listener, READ, accept)
    loop.run(lambda: traceback.print_exc(file=sys.stderr))


def _give_up_rights() -> None:
    """What reads packets from containers shall be able to do nothing else."""
    bits, _ = capabilities.mask(["CAP_NET_BIND_SERVICE"])
    capabilities.drop_bounding(bits)
    capabilities.apply(bits, bits, 0, 0)
    sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)


def main() -> int:
    """`python -m wherry.network.keeper FD PATH [HUB]`: FD is a unix socket that listens on PATH, which `ps` shows.

    HUB is the network namespace of an ordinary user's bridges.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    listener = socket.socket(fileno=int(sys.argv[1]))
    make = inside.sockets(sys.argv[3], _give_up_rights) if len(sys.argv) > 3 else inside.here
    _give_up_rights()
    serve(listener, make)
    return 0


if __name__ == "__main__":
    sys.exit(main())
