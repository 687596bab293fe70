"""The networks that there are: made, found, removed. Their records are in the store, what is here is a copy of them."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from wherry.core.names import quote
from wherry.daemon.config import NetworkOptions
from wherry.network import pools
from wherry.network.model import DEFAULT, RESERVED, Connection, Network, Subnet
from wherry.network.store import Store

T = TypeVar("T")
_DEFAULT_STATE = "/run/wherry"
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")
_INTERFACE = re.compile(r"[a-zA-Z0-9_.-]{1,15}")  # IFNAMSIZ
# the shortest beginning of an id that names a network
_ID_PREFIX = 4


class Instance:
    """What tells one daemon's things in the kernel from another's on the same host: by its state folder."""

    def __init__(self, state: str) -> None:
        path = os.path.realpath(state)
        self.default = path == _DEFAULT_STATE
        digest = hashlib.sha256(path.encode()).hexdigest()[:6]
        self.id = "000000" if self.default else digest
        self.table = "wherry" if self.default else f"wherry_{digest}"
        self.bridge = "wherry0" if self.default else f"wherry-{digest}"


class Networks:
    """Networks by name. `work` runs something with the store in the one thread that may."""

    def __init__(self, options: NetworkOptions, instance: Instance, store: Store, thread: ThreadPoolExecutor) -> None:
        self._options = options
        self._instance = instance
        self._store = store
        self._thread = thread
        self._making = asyncio.Lock()
        self.all: dict[str, Network] = {item.id: item for item in store.networks()}

    async def work(self, what: Callable[[Store], T]) -> T:
        """Run something with the store, in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, what, self._store)

    def find(self, name: str) -> Network | None:
        """By name, by id, or by the beginning of an id that only one has."""
        name = DEFAULT if name == "default" else name
        for network in self.all.values():
            if name in (network.name, network.id):
                return network
        found = [item for item in self.all.values() if len(name) >= _ID_PREFIX and item.id.startswith(name)]
        return found[0] if len(found) == 1 else None

    def get(self, name: str) -> Network:
        """Raises NotFound."""
        network = self.find(name)
        if network is None:
            raise NotFound(f"network {quote(name)}: not found")
        return network

    async def default(self) -> Network:
        """The built-in network, which is made when somebody asks for it first."""
        found = self.find(DEFAULT)
        if found is not None:
            return found
        async with self._making:
            if (found := self.find(DEFAULT)) is None:
                subnets = [Subnet(self._options.subnet, "")] if self._options.subnet else []
                wanted = Network(
                    id="", name=DEFAULT, bridge=self._options.bridge or self._instance.bridge, subnets=subnets,
                    ipv6=self._options.ipv6, dns=False,
                )  # fmt: skip
                found = await self._make(wanted)
            return found

    async def create(self, wanted: Network) -> Network:
        """A network as it is asked for. Raises AlreadyExists, InvalidArgument, FailedPrecondition."""
        if not _NAME.fullmatch(wanted.name) or wanted.name in RESERVED:
            raise InvalidArgument(f"network name {quote(wanted.name)} can't be used: invalid argument")
        async with self._making:
            if any(item.name == wanted.name for item in self.all.values()):
                raise AlreadyExists(f"network {quote(wanted.name)}: already exists")
            return await self._make(wanted)

    async def _make(self, wanted: Network) -> Network:
        wanted.id = os.urandom(32).hex()
        wanted.created_at = time.time()
        if wanted.bridge and not _INTERFACE.fullmatch(wanted.bridge):
            raise InvalidArgument(f"bridge {quote(wanted.bridge)} is no interface's name: invalid argument")
        if wanted.mtu and not 68 <= wanted.mtu <= 65535:
            raise InvalidArgument(f"MTU {wanted.mtu} is out of range: invalid argument")
        if any(item.bridge == wanted.bridge for item in self.all.values()):
            raise AlreadyExists(f"bridge {wanted.bridge} belongs to another network: already exists")
        wanted.bridge = wanted.bridge or f"br-{wanted.id[:12]}"
        wanted.subnets = await self.work(lambda store: self._subnets(store, wanted))
        wanted.ipv6 = wanted.of(6) is not None
        await self.work(lambda store: store.add_network(wanted))
        self.all[wanted.id] = wanted
        return wanted

    def _subnets(self, store: Store, wanted: Network) -> list[Subnet]:
        """The subnets that were asked for, checked, and those that are missing, out of the pools."""
        taken: list[pools.AnyNetwork] = [ipaddress.ip_network(s.subnet) for n in self.all.values() for s in n.subnets]
        found = [pools.check_subnet(item) for item in wanted.subnets]
        for family in (4, 6):
            if sum(item.is6 == (family == 6) for item in found) > 1:
                raise InvalidArgument(f"network {quote(wanted.name)}: more than one subnet of IPv{family}")
        host = pools.host_networks()
        for item in found:
            if (other := pools.overlapping(item.subnet, taken)) is not None:
                raise FailedPrecondition(f"subnet {item.subnet} overlaps {other} of another network")
            if (other := pools.overlapping(item.subnet, host)) is not None:
                raise FailedPrecondition(f"subnet {item.subnet} overlaps the host's route to {other}")
        seed = "" if self._instance.default else self._instance.id
        if not any(not item.is6 for item in found):
            subnet = pools.pick_subnet(self._options.pools, [*taken, *host], seed)
            found.insert(0, pools.check_subnet(Subnet(str(subnet), "")))
        if wanted.ipv6 and not any(item.is6 for item in found):
            # RFC 4193: 40 random bits, so that two sites that meet don't clash
            prefix = store.setting("prefix6", str(ipaddress.IPv6Network((0xFD << 120 | _random40() << 80, 48))))
            found.append(pools.check_subnet(Subnet(str(pools.pick_subnet([f"{prefix}/64"], [*taken, *host])), "")))
        return found

    async def remove(self, network: Network) -> None:
        """The record; raises FailedPrecondition while somebody is on it."""
        await self.work(lambda store: store.remove_network(network))
        self.all.pop(network.id, None)

    def generated(self, network: Network) -> bool:
        """Whether the bridge's name is one that we made up, which nobody else's interface has."""
        return network.bridge in (f"br-{network.id[:12]}", self._instance.bridge)


def used(networks: Iterable[Network], connections: Iterable[Connection]) -> list[Network]:
    """The networks that somebody is on."""
    ids = {endpoint.network for connection in connections for endpoint in connection.endpoints}
    return [network for network in networks if network.id in ids]


def _random40() -> int:
    return int.from_bytes(os.urandom(5), "big")
