"""Sandboxes: containers for code that nobody trusts, which are gone when their owner is.

    async with Wherry() as wherry:
        async with wherry.sandbox("python:3.12", memory=256 << 20, pids=64, ttl=600) as box:
            print((await box.exec(["python3", "-c", "print(6 * 7)"], timeout=5)).text)

A sandbox idles until it is told to run something; its first process is one of ours (`wherry.core.idle`), so that an
image needs nothing but what is to be run.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from wherry.client import disk as disks
from wherry.client.guest import Guest
from wherry.client.keeper import Record, clear
from wherry.client.launch import Launch, create
from wherry.client.security import default_profile
from wherry.client.spec import SpecOptions
from wherry.client.tasks import Stdio
from wherry.core import idle
from wherry.core.errors import FailedPrecondition, InvalidArgument
from wherry.linux.copying import copy_tree

if TYPE_CHECKING:
    from types import TracebackType

    from wherry.client.api import Client
    from wherry.client.containers import Container
    from wherry.client.disk import Disk
    from wherry.client.keepers import Keeper

LABEL = "wherry.sandbox"
# so many sandboxes of one fork are made at the same time: more only wait for each other
TOGETHER = 4


class Limits(NamedTuple):
    """What a sandbox may use: `memory` and `disk` in bytes, `cpus` in whole CPUs; 0 is no limit.

    `ttl` is how long it lives, in seconds. `disk_kind` is one of `wherry.client.disk.KINDS`, "" the best there is.
    """

    memory: int = 0
    cpus: float = 0.0
    pids: int = 0
    disk: int = 0
    ttl: float = 0.0
    disk_kind: str = ""


class Plan(NamedTuple):
    """What a sandbox is made of; its forks are made of the same."""

    image: str
    limits: Limits
    env: Mapping[str, str] = MappingProxyType({})
    cwd: str = ""
    user: str | None = None
    hostname: str = ""
    mounts: Sequence[Mapping[str, Any]] = ()
    read_only: bool = False
    seccomp: bool = True
    net_host: bool = False

    def launch(self, identity: str, program: str) -> Launch:
        """The container, whose first process is the idle program at this path of the host."""
        spec = SpecOptions(
            args=[idle.INSIDE],
            env=[f"{name}={value}" for name, value in self.env.items()],
            cwd=self.cwd,
            hostname=self.hostname or "sandbox",
            mounts=[*self.mounts, idle.mount(program)],
            memory=self.limits.memory,
            cpus=self.limits.cpus,
            pids=self.limits.pids,
            read_only=self.read_only,
            seccomp=self.seccomp,
            apparmor_profile=default_profile() if self.seccomp else "",
            net_host=self.net_host,
        )
        return Launch(id=identity, image=self.image, spec=spec, user=self.user, labels={LABEL: str(os.getpid())})


class Sandbox(Guest):
    """A sandbox that runs. `async with` it, or `close` it; with the `Wherry` that made it, it goes as well."""

    def __init__(self, client: Client, container: Container, plan: Plan, disk: Disk, place: _Place) -> None:
        super().__init__(client, container)
        self.plan = plan
        self.disk = disk
        self._place = place
        self._closed = False
        # CLOCK_MONOTONIC at which it ends, infinite without a limit
        self.ends = time.monotonic() + plan.limits.ttl if plan.limits.ttl else float("inf")
        # set by who closes it with other things: what is to be told of forks, and of the end
        self.adopt: Callable[..., None] = lambda *_: None
        self.disown: Callable[[Sandbox], None] = lambda _: None

    async def close(self) -> None:
        """Removes it with everything in it. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self.disown(self)
        await asyncio.shield(self._place.clear(self.client))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def fork(self, copies: int = 1) -> list[Sandbox]:
        """`copies` sandboxes whose files are what this one's are at this moment. Files only: no process is copied,
        each begins idle; what lies on a tmpfs of the container (/dev/shm) or in a mount is not copied either.

        All processes of this one stand still while what it changed since the image is copied once; the other copies
        are made of the first one, while it goes on. Where the file system shares blocks (XFS, btrfs) a copy costs
        some system calls for each file, else the time to copy each changed byte (`docs/client.md` has figures). The
        forks have the same limits, and a whole life of their own. Raises what making a sandbox raises; then none is
        left.
        """
        if copies < 1:
            raise InvalidArgument(f"{copies} copies of a sandbox make no sense: at least 1")
        source = self.disk.upper
        if not source:
            raise FailedPrecondition(f"sandbox {self.id} has no directory of its own to copy")
        slots = asyncio.Semaphore(TOGETHER)
        begun = [Making(self.client, self.plan, self._place.keeper) for _ in range(copies)]
        try:
            await _all(slots, [making.prepare for making in begun])
            first = begun[0]
            await self.pause()
            try:
                await asyncio.to_thread(copy_tree, source, first.disk.upper)
            finally:
                await asyncio.shield(self.resume())
            rest = [partial(asyncio.to_thread, copy_tree, first.disk.upper, making.disk.upper) for making in begun[1:]]
            await _all(slots, rest)
            forks: list[Sandbox] = list(await _all(slots, [making.start for making in begun]))
        except BaseException:
            await asyncio.shield(_all(slots, [making.undo for making in begun]))
            raise
        self.adopt(*forks)
        return forks


class _Place:
    """A sandbox's folder on the host, and who cleans it up when we can't."""

    def __init__(self, keeper: Keeper, record: Record) -> None:
        self.keeper = keeper
        self.record = record
        self.folder = os.path.join(keeper.folder, record.id)

    def write(self) -> None:
        """Puts the record down before anything else is made."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        self.record.write(self.folder)

    async def clear(self, client: Client) -> None:
        """Removes everything; the keeper goes on trying where that fails."""
        await clear(client, self.record, self.folder)
        self.keeper.forget(self.record.id)


class Making:
    """A sandbox on its way, in two steps: `prepare` makes container and disk, `start` its task."""

    disk: Disk

    def __init__(self, client: Client, plan: Plan, keeper: Keeper) -> None:
        self._client = client
        self._plan = plan
        self._keeper = keeper
        self._place: _Place | None = None
        self._container: Container | None = None

    async def prepare(self) -> None:
        """Up to the point where its files could be changed by us."""
        keeper, plan = self._keeper, self._plan
        await keeper.start()
        name = f"sandbox-{os.urandom(8).hex()}"
        record = Record(keeper.address, self._client.namespace, name, keeper.pid, keeper.started)
        self._place = place = _Place(keeper, record)
        place.write()
        keeper.remember(name, plan.limits.ttl)
        launched = await create(self._client, plan.launch(name, keeper.idle))
        self._container = launched.container
        self.disk = await asyncio.to_thread(
            disks.limited, launched.mounts, plan.limits.disk, place.folder, plan.limits.disk_kind
        )
        place.record = record._replace(
            snapshotter=launched.container.snapshotter,
            upper=self.disk.upper,
            place=self.disk.place,
            project=self.disk.project,
        )
        place.write()

    async def start(self) -> Sandbox:
        """Its first process runs, and does nothing."""
        if self._container is None or self._place is None:
            raise FailedPrecondition("a sandbox is prepared before it is started")
        await self._client.tasks.create(self._container.id, self.disk.mounts, Stdio())
        await self._client.tasks.start(self._container.id)
        return Sandbox(self._client, self._container, self._plan, self.disk, self._place)

    async def undo(self) -> None:
        """Removes what was made so far."""
        if self._place is None:
            return
        if self._container is not None and not self._place.record.snapshotter:
            self._place.record = self._place.record._replace(snapshotter=self._container.snapshotter)
        await self._place.clear(self._client)


async def make(client: Client, plan: Plan, keeper: Keeper) -> Sandbox:
    """A sandbox; nothing is left of it where this raises."""
    making = Making(client, plan, keeper)
    try:
        await making.prepare()
        return await making.start()
    except BaseException:
        await asyncio.shield(making.undo())
        raise


async def _all(slots: asyncio.Semaphore, calls: Sequence[Any]) -> Sequence[Any]:
    """The results of all calls, a few at a time; the first error, when all have ended."""

    async def one(call: Any) -> Any:
        async with slots:
            return await call()

    done = await asyncio.gather(*(one(call) for call in calls), return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return done
