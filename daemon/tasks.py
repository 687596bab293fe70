"""`containerd.services.tasks.v1.Tasks`: containers that run. Each call goes to the container's shim, which knows."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace

import structlog
from google.protobuf import any_pb2, empty_pb2

from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable, WherryError, from_code
from wherry.core.failpoints import reach
from wherry.core.filters import compile_filters, fields
from wherry.core.names import check_identifier
from wherry.daemon import foreign_logs, runtimes
from wherry.daemon.bundle import Bundle, Launch
from wherry.daemon.checkpoints import Checkpoints
from wherry.daemon.config import Config
from wherry.daemon.containers import ContainerStore
from wherry.daemon.ends import timestamp
from wherry.daemon.link import Limits, Shim
from wherry.daemon.namespaces import NamespaceStore, require_namespace
from wherry.daemon.network_manager import NetworkManager
from wherry.daemon.shims import Shims
from wherry.proto import task_v3_pb2 as shim_api
from wherry.proto import tasks_pb2 as pb
from wherry.proto.containers_pb2 import Container
from wherry.proto.service import Context
from wherry.proto.task_types_pb2 import Process, Status
from wherry.proto.types_pb2 import Metric

log = structlog.get_logger(__name__)

# a namespace's default runtime (containerd's label for it)
_RUNTIME_LABEL = "containerd.io/defaults/runtime"
# annotations whose value names the shim that containers share, the first of them counts (containerd-shim-runc-v2's)
_GROUPS = ("io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")
# seconds; a checkpoint writes all that the processes have in memory
_CHECKPOINT = 600.0
# seconds that a listing gives a shim that was mute the last time
_MUTE = 0.2


class TaskService:
    """The tasks of one daemon."""

    SERVICE = "containerd.services.tasks.v1.Tasks"

    def __init__(
        self,
        config: Config,
        tasks: str,
        shims: Shims,
        containers: ContainerStore,
        namespaces: NamespaceStore,
        *,
        networks: NetworkManager,
        checkpoints: Checkpoints,
    ) -> None:
        """`tasks` is the folder of the bundles."""
        self._config = config
        self._folder = tasks
        self._limits = Limits.of(config)
        self._shims = shims
        self._containers = containers
        self._namespaces = namespaces
        self._networks = networks
        self._checkpoints = checkpoints

    # -- the life of a task

    async def create(self, request: pb.CreateTaskRequest, context: Context) -> pb.CreateTaskResponse:
        """Start a shim for a container and create its task, which waits for `start`."""
        namespace = require_namespace(context)
        container = self._containers.get(namespace, check_identifier("task ID", request.container_id))
        launch, options = await self._runtime(namespace, container, request)
        bundle = Bundle(self._folder, namespace, container.id)
        given = request.options if request.options.value else options
        # a folder in the options comes first, as with containerd
        images = runtimes.restored_from(given)
        fetched = ""
        if not images and request.checkpoint.digest:
            images = fetched = await self._checkpoints.fetch(namespace, request.checkpoint)
        asked = shim_api.CreateTaskRequest(
            id=container.id,
            bundle=bundle.path,
            rootfs=request.rootfs,
            terminal=request.terminal,
            stdin=request.stdin,
            stdout=foreign_logs.uri_of(request.stdout, bundle, request.stdin) if launch.binary else request.stdout,
            stderr=foreign_logs.uri_of(request.stderr, bundle) if launch.binary else request.stderr,
            options=runtimes.options(given, launch, self._config.runtimes),
            checkpoint=images,
        )
        spec = await self._networks.connect(container, namespace)
        try:
            shim = await self._shims.create(bundle, spec, launch, options, asked, keep=fetched)
        except AlreadyExists:
            raise  # the network belongs to the task that is there
        except BaseException:
            await self._networks.release(namespace, container.id)
            raise
        self._networks.started(namespace, container.id, shim.pid)
        return pb.CreateTaskResponse(container_id=container.id, pid=shim.pid)

    async def start(self, request: pb.StartRequest, context: Context) -> pb.StartResponse:
        """Start the task, or a process that `exec` added."""
        shim = await self._shim(request.container_id, context)
        asked = shim_api.StartRequest(id=shim.bundle.id, exec_id=request.exec_id)
        reach("daemon.start.asked")
        started = await shim.call("Start", asked, shim_api.StartResponse, shim.limits.create)
        reach("daemon.start.done")
        return pb.StartResponse(pid=started.pid)

    async def delete(self, request: pb.DeleteTaskRequest, context: Context) -> pb.DeleteResponse:
        """Delete a task that has stopped, its shim and its bundle."""
        shim = await self._shim(request.container_id, context)
        asked = shim_api.DeleteRequest(id=shim.bundle.id)
        try:
            reach("daemon.delete.asked")
            deleted = await shim.call("Delete", asked, shim_api.DeleteResponse)
            reach("daemon.delete.done")
        except NotFound:
            # the shim has none: a daemon before this one deleted it and died before it was done
            self._shims.end(shim)
            await self._networks.release(*shim.key)
            raise
        except WherryError as error:
            raise from_code(error.code, f"failed to delete task: {error.message}") from error
        self._shims.end(shim, deleted)
        await self._networks.release(*shim.key)
        return _deleted(shim.bundle.id, deleted)

    async def delete_process(self, request: pb.DeleteProcessRequest, context: Context) -> pb.DeleteResponse:
        """Delete a process that `exec` added and that has stopped."""
        shim = await self._shim(request.container_id, context)
        asked = shim_api.DeleteRequest(id=shim.bundle.id, exec_id=request.exec_id)
        deleted = await shim.call("Delete", asked, shim_api.DeleteResponse)
        reach("daemon.exec.deleted")
        return _deleted(request.exec_id, deleted)

    async def wait(self, request: pb.WaitRequest, context: Context) -> pb.WaitResponse:
        """Answer when the process has exited, at once where it has; also where its shim dies meanwhile."""
        shim = await self._shim(request.container_id, context)
        asked = shim_api.WaitRequest(id=shim.bundle.id, exec_id=request.exec_id)
        try:
            exited = await shim.call("Wait", asked, shim_api.WaitResponse, None)
        except Unavailable:
            dead = await self._shims.fate(shim)
            return pb.WaitResponse(exit_status=dead.exit_status, exited_at=timestamp(dead.exited_at_ns))
        reach("daemon.wait.answered")
        return pb.WaitResponse(exit_status=exited.exit_status, exited_at=exited.exited_at)

    async def exec(self, request: pb.ExecProcessRequest, context: Context) -> empty_pb2.Empty:
        """Add a process to a task that runs; it waits for `start`."""
        shim = await self._shim(request.container_id, context)
        try:
            check_identifier("", request.exec_id)
        except InvalidArgument as error:
            raise InvalidArgument(f"invalid exec id {request.exec_id}: {error.message}") from error
        asked = shim_api.ExecProcessRequest(
            id=shim.bundle.id,
            exec_id=request.exec_id,
            terminal=request.terminal,
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
            spec=request.spec,
        )
        reach("daemon.exec.asked")
        return await shim.call("Exec", asked, empty_pb2.Empty)

    # -- what is asked of one that is there

    async def get(self, request: pb.GetRequest, context: Context) -> pb.GetResponse:
        """The state of a task or of one of its processes."""
        shim = await self._shim(request.container_id, context)
        return pb.GetResponse(process=_process(await shim.state(self._limits.state, request.exec_id)))

    async def list(self, request: pb.ListTasksRequest, context: Context) -> pb.ListTasksResponse:
        """The tasks of the namespace; one whose shim doesn't answer in time is listed as of unknown state."""
        shims = await self._shims.list(require_namespace(context))
        states = await asyncio.gather(*(self._listed(shim) for shim in shims))
        return pb.ListTasksResponse(tasks=[state for state in states if state is not None])

    async def kill(self, request: pb.KillRequest, context: Context) -> empty_pb2.Empty:
        """Send a signal to a process, or with `all` to every one of the container."""
        shim = await self._shim(request.container_id, context)
        asked = shim_api.KillRequest(id=shim.bundle.id, exec_id=request.exec_id, signal=request.signal, all=request.all)
        return await shim.call("Kill", asked, empty_pb2.Empty)

    async def pause(self, request: pb.PauseTaskRequest, context: Context) -> empty_pb2.Empty:
        """Freeze all processes of the container."""
        shim = await self._shim(request.container_id, context)
        return await shim.call("Pause", shim_api.PauseRequest(id=shim.bundle.id), empty_pb2.Empty)

    async def resume(self, request: pb.ResumeTaskRequest, context: Context) -> empty_pb2.Empty:
        """Let them run again."""
        shim = await self._shim(request.container_id, context)
        return await shim.call("Resume", shim_api.ResumeRequest(id=shim.bundle.id), empty_pb2.Empty)

    async def resize_pty(self, request: pb.ResizePtyRequest, context: Context) -> empty_pb2.Empty:
        """Set the size of a process's terminal, in characters."""
        shim = await self._shim(request.container_id, context)
        asked = shim_api.ResizePtyRequest(
            id=shim.bundle.id, exec_id=request.exec_id, width=request.width, height=request.height
        )
        return await shim.call("ResizePty", asked, empty_pb2.Empty)

    async def close_io(self, request: pb.CloseIORequest, context: Context) -> empty_pb2.Empty:
        """Close a process's standard input."""
        shim = await self._shim(request.container_id, context)
        asked = shim_api.CloseIORequest(id=shim.bundle.id, exec_id=request.exec_id, stdin=request.stdin)
        try:
            return await shim.call("CloseIO", asked, empty_pb2.Empty)
        except WherryError as error:
            if error.message.startswith("process does not exist"):  # containerd's shim has no code for it
                raise NotFound(error.message) from error
            raise

    async def list_pids(self, request: pb.ListPidsRequest, context: Context) -> pb.ListPidsResponse:
        """The pids in the container, as the host counts them."""
        shim = await self._shim(request.container_id, context)
        pids = await shim.call("Pids", shim_api.PidsRequest(id=shim.bundle.id), shim_api.PidsResponse)
        return pb.ListPidsResponse(processes=pids.processes)

    async def update(self, request: pb.UpdateTaskRequest, context: Context) -> empty_pb2.Empty:
        """Change the container's limits."""
        shim = await self._shim(request.container_id, context)
        asked = shim_api.UpdateTaskRequest(
            id=shim.bundle.id, resources=request.resources, annotations=dict(request.annotations)
        )
        return await shim.call("Update", asked, empty_pb2.Empty)

    async def metrics(self, request: pb.MetricsRequest, context: Context) -> pb.MetricsResponse:
        """The cgroup's figures of the tasks that the filters match (`id`, `namespace`, `runtime`)."""
        namespace = require_namespace(context)
        matches = compile_filters(request.filters)
        shims = [
            shim
            for shim in await self._shims.list(namespace)
            if matches(fields({"id": shim.bundle.id, "namespace": namespace, "runtime": shim.launch.runtime}))
        ]
        metrics = await asyncio.gather(*map(self._measured, shims))
        return pb.MetricsResponse(metrics=[metric for metric in metrics if metric is not None])

    async def checkpoint(self, request: pb.CheckpointTaskRequest, context: Context) -> pb.CheckpointTaskResponse:
        """Checkpoint a task: into the folder that the options name, else into the content store.

        Answers the descriptors of criu's images and of the specification. What criu can't do is said in its words, and
        the task runs on.
        """
        shim = await self._shim(request.container_id, context)
        path = runtimes.checkpoint_path(request.options)
        if path:
            await self._checkpoint(shim, path, request)
            return pb.CheckpointTaskResponse()
        namespace = require_namespace(context)
        container = self._containers.get(namespace, shim.bundle.id)
        async with self._checkpoints.folder() as folder:
            await self._checkpoint(shim, folder, request)
            stored = await self._checkpoints.store(namespace, container, folder, context.lease)
        return pb.CheckpointTaskResponse(descriptors=stored)

    async def _checkpoint(self, shim: Shim, path: str, request: pb.CheckpointTaskRequest) -> None:
        # no options are none: an Any without a type is refused by containerd's shim
        options = request.options if request.options.type_url else None
        asked = shim_api.CheckpointTaskRequest(id=shim.bundle.id, path=path, options=options)
        await shim.call("Checkpoint", asked, empty_pb2.Empty, _CHECKPOINT)

    # -- helpers

    async def _shim(self, identity: str, context: Context) -> Shim:
        """The shim of a container. Raises NotFound for a container that isn't there, and for one without a task.

        The shim is what counts: a task whose record somebody removed (containerd lets them) can still be ended. There
        containerd asks for the record first, and such a task stays until its daemon starts again.
        """
        namespace = require_namespace(context)
        try:
            return await self._shims.get(namespace, identity)
        except NotFound:
            self._containers.get(namespace, identity)
            raise

    async def _runtime(
        self, namespace: str, container: Container, request: pb.CreateTaskRequest
    ) -> tuple[Launch, any_pb2.Any]:
        """The shim to start or to join, and the container's options for it."""
        if container.sandbox:
            host = await self._shims.get_sandbox(namespace, container.sandbox)
            # whatever the container names: it comes into the sandbox's shim
            launch = replace(host.launch, sandbox=False, host=container.sandbox)
        else:
            name = request.runtime_path or container.runtime.name
            name = name or self._namespaces.labels(namespace).get(_RUNTIME_LABEL, "")
            launch = runtimes.resolve(name, self._config.runtimes)
            if not launch.binary and (group := _group(container.spec.value)):
                launch = replace(launch, group=group)
        return launch, runtimes.options(container.runtime.options, launch, self._config.runtimes)

    async def _listed(self, shim: Shim) -> Process | None:
        limit = _MUTE if shim.mute else self._limits.state
        try:
            return _process(await shim.state(limit))
        except NotFound:
            return None  # deleted while we asked
        except WherryError as error:
            if shim.leaving:
                return None
            log.warning("no state", namespace=shim.key[0], id=shim.key[1], error=error.message)
            return Process(container_id=shim.bundle.id, id=shim.bundle.id, pid=shim.pid, status=Status.UNKNOWN)

    async def _measured(self, shim: Shim) -> Metric | None:
        try:
            request = shim_api.StatsRequest(id=shim.bundle.id)
            stats = await shim.call("Stats", request, shim_api.StatsResponse, self._limits.state)
        except WherryError as error:
            log.warning("no metrics", namespace=shim.key[0], id=shim.key[1], error=error.message)
            return None
        return Metric(timestamp=timestamp(time.time_ns()), id=shim.bundle.id, data=stats.stats)


def _process(state: shim_api.StateResponse) -> Process:
    return Process(
        container_id=state.id,
        id=state.exec_id or state.id,
        pid=state.pid,
        status=state.status,
        stdin=state.stdin,
        stdout=state.stdout,
        stderr=state.stderr,
        terminal=state.terminal,
        exit_status=state.exit_status,
        exited_at=state.exited_at if state.HasField("exited_at") else None,
    )


def _group(spec: bytes) -> str:
    """The shim that a container shares, by the annotations that containerd's shims go by; "" for one of its own."""
    if not any(name.encode() in spec for name in _GROUPS):  # nearly always; the specification is parsed elsewhere
        return ""
    try:
        annotations = json.loads(spec).get("annotations") or {}
        found = next((str(annotations[name]) for name in _GROUPS if annotations.get(name)), "")
    except (ValueError, AttributeError):
        return ""  # what is wrong with it is said where the bundle is made
    return check_identifier("shim group", found) if found else ""


def _deleted(identity: str, answer: shim_api.DeleteResponse) -> pb.DeleteResponse:
    return pb.DeleteResponse(id=identity, pid=answer.pid, exit_status=answer.exit_status, exited_at=answer.exited_at)
