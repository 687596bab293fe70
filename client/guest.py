"""What a program does with a container that runs, whoever started it: commands, files, limits, figures."""

from __future__ import annotations

import asyncio
import contextlib
import signal as signals
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from wherry.client.failures import CommandFailed, OutOfMemory, TimedOut
from wherry.client.files import Root
from wherry.client.programs import Program, execute
from wherry.client.spec import CPU_PERIOD, merge_env
from wherry.client.usage import Usage, usage
from wherry.core.errors import InvalidArgument, NotFound, WherryError

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.containers import Container

# of what a command writes, this much is kept for each of its streams: a program must not grow with what it runs
OUTPUT = 16 << 20
_CHUNK = 1 << 16
_KILLED = 128 + signals.SIGKILL


class Completed(NamedTuple):
    """A command that ended: its exit code (128 + N after signal N) and what it wrote.

    `truncated` says that it wrote more than was to be kept.
    """

    args: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False
    oom_killed: bool = False

    @property
    def text(self) -> str:
        """Standard output as text, without the last line's end."""
        return self.stdout.decode(errors="replace").removesuffix("\n")

    def check(self) -> Self:
        """This, where the exit code is 0; else raises OutOfMemory or CommandFailed."""
        if self.status == 0:
            return self
        if self.oom_killed:
            raise OutOfMemory(self.args, self.status, self.stdout, self.stderr, "was killed over the memory limit")
        raise CommandFailed(self.args, self.status, self.stdout, self.stderr)


class Guest:
    """A container with a task that runs."""

    def __init__(self, client: Client, container: Container) -> None:
        """Nothing is asked here; `container` is the record, with its specification."""
        self.client = client
        self.container = container

    @property
    def id(self) -> str:
        """The container's id in its namespace."""
        return self.container.id

    @asynccontextmanager
    async def process(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str] = MappingProxyType({}),
        cwd: str = "",
        user: tuple[int, int] | None = None,
        tty: bool = False,
        stdin: bool = True,
    ) -> AsyncIterator[Program]:
        """A further process for the time of the block: write to it, read `stdout` and `stderr`, wait for it.

        `env` is added to the container's, `user` is a pair of uid and gid; without `stdin` its input is at its end from
        the beginning. It is killed where the block ends first.
        """
        changes = self._changes(env, cwd, user, tty)
        async with execute(self.client, self.container, args, stdin=stdin, **changes) as program:
            yield program

    def _changes(self, env: Mapping[str, str], cwd: str, user: tuple[int, int] | None, tty: bool) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if env:
            process = (self.container.spec or {}).get("process") or {}
            added = [f"{name}={value}" for name, value in env.items()]
            changes["env"] = merge_env(process.get("env") or [], added)
        if cwd:
            changes["cwd"] = cwd
        if user is not None:
            changes["user"] = {"uid": user[0], "gid": user[1]}
        if tty:
            changes["terminal"] = True
        return changes

    async def exec(
        self,
        args: Sequence[str],
        *,
        input: bytes = b"",  # noqa: A002 - as subprocess.run calls it
        timeout: float | None = None,  # noqa: ASYNC109 - what is over time is killed in the container
        env: Mapping[str, str] = MappingProxyType({}),
        cwd: str = "",
        user: tuple[int, int] | None = None,
        output: int = OUTPUT,
        check: bool = False,
    ) -> Completed:
        """Runs a command to its end and returns what it wrote, at most `output` bytes of each stream.

        Raises TimedOut after `timeout` seconds (with what was written until then; the process is killed), and with
        `check` CommandFailed or OutOfMemory for another exit code than 0.
        """
        if isinstance(args, str) or not args:
            raise InvalidArgument(f"a command is a list of words, not {args!r}: ['sh', '-c', …] for a shell")
        words = tuple(args)
        # an input that nobody feeds needs no pipe, and no call that ends it
        async with self.process(words, env=env, cwd=cwd, user=user, stdin=bool(input)) as program:
            stdout, stderr = _Kept(output), _Kept(output)
            feeding = asyncio.create_task(_feed(program, input))
            try:
                async with asyncio.timeout(timeout):
                    await asyncio.gather(stdout.drain(program.stdout), stderr.drain(program.stderr))
                    status = (await program.wait()).status
            except TimeoutError:
                why = f"was killed after {timeout:g} s"
                raise TimedOut(words, _KILLED, stdout.data, stderr.data, why) from None
            finally:
                feeding.cancel()
                await asyncio.gather(feeding, return_exceptions=True)
        killed = status == _KILLED and await self._oom_killed()
        cut = stdout.truncated or stderr.truncated
        completed = Completed(words, status, stdout.data, stderr.data, cut, killed)
        return completed.check() if check else completed

    async def _oom_killed(self) -> bool:
        """Whether the kernel killed something here over the memory limit since the last question."""
        with contextlib.suppress(WherryError):
            found, before = (await self.usage()).oom_kills, self._oom_kills
            self._oom_kills = found
            return found > before
        return False

    _oom_kills = 0

    async def usage(self) -> Usage:
        """What the container uses now."""
        found = await self.client.tasks.metrics([self.id])
        if not found:
            raise NotFound(f"container {self.id} doesn't run: no figures")
        return usage(found[0].data)

    async def pid(self) -> int:
        """The first process, as the host numbers it; raises NotFound where nothing runs."""
        task = await self.client.tasks.get(self.id)
        if not task.pid or task.status == "STOPPED":
            raise NotFound(f"container {self.id} doesn't run")
        return task.pid

    @asynccontextmanager
    async def files(self) -> AsyncIterator[Root]:
        """The container's files, as its processes see them; for many operations in one go. Its calls block."""
        with Root(await self.pid()) as root:
            yield root

    async def read(self, path: str, *, limit: int = 0) -> bytes:
        """A file's content; raises NotFound, FailedPrecondition over `limit` bytes (0: no limit)."""
        async with self.files() as root:
            return await asyncio.to_thread(root.read, path, limit)

    async def write(self, path: str, data: bytes | str, *, mode: int = 0o644, uid: int = 0, gid: int = 0) -> None:
        """Writes a file and makes its folders."""
        raw = data.encode() if isinstance(data, str) else data
        async with self.files() as root:
            await asyncio.to_thread(root.write, path, raw, mode=mode, uid=uid, gid=gid)

    async def fetch(self, path: str, target: str) -> None:
        """Copies a file or a folder of the container to a new path of the host."""
        async with self.files() as root:
            await asyncio.to_thread(root.fetch, path, target)

    async def store(self, source: str, path: str, *, uid: int = 0, gid: int = 0) -> None:
        """Copies a file or a folder of the host into the container."""
        async with self.files() as root:
            await asyncio.to_thread(root.store, source, path, uid=uid, gid=gid)

    async def pause(self) -> None:
        """Freezes all processes."""
        await self.client.tasks.pause(self.id)

    async def resume(self) -> None:
        """Thaws them."""
        await self.client.tasks.resume(self.id)

    async def limit(self, *, memory: int = 0, cpus: float = 0.0, pids: int = 0) -> None:
        """Changes limits while it runs: `memory` in bytes, `cpus` in whole CPUs; 0 leaves one as it is."""
        resources: dict[str, Any] = {}
        if memory:
            resources["memory"] = {"limit": memory}
        if cpus:
            resources["cpu"] = {"quota": int(cpus * CPU_PERIOD), "period": CPU_PERIOD}
        if pids:
            resources["pids"] = {"limit": pids}
        await self.client.tasks.update(self.id, resources)


class _Kept:
    """A stream's first bytes; the rest is read and dropped, so that the writer never waits."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._chunks: list[bytes] = []
        self._have = 0
        self.truncated = False

    @property
    def data(self) -> bytes:
        return b"".join(self._chunks)

    async def drain(self, reader: asyncio.StreamReader) -> None:
        while chunk := await reader.read(_CHUNK):
            kept = chunk[: self._size - self._have]
            if kept:
                self._chunks.append(kept)
                self._have += len(kept)
            self.truncated |= len(kept) < len(chunk)


async def _feed(program: Program, data: bytes) -> None:
    """Input and its end; a process that ends without reading it is no error."""
    if not data:
        return
    with contextlib.suppress(WherryError, OSError):
        await program.write(data)
        await program.close_stdin()
