"""The shims that this daemon has: starting one for a task, reaching it, finding it again, cleaning up after it.

The shim owns its container; what is here is a view that a restart builds anew from the bundles. Each call to a shim has
a deadline, and a shim that dies is noticed by its connection closing:

    start ──► running ──► end (Delete: the shim is told to leave)            bundle gone, nothing reported
                     └──► lost (the connection closed by itself)  ──► clean-up ──► one exit event with status 137
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog
from google.protobuf import any_pb2, empty_pb2

from wherry.core import topics
from wherry.core.errors import (
    AlreadyExists,
    DeadlineExceeded,
    NotFound,
    Unavailable,
    WherryError,
    from_code,
)
from wherry.core.failpoints import reach
from wherry.daemon import logs
from wherry.daemon.bundle import Bundle, Launch, find
from wherry.daemon.ends import Ends
from wherry.daemon.events import Exchange
from wherry.daemon.gate import Gate
from wherry.daemon.link import SANDBOX, Key, Limits, Places, Shim
from wherry.daemon.starting import CONNECT, Starter
from wherry.proto import events_pb2
from wherry.proto import runtime_sandbox_pb2 as sandbox
from wherry.proto import task_v2_pb2 as _v2  # noqa: F401  # registers the messages of shims that speak version 2
from wherry.proto import task_v3_pb2 as task
from wherry.proto.types_pb2 import Envelope
from wherry.shim.client import DeadShim, ForkServer

log = structlog.get_logger(__name__)

T = TypeVar("T")

# containers that are made at the same time, and seconds for which one counts
_AT_ONCE = max(2, len(os.sched_getaffinity(0)))
_SHARE = 0.25
# a shim that said that it leaves tells first what the daemon hasn't confirmed, for 5 s at most (containerd's and ours)
_FLUSH = 6.0
# seconds that a listing waits for shims that the daemon has found at its start and not heard from yet
_LATE = 1.0


class Shims:
    """All shims of one daemon, by namespace and id."""

    def __init__(
        self,
        places: Places,
        limits: Limits,
        exchange: Exchange,
        forks: ForkServer,
        known: Callable[[str, str, bool], bool],
    ) -> None:
        """`known(namespace, id, sandbox)` says whether the record of the container, or of the sandbox, exists.

        What has none is not kept at a load.
        """
        self._places = places
        self._limits = limits
        self._ends = Ends(exchange)
        self._starter = Starter(places, forks)
        self._gate = Gate(_AT_ONCE, _SHARE)
        self._known = known
        self._shims: dict[Key, Shim] = {}
        # keys that a create, an end, a load or a clean-up works on; done when it is over
        self._busy: dict[Key, asyncio.Future[None]] = {}
        self._loading: dict[Key, Shim] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        exchange.watch(topics.TASK_EXIT, self._saw_exit)

    # -- which there are

    async def get(self, namespace: str, id: str) -> Shim:  # noqa: A002 -- the field's name
        """The shim of a task. Raises NotFound in containerd's words."""
        shim = await self._find((namespace, id))
        if shim is None or shim.launch.sandbox:
            raise NotFound(f"task {id} not found: not found")
        return shim

    async def get_sandbox(self, namespace: str, id: str) -> Shim:  # noqa: A002
        """The shim that holds a sandbox. Raises NotFound."""
        shim = await self._find((namespace, id))
        if shim is None or not shim.launch.sandbox:
            raise NotFound(f"sandbox {id}: not found")
        return shim

    async def _find(self, key: Key) -> Shim | None:
        if key in self._loading:
            await self._settled(key)
        return self._shims.get(key)

    async def list(self, namespace: str) -> list[Shim]:
        """The shims of a namespace, those that the daemon's start is still looking for included.

        It waits for those, but not long: one that doesn't answer may not hide the others.
        """
        found = [key for key in self._loading if key[0] == namespace]
        if found:
            waits = [asyncio.ensure_future(self._settled(key)) for key in found]
            _, late = await asyncio.wait(waits, timeout=_LATE)
            for wait in late:
                wait.cancel()
        shims = {key: shim for key, shim in self._shims.items() if key[0] == namespace}
        for key in found:
            if key in self._loading:
                self._loading[key].mute = True
                shims.setdefault(key, self._loading[key])
        return [shim for shim in shims.values() if not shim.launch.sandbox]

    # -- create

    async def create(
        self,
        bundle: Bundle,
        spec: bytes,
        launch: Launch,
        options: any_pb2.Any,
        request: task.CreateTaskRequest,
        *,
        keep: str = "",
    ) -> Shim:
        """Make the bundle, start a shim, create the task in it; all of it or nothing is left.

        `keep` is a folder that the bundle owns from then on.

        `options` go to a stranger's `start` action, `request` to the shim's Create. A task of a sandbox comes into the
        sandbox's shim. A caller that goes away in the middle leaves nothing either: it was never told that there is a
        task. Raises AlreadyExists, NotFound for a sandbox that isn't there, and what the shim or its start ran into, in
        containerd's words.
        """

        async def make(shim: Shim) -> int:
            if keep:
                bundle.keep(keep)
            try:
                return (await shim.call("Create", request, task.CreateTaskResponse, shim.limits.create)).pid
            except WherryError as error:
                raise from_code(error.code, f"failed to create shim task: {error.message}") from error

        return await self._make(bundle, spec, launch, options, make)

    async def create_sandbox(
        self, bundle: Bundle, spec: bytes, launch: Launch, options: any_pb2.Any, request: sandbox.CreateSandboxRequest
    ) -> Shim:
        """As `create`, for a sandbox. `launch.sandbox` is true."""

        async def make(shim: Shim) -> int:
            try:
                await shim.call("CreateSandbox", request, sandbox.CreateSandboxResponse, shim.limits.create, SANDBOX)
            except WherryError as error:
                raise from_code(error.code, f"failed to create sandbox {bundle.id}: {error.message}") from error
            return 0

        return await self._make(bundle, spec, launch, options, make)

    async def _make(
        self, bundle: Bundle, spec: bytes, launch: Launch, options: any_pb2.Any, make: Callable[[Shim], Awaitable[int]]
    ) -> Shim:
        work = self._spawn(self._create(bundle, spec, launch, options, make))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(self._discard_unwanted)
            raise

    async def _create(
        self, bundle: Bundle, spec: bytes, launch: Launch, options: any_pb2.Any, make: Callable[[Shim], Awaitable[int]]
    ) -> Shim:
        key = bundle.namespace, bundle.id
        async with self._working(key):
            if key in self._shims:
                what = "sandbox" if launch.sandbox else "task"
                raise AlreadyExists(f"{what} {bundle.id}: already exists")
            host = await self.get_sandbox(key[0], launch.host) if launch.host else None
            bundle.create(spec, launch)
            reach("daemon.create.bundled")
            shim = Shim(bundle, launch, self._starter.planned(bundle, launch), self._limits)
            try:
                async with self._gate.turn():
                    began = time.perf_counter()
                    async with self._group(shim):
                        shim = await self._starter.start(shim, options, self._closed, host)
                    launched = time.perf_counter()
                    shim.pid = await make(shim)
                reach("daemon.create.created")
            except BaseException:
                await self._undo(shim)
                raise
            self._shims[key] = shim
            if logs.is_debug():
                took = {"launch_ms": launched - began, "create_ms": time.perf_counter() - launched}
                log.debug("task created", id=bundle.id, **{name: round(s * 1000, 2) for name, s in took.items()})
            return shim

    async def _undo(self, shim: Shim) -> None:
        """Take back a shim whose task was not created. A failure here is logged: the first error is the one to tell."""
        shim.leaving = True
        try:
            if not shim.met and not shim.launch.binary:
                with contextlib.suppress(WherryError):  # it may have been forked although the answer never came
                    await shim.connect(CONNECT, self._closed)
            if self._starter.shared(shim):  # the shim stays; a create that came too late must not
                await self._end_task(shim)
            if not await self._leave(shim, now=True):
                # it died or was killed, perhaps while it made the container; what it forked may still hold its socket
                await self._starter.delete(shim, self._limits.cleanup)
        except (WherryError, OSError) as error:
            log.error("could not take back a shim", namespace=shim.key[0], id=shim.key[1], error=str(error))
        await self._remove(shim)

    def _discard_unwanted(self, work: asyncio.Task[Shim]) -> None:
        if work.cancelled() or work.exception() is not None or self._closing:
            return
        log.info("nobody waits for this task any more", namespace=work.result().key[0], id=work.result().key[1])
        self._spawn(self._destroy(work.result()))

    # -- end

    def end(self, shim: Shim, deleted: task.DeleteResponse | None = None) -> None:
        """Let a shim go whose task was deleted, and remove the bundle; `deleted` is what it answered.

        Nobody waits for that: the container is gone when its shim said so, and a create under the same id waits for
        what is left. (A daemon that dies meanwhile leaves a shim without a task, which the next one sends away.)
        """
        if self._shims.get(shim.key) is shim:
            shim.leaving = True
            del self._shims[shim.key]
            self._spawn(self._end(shim, deleted))

    async def _end(self, shim: Shim, deleted: task.DeleteResponse | None) -> None:
        async with self._working(shim.key):
            if deleted is None or not await self._starter.keep(shim, self._limits.shutdown):
                await self._leave(shim, now=False)
            reach("daemon.end.left")
            if deleted is None:
                await self._ends.tell_noted(shim)
            elif not shim.launch.binary and not shim.launch.sandbox:
                # a shim that was killed on its way out has taken along what it hadn't told yet
                at = deleted.exited_at.ToNanoseconds()
                await self._ends.tell(shim, DeadShim(deleted.pid, deleted.exit_status, at))
            await self._remove(shim)

    async def end_sandbox(self, shim: Shim) -> None:
        """End a sandbox with the tasks that are left in it, its shim, its bundle. Raises what the shim refuses."""
        address = shim.bootstrap.address
        members = [one for one in self._shims.values() if one.bootstrap.address == address and one is not shim]
        await asyncio.gather(*(self._destroy(member) for member in members))
        shim.leaving = True
        try:
            request = sandbox.ShutdownSandboxRequest(sandbox_id=shim.bundle.id)
            await shim.call("ShutdownSandbox", request, sandbox.ShutdownSandboxResponse, service=SANDBOX)
        except BaseException as error:
            if isinstance(error, NotFound) and self._shims.get(shim.key) is not shim:
                return  # another request has ended it meanwhile
            shim.leaving = False
            if not shim.connected:
                self._closed(shim)
            raise
        self.end(shim)

    async def _destroy(self, shim: Shim) -> None:
        """End a task, or a sandbox, that nobody is to have, whatever it does now."""
        if shim.launch.sandbox:
            with contextlib.suppress(WherryError):
                await self.end_sandbox(shim)
            return
        await self._end_task(shim)
        self.end(shim)

    async def _end_task(self, shim: Shim) -> None:
        identity = shim.bundle.id
        for name, request, response in (
            ("Kill", task.KillRequest(id=identity, signal=signal.SIGKILL, all=True), empty_pb2.Empty),
            ("Delete", task.DeleteRequest(id=identity), task.DeleteResponse),
        ):
            with contextlib.suppress(WherryError):
                await shim.call(name, request, response, self._limits.cleanup)
                if name == "Kill":
                    wait = task.WaitRequest(id=identity)
                    await shim.call("Wait", wait, task.WaitResponse, self._limits.cleanup)

    async def _leave(self, shim: Shim, *, now: bool) -> bool:
        """Tell a shim to exit and wait until it has; one that doesn't is killed. Whether it went by itself.

        One that did has the time to tell its last events: a daemon with much to do may be slow to confirm them.

        One that others use stays.
        """
        async with self._group(shim):
            answered = shared = self._starter.shared(shim)
            self._starter.drop(shim)
            patience = self._limits.shutdown
            if shim.connected and not shared:
                with contextlib.suppress(WherryError):
                    request = task.ShutdownRequest(id=shim.bundle.id, now=now)
                    await shim.call("Shutdown", request, empty_pb2.Empty, self._limits.shutdown)
                    answered = True
                    patience += _FLUSH
                if not await shim.wait_closed(patience):
                    log.warning("shim does not leave, it is killed", namespace=shim.key[0], id=shim.key[1])
                    self._starter.kill(shim)
                    answered = False  # it may have been making the task that it is to leave without
            await shim.hang_up()
            return answered

    async def _remove(self, shim: Shim) -> None:
        """Remove what a shim leaves on disk; errors are logged, the record of it is gone already."""
        self._starter.drop(shim)
        try:
            shim.bundle.delete()
        except OSError as error:
            log.error("could not remove the bundle", path=shim.bundle.path, error=str(error))
        self._starter.remove_socket(shim)

    # -- a shim that died

    async def fate(self, shim: Shim) -> DeadShim:
        """What became of a shim whose connection ended: its container's end, once that is known.

        Raises Unavailable where this daemon hung up, NotFound where the task was deleted.
        """
        if shim.key not in self._shims and not shim.lost.done():
            raise NotFound(f"task {shim.bundle.id} not found: not found")
        if self._closing:
            raise Unavailable("the daemon is going down: unavailable")
        return await asyncio.shield(shim.lost)

    def _closed(self, shim: Shim) -> None:
        if not shim.leaving and not self._closing and self._shims.get(shim.key) is shim:
            log.warning("shim died", namespace=shim.key[0], id=shim.key[1], shim_pid=shim.bootstrap.pid)
            self._spawn(self._bury(shim))

    async def _bury(self, shim: Shim) -> None:
        async with self._working(shim.key):
            if self._shims.get(shim.key) is not shim:
                return
            shim.leaving = True
            reach("daemon.bury.begun")
            await self._clean_up(shim)
            del self._shims[shim.key]

    async def _clean_up(self, shim: Shim) -> None:
        """Kill and remove what a dead shim left, and report its container's end once.

        Where that can't be done (who did it was killed, too, again and again) the bundle stays, for the next daemon:
        a container that may be running is not told to have ended.
        """
        try:
            dead = await self._starter.delete(shim, self._limits.cleanup)
        except (WherryError, OSError) as error:
            log.error("could not clean up after a shim", namespace=shim.key[0], id=shim.key[1], error=str(error))
            await shim.hang_up()
            if not shim.lost.done():
                shim.lost.set_exception(Unavailable(f"the shim of {shim.bundle.id} died, and its clean-up: {error}"))
                shim.lost.exception()  # nobody has to wait for it
            return
        reach("daemon.bury.deleted")
        await shim.hang_up()
        # told before the bundle goes: a daemon that dies in between leaves it to the next one, to whom the journal says
        # what was told already
        if (dead.pid or shim.pid) and not shim.launch.sandbox:
            await self._ends.with_its_shim(shim, dead)
        reach("daemon.bury.told")
        await self._remove(shim)
        reach("daemon.bury.removed")
        if not shim.lost.done():
            shim.lost.set_result(dead)

    def _saw_exit(self, envelope: Envelope) -> None:
        """Remember an exit that the shim itself has published, lest its death reports it again."""
        event = events_pb2.TaskExit.FromString(envelope.event.value)
        shim = self._shims.get((envelope.namespace, event.container_id))
        if shim is not None and event.id == event.container_id:
            shim.exit_published = True

    # -- after a restart

    def load(self) -> None:
        """Begin to look for the shims that an earlier daemon left: for all of them at once, and nobody waits here."""
        for bundle in find(self._places.tasks):
            key = bundle.namespace, bundle.id
            launch = bundle.launch()
            shim = Shim(bundle, launch, bundle.bootstrap() or self._starter.planned(bundle, launch), self._limits)
            shim.single_use = True  # another daemon's, perhaps with older code: not for what is made from now on
            self._loading[key] = shim
            self._starter.use(shim)  # before any of them is looked at: one may be another's, too
            self._spawn(self._load(shim))

    async def loaded(self) -> None:
        """Wait until every bundle was looked at."""
        for key in tuple(self._loading):
            await self._settled(key)

    async def _load(self, shim: Shim) -> None:
        try:
            async with self._working(shim.key):
                await self._adopt(shim)
        finally:
            self._loading.pop(shim.key, None)

    async def _adopt(self, shim: Shim) -> None:
        """Take over one shim, or clean up after it."""
        bundle, launch = shim.bundle, shim.launch
        if launch.binary:
            shim.shim_log = self._starter.open_log(bundle)
        try:
            await shim.connect(self._limits.load, self._closed)
            if launch.sandbox:
                ping = sandbox.PingRequest(sandbox_id=bundle.id)
                await shim.call("PingSandbox", ping, sandbox.PingResponse, self._limits.load, SANDBOX)
            else:
                await shim.state(self._limits.load)
        except DeadlineExceeded:
            log.warning("shim does not answer, it is kept", namespace=bundle.namespace, id=bundle.id)
        except NotFound:
            log.info("shim without a task", namespace=bundle.namespace, id=bundle.id)
            await self._ends.tell_noted(shim)
            await self._undo(shim)
            return
        except WherryError as error:
            log.warning("shim is gone", namespace=bundle.namespace, id=bundle.id, error=error.message)
            shim.leaving = True
            await self._clean_up(shim)
            return
        else:
            log.debug("shim found", namespace=bundle.namespace, id=bundle.id, pid=shim.pid)
        self._shims[shim.key] = shim
        if not shim.connected:  # it hung up while we looked at it
            self._closed(shim)
        elif not self._known(*shim.key, launch.sandbox):
            log.warning("task without a container is removed", namespace=bundle.namespace, id=bundle.id)
            self._spawn(self._destroy(shim))

    # -- the daemon's end

    async def close(self) -> None:
        """Let go of all shims; they and their containers go on. What is being created or cleaned up gets 5 s."""
        self._closing = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)
        await self._starter.close()
        for shim in self._shims.values():
            await shim.hang_up()

    # -- helpers

    @contextlib.asynccontextmanager
    async def _working(self, key: Key) -> AsyncIterator[None]:
        """Work on a key alone."""
        while (busy := self._busy.get(key)) is not None:
            await asyncio.shield(busy)
        mine = self._busy[key] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._busy[key]
            mine.set_result(None)

    @contextlib.asynccontextmanager
    async def _group(self, shim: Shim) -> AsyncIterator[None]:
        """Start or end a shim alone, where several tasks may be in it."""
        if not shim.launch.group:
            yield
            return
        async with self._working((shim.key[0], f"{shim.launch.group}/")):  # no id has a slash
            yield

    async def _settled(self, key: Key) -> None:
        while key in self._loading:
            busy = self._busy.get(key)
            await (asyncio.shield(busy) if busy is not None else asyncio.sleep(0))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task_ = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task_)
        task_.add_done_callback(self._done)
        return task_

    def _done(self, work: asyncio.Task[Any]) -> None:
        self._tasks.discard(work)
        if not work.cancelled() and (error := work.exception()) is not None and not isinstance(error, WherryError):
            log.error("work on a shim failed", exc_info=error)
