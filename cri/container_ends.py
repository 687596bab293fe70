"""How containers end: exits and OOM kills from the event bus into the records, and what was missed meanwhile.

An exit is written into the record before the task that knows it is deleted, so that a daemon that is killed in between
learns it from one of them. It is told (to who waits in StopContainer, to the kubelet's stream of events) when the task
is gone: then all of its output is in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING

import structlog

from wherry.client.fifos import discard
from wherry.client.tasks import Process
from wherry.core import topics
from wherry.core.errors import DeadlineExceeded, NotFound, Unavailable, WherryError
from wherry.core.failpoints import reach
from wherry.cri.container_status import ERROR, OOM_KILLED, UNKNOWN, UNKNOWN_EXIT_CODE
from wherry.cri.records import NAMESPACE, Member, MemberFacts
from wherry.proto import cri_pb2 as cri
from wherry.proto import events_pb2

if TYPE_CHECKING:
    from wherry.client.events import Event
    from wherry.cri.node import Node

log = structlog.get_logger(__name__)

_TOPICS = (topics.TASK_EXIT, topics.TASK_OOM)
# seconds for a task's deletion, which waits for its output; what doesn't come in that time is left to a later try
_DELETE = 15.0
_RETRY = 5.0
# seconds between two questions to a shim that didn't answer when the daemon started
_ASK_AGAIN = 10.0
_OUT_OF_MEMORY = "out of memory"
_KILLED = 128 + signal.SIGKILL


class Ends:
    """Watches the tasks of a node's containers."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._work: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        node.on_close(self.close)

    # -- its life

    async def recover(self) -> None:
        """Subscribe, then find out what became of every container while nobody watched."""
        self.watch()
        await asyncio.sleep(0.01)  # the subscription is there before the first question
        members = list(self._node.records.members.values())
        await asyncio.gather(*(self._recover(member) for member in members))

    def watch(self) -> None:
        """Begin to listen; once."""
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """Stop listening; what is missed, the next start finds out."""
        tasks = [*self._work, *([self._watching] if self._watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _do(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except (WherryError, OSError) as error:
                log.error("the end of a container could not be noted", error=str(error))

        task = asyncio.get_running_loop().create_task(guarded())
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    # -- events

    async def _watch(self) -> None:
        filters = [f'topic=="{topic}",namespace=="{NAMESPACE}"' for topic in _TOPICS]
        while True:
            try:
                async for event in self._node.client.events.subscribe(filters):
                    self._saw(event)
            except WherryError as error:
                log.warning("the subscription to events ended", error=error.message)
            await asyncio.sleep(0.1)
            for member in list(self._node.records.members.values()):
                if member.state == cri.CONTAINER_RUNNING:
                    self._do(self.check(member))

    def _saw(self, event: Event) -> None:
        if event.topic == topics.TASK_OOM:
            killed = events_pb2.TaskOOM.FromString(event.packed.value)
            if (member := self._node.records.members.get(killed.container_id)) is not None:
                member.transient["oom"] = True
            return
        ended = events_pb2.TaskExit.FromString(event.packed.value)
        member = self._node.records.members.get(ended.container_id)
        if member is None or ended.id != ended.container_id:
            return
        end = ended.exit_status, ended.exited_at.ToNanoseconds()
        if member.facts.started_at or "starting" in member.transient:
            self._do(self.ended(member, *end))
        else:
            # of a task that never ran and is taken back, or of one whose start `check` is about to find out
            member.transient["early"] = end

    # -- the end of one

    def stopped(self, member: Member) -> asyncio.Event:
        """What is set when a container's end is noted."""
        event: asyncio.Event = member.transient.setdefault("stopped", asyncio.Event())
        return event

    async def ended(self, member: Member, code: int, at_ns: int, reason: str = "") -> None:
        """Note an end; once, whoever tells it first. `reason` where the one who tells it knows better."""
        if member.facts.finished_at or member.transient.get("ending"):
            return
        member.transient["ending"] = True
        try:
            await self._ended(member, code, at_ns, reason)
        finally:
            del member.transient["ending"]

    async def _ended(self, member: Member, code: int, at_ns: int, given: str) -> None:
        if (starting := member.transient.get("starting")) is not None:
            # killed before its start was answered: that one goes first
            await asyncio.wait([starting])
            if member.facts.finished_at:
                return
        reason, message = await self._why(member, code)
        facts = dataclasses.replace(
            member.facts,
            pid=0,
            finished_at=at_ns or time.time_ns(),
            exit_code=code,
            reason=given or reason,
            message=message,
            unknown=False,
        )
        facts.started_at = facts.started_at or facts.finished_at
        reach("cri.end.seen")
        if await self._note(member, facts):
            reach("cri.end.noted")
            await self.delete_task(member)
            reach("cri.end.deleted")
        else:
            self._do(self._note_later(member, facts))
        member.facts = facts
        self.stopped(member).set()
        self._node.events.tell(member.id, cri.CONTAINER_STOPPED_EVENT)
        log.info("container ended", id=member.id, code=code, reason=facts.reason, message=message)

    async def _note(self, member: Member, facts: MemberFacts) -> bool:
        """Write an end; False where that can't be done now (a full disk)."""
        try:
            await self._node.records.put_member(Member(member.id, member.config, facts))
        except NotFound:
            log.info("a container ended whose record is gone", id=member.id)
        except WherryError as error:
            log.error("a container's end can't be written yet", id=member.id, error=error.message)
            return False
        return True

    async def _note_later(self, member: Member, facts: MemberFacts) -> None:
        """Until then the task stays, from which the next daemon would learn it."""
        noted = False
        while not noted and member.id in self._node.records.members:
            await asyncio.sleep(_RETRY)
            noted = await self._note(member, facts)
        await self.delete_task(member)

    async def _why(self, member: Member, code: int) -> tuple[str, str]:
        """The reason where it isn't what the exit code says, and what is known of a kill."""
        oom, message = bool(member.transient.get("oom")), ""
        if code == _KILLED:
            with contextlib.suppress(WherryError):
                explained = await self._node.client.tasks.explain(member.id)
                message = explained.reason if explained is not None else ""
            oom = oom or message.startswith(_OUT_OF_MEMORY)
        return (OOM_KILLED, message) if oom and code else (ERROR if message else "", message)

    async def delete_task(self, member: Member) -> None:
        """Delete the task of a container that has ended; where that takes too long, it goes on beside the rest."""
        if await self._delete_task(member):
            return

        async def again() -> None:
            done = False
            while not done:
                await asyncio.sleep(_RETRY)
                done = await self._delete_task(member)

        self._do(again())

    async def _delete_task(self, member: Member) -> bool:
        client = self._node.client
        try:
            streams = None
            if member.config.stdin:
                streams = (await client.tasks.get(member.id)).stdio
            async with asyncio.timeout(_DELETE):
                await client.tasks.delete(member.id)
            if streams is not None:
                discard(streams)
        except NotFound:
            return True
        except TimeoutError:
            log.warning("a task that has ended isn't deleted yet", id=member.id)
            return False
        except WherryError as error:
            log.warning("a task that has ended can't be deleted", id=member.id, error=error.message)
            return member.id not in self._node.records.members
        return True

    # -- what was missed

    async def _recover(self, member: Member) -> None:
        try:
            await self.check(member)
        except (DeadlineExceeded, Unavailable) as error:
            log.warning("a container's shim doesn't answer", id=member.id, error=error.message)
            if member.state == cri.CONTAINER_RUNNING:
                member.facts.unknown = True
                self._do(self._ask_again(member))
        except WherryError as error:
            log.error("a container's state is unknown", id=member.id, error=error.message)
            member.facts.unknown = member.state == cri.CONTAINER_RUNNING
        member.facts.removing = False

    async def _ask_again(self, member: Member) -> None:
        while member.facts.unknown and member.id in self._node.records.members:
            await asyncio.sleep(_ASK_AGAIN)
            with contextlib.suppress(DeadlineExceeded, Unavailable):
                await self.check(member)

    async def check(self, member: Member) -> None:
        """Compare what is noted with the task. Raises what the shim's silence raises."""
        before = member.facts
        try:
            task = await self._node.client.tasks.get(member.id)
        except NotFound:
            if member.facts is before and (before.unknown or member.state == cri.CONTAINER_RUNNING):
                await self.ended(member, *await self._told(member))
            return
        if task.status == "UNKNOWN":
            raise Unavailable(f"the shim of container {member.id} doesn't answer: unavailable")
        if before.finished_at:
            await self._delete_leftover(member, task)
        elif task.status == "STOPPED":
            await self.ended(member, task.exit_status, int(task.exited_at * 1e9))
        elif task.status == "CREATED":
            if "starting" not in member.transient:
                await self._never_started(member)
        else:
            await self._running(member, task)

    async def _running(self, member: Member, task: Process) -> None:
        facts = member.facts
        if facts.started_at and facts.pid == task.pid and not facts.unknown:
            return
        if "starting" in member.transient:
            return
        facts.unknown, facts.pid = False, task.pid
        facts.started_at = facts.started_at or time.time_ns()
        if (early := member.transient.pop("early", None)) is not None:
            await self.ended(member, *early)
            return
        await self._node.records.put_member(member)

    async def _delete_leftover(self, member: Member, task: Process) -> None:
        if task.status == "STOPPED":
            await self.delete_task(member)

    async def _never_started(self, member: Member) -> None:
        """The daemon was killed between the task's creation and its start: the kubelet will ask again."""
        with contextlib.suppress(NotFound):
            await self._node.client.tasks.delete(member.id)
        member.transient.pop("early", None)

    async def _told(self, member: Member) -> tuple[int, int, str]:
        """Code, time and reason of a task that is gone: what the journal of events says, else unknown."""
        filters = [f'topic=="{topics.TASK_EXIT}",namespace=="{NAMESPACE}",event.container_id=="{member.id}"']
        found = UNKNOWN_EXIT_CODE, time.time_ns(), UNKNOWN
        with contextlib.suppress(WherryError):
            kept = self._node.client.events.follow(filters, since=member.facts.started_at / 1e9, until=time.time())
            async for event in kept:
                ended = events_pb2.TaskExit.FromString(event.packed.value)
                if ended.id == ended.container_id == member.id:
                    found = ended.exit_status, ended.exited_at.ToNanoseconds(), ""
        return found
