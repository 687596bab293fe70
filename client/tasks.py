"""Tasks: containers that run, and the processes in them."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from wherry.client.transport import BlockingPending, Calls, Pending
from wherry.client.values import Mount, descriptor_from, descriptor_message, seconds
from wherry.core import typeurl
from wherry.core.tuples import NamedTuple
from wherry.proto import task_types_pb2
from wherry.proto import tasks_pb2 as pb

if TYPE_CHECKING:
    from wherry.core.descriptor import Descriptor

_SERVICE = "containerd.services.tasks.v1.Tasks"
_EXPLAIN = "wherry.tasks.v1.Tasks"
STATUSES = {value: name for name, value in task_types_pb2.Status.items()}


class Stdio(NamedTuple):
    """Where a process' streams go: paths of FIFOs, URIs (`file://`, `binary://`), or nothing."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


class Process(NamedTuple):
    """A process: `status` is `CREATED`, `RUNNING`, `STOPPED`, `PAUSED`, `PAUSING` or `UNKNOWN`."""

    container_id: str
    id: str
    pid: int
    status: str
    stdio: Stdio
    exit_status: int = 0
    exited_at: float = 0.0


class Exit(NamedTuple):
    """How a process ended: its exit code (128 + N after signal N), and when."""

    status: int
    at: float
    pid: int = 0


class Metrics(NamedTuple):
    """One sample of a task's cgroup; `data` is the message of the cgroup's version (`io.containerd.cgroups.v1|v2`)."""

    id: str
    at: float
    data: Packed


def _process(message: task_types_pb2.Process) -> Process:
    return Process(
        container_id=message.container_id or message.id,
        id=message.id,
        pid=message.pid,
        status=STATUSES.get(message.status, "UNKNOWN"),
        stdio=Stdio(message.stdin, message.stdout, message.stderr, message.terminal),
        exit_status=message.exit_status,
        exited_at=seconds(message.exited_at),
    )


class PendingExit:
    """A wait that was sent: the answer comes when the process ends."""

    def __init__(self, pending: Pending[pb.WaitResponse]) -> None:
        self._pending = pending

    def fileno(self) -> int:
        """Over a blocking transport: what becomes readable when something came; -1 where the connection is lost."""
        return self._blocking().fileno()

    def ready(self) -> bool:
        """Over a blocking transport: takes in what came, and says whether `result` would return (or raise) at once."""
        return self._blocking().ready()

    def _blocking(self) -> BlockingPending[pb.WaitResponse]:
        if not hasattr(self._pending, "ready"):
            raise TypeError("this wait was sent over asyncio: await its result")
        return cast("BlockingPending[pb.WaitResponse]", self._pending)

    async def result(self) -> Exit:
        """Waits for the end."""
        answer = await self._pending.result()
        return Exit(answer.exit_status, seconds(answer.exited_at))

    def cancel(self) -> None:
        """Stops waiting; the process doesn't notice."""
        self._pending.cancel()


class PendingTask:
    """A task that is being made."""

    def __init__(self, pending: Pending[pb.CreateTaskResponse]) -> None:
        self._pending = pending

    async def pid(self) -> int:
        """Waits until it is there, and raises what came in the way."""
        return (await self._pending.result()).pid


class Ending(NamedTuple):
    """How a process ended: `reason` says why it was killed, where that is known (whose memory limit was reached)."""

    pid: int
    status: int
    at: float
    reason: str


class Tasks:
    """The tasks of a namespace. `exec_id` names a further process, "" the container's first one."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def list(self) -> list[Process]:
        """The first process of every task."""
        answer = await self._calls.unary(f"{_SERVICE}/List", pb.ListTasksRequest(), pb.ListTasksResponse)
        return [_process(item) for item in answer.tasks]

    async def get(self, container: str, exec_id: str = "") -> Process:
        """One process; raises NotFound."""
        request = pb.GetRequest(container_id=container, exec_id=exec_id)
        answer = await self._calls.unary(f"{_SERVICE}/Get", request, pb.GetResponse)
        return _process(answer.process)

    async def create(
        self,
        container: str,
        mounts: Iterable[Mount],
        stdio: Stdio,
        *,
        options: Message | None = None,
        checkpoint: Descriptor | None = None,
        runtime_path: str = "",
    ) -> int:
        """Makes a task of a container, created but not started, and returns its pid.

        `options` go to the runtime in place of the container's. Raises AlreadyExists, NotFound, and what the runtime
        says against the spec.
        """
        pending = self.creating(
            container, mounts, stdio, options=options, checkpoint=checkpoint, runtime_path=runtime_path
        )
        return await pending.pid()

    def creating(
        self,
        container: str,
        mounts: Iterable[Mount],
        stdio: Stdio,
        *,
        options: Message | None = None,
        checkpoint: Descriptor | None = None,
        runtime_path: str = "",
    ) -> PendingTask:
        """`create`, sent now, for who has something else to do until the answer comes."""
        request = pb.CreateTaskRequest(
            container_id=container,
            rootfs=[mount.message() for mount in mounts],
            stdin=stdio.stdin,
            stdout=stdio.stdout,
            stderr=stdio.stderr,
            terminal=stdio.terminal,
            runtime_path=runtime_path,
        )
        if options is not None:
            request.options.CopyFrom(typeurl.pack(options))
        if checkpoint is not None:
            request.checkpoint.CopyFrom(descriptor_message(checkpoint))
        return PendingTask(self._calls.begin(f"{_SERVICE}/Create", request, pb.CreateTaskResponse))

    async def explain(self, container: str, exec_id: str = "") -> Ending | None:
        """How a process ended, None while it hasn't; wherryd alone knows this call. Raises NotFound, Unimplemented."""
        from wherry.proto import wherry_tasks_pb2 as explain_pb

        request = explain_pb.ExplainRequest(container_id=container, exec_id=exec_id)
        answer = await self._calls.unary(f"{_EXPLAIN}/Explain", request, explain_pb.ExplainResponse)
        if not answer.exited:
            return None
        return Ending(answer.pid, answer.exit_status, seconds(answer.exited_at), answer.reason)

    async def attach(self, container: str, stdio: Stdio, exec_id: str = "") -> None:
        """Has a process's output copied, from now on, to the FIFOs `stdout` and `stderr`, which somebody must read.

        For processes with a log in Kubernetes' format, which goes on as ever; wherryd alone knows this call. Raises
        NotFound, FailedPrecondition, Unimplemented.
        """
        from wherry.proto import wherry_tasks_pb2 as streams_pb

        request = streams_pb.AttachRequest(
            container_id=container, exec_id=exec_id, stdout=stdio.stdout, stderr=stdio.stderr
        )
        await self._calls.unary(f"{_EXPLAIN}/Attach", request, Empty)

    async def reopen_log(self, container: str, exec_id: str = "") -> None:
        """Lets a log in Kubernetes' format go on in the file that has its path now: the old one was renamed.

        wherryd alone knows this call. Raises NotFound, FailedPrecondition, Unimplemented.
        """
        from wherry.proto import wherry_tasks_pb2 as streams_pb

        request = streams_pb.ReopenLogRequest(container_id=container, exec_id=exec_id)
        await self._calls.unary(f"{_EXPLAIN}/ReopenLog", request, Empty)

    async def start(self, container: str, exec_id: str = "") -> int:
        """Starts what was created and returns its pid; raises the runtime's error."""
        request = pb.StartRequest(container_id=container, exec_id=exec_id)
        answer = await self._calls.unary(f"{_SERVICE}/Start", request, pb.StartResponse)
        return answer.pid

    async def exec(self, container: str, exec_id: str, process: Mapping[str, Any], stdio: Stdio) -> None:
        """Adds a process (the `process` of an OCI spec) to a task; it isn't started yet."""
        request = pb.ExecProcessRequest(
            container_id=container,
            exec_id=exec_id,
            stdin=stdio.stdin,
            stdout=stdio.stdout,
            stderr=stdio.stderr,
            terminal=stdio.terminal,
            spec=typeurl.pack_json(typeurl.PROCESS, process),
        )
        await self._calls.unary(f"{_SERVICE}/Exec", request, Empty)

    def waiting(self, container: str, exec_id: str = "") -> PendingExit:
        """Asks for the end of a process; sent before its start, nothing is missed."""
        request = pb.WaitRequest(container_id=container, exec_id=exec_id)
        return PendingExit(self._calls.begin(f"{_SERVICE}/Wait", request, pb.WaitResponse))

    async def wait(self, container: str, exec_id: str = "") -> Exit:
        """Waits for the end of a process."""
        return await self.waiting(container, exec_id).result()

    async def kill(self, container: str, signal: int, exec_id: str = "", *, every: bool = False) -> None:
        """Sends a signal to one process, or with `every` to all in the container; raises NotFound when it is over."""
        request = pb.KillRequest(container_id=container, exec_id=exec_id, signal=signal, all=every)
        await self._calls.unary(f"{_SERVICE}/Kill", request, Empty)

    async def delete(self, container: str, exec_id: str = "") -> Exit:
        """Removes an ended task or process; raises FailedPrecondition while it runs."""
        if exec_id:
            process = pb.DeleteProcessRequest(container_id=container, exec_id=exec_id)
            answer = await self._calls.unary(f"{_SERVICE}/DeleteProcess", process, pb.DeleteResponse)
        else:
            task = pb.DeleteTaskRequest(container_id=container)
            answer = await self._calls.unary(f"{_SERVICE}/Delete", task, pb.DeleteResponse)
        return Exit(answer.exit_status, seconds(answer.exited_at), answer.pid)

    async def pause(self, container: str) -> None:
        """Freezes a task."""
        await self._calls.unary(f"{_SERVICE}/Pause", pb.PauseTaskRequest(container_id=container), Empty)

    async def resume(self, container: str) -> None:
        """Thaws a task."""
        await self._calls.unary(f"{_SERVICE}/Resume", pb.ResumeTaskRequest(container_id=container), Empty)

    async def resize(self, container: str, width: int, height: int, exec_id: str = "") -> None:
        """Tells a terminal its size in characters."""
        request = pb.ResizePtyRequest(container_id=container, exec_id=exec_id, width=width, height=height)
        await self._calls.unary(f"{_SERVICE}/ResizePty", request, Empty)

    async def close_stdin(self, container: str, exec_id: str = "") -> None:
        """Ends a process' input: the shim holds the FIFO open until it is told."""
        request = pb.CloseIORequest(container_id=container, exec_id=exec_id, stdin=True)
        await self._calls.unary(f"{_SERVICE}/CloseIO", request, Empty)

    async def pids(self, container: str) -> builtins.list[tuple[int, Packed]]:
        """The processes in a container, as the host numbers them, each with what the runtime knows of it."""
        request = pb.ListPidsRequest(container_id=container)
        answer = await self._calls.unary(f"{_SERVICE}/ListPids", request, pb.ListPidsResponse)
        return [(item.pid, item.info) for item in answer.processes]

    async def metrics(self, ids: Iterable[str] = ()) -> builtins.list[Metrics]:
        """A sample of each task, or of those named."""
        request = pb.MetricsRequest(filters=[f"id=={container}" for container in ids])
        answer = await self._calls.unary(f"{_SERVICE}/Metrics", request, pb.MetricsResponse)
        return [Metrics(item.id, seconds(item.timestamp), item.data) for item in answer.metrics]

    async def update(
        self, container: str, resources: Mapping[str, Any], annotations: Mapping[str, str] | None = None
    ) -> None:
        """Changes limits: `resources` is `linux.resources` of an OCI spec."""
        request = pb.UpdateTaskRequest(
            container_id=container,
            resources=typeurl.pack_json(typeurl.LINUX_RESOURCES, resources),
            annotations=dict(annotations or {}),
        )
        await self._calls.unary(f"{_SERVICE}/Update", request, Empty)

    async def checkpoint(self, container: str, options: Message | None = None) -> builtins.list[Descriptor]:
        """Writes a checkpoint into the content store; raises Unimplemented where the runtime has none."""
        request = pb.CheckpointTaskRequest(container_id=container)
        if options is not None:
            request.options.CopyFrom(typeurl.pack(options))
        answer = await self._calls.unary(f"{_SERVICE}/Checkpoint", request, pb.CheckpointTaskResponse)
        return [descriptor_from(item) for item in answer.descriptors]
