"""A container's network from the creation of its task to its end.

What a container asks for is in its record (`wherry.network.v1.Settings`); here is what it has while it has a task.
What is made is recorded before, and unmade before it is forgotten, so that any sudden end is harmless:

1. `connect`: the record with its addresses; names and published ports (keeper); namespace, interfaces and rules
   (worker); the files; then the task is created with a specification that joins the namespace.
2. `release`, when the process has ended, or the task or the container is removed: ports and names are free at once;
   interfaces and namespace go behind it; then the record with its addresses.
3. `reconcile`, at the start: a record whose task has no bundle is undone like a release, and what bears our mark in the
   kernel and is in no record is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import structlog

from wherry.core import places, topics
from wherry.core.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unimplemented,
    WherryError,
)
from wherry.core.failpoints import reach
from wherry.core.names import quote
from wherry.daemon import logs
from wherry.daemon.config import NetworkOptions
from wherry.daemon.events import Exchange
from wherry.daemon.network_cni import CniNetworks
from wherry.daemon.network_files import Files
from wherry.daemon.network_kernel import Kernel
from wherry.daemon.network_names import Names
from wherry.daemon.network_peers import Peers
from wherry.daemon.network_registry import Instance, Networks
from wherry.daemon.network_settings import port, settings_of
from wherry.daemon.network_spare import Spare
from wherry.daemon.network_spec import Spec
from wherry.daemon.network_user import KIND, UserNetwork, refuse_ports
from wherry.daemon.network_wishes import Wishes
from wherry.network.model import USERS, Connection, Endpoint, Network, plain
from wherry.network.store import Store
from wherry.proto import events_pb2
from wherry.proto import network_pb2 as pb
from wherry.proto.containers_pb2 import Container
from wherry.proto.types_pb2 import Envelope

log = structlog.get_logger(__name__)

Key = tuple[str, str]


class Going(NamedTuple):
    """What a container had of networks, on its way out, and the work on that."""

    connection: Connection
    work: asyncio.Task[None]


class NetworkManager:
    """The networks of one daemon and its containers on them."""

    def __init__(self, options: NetworkOptions, root: str, state: str, exchange: Exchange) -> None:
        """Opens the store, no more. Raises OSError, FailedPrecondition."""
        self._state = os.path.join(state, "network")
        self._tasks_folder = os.path.join(state, "tasks")
        os.makedirs(self._state, mode=0o711, exist_ok=True)
        self._thread = ThreadPoolExecutor(1, "network-store")
        self._store = Store(os.path.join(root, "network.db"))
        instance = Instance(state)
        self.networks = Networks(options, instance, self._store, self._thread)
        marker = os.path.join(self._state, "touched")
        # of an ordinary user's daemon
        self.user = UserNetwork(os.path.join(self._state, "user")) if places.is_users() else None
        hub = self.user.hub if self.user is not None else ""
        self._spare: Spare | None = None
        self.kernel = Kernel(instance, self.networks, os.path.join(state, "netns"), marker, hub)
        if self.user is not None:
            self._spare = Spare(self.kernel, os.path.join(self._state, "user"))
        self.connections: dict[Key, Connection] = {
            (item.namespace, item.container): item for item in self._store.connections()
        }
        self.names = Names(
            os.path.join(self._state, "keeper.sock"), self.networks, self.kernel, self.connections.values, hub
        )
        self.files = Files(os.path.join(self._state, "files"), self.names)
        self.cni = CniNetworks(options, os.path.join(root, "cni"), hub)
        self._wishes = Wishes(self.networks, self.kernel, self.cni, self.user)
        self._locks: dict[Key, asyncio.Lock] = {}
        self._going: dict[Key, Going] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._ready = asyncio.Event()
        self._warned = False
        self._peers: Peers | None = None
        exchange.watch(topics.TASK_EXIT, self._saw)
        exchange.watch(topics.CONTAINER_CREATE, self._expect)

    # -- the daemon's start and end

    def start(self, peers: Peers) -> None:
        """Puts in order what an earlier daemon left; calls that concern networks wait for that."""
        self._peers = peers
        self._spawn(self._start())
        if self.connections:
            self._spawn(self.settle(peers))

    async def _start(self) -> None:
        try:
            await self.reconcile()
        except (WherryError, OSError) as error:
            log.error("networks could not be put in order", error=str(error))
        finally:
            self._ready.set()

    async def reconcile(self) -> None:
        """The kernel, the keeper and the files as the records of tasks that are there say, and nothing else of ours."""
        dead = [item for item in self.connections.values() if not self._has_bundle(item)]
        for connection in dead:
            del self.connections[connection.namespace, connection.container]
        alive = list(self.connections.values())
        for connection in dead:
            await self._detach_cni(connection)
        if self.kernel.touched or alive:
            if self.user is not None:
                await self.kernel.hub()  # which makes it where it is gone; the keeper goes there
                self.user.sweep(alive)
            # first the keeper: the rules depend on the ports of its name servers
            await self.names.reconcile()
            await self.kernel.sweep(alive)
        for connection in dead:
            await self.networks.work(lambda store, gone=connection: store.drop(gone))  # type: ignore[misc]
        self.cni.clean_up(alive)
        self.files.sweep(self._tasks_folder)

    async def close(self) -> None:
        """Everything that containers have stays. Where none has anything, nothing stays."""
        for work in [*self._background, *(going.work for going in self._going.values())]:
            with contextlib.suppress(TimeoutError, asyncio.CancelledError, WherryError):
                async with asyncio.timeout(5):
                    await asyncio.shield(work)
        if self._spare is not None:
            await self._spare.close()
        if not self.connections and self.kernel.touched:
            with contextlib.suppress(WherryError, OSError):
                await self.kernel.sweep([])
        await self.cni.close()
        await self.names.close()
        await self.kernel.close()
        if self.user is not None and not self.connections:
            self.user.remove()
        self._thread.shutdown()
        self._store.close()

    def _has_bundle(self, connection: Connection) -> bool:
        return os.path.isdir(os.path.join(self._tasks_folder, connection.namespace, connection.container))

    # -- connect

    async def connect(self, container: Container, namespace: str) -> bytes:
        """The specification with which a container's task is to be created; its network is there when this returns.

        Without settings it is the container's own. Raises what is wrong with the settings, FailedPrecondition where a
        port or an address is in use, NotFound for a network that isn't there; then nothing is left.
        """
        settings = settings_of(container)
        if settings is None:
            return container.spec.value
        await self._ready.wait()
        key = namespace, container.id
        began = time.perf_counter()
        async with self._lock(key):
            await self._gone(key)
            if (old := self.connections.get(key)) is not None:
                if self._has_bundle(old):
                    raise AlreadyExists(f"task {container.id}: already exists")
                await self._release(key)
                await self._gone(key)
            work = self._spawn(self._connect(key, container, settings))
            try:
                spec: bytes = await asyncio.shield(work)
                if logs.is_debug():
                    log.debug("network connected", id=container.id, ms=round((time.perf_counter() - began) * 1000, 2))
                return spec
            except asyncio.CancelledError:
                # half of it would stay: it is done, and undone by who called us
                with contextlib.suppress(WherryError, OSError):
                    await work
                raise

    async def _connect(self, key: Key, container: Container, settings: pb.Settings) -> bytes:
        spec = Spec(container.spec.value, container.id)
        hostname = settings.hostname or spec.hostname or container.id[:12]
        if settings.mode == "container":
            await self._share(key, settings, spec)
            return spec.data()
        connection = Connection(
            namespace=key[0],
            container=key[1],
            mode=settings.mode,
            ports=[port(item) for item in settings.ports],
            names=list(dict.fromkeys([*settings.names, container.id, container.id[:12]])),
            dns=list(settings.dns),
        )
        if settings.mode == "host":
            spec.join("")
        elif settings.mode in ("bridge", "networks"):
            await self._make(connection, settings, spec)
        elif settings.mode != "none":
            raise InvalidArgument(f"network mode {quote(settings.mode)}: invalid argument")
        try:
            spec.name(hostname, settings.domainname)
            said = (self.user.nameservers(connection) if self.user else "") or self.cni.resolv_conf(connection)
            self.files.write(connection, settings, hostname, said, spec.root())
        except BaseException:
            await self._release(key)
            raise
        spec.mount(self.files.folder(*key))
        return spec.data()

    async def _make(self, connection: Connection, settings: pb.Settings, spec: Spec) -> None:
        """Namespace, interfaces, addresses, rules, names and ports of a container."""
        # its network namespace has to belong to it: else it can't mount its /sys, nor change what it is let change
        users = spec.users()
        if users is not None and self.user is not None:
            raise Unimplemented(
                "an ordinary user's container is in that user's namespace already: another one can't be on a network"
            )
        key = connection.namespace, connection.container
        self._refuse_taken(connection)
        wanted, foreign = await self._wishes.resolve(settings)
        token = os.urandom(4).hex()
        connection.netns = os.path.join(self.kernel.folder, key[0], f"{key[1]}.{token}")
        prepared = self._spare is not None and not wanted and await self._spare.give(connection, foreign)
        connection.endpoints += foreign
        try:
            await self.networks.work(lambda store: store.take(connection, wanted))
        except BaseException:
            if prepared:
                await self._detach(key, connection)
            raise
        connection.endpoints.sort(key=lambda item: item.interface)
        self.connections[key] = connection
        recorded = plain(connection)
        reach("network.recorded")
        try:
            if not prepared:
                await self._keep_and_plug(connection, users)
                for endpoint in foreign:
                    await (self.user if self.user is not None and endpoint.kind == KIND else self.cni).add(
                        connection, endpoint
                    )
            if self.user is not None and connection.publishing() is None and connection.ports:
                await self.names.tell(connection)  # of CNI's, whose address is known now
            reach("network.attached")
            if plain(connection) != recorded:  # ports that were any, what CNI gave
                await self.networks.work(lambda store: store.save(connection))
        except BaseException:
            await self._release(key)
            raise
        spec.join(connection.netns, "" if users is None else users.get("path") or connection.netns + USERS)
        if not self._warned:
            self._warned = True
            self._spawn(self._warn())

    def _refuse_taken(self, connection: Connection) -> None:
        """Ports of SCTP have no socket that holds them (`network/keeper.py`): the connections say whose they are."""
        taken = {
            item.host_port: other.key
            for other in self.connections.values()
            for item in other.ports
            if item.protocol == "sctp"
        }
        for item in connection.ports:
            if item.protocol == "sctp" and item.host_port in taken:
                raise FailedPrecondition(
                    f"port {item.host_port}/sctp of the host: container {taken[item.host_port]} has it: "
                    "Address already in use"
                )

    async def _keep_and_plug(self, connection: Connection, users: dict[str, str] | None) -> None:
        own = [item for item in connection.endpoints if item.kind == "bridge"]
        if self.user is not None and connection.relayed() is not None:
            await self._link(self.user, connection)
        if not own:
            await self.kernel.namespace(connection.netns, users)
            return
        await self.names.serve(connection)
        attach = self.kernel.attach
        if any(port.host_port == 0 or port.host_port_end for port in connection.ports):
            # the rules want to know which ports were found
            await self.names.tell(connection)
            reach("network.kept")
            await attach(connection, own, list(self.connections.values()), make=True, users=users)
            return
        done = await asyncio.gather(
            self.names.tell(connection),
            attach(connection, own, list(self.connections.values()), make=True, users=users),
            return_exceptions=True,
        )
        for error in done:
            if error is not None:
                raise error

    async def _link(self, user: UserNetwork, connection: Connection) -> None:
        """The way from a user's bridges to the outside, for networks that have one."""
        refuse_ports(connection)
        hub = await self.kernel.hub()
        kinds = (self.networks.all.get(item.network) for item in connection.endpoints if item.kind != KIND)
        if any(network is None or not network.internal for network in kinds):
            await user.link(hub)

    async def _share(self, key: Key, settings: pb.Settings, spec: Spec) -> None:
        """The network, the name and the files of another container."""
        if self._peers is None:
            raise FailedPrecondition("the daemon's networks weren't started: failed precondition")
        other = key[0], await self._peers.identity(key[0], settings.container)
        connection = self.connections.get(other)
        if connection is not None and connection.netns:
            spec.join(connection.netns)
        else:
            try:
                pid = await self._peers.pid(*other)
            except NotFound:
                raise FailedPrecondition(
                    f"can't join the network of container {quote(settings.container)}: it isn't running"
                ) from None
            spec.join(f"/proc/{pid}/ns/net")
        spec.name(self.files.hostname(*other), "")
        spec.mount(self.files.folder(*other))

    async def network(self, name: str) -> Network | None:
        """A built-in network by its name."""
        return await self._wishes.network(name)

    # -- release

    def _expect(self, envelope: Envelope) -> None:
        """A container that will want a network: the worker starts while its root is prepared."""
        identity = events_pb2.ContainerCreate.FromString(envelope.event.value).id
        if self._peers is not None and self._peers.wants_network(envelope.namespace, identity):
            self._spawn(self.kernel.warm())

    def started(self, namespace: str, identity: str, pid: int) -> None:
        """A container's task was created: its first process has this pid."""
        connection = self.connections.get((namespace, identity))
        if connection is not None and connection.pid != pid:
            connection.pid = pid
            self._spawn(self.networks.work(lambda store: store.update(connection)))

    def _saw(self, envelope: Envelope) -> None:
        """A process has ended; where it is a container's first one, what it had of networks goes.

        The pid tells this life of the container from the one before it, whose last event may come late.
        """
        exited = events_pb2.TaskExit.FromString(envelope.event.value)
        connection = self.connections.get((envelope.namespace, exited.container_id))
        if connection is not None and exited.id == exited.container_id and exited.pid in (0, connection.pid):
            self._spawn(self._release_life((envelope.namespace, exited.container_id), connection))

    async def release(self, namespace: str, identity: str) -> None:
        """Its ports and names are free when this returns; the rest follows. One that has none is fine."""
        key = namespace, identity
        await self._ready.wait()  # else what is put in order just now puts in order what is gone
        async with self._lock(key):
            await self._release(key)

    async def _release_life(self, key: Key, connection: Connection) -> None:
        """As `release`, unless the container has begun another life meanwhile."""
        await self._ready.wait()
        async with self._lock(key):
            if self.connections.get(key) is connection:
                await self._release(key)

    async def _release(self, key: Key) -> None:
        connection = self.connections.pop(key, None)
        if connection is None:
            if key not in self._going:
                self.files.remove(*key)
            return
        done = await asyncio.gather(
            self.names.forget(connection),
            self.kernel.withdraw(connection, self.connections.values()),
            return_exceptions=True,
        )
        for error in done:
            if isinstance(error, BaseException):
                log.warning("published ports could not be withdrawn", container=connection.key, error=str(error))
        self._going[key] = Going(connection, self._spawn(self._detach(key, connection)))

    async def _detach(self, key: Key, connection: Connection) -> None:
        try:
            await self._detach_cni(connection)
            reach("network.detaching")
            await self.kernel.detach(connection, connection.endpoints, whole=True)
            reach("network.detached")
            await self.networks.work(lambda store: store.drop(connection))
        except WherryError as error:
            # the record stays, and the next start tries again
            log.error("a network could not be taken away", container=connection.key, error=error.message)
        finally:
            self.files.remove(*key)
            self._going.pop(key, None)

    async def _detach_cni(self, connection: Connection) -> None:
        if self.user is not None:
            self.user.delete(connection)
        for endpoint in connection.endpoints:
            if endpoint.kind == "cni":
                await self.cni.delete(connection, endpoint)

    async def _gone(self, key: Key) -> None:
        """What is on its way out has gone."""
        if (going := self._going.get(key)) is not None:
            await asyncio.shield(going.work)

    async def vacated(self, network: Network) -> None:
        """Those that are on their way off a network are off it: who ended them may remove it next."""
        for going in list(self._going.values()):
            if any(endpoint.network == network.id for endpoint in going.connection.endpoints):
                await asyncio.shield(going.work)

    async def settle(self, peers: Peers) -> None:
        """After a restart: those whose process ended while nobody saw it."""
        await self._ready.wait()
        for namespace, identity in list(self.connections):
            try:
                self.started(namespace, identity, await peers.pid(namespace, identity))
            except NotFound:
                await self.release(namespace, identity)
            except WherryError:
                continue  # a shim that doesn't answer: it may well run

    # -- changes while it runs

    async def plug(self, key: Key, network: Network, asked: pb.Attachment) -> None:
        """One more network for a container that runs."""
        async with self._lock(key):
            connection = self.connections.get(key)
            if connection is None:
                return
            if any(item.network == network.id for item in connection.endpoints):
                raise AlreadyExists(f"container {quote(key[1])} is on network {quote(network.name)}: already exists")
            taken = {item.interface for item in connection.endpoints}
            interface = asked.interface or next(f"eth{n}" for n in range(256) if f"eth{n}" not in taken)
            endpoint = self._wishes.endpoint(network, asked, interface)
            await self.networks.work(lambda store: store.take(connection, [(network, endpoint)], fresh=False))
            try:
                if self.user is not None:
                    await self._link(self.user, replace(connection, endpoints=[endpoint], ports=[]))
                    await self.names.serve(replace(connection, endpoints=[endpoint], ports=[]))
                await self.kernel.attach(connection, [endpoint], list(self.connections.values()), make=False)
                await self.names.tell(connection)
                await self.networks.work(lambda store: store.save(connection))
            except BaseException:
                await self._unplug(connection, endpoint)
                raise
            self.files.add_host(connection, endpoint)

    async def unplug(self, key: Key, name: str) -> bool:
        """One network less; whether it was on it."""
        async with self._lock(key):
            connection = self.connections.get(key)
            endpoint = next((item for item in connection.endpoints if item.name == name), None) if connection else None
            if connection is None or endpoint is None:
                return False
            if connection.ports and connection.publishing() is endpoint:
                raise FailedPrecondition(
                    f"the published ports of container {quote(key[1])} lead to network {quote(name)}"
                )
            await self._unplug(connection, endpoint)
            return True

    async def _unplug(self, connection: Connection, endpoint: Endpoint) -> None:
        if endpoint.kind == KIND and self.user is not None:
            self.user.delete(connection)
        await self.kernel.detach(replace(connection, ports=[]), [endpoint], whole=False)
        await self.networks.work(lambda store: store.leave(connection, endpoint))
        with contextlib.suppress(WherryError):
            await self.names.tell(connection)

    async def rename(self, key: Key, names: Sequence[str]) -> None:
        """Other names for a container that runs."""
        async with self._lock(key):
            if (connection := self.connections.get(key)) is not None:
                connection.names = list(dict.fromkeys([*names, key[1], key[1][:12]]))
                await self.networks.work(lambda store: store.save(connection))
                await self.names.tell(connection)

    # -- helpers

    async def _warn(self) -> None:
        """Says once which rules of others stand in the way: they are theirs to change."""
        with contextlib.suppress(WherryError):
            for chain in await self.kernel.droppers():
                log.warning(
                    "packets between containers and the outside are dropped by somebody else's rules: "
                    "see 'Firewalls' in docs/networks.md",
                    chain=chain,
                )

    def _lock(self, key: Key) -> asyncio.Lock:
        lock = self._locks.get(key)
        if lock is None:
            if len(self._locks) > 256:
                self._locks = {
                    key: lock for key, lock in self._locks.items() if lock.locked() or key in self.connections
                }
            lock = self._locks[key] = asyncio.Lock()
        return lock

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, WherryError):
            log.error("work on a network failed", exc_info=error)
