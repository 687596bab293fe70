"""The daemon's side of the worker: started when it is needed, sent away when nothing was asked of it for a while."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import sys
from typing import Any

from wherry.core.errors import DeadlineExceeded, Unavailable, from_code

IDLE_SECONDS = 300.0
"""It holds 33 MB, and comes back in a tenth of a second."""
_TIMEOUT = 60.0
"""Seconds for one request: the kernel may be slow, but a worker that is stuck must not hold up the daemon for ever."""
_LINE_LIMIT = 64 << 20


class WorkerClient:
    """Requests to `wherry.network.worker`. For one event loop."""

    def __init__(self, instance: str, hub: str = "", python: str = sys.executable) -> None:
        """`hub` is the file of the network namespace with an ordinary user's bridges, which the worker makes."""
        self._instance, self._hub, self._python = instance, hub, python
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._starting = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def call(self, operation: str, **request: Any) -> Any:
        """Ask for an operation of `worker.Worker`; the answer's value.

        Raises what the operation raises, Unavailable where the worker was killed meanwhile, DeadlineExceeded.
        """
        writer = await self._started()
        identity = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[identity] = future
        try:
            writer.write(json.dumps({"id": identity, "op": operation, **request}).encode() + b"\n")
            async with asyncio.timeout(_TIMEOUT):
                answer = await future
        except TimeoutError:
            await self.close()
            raise DeadlineExceeded(f"the network worker didn't answer to {operation} in {_TIMEOUT:.0f} s") from None
        finally:
            self._waiting.pop(identity, None)
            self._rest()
        if "error" in answer:
            code, text = answer["error"]
            raise from_code(code, text)
        return answer.get("ok")

    async def warm(self) -> None:
        """Start it in advance. Raises Unavailable."""
        await self._started()
        self._rest()

    @property
    def pid(self) -> int | None:
        """Of the process, None without one."""
        return self._process.pid if self._process is not None and self._writer is not None else None

    async def close(self) -> None:
        """Let it go; what it was asked already it still does."""
        if self._idle is not None:
            self._idle.cancel()
        process, self._process = self._process, None
        self._drop()
        if process is not None:
            try:
                async with asyncio.timeout(5):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _started(self) -> asyncio.StreamWriter:
        async with self._starting:
            if self._idle is not None:
                self._idle.cancel()
            if self._writer is None:
                self._writer = await self._start()
            return self._writer

    async def _start(self) -> asyncio.StreamWriter:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        with theirs:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    self._python,
                    "-I",
                    "-m",
                    "wherry.network.worker",
                    self._instance,
                    str(theirs.fileno()),
                    *([self._hub] if self._hub else []),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                )
            except OSError as error:
                ours.close()
                raise Unavailable(f"the network worker can't be started: {error}") from error
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_LINE_LIMIT)
        self._reading = asyncio.create_task(self._read(reader, writer))
        return writer

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                answer = json.loads(line)
                future = self._waiting.get(answer["id"])
                if future is not None and not future.done():
                    future.set_result(answer)
        if self._writer is writer:
            self._drop()

    def _drop(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unavailable("the network worker ended unexpectedly"))

    def _rest(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        if not self._waiting and self._writer is not None:
            loop = asyncio.get_running_loop()
            self._idle = loop.call_later(IDLE_SECONDS, self._retire)

    def _retire(self) -> None:
        if not self._waiting:
            self._drop()
