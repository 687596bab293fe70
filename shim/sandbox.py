"""`containerd.runtime.sandbox.v1.Sandbox`: a pod, whose containers then live in this shim beside it.

The bundle's config.json says what the pod is:

- with a process, a container of that process is made and run (a pause image, or whatever is to be PID 1 of the pod);
- without one, only its namespaces are made and kept by files (`shim/pinned.py`).

    (none) ──Create──► created ──Start──► ready ──Stop, or its process ended──► not ready ──Shutdown──► the shim leaves

The sandbox's process is no task: the task API doesn't know it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from wherry.core import errors, typeurl
from wherry.linux.namespaces import path_of
from wherry.proto import runtime_sandbox_pb2 as pb
from wherry.proto import task_v2_pb2
from wherry.shim import pinned
from wherry.shim.container import Container
from wherry.shim.log import log
from wherry.shim.loop import Exit, Future
from wherry.shim.oci_runtime import in_child, mount_rootfs, read_spec, unmount_rootfs
from wherry.shim.server import Handler, Services
from wherry.shim.state_files import write_exit, write_file

if TYPE_CHECKING:
    from wherry.shim.process import Shim
    from wherry.shim.task import TaskService

SERVICE: Final = "containerd.runtime.sandbox.v1.Sandbox"
READY, NOT_READY, CREATED = "SANDBOX_READY", "SANDBOX_NOTREADY", "SANDBOX_CREATED"
# how long a process may take to die of SIGKILL where the caller names no time
_KILL_WAIT: Final = 10.0


class Sandbox:
    """The pod of one shim, with a process (`container`) or with pinned namespaces."""

    def __init__(self, shim: Shim, request: pb.CreateSandboxRequest) -> None:
        self.id = request.sandbox_id
        self.bundle = request.bundle_path or os.getcwd()
        self.created_at = time.time_ns()
        self.pid = 0
        self.end: Exit | None = None
        self.ended: Future[Exit] = Future(shim.loop)
        self.started = False
        self.container: Container | None = None
        self.namespaces: dict[str, str] = {}
        self.spec: dict[str, Any] = {}
        self._shim = shim

    @property
    def state(self) -> str:
        """As SandboxStatus names it."""
        if self.end is not None:
            return NOT_READY
        return READY if self.started else CREATED

    async def create(self, request: pb.CreateSandboxRequest) -> None:
        """Make it; what was done is undone if that fails."""
        self.spec = _spec(self.bundle)
        if (self.spec.get("process") or {}).get("args"):
            await self._create_container(request)
        else:
            await self._create_pinned(request)
        for entry in (self.spec.get("linux") or {}).get("namespaces") or []:
            if entry.get("type") in self.namespaces:
                entry["path"] = self.namespaces[entry["type"]]

    async def _create_container(self, request: pb.CreateSandboxRequest) -> None:
        linux = self.spec.setdefault("linux", {})
        for entry in linux.get("namespaces") or []:
            if entry.get("type") == "network" and request.netns_path and not entry.get("path"):
                entry["path"] = request.netns_path
                write_file(f"{self.bundle}/config.json", json.dumps(self.spec).encode())
        asked = task_v2_pb2.CreateTaskRequest(id=self.id, bundle=self.bundle, rootfs=request.rootfs)
        if request.HasField("options"):
            asked.options.CopyFrom(request.options)
        container = Container(self._shim, asked)
        await container.create(asked)
        self.container = container
        self.pid = container.init.pid
        container.init.ended.add_callback(lambda: self._ended(container.init.ended.result()))
        kinds = {str(entry.get("type")) for entry in linux.get("namespaces") or []}
        self.namespaces = {kind: path_of(kind, self.pid) for kind in pinned.KINDS if kind in kinds}

    async def _create_pinned(self, request: pb.CreateSandboxRequest) -> None:
        shim = self._shim
        joined, made = pinned.wanted(self.spec, request.netns_path)
        mounts = Container.mounts_of(request.rootfs)
        try:
            mount_rootfs(self.bundle, mounts)
            with shim.children:
                self.pid = await in_child(shim.loop, shim.children, pinned.pin, self.bundle, self.spec, joined, made)
                if self.pid:
                    exited = shim.children.exited(self.pid)
                    exited.add_callback(lambda: self._ended(exited.result()))
        except BaseException as error:
            self._unpin()
            if isinstance(error, OSError):
                raise errors.WherryError(f"failed to create sandbox: {error}") from error
            raise
        self.namespaces = joined | {kind: pinned.pinned_path(self.bundle, kind) for kind in made}

    async def start(self) -> None:
        """Let its process go on, if it has one."""
        if self.started or self.end is not None:
            raise errors.FailedPrecondition(f"sandbox {self.id} is {self.state}: failed precondition")
        if self.container is not None:
            await self.container.start("")
        self.started = True

    async def stop(self, within: float) -> None:
        """End its process, with SIGKILL: nobody listens in a pause. Fine if that was done."""
        if self.end is not None:
            return
        if not self.pid:
            self._ended(Exit(0, 0, time.time_ns()))
            return
        if self.container is not None:
            try:
                await self.container.kill("", signal.SIGKILL, everyone=True)
            except errors.NotFound:
                log("info", "the sandbox's process had ended", id=self.id)
        else:
            os.kill(self.pid, signal.SIGKILL)
        await self._shim.loop.within(within or _KILL_WAIT, self.ended, f"the end of sandbox {self.id}")

    async def remove(self) -> None:
        """Stop it and take everything away."""
        await self.stop(_KILL_WAIT)
        if self.container is not None:
            await self.container.delete("")
        self._unpin()

    def _unpin(self) -> None:
        unmount_rootfs(self.bundle)
        try:
            pinned.unpin(self.bundle)
        except OSError as error:
            log("error", f"failed to remove the sandbox's namespaces: {error}", id=self.id)

    def _ended(self, end: Exit) -> None:
        if self.end is None:
            self.end = end
            if self.container is None:
                write_exit(self.bundle, "", end)
            self.ended.set(end)


def _spec(bundle: str) -> dict[str, Any]:
    """The pod's specification; a bundle without one is a pod that has nothing of its own."""
    return read_spec(bundle) if os.path.exists(f"{bundle}/config.json") else {}


class SandboxService:
    """The sandbox of one shim; there is none in most. `shut_down` ends the shim."""

    def __init__(self, shim: Shim, tasks: TaskService, shut_down: Callable[[], None]) -> None:
        self._shim = shim
        self._tasks = tasks
        self._shut_down = shut_down
        self._sandbox: Sandbox | None = None

    def services(self) -> Services:
        """The handlers."""
        methods: dict[str, Handler] = {
            "CreateSandbox": Handler(pb.CreateSandboxRequest, self.create),
            "StartSandbox": Handler(pb.StartSandboxRequest, self.start),
            "Platform": Handler(pb.PlatformRequest, self.platform),
            "StopSandbox": Handler(pb.StopSandboxRequest, self.stop),
            "WaitSandbox": Handler(pb.WaitSandboxRequest, self.wait),
            "SandboxStatus": Handler(pb.SandboxStatusRequest, self.status),
            "PingSandbox": Handler(pb.PingRequest, self.ping),
            "ShutdownSandbox": Handler(pb.ShutdownSandboxRequest, self.shutdown),
            "SandboxMetrics": Handler(pb.SandboxMetricsRequest, self.metrics),
        }
        return {SERVICE: methods}

    def _of(self, sandbox_id: str) -> Sandbox:
        if self._sandbox is None or self._sandbox.id != sandbox_id:
            raise errors.NotFound(f"sandbox {sandbox_id}: not found")
        return self._sandbox

    async def create(self, request: pb.CreateSandboxRequest) -> pb.CreateSandboxResponse:
        """Make the sandbox; a shim has one at most."""
        if self._sandbox is not None:
            raise errors.AlreadyExists(f"sandbox {self._sandbox.id}: already exists")
        self._sandbox = sandbox = Sandbox(self._shim, request)
        self._tasks.held = True
        self._shim.warm = False  # a shim of several may not be lost with one of them
        try:
            await sandbox.create(request)
        except BaseException:
            self._sandbox = None
            self._tasks.held = False
            raise
        return pb.CreateSandboxResponse()

    async def start(self, request: pb.StartSandboxRequest) -> pb.StartSandboxResponse:
        """Start it; its specification comes back with the paths of its namespaces."""
        sandbox = self._of(request.sandbox_id)
        await sandbox.start()
        response = pb.StartSandboxResponse(pid=sandbox.pid, spec=typeurl.pack_json(typeurl.SPEC, sandbox.spec))
        response.created_at.FromNanoseconds(sandbox.created_at)
        return response

    async def platform(self, request: pb.PlatformRequest) -> pb.PlatformResponse:
        """The host's."""
        response = pb.PlatformResponse()
        machine = os.uname().machine
        response.platform.os = "linux"
        response.platform.architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
        return response

    async def stop(self, request: pb.StopSandboxRequest) -> pb.StopSandboxResponse:
        """End its process within so many seconds."""
        await self._of(request.sandbox_id).stop(float(request.timeout_secs))
        return pb.StopSandboxResponse()

    async def wait(self, request: pb.WaitSandboxRequest) -> pb.WaitSandboxResponse:
        """Answer when it has ended."""
        end = await self._of(request.sandbox_id).ended
        response = pb.WaitSandboxResponse(exit_status=end.status)
        response.exited_at.FromNanoseconds(end.at_ns)
        return response

    async def status(self, request: pb.SandboxStatusRequest) -> pb.SandboxStatusResponse:
        """Its state; with `verbose` the paths of its namespaces, as JSON."""
        sandbox = self._of(request.sandbox_id)
        response = pb.SandboxStatusResponse(sandbox_id=sandbox.id, pid=sandbox.pid, state=sandbox.state)
        response.created_at.FromNanoseconds(sandbox.created_at)
        if sandbox.end is not None:
            response.exited_at.FromNanoseconds(sandbox.end.at_ns)
        if request.verbose:
            response.info["namespaces"] = json.dumps(sandbox.namespaces)
            response.info["containers"] = json.dumps(sorted(self._tasks.containers))
        return response

    async def ping(self, request: pb.PingRequest) -> pb.PingResponse:
        """Whether it is there."""
        self._of(request.sandbox_id)
        return pb.PingResponse()

    async def shutdown(self, request: pb.ShutdownSandboxRequest) -> pb.ShutdownSandboxResponse:
        """End the containers that are left, remove the sandbox, end the shim."""
        sandbox = self._of(request.sandbox_id)
        for container_id, container in list(self._tasks.containers.items()):
            if container.init.end is None:
                await container.kill("", signal.SIGKILL, everyone=True)
                await self._shim.loop.within(_KILL_WAIT, container.init.ended, f"the end of {container_id}")
            await self._tasks.delete(task_v2_pb2.DeleteRequest(id=container_id))
        await sandbox.remove()
        self._sandbox = None
        self._tasks.held = False
        self._shut_down()
        return pb.ShutdownSandboxResponse()

    async def metrics(self, request: pb.SandboxMetricsRequest) -> pb.SandboxMetricsResponse:
        """Those of its process's cgroup; nothing without one."""
        sandbox = self._of(request.sandbox_id)
        response = pb.SandboxMetricsResponse()
        response.metrics.id = sandbox.id
        response.metrics.timestamp.FromNanoseconds(time.time_ns())
        if sandbox.container is not None:
            response.metrics.data.CopyFrom(sandbox.container.stats())
        return response
