"""Names and published ports: what the keeper is told of containers, and which name servers a container gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from wherry.daemon.network_kernel import Kernel
from wherry.daemon.network_registry import Networks, used
from wherry.network.files import read_host
from wherry.network.keeper_client import KeeperClient
from wherry.network.model import Connection, Endpoint, Network, Port
from wherry.network.resolv import outside, parse

RESOLV_CONF = "/etc/resolv.conf"


class Names:
    """One daemon's keeper, and what it is to keep."""

    def __init__(
        self,
        path: str,
        networks: Networks,
        kernel: Kernel,
        connections: Callable[[], Iterable[Connection]],
        hub: str = "",
    ) -> None:
        """`path` of the keeper's socket; `connections` are all that there are; `hub`: a user's namespace."""
        self._hub = hub
        self._networks = networks
        self._kernel = kernel
        self._connections = connections
        self._told: set[str] = set()
        self.keeper = KeeperClient(path, self._wanted, self._restarted, hub)

    def serves(self, network: Network) -> bool:
        """Whether containers of a network ask us: for names of each other, or because the host's own name server is
        one that only the host reaches (systemd-resolved's, say)."""
        if network.dns:
            return True
        return not outside(parse(read_host(RESOLV_CONF)).nameservers) and bool(
            parse(read_host(RESOLV_CONF)).nameservers
        )

    def servers(self, connection: Connection) -> list[str]:
        """The addresses of our name servers that a container asks; none where it asks others."""
        for endpoint in connection.endpoints:
            network = self._networks.all.get(endpoint.network)
            if network is not None and endpoint.kind == "bridge" and self.serves(network):
                return [item for item in (endpoint.gateway4, endpoint.gateway6) if item]
        return []

    async def serve(self, connection: Connection) -> None:
        """There are name servers for a container's networks; what the rules must know of them is known then."""
        for network in self._of(connection):
            if network.id not in self._told or not self.keeper.there:
                port = await self.keeper.network(network.id, self._network(network))
                await self._kernel.redirect({network.id: port})
                self._told.add(network.id)

    async def tell(self, connection: Connection) -> None:
        """Names and ports of a container; ports that were any become the ones that were found.

        Raises FailedPrecondition where a port is in use. Nothing happens where there is nothing to keep.
        """
        owner = self._owner(connection)
        if owner is None:
            return
        await self.serve(connection)
        ports = await self.keeper.owner(connection.key, owner)
        for port_record, found in zip(connection.ports, ports, strict=True):
            port_record.host_port, port_record.host_port_end = found, 0

    async def forget(self, connection: Connection) -> None:
        """A container's names and ports are free."""
        if self._owner(connection) is not None and self.keeper.there:
            await self.keeper.owner(connection.key, None)
            if self.keeper.adopted and not self._wanted()["owners"]:
                # an earlier daemon's, and perhaps of its version: it has done its work
                self._told.clear()
                await self.keeper.leave()

    async def remove_network(self, network: Network) -> None:
        """Its names are served no longer."""
        self._told.discard(network.id)
        if self.keeper.there:
            await self.keeper.network(network.id, None)

    async def reconcile(self) -> None:
        """Take over the keeper that is there, or start one where there is something to keep; tell it all."""
        wanted = self._wanted()
        adopted = await self.keeper.adopt()
        if adopted or wanted["owners"]:
            ports = await self.keeper.sync()
            self._told = set(wanted["networks"])
            await self._kernel.redirect(ports)
        if adopted and not wanted["owners"]:
            await self.keeper.leave()

    async def close(self) -> None:
        await self.keeper.close()

    async def _restarted(self, ports: Mapping[str, int]) -> None:
        self._told = set(ports)
        await self._kernel.redirect(ports)

    def _wanted(self) -> dict[str, Any]:
        connections = list(self._connections())
        networks = [item for item in used(self._networks.all.values(), connections) if self.serves(item)]
        owners = {item.key: self._owner(item) for item in connections}
        return {
            "networks": {item.id: self._network(item) for item in networks},
            "owners": {key: owner for key, owner in owners.items() if owner is not None},
        }

    def _of(self, connection: Connection) -> list[Network]:
        return [item for item in used(self._networks.all.values(), [connection]) if self.serves(item)]

    @staticmethod
    def _network(network: Network) -> dict[str, Any]:
        return {"listen": [item.gateway for item in network.subnets], "internal": network.internal}

    def _owner(self, connection: Connection) -> dict[str, Any] | None:
        served = {item.id: item for item in self._of(connection)}
        target = connection.relayed() if self._hub else connection.publishing()
        if not served and (not connection.ports or target is None):
            return None
        targets = [item for item in (target.address4, target.address6) if item] if target is not None else []
        return {
            "dns": connection.dns,
            "ports": [_port(port, targets) for port in connection.ports],
            "endpoints": [
                _endpoint(connection, item, named=served[item.network].dns)
                for item in connection.endpoints
                if item.network in served
            ],
        }


def _port(port: Port, targets: list[str]) -> dict[str, Any]:
    return {
        "protocol": port.protocol,
        "host_ip": port.host_ip,
        "host_port": port.host_port,
        "host_port_end": port.host_port_end,
        "container_port": port.container_port,
        "targets": targets,
    }


def _endpoint(connection: Connection, endpoint: Endpoint, *, named: bool) -> dict[str, Any]:
    return {
        "network": endpoint.network,
        "addresses": [item for item in (endpoint.address4, endpoint.address6) if item],
        "names": list(dict.fromkeys([*connection.names, *endpoint.aliases])) if named else [],
    }
