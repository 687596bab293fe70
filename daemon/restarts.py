"""What the daemon does for containers by itself when they end: note how, start them again, or remove them.

What is asked for is in labels of the container's record (`wherry.core.labels`), those of containerd's restart monitor
where it has some. So a policy holds over restarts of the daemon and of the host, and any client can set it.

    ends ──► noted in the record ──► removed                        wherry/auto-remove
                                 ──► started again, after a while    restart.policy, unless a person stopped it
                                 ──► left as it is

The first restart comes after 0.1 s, each further one after twice as long, a minute at most; a container that ran for
ten seconds starts anew (docker's figures). While somebody follows a container that is to be removed, its removal waits
for that client to have read what it wrote; the client does it, and the daemon after a while in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from wherry.core import topics
from wherry.core.errors import NotFound, WherryError
from wherry.core.labels import (
    AUTO_REMOVE,
    CONTAINER_NAME,
    LAST_RUN,
    LOG_URI,
    MOUNTS,
    RESTART_COUNT,
    RESTART_EXPLICITLY_STOPPED,
    RESTART_LOG_URI,
    RESTART_POLICY,
    RESTART_STATUS,
)
from wherry.daemon.starting import SIGKILLED
from wherry.daemon.volumes import VolumeStore, named_volumes
from wherry.proto import containers_pb2, events_pb2, tasks_pb2
from wherry.proto.service import GRPC_NAMESPACE, Context
from wherry.proto.task_types_pb2 import Status

if TYPE_CHECKING:
    from wherry.daemon.containers import ContainerStore
    from wherry.daemon.events import Exchange
    from wherry.daemon.namespaces import NamespaceStore
    from wherry.daemon.shims import Shims
    from wherry.daemon.snapshots import SnapshotStore
    from wherry.daemon.tasks import TaskService
    from wherry.proto.types_pb2 import Envelope

log = structlog.get_logger(__name__)

# seconds: before the first restart, the most before any, and how long a run must be for the count to begin anew
FIRST_DELAY, MOST_DELAY, LONG_RUN = 0.1, 60.0, 10.0
# seconds that a client gets to remove a container whose output it still reads
CLIENT_REMOVES = 15.0
# containers that are started at the same time after the daemon's start
AT_ONCE = 4
Key = tuple[str, str]


class Policy(NamedTuple):
    """`name` is `no`, `always`, `unless-stopped` or `on-failure`; `most` restarts, 0 for no limit."""

    name: str
    most: int = 0

    @classmethod
    def of(cls, labels: Mapping[str, str]) -> Policy:
        """The policy in a container's labels. As for containerd, one that is meant to run and has none is `always`."""
        text = labels.get(RESTART_POLICY, "")
        name, _, count = text.partition(":")
        if not name:
            return cls("always" if labels.get(RESTART_STATUS) == "running" else "no")
        if name not in {"always", "unless-stopped", "on-failure"}:
            return cls("no")
        return cls(name, int(count) if count.isdigit() else 0)

    def wants(self, exit_status: int, count: int) -> bool:
        """Whether a container that ended so, after so many restarts, is to be started again."""
        if self.name == "on-failure":
            return exit_status != 0 and (not self.most or count < self.most)
        return self.name != "no"


def stdio(container: containers_pb2.Container) -> tuple[str, str, bool]:
    """Where the output of a container goes that nobody follows: stdout, stderr, and whether it has a terminal."""
    uri = container.labels.get(LOG_URI) or container.labels.get(RESTART_LOG_URI) or ""
    try:
        terminal = bool((json.loads(container.spec.value).get("process") or {}).get("terminal"))
    except (ValueError, AttributeError):
        terminal = False
    return uri, "" if terminal else uri, terminal


class Restarts:
    """Watches exits. `start` after the services are there, `close` when the daemon stops: containers go on."""

    def __init__(
        self,
        exchange: Exchange,
        tasks: TaskService,
        containers: ContainerStore,
        *,
        snapshots: SnapshotStore,
        namespaces: NamespaceStore,
        volumes: VolumeStore,
        reason: Callable[[str, str], str] = lambda namespace, identity: "",
    ) -> None:
        """`reason` says in words why a container's first process was killed, "" where nobody knows."""
        self._reason = reason
        self._tasks = tasks
        self._containers = containers
        self._snapshots = snapshots
        self._namespaces = namespaces
        self._volumes = volumes
        self._began: dict[Key, float] = {}
        self._ooms: set[Key] = set()
        self._delays: dict[Key, float] = {}
        # what is under way for a container: a second exit waits for the first one's work
        self._work: dict[Key, asyncio.Task[None]] = {}
        self._closed = False
        exchange.watch(topics.TASK_START, self._started)
        exchange.watch(topics.TASK_OOM, self._had_no_memory)
        exchange.watch(topics.TASK_EXIT, self._exited)

    def start(self, shims: Shims) -> None:
        """Look, when all shims that are left have answered, for containers that are meant to run and don't."""
        self._spawn(("", ""), lambda: self._resume(shims))

    async def close(self) -> None:
        """Stop all that is under way."""
        self._closed = True
        work = list(self._work.values())
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    # -- what happens

    def _started(self, envelope: Envelope) -> None:
        event = events_pb2.TaskStart.FromString(envelope.event.value)
        self._began[envelope.namespace, event.container_id] = time.time()

    def _had_no_memory(self, envelope: Envelope) -> None:
        event = events_pb2.TaskOOM.FromString(envelope.event.value)
        self._ooms.add((envelope.namespace, event.container_id))

    def _exited(self, envelope: Envelope) -> None:
        event = events_pb2.TaskExit.FromString(envelope.event.value)
        if event.id != event.container_id:
            return
        key = (envelope.namespace, event.container_id)
        try:
            container = self._containers.get(*key)
        except NotFound:
            self._forget(key)
            return
        if self._concerns(container):
            self._spawn(key, lambda: self._after(key, event))

    @staticmethod
    def _concerns(container: containers_pb2.Container) -> bool:
        labels = container.labels
        return any(label in labels for label in (CONTAINER_NAME, AUTO_REMOVE, RESTART_POLICY, RESTART_STATUS))

    def _forget(self, key: Key) -> None:
        self._began.pop(key, None)
        self._ooms.discard(key)
        self._delays.pop(key, None)

    # -- what is done then

    async def _after(self, key: Key, event: events_pb2.TaskExit) -> None:
        container = self._containers.get(*key)
        removal = container.labels.get(AUTO_REMOVE)
        if removal:
            await self._remove_later(key, CLIENT_REMOVES if removal == "attached" else 0.0)
            return
        began = self._began.pop(key, 0.0)
        finished = event.exited_at.seconds + event.exited_at.nanos / 1e9
        note: dict[str, Any] = {"code": event.exit_status, "started": round(began, 3), "finished": round(finished, 3)}
        if _note(container).get("finished") == note["finished"]:
            # shims tell an exit until they know that it was heard
            return
        if key in self._ooms:
            self._ooms.discard(key)
            note["oom"] = True
        if event.exit_status == SIGKILLED and (why := self._reason(*key)):
            note["error"] = why
        labels = {LAST_RUN: json.dumps(note, separators=(",", ":"))}
        policy, count = Policy.of(container.labels), _count(container)
        wanted = container.labels.get(RESTART_STATUS) == "running" and policy.wants(event.exit_status, count)
        if not wanted and container.labels.get(RESTART_STATUS) == "running":
            labels[RESTART_STATUS] = "stopped"
        await self._label(key, labels)
        if wanted:
            long = bool(began) and finished - began >= LONG_RUN
            await self._again(key, 0 if long and policy.name != "on-failure" else count, anew=long)

    async def _again(self, key: Key, count: int, *, anew: bool = False) -> None:
        """Start it again, after its delay, until that works or nobody wants it any more."""
        while not self._closed:
            delay = FIRST_DELAY if anew else min(self._delays.get(key, FIRST_DELAY / 2) * 2, MOST_DELAY)
            anew = False
            self._delays[key] = delay
            await asyncio.sleep(delay)
            try:
                container = self._containers.get(*key)
            except NotFound:
                self._forget(key)
                return
            policy = Policy.of(container.labels)
            if container.labels.get(RESTART_STATUS) != "running" or not policy.wants(1, count):
                return
            count += 1
            try:
                await self._label(key, {RESTART_COUNT: str(count)})
                if not await self._start(key, container):
                    return
            except WherryError as error:
                log.warning("container can't be started again", namespace=key[0], id=key[1], error=error.message)
                with contextlib.suppress(WherryError):
                    await self._label(key, {LAST_RUN: json.dumps({"code": 128, "error": error.message[:500]})})
                continue
            log.info("container started again", namespace=key[0], id=key[1], count=count)
            return

    async def _start(self, key: Key, container: containers_pb2.Container) -> bool:
        """Delete the task of its last run and make a new one; False where somebody else has started it."""
        context = _context(key)
        with contextlib.suppress(NotFound):
            process = (await self._tasks.get(tasks_pb2.GetRequest(container_id=container.id), context)).process
            if process.status in {Status.RUNNING, Status.PAUSED, Status.PAUSING, Status.CREATED}:
                return False
            await self._tasks.delete(tasks_pb2.DeleteTaskRequest(container_id=container.id), context)
        request = tasks_pb2.CreateTaskRequest(container_id=container.id)
        if container.snapshot_key:
            mounts = await self._snapshots.mounts(key[0], container.snapshotter, container.snapshot_key)
            for mount in mounts:
                request.rootfs.add(type=mount.type, source=mount.source, target=mount.target, options=mount.options)
        request.stdout, request.stderr, request.terminal = stdio(container)
        await self._tasks.create(request, context)
        try:
            await self._tasks.start(tasks_pb2.StartRequest(container_id=container.id), context)
        except BaseException:
            with contextlib.suppress(WherryError):
                await self._tasks.delete(tasks_pb2.DeleteTaskRequest(container_id=container.id), context)
            raise
        return True

    async def _remove_later(self, key: Key, seconds: float) -> None:
        await asyncio.sleep(seconds)
        try:
            container = self._containers.get(*key)
        except NotFound:
            self._forget(key)
            return
        with contextlib.suppress(NotFound):
            await self._tasks.delete(tasks_pb2.DeleteTaskRequest(container_id=container.id), _context(key))
        await self._remove(key, container)

    async def _remove(self, key: Key, container: containers_pb2.Container) -> None:
        namespace, identity = key
        if container.snapshot_key:
            with contextlib.suppress(NotFound):
                await self._snapshots.remove(namespace, container.snapshotter, container.snapshot_key)
        with contextlib.suppress(NotFound):
            await self._containers.delete(namespace, identity)
        for name in named_volumes(container.labels.get(MOUNTS, ""), anonymous=True):
            with contextlib.suppress(WherryError, OSError):
                await asyncio.to_thread(self._volumes.remove, namespace, name)
        uri = container.labels.get(LOG_URI, "")
        if uri.startswith("file://"):
            with contextlib.suppress(OSError):
                os.unlink(uri.removeprefix("file://"))
        self._forget(key)

    # -- at the daemon's start

    async def _resume(self, shims: Shims) -> None:
        await shims.loaded()
        gate = asyncio.Semaphore(AT_ONCE)
        found: list[Coroutine[Any, Any, None]] = []
        for namespace in await self._namespaces.list():
            filters = [f'labels."{RESTART_POLICY}"', f'labels."{RESTART_STATUS}"', f'labels."{AUTO_REMOVE}"']
            containers = await self._containers.list(namespace.name, filters)
            found.extend(self._resume_one(gate, (namespace.name, item.id), item) for item in containers)
        await asyncio.gather(*found)

    async def _resume_one(self, gate: asyncio.Semaphore, key: Key, container: containers_pb2.Container) -> None:
        async with gate:
            try:
                if await self._runs(key) or key in self._work:
                    return
                if container.labels.get(AUTO_REMOVE):
                    # created, and the client or the host went away, or ended while no daemon was there
                    if LAST_RUN in container.labels or await self._has_task(key):
                        self._spawn(key, lambda: self._remove_later(key, CLIENT_REMOVES))
                    return
                if self._meant_to_run(container):
                    await self._label(key, {RESTART_STATUS: "running", RESTART_EXPLICITLY_STOPPED: ""})
                    self._spawn(key, lambda: self._again(key, _count(container)))
            except WherryError as error:
                log.warning("container can't be resumed", namespace=key[0], id=key[1], error=error.message)

    @staticmethod
    def _meant_to_run(container: containers_pb2.Container) -> bool:
        labels = container.labels
        policy = Policy.of(labels)
        if labels.get(RESTART_STATUS) == "running":
            # one that ran when the host went down counts as failed
            note = _note(container)
            return policy.wants(int(note.get("code") or 0) if note else 1, _count(container))
        # docker's difference between the two: a new daemon starts `always` also where a person had stopped it
        return policy.name == "always" and labels.get(RESTART_EXPLICITLY_STOPPED) == "true"

    async def _runs(self, key: Key) -> bool:
        try:
            answer = await self._tasks.get(tasks_pb2.GetRequest(container_id=key[1]), _context(key))
        except NotFound:
            return False
        return answer.process.status not in {Status.STOPPED, Status.UNKNOWN}

    async def _has_task(self, key: Key) -> bool:
        with contextlib.suppress(NotFound):
            await self._tasks.get(tasks_pb2.GetRequest(container_id=key[1]), _context(key))
            return True
        return False

    # -- helpers

    async def _label(self, key: Key, labels: Mapping[str, str]) -> None:
        update = containers_pb2.Container(id=key[1], labels=labels)
        await self._containers.update(key[0], update, [f"labels.{name}" for name in labels])

    def _spawn(self, key: Key, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._closed:
            return
        before = self._work.get(key)

        async def run() -> None:
            if before is not None:
                await asyncio.wait([before])
            try:
                await work()
            except WherryError as error:
                # gone meanwhile, or a shim that doesn't answer: nothing more can be done for it here
                level = log.debug if isinstance(error, NotFound) else log.warning
                level("after a container's end", namespace=key[0], id=key[1], error=error.message)

        task = asyncio.get_running_loop().create_task(run())
        self._work[key] = task

        def done(_: asyncio.Task[None]) -> None:
            if self._work.get(key) is task:
                del self._work[key]
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("after a container's end", namespace=key[0], id=key[1], error=repr(error))

        task.add_done_callback(done)


def _note(container: containers_pb2.Container) -> dict[str, Any]:
    """What was noted of its last run; {} where nothing was."""
    try:
        note = json.loads(container.labels.get(LAST_RUN) or "{}")
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}


def _count(container: containers_pb2.Container) -> int:
    text = container.labels.get(RESTART_COUNT, "")
    return int(text) if text.isdigit() else 0


def _context(key: Key) -> Context:
    return Context(metadata={GRPC_NAMESPACE: key[0]})
