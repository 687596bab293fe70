"""Health checks: a command that is run in a container now and then, and what came of it.

The check is in the container's record (label `wherry/health-check`, an image's `Healthcheck`), its outcome too
(`wherry/health`: `Status`, `FailingStreak` and the last runs, as docker's inspect has them). A container is `starting`
until a check succeeds, `unhealthy` after so many failures in a row, which don't count in the time that it has to start.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from wherry.core import topics, typeurl
from wherry.core.errors import NotFound, WherryError
from wherry.core.labels import HEALTH, HEALTH_CHECK
from wherry.proto import containers_pb2, events_pb2, tasks_pb2
from wherry.proto.service import GRPC_NAMESPACE, Context
from wherry.proto.task_types_pb2 import Status

if TYPE_CHECKING:
    from wherry.daemon.containers import ContainerStore
    from wherry.daemon.events import Exchange
    from wherry.daemon.namespaces import NamespaceStore
    from wherry.daemon.shims import Shims
    from wherry.daemon.tasks import TaskService
    from wherry.proto.types_pb2 import Envelope

log = structlog.get_logger(__name__)

# docker's figures
INTERVAL, TIMEOUT, RETRIES, START_INTERVAL = 30.0, 30.0, 3, 5.0
# of the last runs, and characters of their output: all of it must fit into a label of 4096 bytes
KEPT, OUTPUT = 5, 400
ROOM = 3600
Key = tuple[str, str]


class Check(NamedTuple):
    """What to run, and when (seconds)."""

    args: tuple[str, ...]
    interval: float = INTERVAL
    timeout: float = TIMEOUT
    retries: int = RETRIES
    start_period: float = 0.0
    start_interval: float = START_INTERVAL

    @classmethod
    def parse(cls, text: str) -> Check | None:
        """From an image's `Healthcheck` (times in nanoseconds); None where it asks for nothing or can't be read."""
        try:
            found = json.loads(text)
            test = [str(item) for item in found.get("Test") or ()]
        except (ValueError, AttributeError, TypeError):
            return None
        if len(test) < 2 or test[0] not in {"CMD", "CMD-SHELL"}:
            return None
        args = tuple(test[1:]) if test[0] == "CMD" else ("/bin/sh", "-c", test[1])

        def seconds(name: str, default: float) -> float:
            value = found.get(name)
            return value / 1e9 if isinstance(value, (int, float)) and value > 0 else default

        retries = found.get("Retries")
        return cls(
            args,
            seconds("Interval", INTERVAL),
            seconds("Timeout", TIMEOUT),
            retries if isinstance(retries, int) and retries > 0 else RETRIES,
            seconds("StartPeriod", 0.0),
            seconds("StartInterval", START_INTERVAL),
        )


class HealthChecks:
    """Runs the checks of all containers that have some, for as long as they run."""

    def __init__(
        self,
        exchange: Exchange,
        tasks: TaskService,
        containers: ContainerStore,
        namespaces: NamespaceStore,
        folder: str,
    ) -> None:
        """`folder` is for the output of checks under way."""
        self._tasks = tasks
        self._containers = containers
        self._namespaces = namespaces
        self._folder = folder
        self._watched: dict[Key, asyncio.Task[None]] = {}
        self._resuming: asyncio.Task[None] | None = None
        exchange.watch(topics.TASK_START, self._started)
        exchange.watch(topics.TASK_EXIT, self._exited)

    def start(self, shims: Shims) -> None:
        """Go on with the containers that run already."""
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        self._resuming = asyncio.get_running_loop().create_task(self._resume(shims))

    async def close(self) -> None:
        """Stop checking; containers go on."""
        work = [*self._watched.values(), *([self._resuming] if self._resuming is not None else [])]
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)

    async def _resume(self, shims: Shims) -> None:
        await shims.loaded()
        for namespace in await self._namespaces.list():
            for container in await self._containers.list(namespace.name, [f'labels."{HEALTH_CHECK}"']):
                key = (namespace.name, container.id)
                with contextlib.suppress(WherryError):
                    answer = await self._tasks.get(tasks_pb2.GetRequest(container_id=container.id), _context(key))
                    if answer.process.status == Status.RUNNING:
                        self._watch(key, container)

    def _started(self, envelope: Envelope) -> None:
        event = events_pb2.TaskStart.FromString(envelope.event.value)
        key = (envelope.namespace, event.container_id)
        with contextlib.suppress(NotFound):
            self._watch(key, self._containers.get(*key))

    def _exited(self, envelope: Envelope) -> None:
        event = events_pb2.TaskExit.FromString(envelope.event.value)
        if event.id == event.container_id:
            task = self._watched.pop((envelope.namespace, event.container_id), None)
            if task is not None:
                task.cancel()

    def _watch(self, key: Key, container: containers_pb2.Container) -> None:
        check = Check.parse(container.labels.get(HEALTH_CHECK, ""))
        if check is None or key in self._watched:
            return
        work = asyncio.get_running_loop().create_task(self._follow(key, check))
        self._watched[key] = work

        def done(task: asyncio.Task[None]) -> None:
            if self._watched.get(key) is task:
                del self._watched[key]
            if not task.cancelled() and (error := task.exception()) is not None:
                log.warning("health checks ended", namespace=key[0], id=key[1], error=str(error))

        work.add_done_callback(done)

    async def _follow(self, key: Key, check: Check) -> None:
        began, streak, status = time.monotonic(), 0, "starting"
        runs: list[dict[str, Any]] = []
        await self._note(key, status, streak, runs)
        while True:
            in_start = status == "starting" and time.monotonic() - began < check.start_period
            await asyncio.sleep(min(check.start_interval, check.interval) if in_start else check.interval)
            in_start = status == "starting" and time.monotonic() - began < check.start_period
            result = await self._run(key, check)
            if result is None:
                # paused: no check, as docker has it
                continue
            runs = [*runs, result][-KEPT:]
            if result["ExitCode"] == 0:
                streak, status = 0, "healthy"
            elif not in_start:
                streak += 1
                if streak >= check.retries:
                    status = "unhealthy"
            await self._note(key, status, streak, runs)

    async def _run(self, key: Key, check: Check) -> dict[str, Any] | None:
        """One check, as an entry of docker's log; None where the container is paused."""
        context, name = _context(key), f"health-{os.urandom(6).hex()}"
        state = (await self._tasks.get(tasks_pb2.GetRequest(container_id=key[1]), context)).process.status
        if state == Status.PAUSED:
            return None
        begun, path = time.time(), os.path.join(self._folder, name)
        try:
            try:
                code = await self._exec(key, name, check, path)
                output = _read(path)
            except TimeoutError:
                code, output = -1, f"Health check exceeded timeout ({check.timeout:g}s)"
            except NotFound:
                raise
            except WherryError as error:
                code, output = -1, error.message
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
        return {"Start": _when(begun), "End": _when(time.time()), "ExitCode": code, "Output": output[:OUTPUT]}

    async def _exec(self, key: Key, name: str, check: Check, path: str) -> int:
        context = _context(key)
        process = dict((json.loads(self._containers.get(*key).spec.value).get("process")) or {})
        process |= {"args": list(check.args), "terminal": False}
        uri = f"file://{path}"
        request = tasks_pb2.ExecProcessRequest(
            container_id=key[1], exec_id=name, stdout=uri, stderr=uri, spec=typeurl.pack_json(typeurl.PROCESS, process)
        )
        await self._tasks.exec(request, context)
        try:
            await self._tasks.start(tasks_pb2.StartRequest(container_id=key[1], exec_id=name), context)
            waiting = self._tasks.wait(tasks_pb2.WaitRequest(container_id=key[1], exec_id=name), context)
            return (await asyncio.wait_for(waiting, check.timeout)).exit_status
        finally:
            await asyncio.shield(self._end(key, name))

    async def _end(self, key: Key, name: str) -> None:
        """Remove the check's process, killed where it still runs."""
        context = _context(key)
        with contextlib.suppress(WherryError, TimeoutError):
            try:
                await self._tasks.delete_process(
                    tasks_pb2.DeleteProcessRequest(container_id=key[1], exec_id=name), context
                )
            except NotFound:
                return
            except WherryError:
                await self._tasks.kill(tasks_pb2.KillRequest(container_id=key[1], exec_id=name, signal=9), context)
                wait = self._tasks.wait(tasks_pb2.WaitRequest(container_id=key[1], exec_id=name), context)
                await asyncio.wait_for(wait, TIMEOUT)
                await self._tasks.delete_process(
                    tasks_pb2.DeleteProcessRequest(container_id=key[1], exec_id=name), context
                )

    async def _note(self, key: Key, status: str, streak: int, runs: list[dict[str, Any]]) -> None:
        kept = list(runs)
        while True:
            text = json.dumps({"Status": status, "FailingStreak": streak, "Log": kept}, separators=(",", ":"))
            if len(text.encode()) <= ROOM or not kept:
                break
            kept.pop(0)
        update = containers_pb2.Container(id=key[1], labels={HEALTH: text})
        await self._containers.update(key[0], update, [f"labels.{HEALTH}"])


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(OUTPUT * 4).decode(errors="replace")
    except OSError:
        return ""


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f"{at % 1:.6f}"[1:] + "Z"


def _context(key: Key) -> Context:
    return Context(metadata={GRPC_NAMESPACE: key[0]})
