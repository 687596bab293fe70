"""The daemon's side of shims: the fork server, and the start protocol of shims that are somebody else's.

`ForkServer` owns one process that was started by exec (`python -I -m wherry.shim.forkserver`) and speaks with it over a
socket pair of type SOCK_SEQPACKET in lists of strings (`wherry.shim.words`); answers come in any order.
When it dies, the next request starts another one; shims live on, they are children of init.

Imports asyncio and the messages, nothing of the runtime: what a shim needs is loaded in the fork server only.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from wherry.core import errors
from wherry.shim import forkserver
from wherry.shim.foreign import (
    DELETE_TIMEOUT,
    TASK_API_VERSION,
    Bootstrap,
    ForeignShim,
    ShimLog,
    delete_shim,
    parse_start_response,
    start_foreign_shim,
)
from wherry.shim.words import REUSE, ShimWords, join, split

__all__ = [
    "REUSE",
    "Bootstrap",
    "DeadShim",
    "ForeignShim",
    "ForkServer",
    "ShimLog",
    "ShimRequest",
    "delete_shim",
    "parse_start_response",
    "start_foreign_shim",
]

# a fork takes 2 ms; what takes longer than this is a machine that thrashes or a shim that died before it answered
SPAWN_TIMEOUT: Final = 10.0
_MESSAGE_MAX: Final = 256 * 1024

Log = Callable[[str, Mapping[str, object]], None]
"""`log(event, fields)`: what the fork server's owner wants to know about it."""


@dataclass(frozen=True, slots=True)
class ShimRequest:
    """What a shim is started with.

    `bundle` is an absolute directory that exists; `socket` an absolute path that the shim binds (unix, mode 0600; may
    be longer than 107 bytes). `ttrpc_address` is where events go (the daemon's socket + ".ttrpc"), `grpc_address` the
    daemon's own. `oom_score_adj` None means: as the kernel has it for the daemon's children. `shim_cgroup` is a cgroup
    path the shim moves itself into, "" for none. `state` is where the bundled runtime keeps its state; "" for
    `/run/wherry/runtime/NAMESPACE`.
    """

    namespace: str
    id: str
    bundle: str
    socket: str
    ttrpc_address: str
    grpc_address: str = ""
    log_level: str = "info"
    oom_score_adj: int | None = None
    shim_cgroup: str = ""
    state: str = ""

    @property
    def single_use(self) -> bool:
        """Whether the process becomes what none of its later containers' shims might be."""
        return bool(self.shim_cgroup) or self.oom_score_adj is not None

    def in_bytes(self) -> bytes:
        """The words as they are sent."""
        return join(*self.in_words())

    def in_words(self) -> ShimWords:
        """As the fork server, and a shim that changes its container, are told."""
        return ShimWords(
            namespace=self.namespace,
            id=self.id,
            bundle=self.bundle,
            socket=self.socket,
            ttrpc_address=self.ttrpc_address,
            grpc_address=self.grpc_address,
            log_level=self.log_level,
            oom_score_adj="" if self.oom_score_adj is None else str(self.oom_score_adj),
            shim_cgroup=self.shim_cgroup,
            state=self.state,
        )


@dataclass(frozen=True, slots=True)
class DeadShim:
    """What was left of a container whose shim is gone, now cleaned up.

    `exited_at_ns` in nanoseconds since the epoch. `exit_status` is 137 unless the shim had already written an exit into
    the bundle; `reason` says which.
    """

    pid: int
    exit_status: int
    exited_at_ns: int
    reason: str = ""


class ForkServer:
    """The process that shims are forked from; one for each daemon.

    `await ForkServer.start()` gives one that accepts requests at once (they wait in its socket until it has loaded,
    about 0.2 s). Not safe for threads: belongs to one event loop.
    """

    def __init__(self, log: Log | None = None, python: str = sys.executable) -> None:
        self._log = log or (lambda event, fields: None)
        self._python = python
        self._sequence = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[list[str]]] = {}
        self._outbox: list[bytes] = []
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when `close()` was called, not when a fork server died: another one is started then."""

    @classmethod
    async def start(cls, log: Log | None = None, python: str = sys.executable, *, wait: bool = False) -> ForkServer:
        """Start the process; with `wait` return only when it has loaded everything."""
        server = cls(log, python)
        server._launch()
        if wait:
            await server.ping()
        return server

    @property
    def pid(self) -> int:
        """The pid of the fork server that runs now, 0 when none does."""
        return self._process.pid if self._process is not None and self._control is not None else 0

    def watched(self) -> bool:
        """Whether somebody traces it (`wherry trace`), who wants to see a shim come into being."""
        try:
            with open(f"/proc/{self.pid}/status", "rb") as file:
                return b"TracerPid:\t0\n" not in file.read()
        except OSError:
            return False

    async def ping(self) -> None:
        """Return when the fork server has loaded and answers. Raises Unavailable."""
        await self._call("ping", (), SPAWN_TIMEOUT)

    async def spawn(self, request: ShimRequest) -> Bootstrap:
        """Fork a shim and return when it listens on its socket (about 3 ms).

        A shim that already listens there for the same id (the fork server died between fork and answer) is taken
        over, no second one is made. Raises Unavailable, and what the shim itself ran into (AlreadyExists, Internal).
        """
        pid, path = await self._call("spawn", request.in_words(), SPAWN_TIMEOUT, again=True)
        return Bootstrap("unix://" + path, "ttrpc", TASK_API_VERSION, int(pid))

    async def delete(self, request: ShimRequest) -> DeadShim:
        """Clean up after a shim of ours that died: kill the container, unmount, delete the runtime's state.

        Done in a child of the fork server, with the runtime that the shim noted in the bundle. Idempotent.
        """
        pid, status, at_ns, reason = await self._call("delete", request.in_words(), DELETE_TIMEOUT, again=True)
        return DeadShim(int(pid), int(status), int(at_ns), reason)

    async def close(self) -> None:
        """Let the fork server exit and reap it; shims live on."""
        self._closing = True
        process = self._process
        self._drop("the fork server was closed")
        if process is not None:
            await self._reap(process)
        if not self.closed.done():
            self.closed.set_result(None)

    # -- one process -----------------------------------------------------------------------------------------------

    def _launch(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        with theirs:
            theirs.setblocking(True)
            # elsewhere it would compile all its modules at each start
            optimized = ["-OO"] if forkserver.compiled() or forkserver.keeps_compiled() else []
            try:
                # vfork and exec: no Python runs between (preexec_fn would fork with the threads of gRPC around)
                self._process = subprocess.Popen(
                    [
                        *(self._python, "-I", *optimized, "-m", "wherry.shim.forkserver"),
                        *("--control-fd", str(theirs.fileno())),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            except OSError as error:
                ours.close()
                raise errors.Unavailable(f"the fork server could not be started: {error}") from error
        self._control = ours
        asyncio.get_running_loop().add_reader(ours, self._readable, ours)
        self._log("fork server started", {"pid": self._process.pid})

    def _readable(self, control: socket.socket) -> None:
        while True:
            try:
                data = control.recv(_MESSAGE_MAX)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._died(control)
                return
            self._answered(data)

    def _answered(self, data: bytes) -> None:
        sequence, code, *words = split(data)
        future = self._waiting.pop(sequence, None)
        if future is None or future.done():
            return
        if code:
            future.set_exception(errors.from_code(int(code), words[0]))
        else:
            future.set_result(words)

    def _died(self, control: socket.socket) -> None:
        if control is not self._control:
            return
        process = self._process
        self._drop("the fork server died")
        if process is not None and not self._closing:
            self._log("fork server died", {"pid": process.pid})
            task = asyncio.get_running_loop().create_task(self._reap(process))
            task.add_done_callback(lambda done: done.exception())

    def _drop(self, why: str) -> None:
        control, self._control = self._control, None
        if control is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(control)
            loop.remove_writer(control)
            control.close()
        self._outbox.clear()
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(_Gone(why))

    async def _reap(self, process: subprocess.Popen[bytes]) -> None:
        # it exits at the end of its control socket; wait a little for that, then insist
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            process.poll()
            return
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, ended.set)
        try:
            try:
                async with asyncio.timeout(2.0):
                    await ended.wait()
            except TimeoutError:
                process.kill()
                await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            process.poll()

    # -- one request -----------------------------------------------------------------------------------------------

    async def _call(self, operation: str, words: Sequence[str], within: float, *, again: bool = False) -> list[str]:
        try:
            return await self._call_once(operation, words, within)
        except _Gone:
            if not again or self._closing:
                raise
            return await self._call_once(operation, words, within)

    async def _call_once(self, operation: str, words: Sequence[str], within: float) -> list[str]:
        if self._closing:
            raise errors.Unavailable("the fork server was closed")
        if self._control is None:
            self._launch()
        sequence = str(next(self._sequence))
        future: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._waiting[sequence] = future
        self._outbox.append(join(operation, sequence, *words))
        self._flush()
        try:
            async with asyncio.timeout(within):
                return await future
        except TimeoutError:
            raise errors.Unavailable(f"the fork server did not answer within {within:.0f} s") from None
        finally:
            self._waiting.pop(sequence, None)

    def _flush(self) -> None:
        control = self._control
        if control is None:
            return
        loop = asyncio.get_running_loop()
        while self._outbox:
            try:
                control.send(self._outbox[0])
            except BlockingIOError:
                loop.add_writer(control, self._flush)
                return
            except OSError:
                self._died(control)
                return
            self._outbox.pop(0)
        loop.remove_writer(control)


class _Gone(errors.Unavailable):
    """The fork server went away under a request."""
