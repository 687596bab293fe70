"""What exec and attach stream from and to: a further process of a container, or the streams of its first one.

Both are FIFOs between the daemon and the container's shim. A client that goes away takes its streams with it, not the
process, whose output is then read and dropped; a process on a terminal is told of it by SIGHUP, as by any terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Iterable, Mapping
from typing import Any, Final

import structlog

from wherry.client.api import Client
from wherry.client.fifos import Fifos
from wherry.client.tasks import Stdio
from wherry.core.errors import FailedPrecondition, NotFound, WherryError
from wherry.cri.records import Records
from wherry.cri.streaming.remote import EXEC, Call, Channels, Sink, Sizes, Source
from wherry.proto import cri_pb2 as cri

log = structlog.get_logger(__name__)

_CHUNK: Final = 64 << 10
# seconds without anything to read after a process has ended: then what it left behind holds its streams open
_STILL: Final = 2.0


class Outflow:
    """Moves what a FIFO brings to a client, until its end; drops it where there is no client (any more)."""

    def __init__(self, fd: int, sink: Sink | None) -> None:
        self._fd = fd
        self._sink = sink
        self.moved = 0
        self.asking = False
        """Whether it waits for the FIFO, not for the client."""

    async def run(self) -> None:
        """Until the end."""
        while True:
            self.asking = True
            await _ready(self._fd, writing=False)
            self.asking = False
            try:
                data = os.read(self._fd, _CHUNK)
            except BlockingIOError:
                continue
            if not data:
                return
            self.moved += len(data)
            if self._sink is not None:
                try:
                    await self._sink.write(data)
                except ConnectionError:
                    self._sink = None


async def _ready(fd: int, *, writing: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    watch, forget = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    watch(fd, _settle, ready)
    try:
        await ready
    finally:
        forget(fd)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _feed(source: Source, fd: int) -> None:
    """Move a client's input to a FIFO until its end, or until nobody reads it."""
    while data := await source.read():
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(fd, rest) :]
            except BlockingIOError:
                await _ready(fd, writing=True)
            except BrokenPipeError:
                return


class Processes:
    """Does exec and attach for the streaming server."""

    def __init__(self, client: Client, records: Records, folder: str) -> None:
        """`folder` is for FIFOs; what another daemon left there is removed."""
        self._client = client
        self._records = records
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)

    async def run(self, call: Call, channels: Channels) -> int:
        """A call; its exit code, 0 for attach. Raises WherryError."""
        running(self._records, call.id)
        return await (self._exec if call.kind == EXEC else self._attach)(call, channels)

    # -- exec ------------------------------------------------------------------------------------------------------

    async def _exec(self, call: Call, channels: Channels) -> int:
        tasks, name = self._client.tasks, os.urandom(32).hex()
        spec = (await self._client.containers.get(call.id)).spec
        if spec is None or "process" not in spec:
            raise FailedPrecondition(f"container {call.id} has no OCI specification to take the process from")
        process = process_of(spec["process"], call.command, tty=call.tty)
        with Fifos(name[:12], stdin=call.stdin, terminal=call.tty, parent=self._folder) as fifos:
            await tasks.exec(call.id, name, process, fifos.stdio)
            try:
                pending = asyncio.ensure_future(tasks.waiting(call.id, name).result())
                try:
                    return await self._follow(call, channels, name, fifos, pending)
                finally:
                    pending.cancel()
            finally:
                await asyncio.shield(self._delete(call.id, name))

    async def _follow(
        self, call: Call, channels: Channels, name: str, fifos: Fifos, pending: asyncio.Future[Any]
    ) -> int:
        tasks = self._client.tasks
        outflows = [Outflow(fifos.stdout, channels.stdout)]
        if not call.tty:
            outflows.append(Outflow(fifos.stderr, channels.stderr))
        helpers = [asyncio.create_task(outflow.run()) for outflow in outflows]
        flowing = list(helpers)
        try:
            await tasks.start(call.id, name)
            if channels.sizes is not None:
                helpers.append(asyncio.create_task(self._resize(call.id, channels.sizes, name)))
            if channels.stdin is not None:
                helpers.append(asyncio.create_task(self._feed_exec(call.id, name, channels.stdin, fifos)))
            if call.tty:
                helpers.append(asyncio.create_task(self._hang_up(call.id, name, channels)))
            end = await pending
            await _drained(outflows, flowing)
            if not all(task.done() for task in flowing):
                await self._delete(call.id, name)  # the shim ends its streams
                await asyncio.wait(flowing, timeout=_STILL)
            return int(end.status)
        finally:
            await _ended(helpers)

    async def _feed_exec(self, container: str, name: str, source: Source, fifos: Fifos) -> None:
        await _feed(source, fifos.stdin)
        fifos.close_stdin()
        with contextlib.suppress(WherryError):
            await self._client.tasks.close_stdin(container, name)

    async def _hang_up(self, container: str, name: str, channels: Channels) -> None:
        await asyncio.shield(channels.gone)
        with contextlib.suppress(WherryError):
            await self._client.tasks.kill(container, signal.SIGHUP, name)

    async def _delete(self, container: str, name: str) -> None:
        # it may run on (the daemon stops), be deleted already, or its container may be gone
        with contextlib.suppress(WherryError):
            await self._client.tasks.delete(container, name)

    async def _resize(self, container: str, sizes: Sizes, name: str = "") -> None:
        async for width, height in sizes:
            with contextlib.suppress(WherryError):
                await self._client.tasks.resize(container, width, height, name)

    # -- attach ----------------------------------------------------------------------------------------------------

    async def _attach(self, call: Call, channels: Channels) -> int:
        member = self._records.member(call.id)
        tty, once = member.config.tty, member.config.stdin_once
        task = await self._client.tasks.get(member.id)
        pending = asyncio.ensure_future(self._client.tasks.waiting(member.id).result())
        helpers: list[asyncio.Task[Any]] = []
        with Fifos("attach", stdin=False, terminal=tty, parent=self._folder) as fifos:
            try:
                outflows = [Outflow(fifos.stdout, channels.stdout)] if channels.stdout is not None else []
                if channels.stderr is not None and not tty:
                    outflows.append(Outflow(fifos.stderr, channels.stderr))
                flowing = [asyncio.create_task(outflow.run()) for outflow in outflows]
                helpers += flowing
                if flowing:
                    await self._client.tasks.attach(member.id, _wanted(fifos.stdio, channels))
                    fifos.remove()
                if channels.sizes is not None and tty:
                    helpers.append(asyncio.create_task(self._resize(member.id, channels.sizes)))
                feeding: list[asyncio.Task[Any]] = []
                if channels.stdin is not None and task.stdio.stdin:
                    close = once and not tty
                    feed = asyncio.create_task(self._feed_first(member.id, channels.stdin, task.stdio.stdin, close))
                    helpers.append(feed)
                    feeding = [] if close else [feed]
                await asyncio.wait([*flowing, *feeding, channels.gone, pending], return_when=asyncio.FIRST_COMPLETED)
                await self._settle(channels, pending, outflows, flowing, feeding)
            finally:
                await _ended(helpers)
                pending.cancel()
        return 0

    async def _settle(
        self,
        channels: Channels,
        pending: asyncio.Future[Any],
        outflows: list[Outflow],
        flowing: list[asyncio.Task[None]],
        feeding: list[asyncio.Task[Any]],
    ) -> None:
        """Something has ended: the container, a stream of its output, the client, or the client's input."""
        if not channels.gone.done() and not pending.done() and not any(task.done() for task in feeding):
            # a stream of the output: the process closed it or ends, or the shim gave this client up
            ended = asyncio.create_task(asyncio.wait(flowing))
            try:
                first: list[asyncio.Future[Any]] = [ended, channels.gone, *feeding]
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
                if ended.done():
                    await asyncio.wait([pending, channels.gone], timeout=_STILL, return_when=asyncio.FIRST_COMPLETED)
                    if not pending.done() and not channels.gone.done():
                        raise FailedPrecondition(
                            "the output ended here and the container runs: it closed it, or wrote more than was read; "
                            "its log has all of it"
                        )
            finally:
                ended.cancel()
        if pending.done() and not channels.gone.done():
            await _drained(outflows, flowing)

    async def _feed_first(self, container: str, source: Source, path: str, close: bool) -> None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):  # the process has ended, or its input has
                return
            raise
        try:
            await _feed(source, fd)
        finally:
            os.close(fd)
        if close:
            with contextlib.suppress(WherryError):
                await self._client.tasks.close_stdin(container)


def _wanted(stdio: Stdio, channels: Channels) -> Stdio:
    return Stdio(
        "",
        stdio.stdout if channels.stdout is not None else "",
        stdio.stderr if channels.stderr is not None else "",
        stdio.terminal,
    )


async def _drained(outflows: list[Outflow], flowing: list[asyncio.Task[None]]) -> None:
    """Wait for the end of what flows; not for what a process holds open that was left behind."""
    while any(not task.done() for task in flowing):
        before = sum(outflow.moved for outflow in outflows)
        await asyncio.wait(flowing, timeout=_STILL)
        stuck = all(outflow.asking for outflow, task in zip(outflows, flowing, strict=True) if not task.done())
        if stuck and before == sum(outflow.moved for outflow in outflows):
            return


async def _ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            log.warning("streaming", error=repr(result))


def process_of(process: Mapping[str, Any], command: Iterable[str], *, tty: bool) -> dict[str, Any]:
    """A process like the container's own, with another command."""
    made = {**process, "args": list(command), "terminal": tty}
    if tty:
        env = [item for item in process.get("env") or [] if not item.startswith("TERM=")]
        made["env"] = [*env, "TERM=xterm"]
    else:
        made.pop("consoleSize", None)
    return made


def running(records: Records, container: str) -> str:
    """The whole id of a container that runs. Raises NotFound, FailedPrecondition."""
    member = records.member(container)
    if member.state != cri.CONTAINER_RUNNING:
        raise FailedPrecondition(f"container is in {cri.ContainerState.Name(member.state)} state")
    return member.id


async def netns_of(records: Records, pod: str) -> str:
    """The network namespace of a pod that is ready, "" for the host's. Raises NotFound, FailedPrecondition."""
    found = records.pod(pod)
    if found.facts.state != "ready":
        raise FailedPrecondition(f"sandbox container {found.id!r} is not running")
    if found.facts.netns and not os.path.exists(found.facts.netns):  # noqa: ASYNC240 - in /run
        raise NotFound(f"the network namespace of sandbox {found.id!r} is gone: not found")
    return found.facts.netns
