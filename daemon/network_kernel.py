"""The daemon's share of the kernel: what the worker is asked for, and which rules are there already."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import structlog

from wherry.core.errors import NotFound, WherryError
from wherry.daemon.network_registry import Instance, Networks, used
from wherry.network import rules
from wherry.network.model import Connection, Endpoint, Network, plain
from wherry.network.worker_client import WorkerClient

log = structlog.get_logger(__name__)


class Kernel:
    """Interfaces, namespaces and rules of one daemon."""

    def __init__(self, instance: Instance, networks: Networks, namespaces: str, marker: str, hub: str = "") -> None:
        """`namespaces` is the folder where they are held; the file `marker` says that something of ours may be.

        `hub` is the file of the network namespace with an ordinary user's bridges, "" for the host's.
        """
        self._instance = instance
        self._networks = networks
        self.folder = namespaces
        self._marker = marker
        self._worker = WorkerClient(instance.id, hub)
        # the networks that our table knows; None: there is no table yet, or somebody took it
        self._known: set[str] | None = None
        # where names are served on another port than 53, by network
        self.dns_ports: dict[str, int] = {}

    @property
    def touched(self) -> bool:
        """Whether a daemon before this one, or this one, may have left something (since the host started)."""
        return os.path.exists(self._marker)

    def veth(self) -> str:
        """A name for the outer end of a pair (links.veth_prefix, not imported here: it brings pyroute2)."""
        return f"wh{self._instance.id}{os.urandom(4).hex()[:7]}"

    async def warm(self) -> None:
        with contextlib.suppress(WherryError):
            await self._worker.warm()

    async def hub(self) -> int:
        """Which namespace the bridges are in: of an ordinary user's daemon, which is there from now on."""
        self._touch()
        found: int = await self._worker.call("hub")
        return found

    async def attach(
        self,
        connection: Connection,
        endpoints: Sequence[Endpoint],
        others: Sequence[Connection],
        *,
        make: bool,
        users: Mapping[str, str] | None = None,
    ) -> None:
        """Connects a container's endpoints, with its published ports where `make`, the namespace too.

        `others` are all connections, this one among them: what the table holds where it has to be made. `users`: the
        user namespace that owns the new one (`Links.make_namespace`).
        """
        self._touch()
        wanted = [self._networks.all[item.network] for item in endpoints]
        for again in (False, True):
            text = self._rules(connection if make else None, wanted, others)
            try:
                macs = await self._worker.call(
                    "attach",
                    netns=connection.netns,
                    owner=connection.key,
                    make=make,
                    users=users,
                    plugs=self._plugs(connection, endpoints, wanted),
                    rules=text,
                )
            except NotFound:
                # somebody flushed the rules or removed a bridge: once more, from the beginning
                if again:
                    raise
                self._known = None
                continue
            break
        self._known = {*(self._known or ()), *(item.id for item in wanted)}
        for endpoint, mac in zip(endpoints, macs, strict=True):
            endpoint.mac = mac

    async def namespace(self, path: str, users: Mapping[str, str] | None = None) -> None:
        """A namespace without interfaces."""
        self._touch()
        await self._worker.call("namespace", netns=path, users=users)

    async def withdraw(self, connection: Connection, others: Iterable[Connection]) -> None:
        """Its published ports lead nowhere from now on; those that are one of the others' stay."""
        text = rules.withdraw(self._instance.table, connection, others)
        # also where no table is known: one that is being made may have them
        if text and self.touched:
            await self._worker.call("withdraw", rules=text)

    async def detach(self, connection: Connection, endpoints: Sequence[Endpoint], *, whole: bool) -> None:
        """Takes endpoints off; `whole`: the namespace goes too."""
        udp = any(port.protocol == "udp" for port in connection.ports)
        target = connection.publishing()
        await self._worker.call(
            "detach",
            interfaces=[item.host_interface for item in endpoints if item.host_interface],
            netns=connection.netns if whole else "",
            forget=[item for item in (target.address4, target.address6) if item] if udp and target is not None else [],
        )

    async def redirect(self, ports: Mapping[str, int]) -> None:
        """Names of these networks are served on these ports now."""
        changed = {key: port for key, port in ports.items() if port and self.dns_ports.get(key, 53) != port}
        before, self.dns_ports = dict(self.dns_ports), {**self.dns_ports, **changed}
        if self._known is None:
            return
        for key, port in changed.items():
            network = self._networks.all.get(key)
            if network is not None and key in self._known:
                table = self._instance.table
                old = rules.dns_elements(table, network, before.get(key, 53), add=False)
                await self._worker.call("withdraw", rules=old)
                await self._worker.call("rules", rules=rules.dns_elements(table, network, port, add=True))

    async def remove_network(self, network: Network) -> None:
        """Its bridge and its elements of the table."""
        if not self.touched:
            return
        text = ""
        if self._known is not None and network.id in self._known:
            self._known.discard(network.id)
            text = rules.remove_network(self._instance.table, network, self.dns_ports.pop(network.id, 53))
        await self._worker.call("remove_network", bridge=network.bridge, rules=text)

    async def sweep(self, alive: Sequence[Connection]) -> None:
        """What should be there by these connections is, and nothing else of ours."""
        networks = used(self._networks.all.values(), alive)
        table = self._instance.table
        gone = await self._worker.call(
            "sweep",
            keep=[
                *(network.bridge for network in networks),
                *(endpoint.host_interface for connection in alive for endpoint in connection.endpoints),
            ],
            bridges=[item.bridge for item in self._networks.all.values() if self._networks.generated(item)],
            folder=self.folder,
            namespaces=[connection.netns for connection in alive if connection.netns],
            rules=rules.whole(table, networks, alive, self.dns_ports) if alive else rules.remove(table),
        )
        if gone:
            log.info("networks: what nobody uses is removed", removed=gone)
        self._known = {network.id for network in networks} if alive else None
        if not alive:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._marker)

    async def droppers(self) -> list[str]:
        """Other people's chains that drop what is forwarded."""
        found: list[str] = await self._worker.call("droppers", table=self._instance.table)
        return found

    async def close(self) -> None:
        await self._worker.close()

    def _touch(self) -> None:
        if not os.path.exists(self._marker):
            os.close(os.open(self._marker, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def _rules(self, connection: Connection | None, wanted: Sequence[Network], others: Sequence[Connection]) -> str:
        table = self._instance.table
        if self._known is None:
            there = {item.id: item for item in [*used(self._networks.all.values(), others), *wanted]}
            return rules.whole(table, there.values(), others, self.dns_ports)
        new = [item for item in wanted if item.id not in (self._known or ())]
        text = "".join(rules.add_network(table, item, self.dns_ports.get(item.id, 53)) for item in new)
        return text + (rules.publish(table, connection) if connection is not None else "")

    def _plugs(
        self, connection: Connection, endpoints: Sequence[Endpoint], networks: Sequence[Network]
    ) -> list[dict[str, Any]]:
        route = default_route(connection, self._networks)
        return [
            {
                "network": {**plain(network), "generated": self._networks.generated(network)},
                "endpoint": {**plain(endpoint), "default_route": endpoint.interface == route},
            }
            for endpoint, network in zip(endpoints, networks, strict=True)
        ]


def default_route(connection: Connection, networks: Networks) -> str:
    """The interface by which a container reaches the rest of the world: of its first network that leads there.

    "" where a program of the user's makes it, as it does of the default network without root.
    """
    if any(item.kind == "user" for item in connection.endpoints):
        return ""
    for endpoint in connection.endpoints:
        network = networks.all.get(endpoint.network)
        if endpoint.kind == "bridge" and network is not None and not network.internal:
            return endpoint.interface
    return ""
