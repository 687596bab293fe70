"""Networks: what a container asks for, and the networks of the daemon.

What a container asks for is kept in its record (the extension `wherry.network`) and done by the daemon when its task is
created: a container that is started again, by whomever, has its network again. A daemon that isn't `wherryd` keeps the
extension and does nothing: `Networks.check` tells them apart.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from google.protobuf.empty_pb2 import Empty

from wherry.client.values import seconds
from wherry.core import typeurl
from wherry.core.errors import InvalidArgument, NotFound, Unimplemented
from wherry.core.tuples import NamedTuple
from wherry.proto import network_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as Packed

    from wherry.client.transport import Calls

_SERVICE = "wherry.network.v1.Networks"
EXTENSION = "wherry.network"
PROTOCOLS = ("tcp", "udp", "sctp")
# the modes that are no network's name
MODES = ("bridge", "none", "host")


class Port(NamedTuple):
    """A published port. `host_ip` "" is every address of both families, `host_port` 0 any free port.

    `host_port_end` not 0: any port from `host_port` to this one.
    """

    container_port: int
    host_port: int = 0
    protocol: str = "tcp"
    host_ip: str = ""
    host_port_end: int = 0


class Attachment(NamedTuple):
    """One network that a container is on; wanted addresses and `mac` are "" for any."""

    network: str
    aliases: Sequence[str] = ()
    ipv4: str = ""
    ipv6: str = ""
    mac: str = ""
    interface: str = ""


class NetworkOptions(NamedTuple):
    """What a container asks for.

    `mode`: "bridge" (the built-in network), "none", "host", "container" (then `container` is the id), or "networks"
    (then `networks` names them; with "bridge" it may hold one attachment with addresses). `hosts` are "NAME:ADDRESS".
    `names` are what the other containers of its named networks find it by. `publish_all`: every port that the image
    exposes, and those of `exposed` (`PORT/PROTOCOL`), on a free one of the host. `optional`: a daemon without networks
    (containerd) gives it an empty one.
    """

    mode: str = "bridge"
    container: str = ""
    networks: Sequence[Attachment] = ()
    ports: Sequence[Port] = ()
    publish_all: bool = False
    exposed: Sequence[str] = ()
    hostname: str = ""
    domainname: str = ""
    hosts: Sequence[str] = ()
    dns: Sequence[str] = ()
    dns_search: Sequence[str] = ()
    dns_options: Sequence[str] = ()
    names: Sequence[str] = ()
    optional: bool = False


class Subnet(NamedTuple):
    """`subnet` as 10.1.0.0/24; `gateway` is the bridge's address in it, addresses are given out of `range`."""

    subnet: str
    gateway: str = ""
    range: str = ""


class Endpoint(NamedTuple):
    """A container on a network; addresses with their prefix length (10.1.0.2/24), "" where it has none."""

    container: str
    network: str
    interface: str
    ipv4: str
    ipv6: str
    mac: str
    gateway4: str
    gateway6: str
    names: Sequence[str]
    namespace: str = ""


class Network(NamedTuple):
    """A network. `driver` is "bridge", or "cni" for a conflist."""

    name: str
    id: str = ""
    driver: str = "bridge"
    subnets: Sequence[Subnet] = ()
    ipv6: bool = False
    internal: bool = False
    isolated: bool = False
    bridge: str = ""
    mtu: int = 0
    dns: bool = True
    labels: Mapping[str, str] = MappingProxyType({})
    created_at: float = 0.0
    endpoints: Sequence[Endpoint] = ()


class NetworkStatus(NamedTuple):
    """What a container has now; `ports` with the host's ports that were found."""

    container: str
    mode: str
    netns: str
    endpoints: Sequence[Endpoint]
    ports: Sequence[Port]


def parse_ports(text: str) -> list[Port]:
    """The ports of one `-p`: `[ADDRESS:][HOST[-HOST]:]PORT[-PORT][/PROTOCOL]`, an IPv6 address in brackets.

    Raises InvalidArgument.
    """
    rest, _, protocol = text.partition("/")
    protocol = protocol.lower() or "tcp"
    if protocol not in PROTOCOLS:
        raise InvalidArgument(f"port {text!r}: protocol {protocol!r} is none of {', '.join(PROTOCOLS)}")
    address = ""
    if rest.startswith("["):
        address, bracket, rest = rest[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            raise InvalidArgument(f"port {text!r}: an IPv6 address is written as [ADDRESS]:HOST:PORT")
        rest = rest[1:]
    parts = rest.split(":")
    if len(parts) == 3 and not address:
        address, *parts = parts
    if len(parts) > 2:
        raise InvalidArgument(f"port {text!r}: expected [ADDRESS:][HOST:]PORT[/PROTOCOL]")
    if address:
        address = _address(address, text)
    inside = _range(parts[-1], text)
    outside = _range(parts[0], text) if len(parts) == 2 and parts[0] else None
    if outside is None:
        return [Port(port, 0, protocol, address) for port in inside]
    if len(outside) == len(inside):
        return [Port(port, host, protocol, address) for port, host in zip(inside, outside, strict=True)]
    if len(inside) == 1:
        return [Port(inside[0], outside[0], protocol, address, outside[-1])]
    raise InvalidArgument(f"port {text!r}: the ranges differ in length")


def _address(text: str, whole: str) -> str:
    import ipaddress

    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidArgument(f"port {whole!r}: {text!r} is no IP address") from None
    # without an address there are both families; 0.0.0.0 and :: are one
    return str(address)


def _range(text: str, whole: str) -> range:
    first, dash, last = text.partition("-")
    try:
        begin = int(first)
        end = int(last) if dash else begin
    except ValueError:
        raise InvalidArgument(f"port {whole!r}: {text!r} is no port") from None
    if not 1 <= begin <= end <= 65535:
        raise InvalidArgument(f"port {whole!r}: ports go from 1 to 65535")
    return range(begin, end + 1)


def _exposed(settings: Mapping[str, Any] | None) -> list[Port]:
    found: list[Port] = []
    for text in (settings or {}).get("ExposedPorts") or {}:
        found += parse_ports(str(text))
    return found


def extensions(options: NetworkOptions | None, settings: Mapping[str, Any] | None = None) -> dict[str, Packed]:
    """The extensions of a container's record that ask for this; `settings` is the image's `config` (for EXPOSE).

    None asks for nothing: the container has the network that its specification says.
    """
    if options is None:
        return {}
    ports = list(options.ports)
    if options.publish_all:
        named = {(port.container_port, port.protocol) for port in ports}
        wanted = [*_exposed(settings), *(port for text in options.exposed for port in parse_ports(text))]
        ports += [port for port in dict.fromkeys(wanted) if (port.container_port, port.protocol) not in named]
    message = pb.Settings(
        mode=options.mode,
        container=options.container,
        networks=[pb.Attachment(**item._asdict()) for item in options.networks],
        ports=[pb.Port(**port._asdict()) for port in ports],
        hostname=options.hostname,
        domainname=options.domainname,
        hosts=options.hosts,
        dns=options.dns,
        dns_search=options.dns_search,
        dns_options=options.dns_options,
        names=options.names,
    )
    return {EXTENSION: typeurl.pack(message)}


def read_extensions(held: Mapping[str, Packed]) -> NetworkOptions | None:
    """What `extensions` wrote, of a container's record; None where there is nothing of it."""
    packed = held.get(EXTENSION)
    if packed is None:
        return None
    message = typeurl.unpack_as(packed, pb.Settings)
    return NetworkOptions(
        mode=message.mode,
        container=message.container,
        networks=[
            Attachment(item.network, list(item.aliases), item.ipv4, item.ipv6, item.mac, item.interface)
            for item in message.networks
        ],
        ports=[_port(item) for item in message.ports],
        hostname=message.hostname,
        domainname=message.domainname,
        hosts=list(message.hosts),
        dns=list(message.dns),
        dns_search=list(message.dns_search),
        dns_options=list(message.dns_options),
        names=list(message.names),
    )


def _port(message: pb.Port) -> Port:
    return Port(
        message.container_port, message.host_port, message.protocol or "tcp", message.host_ip, message.host_port_end
    )


def _endpoint(message: pb.Endpoint) -> Endpoint:
    return Endpoint(
        container=message.container,
        network=message.network,
        interface=message.interface,
        ipv4=message.ipv4,
        ipv6=message.ipv6,
        mac=message.mac,
        gateway4=message.gateway4,
        gateway6=message.gateway6,
        names=list(message.names),
        namespace=message.namespace,
    )


def _network(message: pb.Network) -> Network:
    return Network(
        name=message.name,
        id=message.id,
        driver=message.driver,
        subnets=[Subnet(item.subnet, item.gateway, item.range) for item in message.subnets],
        ipv6=message.ipv6,
        internal=message.internal,
        isolated=message.isolated,
        bridge=message.bridge,
        mtu=message.mtu,
        dns=message.dns,
        labels=dict(message.labels),
        created_at=seconds(message.created_at),
        endpoints=[_endpoint(item) for item in message.endpoints],
    )


class Networks:
    """The networks of a daemon (they belong to no namespace), and those of the namespace's containers."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def check(self) -> None:
        """Raises Unimplemented where the daemon has no networks (containerd leaves them to its clients).

        No call where the transport has seen already that it speaks with `wherryd`.
        """
        if getattr(self._calls.transport, "ours", False):
            return
        try:
            await self.list()
        except (Unimplemented, NotFound):
            raise Unimplemented(
                "this daemon has no networks of its own (is it containerd?): use --net none or --net host"
            ) from None

    async def create(self, network: Network) -> Network:
        """Makes a network; without subnets it gets one from the pool. Raises AlreadyExists, InvalidArgument."""
        request = pb.CreateRequest(
            network=pb.Network(
                name=network.name,
                driver=network.driver,
                subnets=[pb.Subnet(**item._asdict()) for item in network.subnets],
                ipv6=network.ipv6,
                internal=network.internal,
                isolated=network.isolated,
                bridge=network.bridge,
                mtu=network.mtu,
                dns=network.dns,
                labels=dict(network.labels),
            )
        )
        answer = await self._calls.unary(f"{_SERVICE}/Create", request, pb.CreateResponse)
        return _network(answer.network)

    async def get(self, name: str) -> Network:
        """A network by its name, its id or the beginning of its id, with who is on it; raises NotFound."""
        answer = await self._calls.unary(f"{_SERVICE}/Get", pb.GetRequest(name=name), pb.GetResponse)
        return _network(answer.network)

    async def list(self) -> list[Network]:
        """All networks, the conflists of CNI too, without who is on them."""
        answer = await self._calls.unary(f"{_SERVICE}/List", pb.ListRequest(), pb.ListResponse)
        return [_network(item) for item in answer.networks]

    async def delete(self, name: str) -> None:
        """Removes a network; raises NotFound, FailedPrecondition while somebody is on it."""
        await self._calls.unary(f"{_SERVICE}/Delete", pb.DeleteRequest(name=name), Empty)

    async def prune(self) -> builtins.list[str]:
        """Removes the networks that nobody is on and no container names; their names."""
        answer = await self._calls.unary(f"{_SERVICE}/Prune", pb.PruneRequest(), pb.PruneResponse)
        return list(answer.names)

    async def connect(self, container: str, attachment: Attachment) -> None:
        """Puts a container on one more network, at once where it runs."""
        request = pb.ConnectRequest(container=container, network=pb.Attachment(**attachment._asdict()))
        await self._calls.unary(f"{_SERVICE}/Connect", request, Empty)

    async def disconnect(self, container: str, network: str) -> None:
        """Takes a container off a network, at once where it runs."""
        await self._calls.unary(
            f"{_SERVICE}/Disconnect", pb.DisconnectRequest(container=container, network=network), Empty
        )

    async def rename(self, container: str, names: Sequence[str]) -> None:
        """Other names for a container, in its record and at once in DNS; nothing happens to one without networks."""
        await self._calls.unary(f"{_SERVICE}/Rename", pb.RenameRequest(container=container, names=names), Empty)

    async def status(self, containers: Iterable[str] = ()) -> builtins.list[NetworkStatus]:
        """What running containers have now; of all in the namespace where none are named."""
        request = pb.StatusRequest(containers=containers)
        answer = await self._calls.unary(f"{_SERVICE}/Status", request, pb.StatusResponse)
        return [
            NetworkStatus(
                container=item.container,
                mode=item.mode,
                netns=item.netns,
                endpoints=[_endpoint(endpoint) for endpoint in item.endpoints],
                ports=[_port(port) for port in item.ports],
            )
            for item in answer.containers
        ]


def show_ports(ports: Sequence[Port]) -> str:
    """The published ports in one cell, neighbours as ranges: `0.0.0.0:7000-7009->7000-7009/tcp`."""
    runs: list[list[Port]] = []
    for port in sorted(ports, key=lambda item: (item.host_ip, item.protocol, item.container_port, item.host_port)):
        last = runs[-1][-1] if runs else None
        after = last is not None and port == last._replace(
            container_port=last.container_port + 1, host_port=last.host_port + 1
        )
        if after:
            runs[-1].append(port)
        else:
            runs.append([port])
    return ", ".join(_show_run(run[0], run[-1]) for run in runs)


def _show_run(first: Port, last: Port) -> str:
    if first == last:
        return show_port(first)
    host, _, _ = show_port(first).rpartition(f":{first.host_port}->")
    inside = f"{first.container_port}-{last.container_port}"
    return f"{host}:{first.host_port}-{last.host_port}->{inside}/{first.protocol}"


def show_port(port: Port) -> str:
    """A published port as docker's listings have it: `0.0.0.0:8080->80/tcp`, `[::]:8080->80/tcp`."""
    host = port.host_ip or "0.0.0.0"
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port.host_port}->{port.container_port}/{port.protocol}"
