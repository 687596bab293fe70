"""Containers: the CRI's methods for them, in front of the parts that do the work.

    CreateContainer ──► created ──StartContainer──► running ──StopContainer, or by itself──► exited ──RemoveContainer──►

What is known of a container is in its record (`Member`): a list or a status asks nobody. A task is made by
StartContainer, in the shim of the pod, and is gone again when the container has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from wherry.client.fifos import discard, lone_stdin
from wherry.client.tasks import Stdio
from wherry.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    WherryError,
)
from wherry.core.failpoints import reach
from wherry.cri import container_checkpoint, container_restore, container_status
from wherry.cri.batches import batches
from wherry.cri.container_create import RESTORED, Maker, log_uri
from wherry.cri.container_ends import Ends
from wherry.cri.container_spec import resources
from wherry.cri.container_stats import Stats
from wherry.cri.container_status import START_ERROR, START_EXIT_CODE, Names
from wherry.cri.exec_sync import exec_sync
from wherry.cri.exec_sync import folder as exec_folder
from wherry.cri.handlers import choose
from wherry.cri.records import READY, Member, Pod
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from wherry.client.values import Mount
    from wherry.cri.node import Node

log = structlog.get_logger(__name__)
T = TypeVar("T")

SIGKILL = 9
# seconds for processes that were sent SIGKILL to be gone and their output to be copied
KILL_SECONDS = 30.0
# seconds in which the end of a container that runs no more is noted
_NOTED = 20.0
# seconds between the tries to delete the task of a shim that is dead
_BURIAL = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0)


class Members:
    """The containers of a node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._records = node.records
        self._client = node.client
        self._maker = Maker(node)
        self._ends = Ends(node)
        self._names = Names(node)
        self.stats = Stats(node)

    async def recover(self) -> None:
        """Find out what lives, once, after the records are read."""
        await asyncio.to_thread(shutil.rmtree, exec_folder(self._node), ignore_errors=True)
        await self._maker.sweep()
        await self._ends.recover()

    # -- create

    async def create_container(self, request: cri.CreateContainerRequest) -> cri.CreateContainerResponse:
        """Make a container in a pod; it runs when it is started."""
        try:
            member = await self._maker.create(request)
        except WherryError as error:
            raise type(error)(f"failed to create container: {error.message}") from error
        self._node.events.tell(member.id, cri.CONTAINER_CREATED_EVENT)
        return cri.CreateContainerResponse(container_id=member.id)

    # -- start

    async def start_container(self, request: cri.StartContainerRequest) -> cri.StartContainerResponse:
        """Let it run. What is begun is brought to its end, also where the caller goes away."""
        member = self._records.member(request.container_id)
        if member.facts.removing:
            raise FailedPrecondition(f'container "{member.id}" is in removing state, can\'t be started')
        if "starting" in member.transient:
            raise FailedPrecondition(f'container "{member.id}" is already in starting state')
        if member.state != cri.CONTAINER_CREATED:
            state = cri.ContainerState.Name(member.state)
            raise FailedPrecondition(
                f'failed to set starting state for container "{member.id}": container is in {state} state'
            )
        pod = self._records.pod(member.facts.pod)
        if pod.facts.state != READY:
            raise FailedPrecondition(f'sandbox container "{pod.id}" is not running: failed precondition')
        await _to_its_end(self._started(member, pod))
        return cri.StartContainerResponse()

    async def _started(self, member: Member, pod: Pod) -> None:
        starting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        member.transient["starting"] = starting
        try:
            await self._start(member)
        except WherryError as error:
            facts = member.facts
            facts.started_at = facts.finished_at = time.time_ns()
            facts.exit_code, facts.reason, facts.message, facts.pid = START_EXIT_CODE, START_ERROR, error.message, 0
            with contextlib.suppress(WherryError):
                await self._records.put_member(member)
            self._ends.stopped(member).set()
            raise type(error)(f'failed to start container "{member.id}": {error.message}') from error
        finally:
            del member.transient["starting"]
            starting.set_result(None)
        self._node.events.tell(member.id, cri.CONTAINER_STARTED_EVENT)

    async def _start(self, member: Member) -> None:
        tasks, facts = self._client.tasks, member.facts
        mounts: list[Mount] | None = member.transient.pop("mounts", None)
        if mounts is None:
            mounts = await self._client.snapshots(facts.snapshotter).mounts(facts.snapshot)
        stdio = self._stdio(member)
        try:
            pid = await tasks.create(member.id, mounts, stdio, options=self._restoring(member))
            reach("cri.start.created")
            started = time.time_ns()  # before it runs: it may have ended when the answer is here
            try:
                pid = await tasks.start(member.id) or pid  # one that is restored has none before
            except BaseException:
                with contextlib.suppress(WherryError):
                    await self._client.tidying().tasks.delete(member.id)
                raise
        except BaseException:
            if stdio.stdin:
                discard(stdio)
            raise
        reach("cri.start.started")
        facts.pid, facts.started_at = pid, started
        if facts.more.pop(RESTORED, None):
            await asyncio.to_thread(shutil.rmtree, self._maker.restored(member.id), ignore_errors=True)
        # before the answer: where daemon and shim are killed after it, nobody else would say that it ran
        await self._write(member)
        reach("cri.start.noted")

    def _restoring(self, member: Member) -> Message | None:
        """The runtime's options, where a container is made from a checkpoint."""
        if not member.facts.more.get(RESTORED):
            return None
        handler = self._records.pod(member.facts.pod).facts.handler
        own = choose(self._node.settings, handler).options
        return container_restore.options(own, self._maker.restored(member.id))

    def _stdio(self, member: Member) -> Stdio:
        config = member.config
        uri = log_uri(member.facts, self._node.settings)
        stdin = lone_stdin(member.id) if config.stdin else ""
        return Stdio(stdin, uri, "" if config.tty else uri, config.tty)

    async def _write(self, member: Member) -> None:
        try:
            if member.id in self._records.members and not member.facts.finished_at:
                await self._records.put_member(member)
        except WherryError as error:  # it runs; a daemon that comes after this one asks its shim
            log.warning("a container's record can't be written", id=member.id, error=error.message)

    # -- stop

    async def stop_container(self, request: cri.StopContainerRequest) -> cri.StopContainerResponse:
        """End it: its stop signal, and SIGKILL after the grace period. Fine where it has ended or isn't known."""
        try:
            member = self._records.member(request.container_id)
        except NotFound:
            return cri.StopContainerResponse()
        await self.stop(member, float(max(0, request.timeout)))
        return cri.StopContainerResponse()

    async def stop(self, member: Member, grace: float) -> None:
        """`stop_container` of one; `grace` in seconds. Raises DeadlineExceeded where it outlives SIGKILL."""
        if (starting := member.transient.get("starting")) is not None:
            await asyncio.wait([starting])
        if member.facts.unknown:
            # its shim may have come back, or be gone
            await self._ends.check(member)
        if member.state not in {cri.CONTAINER_RUNNING, cri.CONTAINER_UNKNOWN}:
            return
        stopped = self._ends.stopped(member)
        try:
            if grace > 0:
                await self._signal(member)
                if await _within(grace, stopped):
                    return
            await self._client.tasks.kill(member.id, SIGKILL, every=True)
        except (NotFound, Unavailable):
            # it has ended, or its shim has: its exit is on its way, or was missed
            if not await _within(2.0, stopped):
                await self._ends.check(member)
                await self._outlived(member, _NOTED)
            return
        await self._outlived(member, KILL_SECONDS)

    async def _signal(self, member: Member) -> None:
        """The stop signal, once, however often it is asked for."""
        if member.transient.get("signalled"):
            return
        number = signal_number(member.facts.stop_signal)
        await self._client.tasks.kill(member.id, number)
        member.transient["signalled"] = True

    async def _outlived(self, member: Member, seconds: float) -> None:
        if await _within(seconds, self._ends.stopped(member)):
            return
        if not member.facts.finished_at:
            raise DeadlineExceeded(
                f'container "{member.id}" is not noted as stopped {seconds:.0f} s after SIGKILL: its shim is stopped, '
                f"or a system call of pid {member.facts.pid} can't be interrupted: deadline exceeded"
            )

    async def stop_all(self, pod: str) -> None:
        """End all containers of a pod at once."""
        await asyncio.gather(*(self.stop(member, 0) for member in self._records.members_of(pod)))

    # -- remove

    async def remove_container(self, request: cri.RemoveContainerRequest) -> cri.RemoveContainerResponse:
        """Remove it, by force where it runs. Fine where it isn't known; its log stays, the kubelet removes that."""
        try:
            member = self._records.member(request.container_id)
        except NotFound:
            return cri.RemoveContainerResponse()
        await self.remove(member)
        return cri.RemoveContainerResponse()

    async def remove(self, member: Member) -> None:
        """`remove_container` of one; several at once do it together."""
        removing: asyncio.Task[None] | None = member.transient.get("removing")
        if removing is None:
            removing = asyncio.get_running_loop().create_task(self._remove(member))
            member.transient["removing"] = removing
            removing.add_done_callback(lambda _: member.transient.pop("removing", None))
        await asyncio.shield(removing)

    async def _remove(self, member: Member) -> None:
        await self.stop(member, 0)
        member.facts.removing = True
        reach("cri.remove.stopped")
        try:
            await self._delete_task(member)
            with contextlib.suppress(NotFound):
                await self._client.snapshots(member.facts.snapshotter).remove(member.facts.snapshot)
            reach("cri.remove.unmounted")
            with contextlib.suppress(NotFound):
                await self._client.containers.delete(member.id)
        except BaseException:
            member.facts.removing = False
            raise
        reach("cri.remove.forgotten")
        await self._maker.remove_folder(member)
        self._records.drop_member(member)
        self.stats.forget(member.id)
        self._names.forget({other.facts.image_id for other in self._records.members.values()})
        self._node.events.tell(member.id, cri.CONTAINER_DELETED_EVENT, member.facts.pod)

    async def _delete_task(self, member: Member) -> None:
        """Where there is one. A shim that has just died is cleaned up after by the daemon: that is waited for."""
        for pause in (*_BURIAL, None):
            try:
                await self._client.tasks.delete(member.id)
            except NotFound:
                return
            except Unavailable:
                if pause is None:
                    raise
                await asyncio.sleep(pause)
            else:
                return

    async def remove_all(self, pod: str) -> None:
        """Remove all containers of a pod."""
        await asyncio.gather(*(self.remove(member) for member in self._records.members_of(pod)))

    # -- questions

    def status_of(self, member: Member) -> cri.ContainerStatus:
        """A container's status, as it is known."""
        return container_status.status(member, self._names)

    async def container_status(self, request: cri.ContainerStatusRequest) -> cri.ContainerStatusResponse:
        """Its status, with `verbose` also its specification. Raises NotFound."""
        member = self._records.member(request.container_id)
        await self._names.refresh(member)
        answer = cri.ContainerStatusResponse(status=self.status_of(member))
        if request.verbose:
            record = None
            with contextlib.suppress(NotFound):
                record = await self._client.containers.get(member.id)
            answer.info.update(container_status.info(member, record))
        return answer

    async def list_containers(self, request: cri.ListContainersRequest) -> cri.ListContainersResponse:
        """Those that the filter lets through."""
        found = self._records.find_members(request.filter)
        return cri.ListContainersResponse(containers=[container_status.listed(member) for member in found])

    async def stream_containers(
        self, request: cri.StreamContainersRequest
    ) -> AsyncIterator[cri.StreamContainersResponse]:
        """The same, some at a time."""
        found = self._records.find_members(request.filter)
        for part in batches(found):
            yield cri.StreamContainersResponse(containers=[container_status.listed(member) for member in part])

    # -- changes

    async def update_container_resources(
        self, request: cri.UpdateContainerResourcesRequest
    ) -> cri.UpdateContainerResourcesResponse:
        """Change its limits, those of its next start where it doesn't run. What is 0 stays as it is."""
        member = self._records.member(request.container_id)
        if member.facts.removing:
            raise FailedPrecondition(f'container "{member.id}" is in removing state')
        changed = resources(request.linux, self._node.settings)
        record = await self._client.containers.get(member.id)
        before = record.spec or {}
        spec = json.loads(json.dumps(before))
        _merge(spec.setdefault("linux", {}).setdefault("resources", {}), changed)
        for key, value in request.annotations.items():
            spec.setdefault("annotations", {})[key] = value
        await self._client.containers.update(record._replace(spec=spec), ["spec"])
        if member.state == cri.CONTAINER_RUNNING:
            limits = {name: part for name, part in spec["linux"]["resources"].items() if name in changed}
            try:
                await self._client.tasks.update(member.id, limits, dict(request.annotations))
            except WherryError as error:
                with contextlib.suppress(WherryError):
                    await self._client.containers.update(record._replace(spec=before), ["spec"])
                raise type(error)(f'failed to update resources of container "{member.id}": {error.message}') from error
        _merge_resources(member.config.linux.resources, request.linux)
        await self._records.put_member(member, config=True)
        return cri.UpdateContainerResourcesResponse()

    async def reopen_container_log(self, request: cri.ReopenContainerLogRequest) -> cri.ReopenContainerLogResponse:
        """Have the shim write to a new file under the log's name: the kubelet has moved the old one."""
        member = self._records.member(request.container_id)
        if member.state != cri.CONTAINER_RUNNING:
            raise FailedPrecondition("container is not running: failed precondition")
        await self._client.tasks.reopen_log(member.id)
        return cri.ReopenContainerLogResponse()

    async def checkpoint_container(self, request: cri.CheckpointContainerRequest) -> cri.CheckpointContainerResponse:
        """Write a container's state into an archive; it runs on."""
        member = self._running(request.container_id)
        await self._names.refresh(member)
        shown = self.status_of(member)
        await container_checkpoint.checkpoint(self._node, member, shown, request.location, request.timeout)
        return cri.CheckpointContainerResponse()

    async def exec_sync(self, request: cri.ExecSyncRequest) -> cri.ExecSyncResponse:
        """Run a command in it to its end."""
        return await exec_sync(self._node, self._running(request.container_id), request)

    def _running(self, identity: str) -> Member:
        member = self._records.member(identity)
        if member.state != cri.CONTAINER_RUNNING:
            state = cri.ContainerState.Name(member.state)
            raise FailedPrecondition(f"container is in {state} state: failed precondition")
        return member


def signal_number(text: str) -> int:
    """A signal's number from its number or name (`9`, `KILL`, `SIGKILL`, `SIGRTMIN+3`); raises InvalidArgument."""
    if text.isascii() and text.isdigit():
        return int(text)
    name = text.upper().removeprefix("SIG")
    base, offset = name, 0
    for sign in "+-":
        if sign in name:
            base, _, number = name.partition(sign)
            offset = int(f"{sign}{number}") if number.isdigit() else 0
    try:
        return int(signal.Signals[f"SIG{base}"]) + offset
    except KeyError:
        raise InvalidArgument(f'failed to parse stop signal "{text}": invalid signal: invalid argument') from None


async def _within(seconds: float, event: asyncio.Event) -> bool:
    """Whether it happens in that time."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return event.is_set()
    return True


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Do something that mustn't be left half done, also where the one who asked is gone."""
    task = asyncio.get_running_loop().create_task(work)
    # where nobody waits any more, nobody asks for its error
    task.add_done_callback(lambda done: None if done.cancelled() else done.exception() and None)
    return await asyncio.shield(task)


def _merge(into: dict[str, Any], changed: dict[str, Any]) -> None:
    for name, part in changed.items():
        if isinstance(part, dict):
            into[name] = {**(into.get(name) or {}), **part}
        else:
            into[name] = part


def _merge_resources(into: cri.LinuxContainerResources, changed: cri.LinuxContainerResources) -> None:
    """What is set in the second is set in the first; lists and maps are replaced, not joined."""
    for field, value in changed.ListFields():
        into.ClearField(field.name)
        if hasattr(value, "items"):
            into.unified.update(value)
        elif field.name == "hugepage_limits":
            into.hugepage_limits.extend(value)
        else:
            setattr(into, field.name, value)
