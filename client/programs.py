"""Processes in containers for programs with asyncio: made, fed, read, waited for, and always cleaned up.

async with run(client, Launch(id="box", image="busybox", spec=SpecOptions(args=["cat"]))) as program:
    await program.write(b"hello")
    await program.close_stdin()
    print(await program.stdout.read(), (await program.wait()).status)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal as signals
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from wherry.client.fifos import Fifos
from wherry.client.launch import create, remove
from wherry.core.errors import FailedPrecondition, NotFound, Unavailable, WherryError

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.containers import Container
    from wherry.client.launch import Launch
    from wherry.client.tasks import Exit

# seconds that a daemon may be away while its containers run on, and between two tries to reach it
AWAY = 60.0
RETRY = 0.1


class Program:
    """A process that was created in a container. `stdout` and `stderr` end when it closes them."""

    def __init__(self, client: Client, container: Container, fifos: Fifos, exec_id: str = "") -> None:
        self.container = container
        self.exec_id = exec_id
        self.pid = 0
        self.stdout = asyncio.StreamReader()
        self.stderr = asyncio.StreamReader()
        self._client = client
        self._fifos = fifos
        self._transports: list[asyncio.BaseTransport] = []
        self._end: asyncio.Task[Exit] | None = None

    async def start(self) -> None:
        """Starts the process; from then on `wait` knows of its end. Raises what the runtime says."""
        loop = asyncio.get_running_loop()
        for descriptor, reader in ((self._fifos.stdout, self.stdout), (self._fifos.stderr, self.stderr)):
            if descriptor < 0:
                reader.feed_eof()
                continue
            # the transport owns and closes what it is given
            file = os.fdopen(os.dup(descriptor), "rb", 0)
            transport, _ = await loop.connect_read_pipe(partial(asyncio.StreamReaderProtocol, reader), file)
            self._transports.append(transport)
        first = self._client.tasks.waiting(self.container.id, self.exec_id)
        self._end = asyncio.create_task(self._wait(first))
        self.pid = await self._client.tasks.start(self.container.id, self.exec_id)

    async def _wait(self, pending: Any) -> Exit:
        """The end of the process, also over restarts of the daemon."""
        tasks, lost = self._client.tasks, 0.0
        while True:
            try:
                exit_: Exit = await pending.result()
                return exit_
            except Unavailable:
                if lost > AWAY:
                    raise
            lost += RETRY
            await asyncio.sleep(RETRY)
            pending = tasks.waiting(self.container.id, self.exec_id)

    async def wait(self) -> Exit:
        """Waits for the end of the process."""
        if self._end is None:
            raise FailedPrecondition(f"the process of {self.container.id} wasn't started")
        return await asyncio.shield(self._end)

    async def write(self, data: bytes) -> None:
        """Gives the process input; waits while it doesn't read."""
        view = memoryview(data)
        while view:
            if self._fifos.stdin < 0:
                raise FailedPrecondition("the input of the process was closed")
            try:
                view = view[os.write(self._fifos.stdin, view) :]
            except BlockingIOError:
                await _writable(self._fifos.stdin)

    async def close_stdin(self) -> None:
        """Ends the input of the process."""
        self._fifos.close_stdin()
        with contextlib.suppress(NotFound):
            await self._client.tasks.close_stdin(self.container.id, self.exec_id)

    async def kill(self, signal: int = signals.SIGTERM) -> None:
        """Sends a signal; raises NotFound when it has ended."""
        await self._client.tasks.kill(self.container.id, signal, self.exec_id)

    async def close(self) -> None:
        """Kills the process where it runs and removes it from the daemon."""
        tasks = self._client.tasks
        try:
            if self._end is not None and not self._end.done():
                with contextlib.suppress(WherryError):
                    await tasks.kill(self.container.id, signals.SIGKILL, self.exec_id, every=not self.exec_id)
                    await self._end
            if self._end is not None:
                self._end.cancel()
            with contextlib.suppress(NotFound):
                await tasks.delete(self.container.id, self.exec_id)
        finally:
            for transport in self._transports:
                transport.close()
            self._fifos.close()


async def _writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(descriptor, ready.set_result, None)
    try:
        await ready
    finally:
        loop.remove_writer(descriptor)


@asynccontextmanager
async def run(client: Client, launch: Launch, *, fifo_dir: str = "") -> AsyncIterator[Program]:
    """A container that runs for the time of the block; afterwards nothing is left of it, whatever happened."""
    launched = await create(client, launch)
    try:
        terminal = bool(((launched.container.spec or {}).get("process") or {}).get("terminal"))
        fifos = Fifos(launched.container.id, stdin=True, terminal=terminal, parent=fifo_dir)
        program = Program(client, launched.container, fifos)
        try:
            await client.tasks.create(launched.container.id, launched.mounts, fifos.stdio)
            await program.start()
            yield program
        finally:
            await asyncio.shield(program.close())
    finally:
        await asyncio.shield(remove(client, launched.container))


@asynccontextmanager
async def execute(
    client: Client,
    container: Container,
    args: Sequence[str],
    *,
    fifo_dir: str = "",
    stdin: bool = True,
    **changes: Any,
) -> AsyncIterator[Program]:
    """A further process in a container that runs; `changes` are fields of the specification's `process` (`cwd` …).

    Without `stdin` its input is empty.
    """
    if container.spec is None:
        raise FailedPrecondition(f"container {container.id} has no OCI specification to take the process from")
    process = {**container.spec["process"], "terminal": False, "args": list(args), **changes}
    name = f"e{os.urandom(6).hex()}"
    fifos = Fifos(name, stdin=stdin, terminal=bool(process["terminal"]), parent=fifo_dir)
    program = Program(client, container, fifos, name)
    try:
        await client.tasks.exec(container.id, name, process, fifos.stdio)
        await program.start()
        yield program
    finally:
        await asyncio.shield(program.close())
