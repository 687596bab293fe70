"""ExecSync: a command in a container, to its end, with its output; what probes and lifecycle hooks run.

A command that takes longer than it may is killed, and the answer is DEADLINE_EXCEEDED, by which a kubelet knows it from
one that failed. Of its output so much is kept as a message holds, 16 MiB together; what comes after it is read and
dropped. (containerd keeps 16 MiB of each stream, which then it can't send, nor a kubelet receive.)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog

from wherry.client.fifos import Fifos
from wherry.core.durations import parse_duration
from wherry.core.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound, WherryError
from wherry.cri.records import Member
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from wherry.cri.node import Node

log = structlog.get_logger(__name__)

# what a kubelet takes in one message, without what is around the output
LIMIT = (16 << 20) - 4096
SIGKILL = 9
# seconds for a command that was killed to be gone; a shim that doesn't answer is waited for no longer
_KILLED = 5.0
# seconds for the rest of the output when the command has ended: the shim gives up before
_DRAIN = 12.0


class Room:
    """What may still be kept of both streams, in bytes."""

    def __init__(self) -> None:
        self.left = LIMIT


class Output(asyncio.Protocol):
    """One stream: what came of it, as long as there is room, and its end."""

    def __init__(self, room: Room) -> None:
        self.data = bytearray()
        self.ended = asyncio.Event()
        self._room = room

    def data_received(self, data: bytes) -> None:
        """Keep what fits."""
        kept = data[: self._room.left]
        self.data += kept
        self._room.left -= len(kept)

    def eof_received(self) -> None:
        """Nobody writes any more."""
        self.ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """That was all."""
        self.ended.set()


async def exec_sync(node: Node, member: Member, request: cri.ExecSyncRequest) -> cri.ExecSyncResponse:
    """Run `request.cmd`. Raises DeadlineExceeded after `request.timeout` seconds (0: never), NotFound, and what the
    runtime says of a command that can't be run."""
    if not request.cmd:
        raise InvalidArgument("command must not be empty: invalid argument")
    if request.timeout < 0:
        raise InvalidArgument(f"timeout {request.timeout} is negative: invalid argument")
    process = await _process(node, member)
    running = _Exec(node, member, {**process, "args": list(request.cmd), "terminal": False})
    try:
        async with asyncio.timeout(request.timeout or None):
            code = await running.run()
    except TimeoutError:
        await asyncio.shield(running.kill())
        raise DeadlineExceeded(
            f"failed to exec in container: timeout {request.timeout}s exceeded: context deadline exceeded"
        ) from None
    except asyncio.CancelledError:
        await asyncio.shield(running.kill())
        raise
    except WherryError as error:
        await asyncio.shield(running.kill())
        raise type(error)(f"failed to exec in container: {error.message}") from error
    return cri.ExecSyncResponse(stdout=bytes(running.stdout.data), stderr=bytes(running.stderr.data), exit_code=code)


def folder(node: Node) -> str:
    """Where the FIFOs of commands are; what is there when a daemon starts, nobody reads any more."""
    return os.path.join(node.places.state, "cri", "exec")


async def _process(node: Node, member: Member) -> Mapping[str, Any]:
    """The container's own process, which commands are like; it doesn't change while the container is there."""
    known: Mapping[str, Any] | None = member.transient.get("process")
    if known is None:
        record = await node.client.containers.get(member.id)
        if record.spec is None:
            raise FailedPrecondition(f'container "{member.id}" has no OCI specification: failed precondition')
        known = member.transient["process"] = dict(record.spec["process"])
    return known


class _Exec:
    """One command."""

    def __init__(self, node: Node, member: Member, process: Mapping[str, Any]) -> None:
        room = Room()
        self.stdout, self.stderr = Output(room), Output(room)
        self._node = node
        self._member = member
        self._process = process
        self._id = os.urandom(32).hex()
        self._transports: list[asyncio.BaseTransport] = []
        self._made = self._started = False

    async def run(self) -> int:
        """To its end and that of its output; the exit code."""
        tasks, identity = self._node.client.tasks, self._member.id
        fifos = Fifos(self._id, stdin=False, parent=folder(self._node))
        try:
            await self._listen(fifos)
            await tasks.exec(identity, self._id, self._process, fifos.stdio)
            self._made = True
            pending = tasks.waiting(identity, self._id)
            try:
                await tasks.start(identity, self._id)
                self._started = True
                ended = await pending.result()
            except BaseException:
                pending.cancel()
                raise
            self._started = False
            await self._drained()
        finally:
            for transport in self._transports:
                transport.close()
            fifos.close()
        return ended.status

    async def _listen(self, fifos: Fifos) -> None:
        loop = asyncio.get_running_loop()
        for descriptor, output in ((fifos.stdout, self.stdout), (fifos.stderr, self.stderr)):
            file = os.fdopen(os.dup(descriptor), "rb", 0)  # the transport closes what it is given
            transport, _ = await loop.connect_read_pipe(lambda to=output: to, file)  # type: ignore[misc]
            self._transports.append(transport)

    async def _drained(self) -> None:
        """Delete the process, which has the shim copy what waits and close the streams, then read to their end.

        A process in the background may hold them open: it is not waited for longer than the shim does, or than
        `drain_exec_sync_io_timeout` says.
        """
        limit = parse_duration(self._node.settings.drain_exec_sync_io_timeout) or _DRAIN
        try:
            async with asyncio.timeout(limit):
                with contextlib.suppress(NotFound):
                    await self._node.client.tasks.delete(self._member.id, self._id)
                self._made = False
                await self.stdout.ended.wait()
                await self.stderr.ended.wait()
        except TimeoutError:
            log.warning("the output of a command has no end", id=self._member.id, exec_id=self._id)
            self._later(self._delete())

    async def kill(self) -> None:
        """End what was begun, and see that nothing is left of it."""
        if not self._made:
            return
        try:
            async with asyncio.timeout(_KILLED):
                await self._delete()
        except TimeoutError:
            self._later(self._delete())

    async def _delete(self) -> None:
        tasks = self._node.client.tidying().tasks
        with contextlib.suppress(WherryError):
            if self._started:
                await tasks.kill(self._member.id, SIGKILL, self._id)
                await tasks.wait(self._member.id, self._id)
            await tasks.delete(self._member.id, self._id)

    def _later(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        _LATER.add(task)
        task.add_done_callback(_LATER.discard)


_LATER: set[asyncio.Task[None]] = set()
