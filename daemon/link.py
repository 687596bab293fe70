"""One shim as the daemon sees it: its connection, its bundle, and the limits of talking to it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

from google.protobuf.message import Message

from wherry.core.errors import DeadlineExceeded, NotFound, Unavailable, WherryError
from wherry.daemon.bundle import Bundle, Launch
from wherry.daemon.config import Config
from wherry.proto import task_v2_pb2 as _v2  # noqa: F401  # registers the messages of shims that speak version 2
from wherry.proto import task_v3_pb2 as task
from wherry.proto.service import GRPC_NAMESPACE, TTRPC_NAMESPACE
from wherry.proto.ttrpc.calls import ClientClosed
from wherry.proto.ttrpc.client import TtrpcClient
from wherry.shim.client import Bootstrap, DeadShim, ShimLog

SANDBOX = "containerd.runtime.sandbox.v1.Sandbox"  # the service of a shim that holds a pod

Key = tuple[str, str]  # namespace, id
R = TypeVar("R", bound=Message)

# a process that forks while it is looked for is found in the next round; what was killed is seen until it is reaped
_KILL_ROUNDS = 20

_USUAL = -1.0  # stands for `Limits.call`


@dataclass(frozen=True)
class Limits:
    """Deadlines in seconds; their names in containerd's table `[timeouts]` beside them, two of which are ours.

    `call` is for what has no other: the shim's work is local and short, a loaded machine is slow. `create` is for
    Create and for Start (mounts, hooks, the runtime's set-up): less than the two minutes after which a kubelet gives
    up, so that it hears why.
    """

    load: float = 5.0  # io.containerd.timeout.shim.load
    cleanup: float = 5.0  # io.containerd.timeout.shim.cleanup
    shutdown: float = 3.0  # io.containerd.timeout.shim.shutdown
    state: float = 2.0  # io.containerd.timeout.task.state
    call: float = 30.0  # io.wherry.timeout.task.call
    create: float = 100.0  # io.wherry.timeout.task.create

    @classmethod
    def of(cls, config: Config) -> Limits:
        """The limits that the configuration sets."""
        prefix = "io.containerd.timeout"
        return cls(
            config.timeout(f"{prefix}.shim.load", cls.load),
            config.timeout(f"{prefix}.shim.cleanup", cls.cleanup),
            config.timeout(f"{prefix}.shim.shutdown", cls.shutdown),
            config.timeout(f"{prefix}.task.state", cls.state),
            config.timeout("io.wherry.timeout.task.call", cls.call),
            config.timeout("io.wherry.timeout.task.create", cls.create),
        )


class Connection(Protocol):
    """A connection to a shim, whichever protocol it speaks."""

    @property
    def closed(self) -> bool:
        """Whether it has ended."""

    async def wait_closed(self) -> WherryError:
        """Wait for its end; the reason."""

    async def close(self) -> None:
        """End it."""

    async def call(
        self,
        service: str,
        name: str,
        request: Message,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - the shim is told too
        metadata: Mapping[str, str] | None = None,
    ) -> Message:
        """Call a method. Raises what the shim answered, DeadlineExceeded, Unavailable."""


async def _connect(bootstrap: Bootstrap, limit: float, on_close: Callable[[WherryError], None]) -> Connection:
    if bootstrap.protocol.lower() == "ttrpc":
        return await TtrpcClient.connect(bootstrap.path, limit, on_close=on_close)
    # grpcio is 9 MB and 0.1 s: for who has such a shim
    from wherry.daemon.grpc_shim import GrpcShim  # noqa: PLC0415

    return await GrpcShim.connect(bootstrap.address, limit, on_close)


class Shim:
    """One shim that answers, or did a moment ago. `lost` is done when it died by itself and was cleaned up after."""

    def __init__(self, bundle: Bundle, launch: Launch, bootstrap: Bootstrap, limits: Limits) -> None:
        self.bundle = bundle
        self.launch = launch
        self.bootstrap = bootstrap
        self.limits = limits
        self.shim_log: ShimLog | None = None
        self.pid = 0  # of the container's init, as last heard
        self.single_use = False  # for no other container: it has its own cgroup, or was there before the daemon
        self.lives = 1  # which of its containers this is (`vacant.py`)
        self.mute = False  # its last answer didn't come in time
        self.leaving = False  # it was told to, or is being cleaned up after
        self.exit_published = False
        self.lost: asyncio.Future[DeadShim] = asyncio.get_running_loop().create_future()
        self._client: Connection | None = None
        self._parted = False
        self._service = f"containerd.task.v{bootstrap.version}.Task"
        key = TTRPC_NAMESPACE if bootstrap.protocol.lower() == "ttrpc" else GRPC_NAMESPACE
        self._metadata = {key: bundle.namespace}

    async def connect(self, limit: float, on_close: Callable[[Shim], None]) -> None:
        """Connect within `limit` seconds; `on_close` hears of the connection's end. Raises Unavailable."""
        self._client = await _connect(self.bootstrap, limit, lambda error: on_close(self))

    @property
    def client(self) -> Connection | None:
        """The connection, if there ever was one."""
        return self._client

    def part(self) -> None:
        """Let the connection be another's: the shim has nothing to do with this container any more."""
        self._client, self._parted = None, True

    def take(self, client: TtrpcClient, on_close: Callable[[Shim], None]) -> None:
        """Use a connection that is there already, as `connect` one that it makes."""
        self._client = client
        client.watch(lambda error: on_close(self))

    async def hang_up(self) -> None:
        """Close the connection; the shim goes on."""
        if self._client is not None:
            await self._client.close()
        if self.shim_log is not None:
            self.shim_log.close()

    async def wait_closed(self, limit: float) -> bool:
        """Wait for the shim to hang up, at most `limit` seconds; whether it did."""
        if self._client is None:
            return True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._client.wait_closed(), limit)
            return True
        return False

    @property
    def met(self) -> bool:
        """Whether there ever was a connection."""
        return self._client is not None

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._client is not None and not self._client.closed

    @property
    def key(self) -> Key:
        """Namespace and id."""
        return self.bundle.namespace, self.bundle.id

    async def call(
        self, name: str, request: Message, response: type[R], limit: float | None = _USUAL, service: str = ""
    ) -> R:
        """Call a method of the task service, or of `service`.

        Messages are those of version 3, which version 2 shares on the wire.

        `limit` in seconds, None for what may wait for ever. Raises what the shim answered, DeadlineExceeded when it
        didn't in time, Unavailable when it is gone (or went, and nobody knows what it did), NotFound where it was told
        to leave meanwhile: another request has deleted what is asked about.
        """
        if self._client is None:
            if self._parted:
                raise self.not_found()
            raise Unavailable(f"shim of {self.bundle.id} is not connected: unavailable")
        if limit == _USUAL:
            limit = self.limits.call
        try:
            answer = await self._client.call(
                service or self._service, name, request, timeout=limit, metadata=self._metadata
            )
        except DeadlineExceeded:
            if limit is None:
                raise
            self.mute = True
            which = f" (pid {self.bootstrap.pid})" if self.bootstrap.pid else ""
            raise DeadlineExceeded(
                f"shim of {self.bundle.id}{which} did not answer {name} within {limit:g} s: deadline exceeded"
            ) from None
        except ClientClosed:
            if self.leaving:
                raise self.not_found() from None
            raise Unavailable("the daemon is going down: unavailable") from None
        self.mute = False
        return cast("R", answer)

    def not_found(self) -> NotFound:
        """The task isn't there, or the sandbox, in containerd's words."""
        what = f"sandbox {self.bundle.id}" if self.launch.sandbox else f"task {self.bundle.id} not found"
        return NotFound(f"{what}: not found")

    async def state(self, limit: float, exec_id: str = "") -> task.StateResponse:
        """What the shim says of a process; keeps init's pid."""
        request = task.StateRequest(id=self.bundle.id, exec_id=exec_id)
        state = await self.call("State", request, task.StateResponse, limit)
        if not exec_id:
            self.pid = state.pid
        return state


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are: the folders of bundles, of shims' sockets and of the runtime's state; the daemon's addresses.

    `publish_binary` is a program that a stranger's shim may call to publish an event (`wherryd`).
    """

    tasks: str
    sockets: str
    runtime: str
    publish_binary: str
    grpc_address: str
    ttrpc_address: str
    log_level: str = "info"

    def socket(self, key: Key) -> str:
        """The socket of our own shim for a task: always the same, so that a restart finds one it knows nothing of."""
        return os.path.join(self.sockets, hashlib.sha256("/".join(key).encode()).hexdigest()[:32])


def kill_remains(namespace: str, identity: str, address: str) -> None:
    """SIGKILL to our own shim of a task and to what it forked and what has not become a container yet, by their titles.

    Looks through all processes: for the rare case of a shim that died or doesn't leave.
    """
    title = f"containerd-shim-wherry-v1 -namespace {namespace} -id {identity} -address {address}".encode().split()
    for _ in range(_KILL_ROUNDS):
        found = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if _command_line(pid)[: len(title)] == title]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _command_line(pid: str) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read(4096).replace(b"\0", b" ").split()
    except OSError:
        return []  # gone meanwhile
