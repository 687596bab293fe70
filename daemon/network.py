"""`wherry.network.v1.Networks`: networks for the command line and for programs."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf import empty_pb2, timestamp_pb2

from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound
from wherry.core.names import quote
from wherry.core.typeurl import pack
from wherry.daemon.containers import ContainerStore
from wherry.daemon.namespaces import NamespaceStore, require_namespace
from wherry.daemon.network_manager import NetworkManager
from wherry.daemon.network_settings import EXTENSION, mac, settings_of
from wherry.daemon.network_user import UserNetwork
from wherry.network.cni import NetworkList
from wherry.network.model import DEFAULT, Connection, Endpoint, Network, Subnet
from wherry.proto import network_pb2 as pb
from wherry.proto.containers_pb2 import Container
from wherry.proto.service import Context

_BUILT_IN = "the built-in network can't be removed: failed precondition"


class NetworkService:
    """The networks of one daemon; they belong to no namespace, containers on them do."""

    SERVICE = "wherry.network.v1.Networks"

    def __init__(self, manager: NetworkManager, containers: ContainerStore, namespaces: NamespaceStore) -> None:
        self._manager = manager
        self._containers = containers
        self._namespaces = namespaces

    # -- networks

    async def create(self, request: pb.CreateRequest, context: Context) -> pb.CreateResponse:
        """Record a network; its bridge is made with the first container on it."""
        wanted = request.network
        if wanted.driver not in ("", "bridge"):
            raise InvalidArgument(
                f"network driver {quote(wanted.driver)}: there is 'bridge', others by CNI: invalid argument"
            )
        if self._manager.cni.find(wanted.name) is not None:
            raise InvalidArgument(f"network {quote(wanted.name)} is one of CNI: invalid argument")
        made = await self._manager.networks.create(
            Network(
                id="",
                name=wanted.name,
                bridge=wanted.bridge,
                subnets=[Subnet(item.subnet, item.gateway, item.range) for item in wanted.subnets],
                ipv6=wanted.ipv6,
                internal=wanted.internal,
                isolated=wanted.isolated,
                mtu=wanted.mtu,
                dns=wanted.dns,
                labels=dict(wanted.labels),
            )
        )
        return pb.CreateResponse(network=self._shown(made))

    async def get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        """A network, with who is on it now, of all namespaces."""
        network = await self._manager.network(request.name)
        if network is None:
            if request.name in (DEFAULT, "default") and (user := self._manager.user) is not None:
                return pb.GetResponse(network=self._users(user, everything=True))
            for item in self._manager.cni.networks():
                if item.name == request.name:
                    return pb.GetResponse(network=self._foreign(item, everything=True))
            raise NotFound(f"network {quote(request.name)}: not found")
        return pb.GetResponse(network=self._shown(network, everything=True))

    async def list(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        """All networks; CNI's after ours."""
        if (user := self._manager.user) is None:
            await self._manager.networks.default()
        kept = [item for item in self._manager.networks.all.values() if user is None or item.name != DEFAULT]
        ours = [self._shown(item) for item in kept]
        if user is not None:
            ours.insert(0, self._users(user))
        names = {item.name for item in ours}
        theirs = [self._foreign(item) for item in self._manager.cni.networks() if item.name not in names]
        return pb.ListResponse(networks=[*ours, *theirs])

    async def delete(self, request: pb.DeleteRequest, context: Context) -> empty_pb2.Empty:
        """Remove a network that nobody is on."""
        if request.name in (DEFAULT, "default"):
            raise FailedPrecondition(_BUILT_IN)
        await self._remove(self._manager.networks.get(request.name))
        return empty_pb2.Empty()

    async def prune(self, request: pb.PruneRequest, context: Context) -> pb.PruneResponse:
        """Remove the networks that no container names, whether it runs or not."""
        named = {DEFAULT}
        for namespace in await self._namespaces.list():
            for container in await self._containers.list(namespace.name):
                settings = settings_of(container)
                named |= {item.network for item in settings.networks} if settings is not None else set()
        gone = []
        for network in list(self._manager.networks.all.values()):
            if network.name in named or network.id in named:
                continue
            try:
                await self._remove(network)
            except FailedPrecondition:
                continue  # somebody came on it just now
            gone.append(network.name)
        return pb.PruneResponse(names=gone)

    async def _remove(self, network: Network) -> None:
        if network.name == DEFAULT:
            raise FailedPrecondition(_BUILT_IN)
        await self._manager.vacated(network)
        await self._manager.networks.remove(network)
        await self._manager.names.remove_network(network)
        await self._manager.kernel.remove_network(network)

    # -- containers

    async def connect(self, request: pb.ConnectRequest, context: Context) -> empty_pb2.Empty:
        """Put a container on one more network: in its record, and at once where it has a task."""
        namespace = require_namespace(context)
        container = self._containers.get(namespace, request.container)
        settings = self._settings(container)
        asked = request.network
        network = await self._manager.network(asked.network)
        if network is None:
            if asked.network in (DEFAULT, "default"):
                raise FailedPrecondition(f"without root, a container is on network {quote(DEFAULT)} from its start on")
            raise NotFound(f"network {quote(asked.network)}: not found")
        mac(asked.mac)
        if settings.mode == "bridge" and not settings.networks:
            settings.networks.add(network=DEFAULT)
        settings.mode = "networks"
        if any(item.network == network.name for item in settings.networks):
            raise FailedPrecondition(f"container {quote(container.id)} is on network {quote(network.name)} already")
        await self._manager.plug((namespace, container.id), network, asked)
        added = settings.networks.add()
        added.CopyFrom(asked)
        added.network = network.name
        await self._store(namespace, container, settings)
        return empty_pb2.Empty()

    async def disconnect(self, request: pb.DisconnectRequest, context: Context) -> empty_pb2.Empty:
        """Take a container off a network: in its record, and at once where it has a task."""
        namespace = require_namespace(context)
        container = self._containers.get(namespace, request.container)
        settings = self._settings(container)
        network = await self._manager.network(request.network)
        name = request.network if network is None else network.name
        name = DEFAULT if name == "default" else name
        if settings.mode == "bridge" and not settings.networks:
            settings.networks.add(network=DEFAULT)
        left = [item for item in settings.networks if item.network != name]
        was = await self._manager.unplug((namespace, container.id), name)
        if not was and len(left) == len(settings.networks):
            raise NotFound(f"container {quote(container.id)} on network {quote(name)}: not found")
        del settings.networks[:]
        settings.networks.extend(left)
        settings.mode = "networks" if left else "none"
        await self._store(namespace, container, settings)
        return empty_pb2.Empty()

    async def rename(self, request: pb.RenameRequest, context: Context) -> empty_pb2.Empty:
        """Other names, in the record and at once in DNS."""
        namespace = require_namespace(context)
        container = self._containers.get(namespace, request.container)
        settings = settings_of(container)
        if settings is not None:
            del settings.names[:]
            settings.names.extend(request.names)
            await self._store(namespace, container, settings)
            await self._manager.rename((namespace, container.id), request.names)
        return empty_pb2.Empty()

    async def status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        """What containers with a task have now."""
        namespace = require_namespace(context)
        wanted = set(request.containers)
        found = [
            item
            for key, item in self._manager.connections.items()
            if key[0] == namespace and (not wanted or key[1] in wanted)
        ]
        return pb.StatusResponse(containers=[_status(item) for item in found])

    # -- helpers

    @staticmethod
    def _settings(container: Container) -> pb.Settings:
        settings = settings_of(container)
        if settings is None or settings.mode not in ("bridge", "networks", "none"):
            mode = "its specification's own" if settings is None else settings.mode
            raise FailedPrecondition(
                f"container {quote(container.id)} has the network {quote(mode)}, no other can be added"
            )
        return settings

    async def _store(self, namespace: str, container: Container, settings: pb.Settings) -> None:
        changed = Container(id=container.id)
        changed.extensions[EXTENSION].CopyFrom(pack(settings))
        await self._containers.update(namespace, changed, [f"extensions.{EXTENSION}"])

    def _shown(self, network: Network, *, everything: bool = False) -> pb.Network:
        shown = pb.Network(
            name=network.name,
            id=network.id,
            driver="bridge",
            subnets=[pb.Subnet(subnet=item.subnet, gateway=item.gateway, range=item.range) for item in network.subnets],
            ipv6=network.ipv6,
            internal=network.internal,
            bridge=network.bridge,
            mtu=network.mtu,
            isolated=network.isolated,
            dns=network.dns,
            labels=network.labels,
            created_at=timestamp_pb2.Timestamp(seconds=int(network.created_at)),
        )
        if everything:
            shown.endpoints.extend(_endpoints(self._manager.connections.values(), network.id))
        return shown

    def _users(self, user: UserNetwork, *, everything: bool = False) -> pb.Network:
        """What stands in for the built-in network where the daemon is an ordinary user's."""
        shown = pb.Network(name=DEFAULT, id=DEFAULT, driver=user.program())
        if everything:
            shown.endpoints.extend(_endpoints(self._manager.connections.values(), DEFAULT))
        return shown

    def _foreign(self, network: NetworkList, *, everything: bool = False) -> pb.Network:
        shown = pb.Network(name=network.name, id=network.path, driver="cni")
        if everything:
            shown.endpoints.extend(_endpoints(self._manager.connections.values(), network.name))
        return shown


def _endpoints(connections: Iterable[Connection], network: str) -> list[pb.Endpoint]:
    return [
        _endpoint(connection, endpoint)
        for connection in connections
        for endpoint in connection.endpoints
        if endpoint.network == network
    ]


def _endpoint(connection: Connection, endpoint: Endpoint) -> pb.Endpoint:
    return pb.Endpoint(
        namespace=connection.namespace,
        container=connection.container,
        network=endpoint.name,
        interface=endpoint.interface,
        ipv4=endpoint.ipv4,
        ipv6=endpoint.ipv6,
        mac=endpoint.mac,
        gateway4=endpoint.gateway4,
        gateway6=endpoint.gateway6,
        names=[*connection.names, *endpoint.aliases],
    )


def _status(connection: Connection) -> pb.ContainerStatus:
    return pb.ContainerStatus(
        container=connection.container,
        mode=connection.mode,
        netns=connection.netns,
        endpoints=[_endpoint(connection, item) for item in connection.endpoints],
        ports=[
            pb.Port(
                host_ip=item.host_ip,
                host_port=item.host_port,
                container_port=item.container_port,
                protocol=item.protocol,
            )
            for item in connection.ports
        ],
    )
