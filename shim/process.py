"""One process of a container, the init or one exec'd: its streams, its state, and its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from wherry.core.errors import FailedPrecondition, NotFound
from wherry.core.failpoints import reach
from wherry.proto import events_pb2, task_v2_pb2
from wherry.shim.events import Publisher
from wherry.shim.log import log
from wherry.shim.loop import Children, Exit, Future, Lock, Loop
from wherry.shim.state_files import write_exit
from wherry.shim.states import EXEC, INIT, STATUS, Machine, Operation, State
from wherry.shim.stdio import Owner, ProcessIO, Stdio

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

# Go's zero time, which clients take for "not yet" (protobuf.ToTimestamp(time.Time{}))
_NO_TIME = -62135596800
# how long Delete waits for output that is not read: without progress, and at all
DRAIN_STEP, DRAIN_LIMIT = 2.0, 10.0


class Shim:
    """What every part of a shim works with.

    `runtime_root`: where the bundled runtime keeps this namespace's state. `warm`: this process had a container before,
    so that its memory is its own already.
    """

    __slots__ = ("children", "loop", "namespace", "publisher", "runtime_root", "warm")

    def __init__(self, loop: Loop, children: Children, publisher: Publisher) -> None:
        self.loop = loop
        self.children = children
        self.publisher = publisher
        self.namespace = ""
        self.runtime_root = ""
        self.warm = False


class Process:
    """A process from its request to its deletion; `exec_id` is "" for the init.

    An exit that comes while the process is still being started is held until `started`, so that the events of its
    start come before that of its end.
    """

    def __init__(self, shim: Shim, bundle: str, exec_id: str, stdio: Stdio, owner: Owner) -> None:
        self.container_id = owner.id
        self.exec_id = exec_id
        self.stdio = stdio
        self.io = ProcessIO(shim.loop, shim.children, stdio, owner)
        self.machine = Machine(EXEC if exec_id else INIT)
        self.lock = Lock(shim.loop)
        self.pid = 0
        self.end: Exit | None = None
        self.ended: Future[Exit] = Future(shim.loop)
        self.reaped = False
        self.reason = ""
        self._shim = shim
        self._bundle = bundle
        self._starting = False
        self._held: Exit | None = None
        self._kept = False
        self._on_exit: Callable[[Exit], None] = self.settle

    @property
    def id(self) -> str:
        """What events call the process: the exec id, or for the init the container's id."""
        return self.exec_id or self.container_id

    @property
    def active(self) -> bool:
        """True from the start of the process until its end has been told."""
        return self.pid > 0 and self.end is None

    # -- life ------------------------------------------------------------------------------------------------------

    def born(self, pid: int, on_exit: Callable[[Exit], None]) -> None:
        """The runtime made it. Call inside `with children` that began before, lest its end be missed."""
        self.pid = pid
        self._on_exit = on_exit
        end = self._shim.children.exited(pid)
        if end.done:  # before the runtime told of it: reaped, and not noted yet
            self._keep(end.result())
        else:
            self._shim.children.keep(pid, self._keep)
        end.add_callback(lambda: self._exited(end.result()))

    def starting(self) -> None:
        """Hold its exit until `started`."""
        self._starting = True

    def started(self) -> None:
        """It was started, or that failed, and the event of it is out."""
        self._starting = False
        held, self._held = self._held, None
        if held is not None:
            self._on_exit(held)

    def _keep(self, end: Exit) -> None:
        """Note its end in the bundle, before it is reaped."""
        reach("shim.exit.seen")
        try:
            write_exit(self._bundle, self.exec_id, end, self.reason)
            self._kept = True
        except OSError as error:  # the bundle was taken away under us; the event still says it
            log("error", f"an exit was not kept: {error}", id=self.id)

    def _exited(self, end: Exit) -> None:
        reach("shim.exit.reaped")
        self.reaped = True
        if self._starting:
            self._held = end
        else:
            self._on_exit(end)

    def settle(self, end: Exit) -> None:
        """Its end: kept in the bundle, then published, then told to everybody who waits."""
        if self.end is not None:
            return
        self.io.flush()
        if self.reason or not self._kept:
            self._keep(end)
        reach("shim.exit.written")
        self.machine.move(Operation.EXIT)
        self.end = end
        event = events_pb2.TaskExit(container_id=self.container_id, id=self.id, pid=end.pid, exit_status=end.status)
        event.exited_at.FromNanoseconds(end.at_ns)
        self._shim.publisher.publish(event)
        reach("shim.exit.published")
        self.ended.set(end)
        reach("shim.exit.told")

    def failed(self) -> None:
        """It could not be started: whoever waits for it waits in vain."""
        self.io.close()
        self.ended.set(Exit(0, 255, 0))

    # -- questions -------------------------------------------------------------------------------------------------

    def check_killable(self) -> None:
        """Raises what containerd answers to a kill of a process that isn't there."""
        self.machine.check(Operation.KILL)
        if not self.pid:
            raise FailedPrecondition("process not created: failed precondition")
        if self.reaped or self.end is not None:
            raise NotFound("process already finished: not found")

    def state(self, bundle: str, status: State) -> task_v2_pb2.StateResponse:
        """The answer to State; `status` is the process's own, or that of a container that is paused."""
        response = task_v2_pb2.StateResponse(
            id=self.id,
            bundle=bundle,
            pid=self.pid,
            status=STATUS[status],
            stdin=self.stdio.stdin,
            stdout=self.stdio.stdout,
            stderr=self.stdio.stderr,
            terminal=self.stdio.terminal,
            exec_id=self.exec_id,
        )
        self.tell_end(response.exited_at)
        if self.end is not None:
            response.exit_status = self.end.status
        return response

    def tell_end(self, at: Timestamp) -> None:
        """Fill in when it ended; Go's zero time if it hasn't."""
        if self.end is None:
            at.seconds = _NO_TIME
        else:
            at.FromNanoseconds(self.end.at_ns)

    async def drain(self) -> None:
        """Wait until the output was copied; not for ever, where nobody reads it or somebody else holds it open."""
        waited = 0.0
        moved = -1
        while not self.io.drained.done and moved != self.io.moved and waited < DRAIN_LIMIT:
            moved = self.io.moved
            either: Future[None] = Future(self._shim.loop)
            self.io.drained.add_callback(lambda either=either: either.set(None))  # type: ignore[misc]
            timer = self._shim.loop.later(DRAIN_STEP, lambda either=either: either.set(None))  # type: ignore[misc]
            await either
            timer.cancel()
            waited += DRAIN_STEP
