"""The daemon, assembled: stores, services and the two doors, in the order in which they need each other."""

from __future__ import annotations

import asyncio
import contextlib
import gc as memory
import os
import socket
import time
from collections.abc import AsyncIterator, Iterable, Mapping

import structlog

from wherry.core import platforms
from wherry.core.errors import FailedPrecondition, NotFound
from wherry.daemon import apparmor, boot, logs, metrics
from wherry.daemon.bundle import find
from wherry.daemon.checkpoints import Checkpoints
from wherry.daemon.config import Config
from wherry.daemon.containers import ContainerService, ContainerStore
from wherry.daemon.content import ContentStore
from wherry.daemon.content_service import ContentService
from wherry.daemon.cri import PLUGINS as CRI_PLUGINS
from wherry.daemon.cri import CriDoor
from wherry.daemon.diff import Differ, DiffService
from wherry.daemon.durations import parse_duration
from wherry.daemon.events import EventsService, EventsTtrpcService, Exchange
from wherry.daemon.events_journal import Journal, Retention
from wherry.daemon.events_kept import KeptEventsService
from wherry.daemon.explain import ExplainService, reason_of
from wherry.daemon.gc import Collector, Policy
from wherry.daemon.gc_service import GcService
from wherry.daemon.health import HealthService
from wherry.daemon.health_checks import HealthChecks
from wherry.daemon.images import ImageService, ImageStore
from wherry.daemon.introspection import IntrospectionService
from wherry.daemon.leases import LeaseService, LeaseStore
from wherry.daemon.link import Limits, Places
from wherry.daemon.metadata import Metadata
from wherry.daemon.metrics import CallCounter
from wherry.daemon.namespaces import NamespaceService, NamespaceStore
from wherry.daemon.network import NetworkService
from wherry.daemon.network_manager import NetworkManager
from wherry.daemon.network_peers import Peers
from wherry.daemon.notify import notify
from wherry.daemon.observed import Observed, Observer
from wherry.daemon.plugins import Plugins
from wherry.daemon.restarts import Restarts
from wherry.daemon.sandbox_controller import SandboxController, SandboxControllerService
from wherry.daemon.sandboxes import SandboxService, SandboxStore
from wherry.daemon.shims import Shims
from wherry.daemon.snapshots import SnapshotStore
from wherry.daemon.snapshots_service import SnapshotService
from wherry.daemon.snapshotters import load_local, load_proxies
from wherry.daemon.streaming import StreamingService, StreamManager
from wherry.daemon.tasks import TaskService
from wherry.daemon.tracing import Tracer
from wherry.daemon.transfer import TransferService
from wherry.daemon.transfer_registry import RegistryService
from wherry.daemon.version import VersionService
from wherry.daemon.volumes import VolumeService, VolumeStore
from wherry.proto.addresses import own
from wherry.proto.grpc.server import GrpcServer
from wherry.proto.ttrpc.server import TtrpcServer
from wherry.shim.client import ForkServer
from wherry.snapshotter.applier import Applier
from wherry.snapshotter.limits import Limits as LayerLimits

log = structlog.get_logger(__name__)

# seconds that calls under way get when the daemon is told to stop
GRACE = 2.0


class Daemon:
    """One wherryd. The caller holds the locks on root, state and address."""

    def __init__(
        self,
        config: Config,
        listeners: Mapping[str, socket.socket],
        forks: ForkServer,
        publish_binary: str,
        observers: Iterable[Observer] = (),
    ) -> None:
        """`listeners` are the sockets that the service manager handed over, by path; `forks` is closed by `stop`.

        `observers` watch all calls, besides those that the configuration asks for.
        """
        self._config = config
        self._forks = forks
        self._listeners = dict(listeners)
        self._publish_binary = publish_binary
        self._plugins = Plugins(config.disabled_plugins, config.required_plugins)
        self._services: list[object] = []
        self._observers: list[Observer] = list(observers)
        self._cleanup = contextlib.AsyncExitStack()
        self._observe()

    async def start(self) -> None:
        """Build everything and serve. Raises WherryError or OSError for what can't be; then `stop` still cleans up."""
        began = time.perf_counter()
        notify("STATUS=starting")
        self._make_folders()
        # before containers that the restarts bring back ask for it
        await apparmor.provide()
        self._cleanup.push_async_callback(self._forks.close)
        self._exchange = Exchange()
        await self._build_stores()
        await self._build_tasks()
        self._build_transfer()
        self._build_rest()
        self._plugins.check()
        await self._open_metrics()
        await self._open_ttrpc()
        await self._open_grpc()
        memory.collect()
        memory.freeze()  # what is there now stays: later collections needn't look at it
        log.info("serving", address=self._config.grpc.address, seconds=round(time.perf_counter() - began, 3))
        notify("READY=1", "STATUS=serving")

    async def stop(self) -> None:
        """Stop serving and close what was opened, last first; containers and shims go on."""
        notify("STOPPING=1", "STATUS=stopping")
        await self._cleanup.aclose()

    # -- phases of the start

    def _make_folders(self) -> None:
        config = self._config
        for folder in (config.root, config.state, *(self._state(name) for name in boot.STALE)):
            os.makedirs(folder, mode=0o711, exist_ok=True)
        boot.clean(config.state)

    async def _build_stores(self) -> None:
        """Metadata, content, snapshots and what is kept in the database."""
        load, publish = self._plugins.load, self._exchange.publish
        with load("io.containerd.event.v1", "exchange"):
            self._add("events", EventsService(self._exchange))
        with load("io.containerd.metadata.v1", "bolt", requires=["io.containerd.content.v1"]):
            metadata = await Metadata.open(self._root("metadata.db"))
            self._cleanup.push_async_callback(metadata.close)
            events = self._config.events
            retention = Retention(parse_duration(events.keep_for), events.keep_count)
            self._exchange.journal = await Journal.open(metadata, retention)
            self._cleanup.push_async_callback(self._exchange.journal.close)
            self._add("kept-events", KeptEventsService(self._exchange.journal))
        with load("io.containerd.content.v1", "content", exports={"root": self._root("content")}):
            isolated = self._config.metadata.content_sharing_policy == "isolated"
            self._content = ContentStore(metadata, self._root("content"), publish, isolated=isolated)
            self._cleanup.push_async_callback(self._content.close)
        snapshotters = load_local(self._plugins, self._config)
        proxies = await load_proxies(self._plugins, self._config, metadata)
        if not snapshotters and not proxies:
            raise FailedPrecondition("no snapshotter is usable: see the log for the reasons")
        self._snapshots = SnapshotStore(metadata, snapshotters, publish, proxies=proxies)
        self._cleanup.push_async_callback(self._snapshots.close)
        with load("io.containerd.gc.v1", "scheduler", requires=["io.containerd.metadata.v1"]):
            policy = self._config.gc
            self._collector = Collector(
                metadata,
                self._content,
                self._snapshots,
                Policy(
                    pause_threshold=policy.pause_threshold,
                    deletion_threshold=policy.deletion_threshold,
                    mutation_threshold=policy.mutation_threshold,
                    schedule_delay=parse_duration(policy.schedule_delay),
                    startup_delay=parse_duration(policy.startup_delay),
                ),
                publish,
            )
            await self._collector.start()
            self._cleanup.push_async_callback(self._collector.close)
        with load("io.containerd.differ.v1", "walking", platforms=[platforms.host()]):
            limits = self._config.limits
            self._applier = Applier(
                limits=LayerLimits(limits.layer_bytes, limits.layer_entries, limits.image_layers),
                sync_fs=self._config.diff.sync_fs or self._config.walking.sync_fs,
            )
            self._cleanup.push_async_callback(self._applier.close)
            self._differ = Differ(self._content, self._applier)
        self._containers = ContainerStore(metadata, publish)
        self._images = ImageStore(metadata, publish)
        self._leases = LeaseStore(metadata)
        self._namespaces = NamespaceStore(metadata, publish)
        with load("io.containerd.sandbox.store.v1", "local"):
            self._sandboxes = SandboxStore(metadata)
        self._add("content", ContentService(self._content))
        self._add("snapshots", SnapshotService(self._snapshots))
        self._add("diff", DiffService(self._differ))
        self._add("containers", ContainerService(self._containers))
        self._add("images", ImageService(self._images, self._collector))
        self._add("leases", LeaseService(self._leases, self._collector))
        self._add("namespaces", NamespaceService(self._namespaces))
        self._add("sandboxes", SandboxService(self._sandboxes))
        self._add("gc", GcService(self._collector, self._content, self._snapshots))

    async def _build_tasks(self) -> None:
        """Shims, and the search for those that an earlier daemon left."""
        config = self._config

        def known(namespace: str, identity: str, sandbox: bool) -> bool:
            try:
                (self._sandboxes if sandbox else self._containers).get(namespace, identity)
            except NotFound:
                return False
            return True

        requires = ["io.containerd.event.v1", "io.containerd.metadata.v1"]
        with self._plugins.load("io.containerd.runtime.v2", "task", requires=requires, platforms=[platforms.host()]):
            places = Places(
                tasks=self._state("tasks"),
                sockets=self._state("s"),
                runtime=self._state("runtime"),
                publish_binary=self._publish_binary,
                grpc_address=config.grpc.address,
                ttrpc_address=config.ttrpc_address,
                log_level=config.debug.level or "info",
            )
            networks = NetworkManager(config.network, config.root, config.state, self._exchange)
            self._cleanup.push_async_callback(networks.close)
            shims = Shims(places, Limits.of(config), self._exchange, self._forks, known)
            self._cleanup.push_async_callback(shims.close)
            shims.load()
            networks.start(Peers(shims, self._containers))
        self._add("networks", NetworkService(networks, self._containers, self._namespaces))
        checkpoints = Checkpoints(self._root("checkpoints"), self._content)
        checkpoints.sweep(list(find(places.tasks)))
        self._task_service = TaskService(
            config,
            places.tasks,
            shims,
            self._containers,
            self._namespaces,
            networks=networks,
            checkpoints=checkpoints,
        )
        self._add("tasks", self._task_service)
        self._add("explain", ExplainService(places.tasks, shims, self._exchange, Limits.of(config)))
        self._build_everyday(self._task_service, shims)
        with self._plugins.load("io.containerd.sandbox.controller.v1", "shim", requires=requires):
            controller = SandboxController(config, places.tasks, shims, self._sandboxes)
        self._add("sandbox-controllers", SandboxControllerService(controller, self._sandboxes))

    def _build_everyday(self, tasks: TaskService, shims: Shims) -> None:
        """What the daemon does for containers that people made: volumes, restarts, removals, health checks."""
        volumes = VolumeStore(self._root("volumes"))
        tasks_folder = self._state("tasks")
        self._add("volumes", VolumeService(volumes, self._containers))
        restarts = Restarts(
            self._exchange,
            tasks,
            self._containers,
            snapshots=self._snapshots,
            namespaces=self._namespaces,
            volumes=volumes,
            reason=lambda namespace, identity: reason_of(tasks_folder, namespace, identity),
        )
        checks = HealthChecks(self._exchange, tasks, self._containers, self._namespaces, self._state("health"))
        for part in (restarts, checks):
            part.start(shims)
            self._cleanup.push_async_callback(part.close)

    def _build_transfer(self) -> None:
        """Images moved by the daemon itself, and the streams that clients hand to it."""
        with self._plugins.load("io.containerd.streaming.v1", "manager"):
            streams = StreamManager()
        self._add("streaming", StreamingService(streams))
        requires = ["io.containerd.metadata.v1", "io.containerd.streaming.v1"]
        here = [platforms.host()]
        with self._plugins.load("io.containerd.transfer.v1", "local", requires=requires, platforms=here):
            transfer = TransferService(
                content=self._content,
                images=self._images,
                leases=self._leases,
                snapshots=self._snapshots,
                applier=self._applier,
                streams=streams,
                options=self._config.transfer,
                limits=self._config.limits,
            )
        self._add("transfer", transfer)
        self._add("registry", RegistryService(transfer.registries))

    def _build_rest(self) -> None:
        self._add("version", VersionService())
        identity = self._root("uuid")
        self._add("introspection", IntrospectionService(self._plugins, identity, self._config.runtimes))
        self._health = HealthService()
        self._add("healthcheck", self._health)
        self._build_cri()

    def _build_cri(self) -> None:
        """The way to the CRI's services, which are made when somebody calls them."""
        self._cri: CriDoor | None = None
        if not self._plugins.any_disabled(CRI_PLUGINS):
            requires = ["io.containerd.sandbox.controller.v1", "io.containerd.sandbox.store.v1"]
            with self._plugins.load("io.containerd.grpc.v1", "cri", requires=requires, platforms=[platforms.host()]):
                self._cri = CriDoor(self._config, self._services, self._sandboxes, self._observers)
            self._cleanup.push_async_callback(self._cri.close)

    def _add(self, name: str, service: object) -> None:
        """Serve a service, unless its gRPC plugin is disabled."""
        if not self._plugins.enabled("io.containerd.grpc.v1", name):
            log.info("plugin disabled", type="io.containerd.grpc.v1", id=name)
            return
        with self._plugins.load("io.containerd.grpc.v1", name):
            self._services.append(Observed(service, self._observers) if self._observers else service)

    def _observe(self) -> None:
        """Who watches calls: figures, traces; nobody by default."""
        if self._config.metrics.address:
            self._counter = CallCounter(histogram=self._config.metrics.grpc_histogram)
            self._observers.append(self._counter)
        if (tracer := Tracer.open()) is not None:
            self._observers.append(tracer)
            self._cleanup.push_async_callback(asyncio.to_thread, tracer.close)

    # -- the doors

    async def _open_metrics(self) -> None:
        address = self._config.metrics.address
        if not address:
            return
        source = metrics.Source(self._task_service, self._containers, self._namespaces)

        async def families() -> AsyncIterator[list[metrics.Family]]:
            yield metrics.own_process()
            yield self._counter.families()
            yield await source.families()

        runner = await metrics.serve(address, families)
        self._cleanup.push_async_callback(runner.cleanup)
        log.info("figures", address=address, path=metrics.PATH)

    async def _open_ttrpc(self) -> None:
        def report(path: str, traceback: str) -> None:
            log.error("call failed", method=path, traceback=traceback)

        options = self._config.ttrpc
        server = TtrpcServer([*self._services, EventsTtrpcService(self._exchange)], on_error=report)
        self._cleanup.push_async_callback(server.close)
        address = self._config.ttrpc_address
        if (listener := self._listeners.pop(address, None)) is not None:
            await server.serve_socket(listener)
        else:
            os.makedirs(os.path.dirname(address), mode=0o711, exist_ok=True)
            await server.serve_unix(address)
            own(address, uid=options.uid, gid=options.gid)

    async def _open_grpc(self) -> None:
        options = self._config.grpc
        server = GrpcServer(
            self._services,
            max_receive=options.max_recv_message_size,
            max_send=options.max_send_message_size,
            logs_calls=logs.is_debug,
            lazy={} if self._cri is None else self._cri.services(),
        )
        self._cleanup.push_async_callback(server.stop, GRACE)
        if (listener := self._listeners.pop(options.address, None)) is not None:
            await server.serve_socket(listener)
        else:
            os.makedirs(os.path.dirname(options.address), mode=0o711, exist_ok=True)
            await server.serve_unix(options.address, uid=options.uid, gid=options.gid)
        if self._cri is not None:
            await self._cri.start()
        self._health.serving(True)
        self._cleanup.callback(self._health.serving, False)
        for path, unused in self._listeners.items():
            log.warning("handed over socket is none of ours", path=path)
            unused.close()

    def _root(self, *names: str) -> str:
        return os.path.join(self._config.root, *names)

    def _state(self, *names: str) -> str:
        return os.path.join(self._config.state, *names)
