"""From what a container's settings ask for to the endpoints that it is to have."""

from __future__ import annotations

import re

from wherry.core.errors import InvalidArgument, NotFound
from wherry.core.names import quote
from wherry.daemon.network_cni import CniNetworks
from wherry.daemon.network_kernel import Kernel
from wherry.daemon.network_registry import Networks
from wherry.daemon.network_settings import mac
from wherry.daemon.network_user import UserNetwork
from wherry.network.model import DEFAULT, Endpoint, Network
from wherry.proto import network_pb2 as pb

# IFNAMSIZ, and nothing that means something in a path
_INTERFACE = re.compile(r"[a-zA-Z0-9_-][a-zA-Z0-9_.-]{0,14}")


class Wishes:
    """Finds the networks that are asked for, and checks that they can give what is asked of them."""

    def __init__(self, networks: Networks, kernel: Kernel, cni: CniNetworks, user: UserNetwork | None) -> None:
        """`user` stands in for the default network where the daemon is an ordinary user's."""
        self._networks = networks
        self._kernel = kernel
        self._cni = cni
        self._user = user

    async def resolve(self, settings: pb.Settings) -> tuple[list[tuple[Network, Endpoint]], list[Endpoint]]:
        """The endpoints on our networks, which are still without addresses, and those that others make.

        Raises NotFound, InvalidArgument.
        """
        asked = list(settings.networks) or [pb.Attachment(network=DEFAULT)]
        ours: list[tuple[Network, Endpoint]] = []
        foreign: list[Endpoint] = []
        for index, item in enumerate(asked):
            interface = item.interface or f"eth{index}"
            name = DEFAULT if settings.mode == "bridge" else item.network
            if self._user is not None and name in (DEFAULT, "default"):
                foreign.append(self._user.endpoint(item, interface))
                continue
            network = await self.network(name)
            if network is not None:
                ours.append((network, self.endpoint(network, item, interface)))
            else:
                foreign.append(self._foreign(item, interface))
        names = [network.name for network, _ in ours] + [item.name for item in foreign]
        if len(set(names)) != len(names):
            raise InvalidArgument("the same network is named twice: invalid argument")
        if settings.ports:
            self._check_ports([network for network, _ in ours], foreign)
        return ours, foreign

    async def network(self, name: str) -> Network | None:
        """A built-in network by its name; without root the default one isn't among them."""
        if self._user is not None and name in (DEFAULT, "default"):
            return None
        return await self._networks.default() if name in (DEFAULT, "default") else self._networks.find(name)

    def endpoint(self, network: Network, asked: pb.Attachment, interface: str) -> Endpoint:
        """An endpoint on one of our networks, without what it isn't asked to have."""
        if not _INTERFACE.fullmatch(interface):
            raise InvalidArgument(f"{quote(interface)} is no interface's name: invalid argument")
        if asked.ipv4 and network.of(4) is None:
            raise InvalidArgument(f"network {quote(network.name)} has no IPv4 addresses: invalid argument")
        if asked.ipv6 and network.of(6) is None:
            raise InvalidArgument(f"network {quote(network.name)} has no IPv6 addresses (--ipv6): invalid argument")
        return Endpoint(
            network=network.id,
            name=network.name,
            interface=interface,
            host_interface=self._kernel.veth(),
            ipv4=asked.ipv4,
            ipv6=asked.ipv6,
            mac=mac(asked.mac),
            aliases=list(asked.aliases),
        )

    def _foreign(self, asked: pb.Attachment, interface: str) -> Endpoint:
        name = self._cni.find(asked.network)
        if name is None:
            raise NotFound(f"network {quote(asked.network)}: not found")
        return Endpoint(
            network=name,
            name=name,
            interface=interface,
            kind="cni",
            ipv4=asked.ipv4,
            ipv6=asked.ipv6,
            mac=mac(asked.mac),
            aliases=list(asked.aliases),
        )

    def _check_ports(self, ours: list[Network], foreign: list[Endpoint]) -> None:
        if self._user is not None and foreign:
            return
        if not ours and not any(self._cni.publishes(item.name) for item in foreign):
            raise InvalidArgument(
                f"network {quote(foreign[0].name)} publishes no ports (portMappings): invalid argument"
            )
        if ours and all(network.internal for network in ours):
            raise InvalidArgument(f"network {quote(ours[0].name)} is internal: its ports can't be published")
