"""What is recorded of networks and of the containers on them. Plain values, kept as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

DEFAULT = "bridge"
"""The name of the built-in network."""
USERS = ".user"
"""Beside a network namespace's file: its owner, the user namespace of the container."""
RESERVED = frozenset({"bridge", "none", "host", "container", "default"})


@dataclass(slots=True)
class Subnet:
    """`subnet` and `range` in prefix notation (10.1.0.0/24), `gateway` an address of the subnet: the bridge's."""

    subnet: str
    gateway: str
    range: str = ""

    @property
    def prefix(self) -> int:
        return int(self.subnet.rpartition("/")[2])

    @property
    def is6(self) -> bool:
        return ":" in self.subnet


@dataclass(slots=True)
class Network:
    """A network of the built-in kind. `created_at` is in seconds since the epoch, `mtu` 0 means the host's."""

    id: str
    name: str
    bridge: str
    subnets: list[Subnet]
    ipv6: bool = False
    internal: bool = False
    isolated: bool = False
    mtu: int = 0
    dns: bool = True
    labels: dict[str, str] = field(default_factory=dict)
    created_at: float = 0.0

    def of(self, family: int) -> Subnet | None:
        """The subnet of family 4 or 6."""
        return next((item for item in self.subnets if item.is6 == (family == 6)), None)


@dataclass(slots=True)
class Endpoint:
    """A container on a network; addresses with their prefix (10.1.0.2/24), "" where it has none.

    `kind` is "bridge", or "cni", where `network` is the conflist's name and `host_interface` is empty.
    """

    network: str
    name: str
    interface: str
    kind: str = "bridge"
    host_interface: str = ""
    ipv4: str = ""
    ipv6: str = ""
    mac: str = ""
    gateway4: str = ""
    gateway6: str = ""
    aliases: list[str] = field(default_factory=list)

    @property
    def address4(self) -> str:
        return self.ipv4.partition("/")[0]

    @property
    def address6(self) -> str:
        return self.ipv6.partition("/")[0]


@dataclass(slots=True)
class Port:
    """A published port; `host_ip` "" is every address of both families; `host_port_end` as in network.proto."""

    container_port: int
    host_port: int = 0
    protocol: str = "tcp"
    host_ip: str = ""
    host_port_end: int = 0


@dataclass(slots=True)
class Connection:
    """All that a container has of networks while it has a task.

    `netns` is the path of its namespace, "" where it isn't ours. `names` are known on its networks beside the aliases.
    `dns`: name servers that were asked for. `pid` of the container's first process, 0 before it is there.
    """

    namespace: str
    container: str
    mode: str
    netns: str = ""
    endpoints: list[Endpoint] = field(default_factory=list)
    ports: list[Port] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    dns: list[str] = field(default_factory=list)
    pid: int = 0

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.container}"

    def publishing(self) -> Endpoint | None:
        """The endpoint that published ports lead to: the first one on a bridge."""
        return next((item for item in self.endpoints if item.kind == "bridge"), None)

    def relayed(self) -> Endpoint | None:
        """The endpoint that an ordinary user's published ports lead to, all of them by the keeper; CNI's, too."""
        return self.publishing() or next((item for item in self.endpoints if item.kind == "cni"), None)


def network_from(value: Mapping[str, Any]) -> Network:
    """What `dataclasses.asdict` made of a network."""
    return Network(**{**value, "subnets": [Subnet(**item) for item in value["subnets"]]})


def connection_from(value: Mapping[str, Any]) -> Connection:
    """What `dataclasses.asdict` made of a connection."""
    return Connection(
        **{
            **value,
            "endpoints": [Endpoint(**item) for item in value["endpoints"]],
            "ports": [Port(**item) for item in value["ports"]],
        }
    )


def plain(value: Network | Connection | Endpoint | Port) -> dict[str, Any]:
    """As JSON has it."""
    return asdict(value)
