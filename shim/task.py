"""The task service of a shim, `containerd.task.v2.Task` and `containerd.task.v3.Task`: the same messages, two names.

Errors and their texts are those of containerd-shim-runc-v2. Containers are kept by id, so that several may live in one
shim; the daemon starts one shim for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from google.protobuf.empty_pb2 import Empty

from wherry.core import errors, typeurl
from wherry.core.failpoints import reach
from wherry.proto import events_pb2, runc_options_pb2, task_types_pb2, task_v2_pb2
from wherry.shim.container import Container
from wherry.shim.server import Handler, Services
from wherry.shim.states import Operation, State

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from wherry.shim.process import Process, Shim

SERVICES: Final = ("containerd.task.v2.Task", "containerd.task.v3.Task")


class TaskService:
    """The containers of one shim. `shut_down` is called when a Shutdown found none left."""

    def __init__(self, shim: Shim, shut_down: Callable[[], None]) -> None:
        self._shim = shim
        self._shut_down = shut_down
        self.containers: dict[str, Container] = {}
        self._creating: set[str] = set()
        self.begun = 0
        """How many creates were asked for, ever."""
        self.held = False
        """The shim has a sandbox, which ends it."""

    @property
    def idle(self) -> bool:
        """True while the shim has no container, none is being made, and there is no sandbox."""
        return not self.containers and not self._creating and not self.held

    def services(self) -> Services:
        """The handlers under both names."""
        message = task_v2_pb2
        methods: dict[str, Handler] = {
            "Checkpoint": Handler(message.CheckpointTaskRequest, self.checkpoint),
            "CloseIO": Handler(message.CloseIORequest, self.close_io),
            "Connect": Handler(message.ConnectRequest, self.connect),
            "Create": Handler(message.CreateTaskRequest, self.create),
            "Delete": Handler(message.DeleteRequest, self.delete),
            "Exec": Handler(message.ExecProcessRequest, self.exec),
            "Kill": Handler(message.KillRequest, self.kill),
            "Pause": Handler(message.PauseRequest, self.pause),
            "Pids": Handler(message.PidsRequest, self.pids),
            "ResizePty": Handler(message.ResizePtyRequest, self.resize_pty),
            "Resume": Handler(message.ResumeRequest, self.resume),
            "Shutdown": Handler(message.ShutdownRequest, self.shutdown),
            "Start": Handler(message.StartRequest, self.start),
            "State": Handler(message.StateRequest, self.state),
            "Stats": Handler(message.StatsRequest, self.stats),
            "Update": Handler(message.UpdateTaskRequest, self.update),
            "Wait": Handler(message.WaitRequest, self.wait),
        }
        return dict.fromkeys(SERVICES, methods)

    def _container(self, container_id: str) -> Container:
        container = self.containers.get(container_id)
        if container is None:
            raise errors.NotFound("container not created: not found")
        return container

    def process(self, container_id: str, exec_id: str) -> Process:
        """A process of one of the containers. Raises NotFound."""
        return self._container(container_id).process(exec_id)

    def _publish(self, event: Message) -> None:
        self._shim.publisher.publish(event)

    async def create(self, request: task_v2_pb2.CreateTaskRequest) -> task_v2_pb2.CreateTaskResponse:
        """Make a container; its init waits for Start."""
        if request.id in self.containers or request.id in self._creating:
            raise errors.AlreadyExists(f"task {request.id}: already exists")
        self._creating.add(request.id)
        self.begun += 1
        try:
            reach("shim.create.asked")
            container = Container(self._shim, request)
            await container.create(request)
            self.containers[request.id] = container
        finally:
            self._creating.discard(request.id)
        event = events_pb2.TaskCreate(
            container_id=request.id,
            bundle=request.bundle,
            rootfs=request.rootfs,
            checkpoint=request.checkpoint,
            pid=container.init.pid,
        )
        for name in ("stdin", "stdout", "stderr", "terminal"):
            setattr(event.io, name, getattr(request, name))
        self._publish(event)
        reach("shim.create.done")
        return task_v2_pb2.CreateTaskResponse(pid=container.init.pid)

    async def start(self, request: task_v2_pb2.StartRequest) -> task_v2_pb2.StartResponse:
        """Let the init go on, or run an exec'd process."""
        process = await self._container(request.id).start(request.exec_id)
        return task_v2_pb2.StartResponse(pid=process.pid)

    async def delete(self, request: task_v2_pb2.DeleteRequest) -> task_v2_pb2.DeleteResponse:
        """Remove what has stopped."""
        container = self._container(request.id)
        process = await container.delete(request.exec_id)
        response = task_v2_pb2.DeleteResponse(pid=process.pid)
        process.tell_end(response.exited_at)
        if process.end is not None:
            response.exit_status = process.end.status
        if not request.exec_id:
            self.containers.pop(request.id, None)
            event = events_pb2.TaskDelete(container_id=request.id, pid=response.pid, exit_status=response.exit_status)
            event.exited_at.CopyFrom(response.exited_at)
            self._publish(event)
            reach("shim.delete.done")
        return response

    async def exec(self, request: task_v2_pb2.ExecProcessRequest) -> Empty:
        """Add a process, to be run by Start."""
        process = self._container(request.id).add_exec(request)
        self._publish(events_pb2.TaskExecAdded(container_id=request.id, exec_id=process.exec_id))
        reach("shim.exec.added")
        return Empty()

    async def kill(self, request: task_v2_pb2.KillRequest) -> Empty:
        """Signal one process or all."""
        await self._container(request.id).kill(request.exec_id, request.signal, everyone=request.all)
        return Empty()

    async def wait(self, request: task_v2_pb2.WaitRequest) -> task_v2_pb2.WaitResponse:
        """Answer when the process has ended."""
        process = self._container(request.id).process(request.exec_id)
        end = await process.ended
        response = task_v2_pb2.WaitResponse(exit_status=end.status)
        process.tell_end(response.exited_at)
        return response

    async def state(self, request: task_v2_pb2.StateRequest) -> task_v2_pb2.StateResponse:
        """What a process is doing."""
        container = self._container(request.id)
        process = container.process(request.exec_id)
        whole = container.init.machine.state
        status = whole if whole is State.PAUSED else process.machine.state
        response = process.state(container.bundle, status)
        if container.pausing:
            response.status = task_types_pb2.PAUSING
        return response

    async def pids(self, request: task_v2_pb2.PidsRequest) -> task_v2_pb2.PidsResponse:
        """All processes; those of ours with the exec id they were asked for under."""
        container = self._container(request.id)
        ours = {process.pid: process.exec_id for process in container.execs.values() if process.active}
        response = task_v2_pb2.PidsResponse()
        for pid in await container.runtime.pids(request.id):
            info = response.processes.add(pid=pid)
            if pid in ours:
                info.info.CopyFrom(typeurl.pack(runc_options_pb2.ProcessDetails(exec_id=ours[pid])))
        return response

    async def pause(self, request: task_v2_pb2.PauseRequest) -> Empty:
        """Freeze."""
        await self._container(request.id).pause()
        self._publish(events_pb2.TaskPaused(container_id=request.id))
        return Empty()

    async def resume(self, request: task_v2_pb2.ResumeRequest) -> Empty:
        """Thaw."""
        await self._container(request.id).resume()
        self._publish(events_pb2.TaskResumed(container_id=request.id))
        return Empty()

    async def resize_pty(self, request: task_v2_pb2.ResizePtyRequest) -> Empty:
        """Set the size of a process's terminal."""
        process = self._container(request.id).process(request.exec_id)
        process.machine.check(Operation.RESIZE)
        process.io.resize(request.width, request.height)
        return Empty()

    async def close_io(self, request: task_v2_pb2.CloseIORequest) -> Empty:
        """Let the process see the end of its input once the client closed it too."""
        self._container(request.id).process(request.exec_id).io.close_stdin()
        return Empty()

    async def stats(self, request: task_v2_pb2.StatsRequest) -> task_v2_pb2.StatsResponse:
        """Metrics of the container's cgroup."""
        return task_v2_pb2.StatsResponse(stats=self._container(request.id).stats())

    async def update(self, request: task_v2_pb2.UpdateTaskRequest) -> Empty:
        """Change limits."""
        await self._container(request.id).update(request.resources)
        return Empty()

    async def checkpoint(self, request: task_v2_pb2.CheckpointTaskRequest) -> Empty:
        """Save the processes of a container."""
        await self._container(request.id).checkpoint(request)
        self._publish(events_pb2.TaskCheckpointed(container_id=request.id, checkpoint=request.path))
        return Empty()

    async def connect(self, request: task_v2_pb2.ConnectRequest) -> task_v2_pb2.ConnectResponse:
        """Who the shim is, and which process the container's init is (0 before Create)."""
        container = self.containers.get(request.id)
        task_pid = container.init.pid if container is not None else 0
        return task_v2_pb2.ConnectResponse(shim_pid=os.getpid(), task_pid=task_pid)

    async def shutdown(self, request: task_v2_pb2.ShutdownRequest) -> Empty:
        """End the shim, unless it has containers."""
        if self.idle:
            self._shut_down()
        return Empty()
