"""The shim's event loop: epoll, timers, coroutines and children, in one thread and few objects.

It does what a shim needs of asyncio (which weighs 1.5 MB in every shim, see DESIGN.md) and no more: `async def` runs
on it, awaiting `Future`s of this module. Callbacks run in the loop, one after the other; none may block.
"""

from __future__ import annotations

import contextlib
import heapq
import importlib
import itertools
import os
import select
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from wherry.core import errors

T = TypeVar("T")

# what Python ignores and the programs we start must not; a handler is reset by execve itself
DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)

# EPOLLHUP and EPOLLERR come unasked; whoever waits finds out by reading or writing
_READ = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR
_WRITE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR


class Future(Generic[T]):
    """A value that comes later; `await` it, or `add_callback`. Settled once, later attempts are ignored."""

    __slots__ = ("_callbacks", "_error", "_loop", "_value", "done")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._callbacks: list[Callable[[], None]] = []
        self._value: T | None = None
        self._error: BaseException | None = None
        self.done = False

    def set(self, value: T) -> None:
        """Settle with a value."""
        if not self.done:
            self._value = value
            self._settle()

    def fail(self, error: BaseException) -> None:
        """Settle with an error, which `result` and `await` raise."""
        if not self.done:
            self._error = error
            self._settle()

    def _settle(self) -> None:
        self.done = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._loop.soon(callback)

    def result(self) -> T:
        """The value; raises the error it failed with. Only once `done`."""
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # a settled future without an error has its value

    def add_callback(self, callback: Callable[[], None]) -> None:
        """Call back from the loop when settled."""
        if self.done:
            self._loop.soon(callback)
        else:
            self._callbacks.append(callback)

    def __await__(self) -> Generator[Future[Any], None, T]:
        if not self.done:
            yield self
        return self.result()


class Job(Future[T]):
    """A coroutine that runs on the loop, and the future of what it returns."""

    __slots__ = ("_coroutine",)

    def __init__(self, loop: Loop, coroutine: Coroutine[Future[Any], None, T]) -> None:
        super().__init__(loop)
        self._coroutine = coroutine
        self._step()  # at once: most handlers never wait

    def _step(self) -> None:
        try:
            awaited = self._coroutine.send(None)
        except StopIteration as stop:
            self.set(stop.value)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  # whatever it is belongs to whoever awaits this job
            self.fail(error)
        else:
            awaited.add_callback(self._step)


class Timer:
    """A callback at a time of the monotonic clock."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Don't call back any more."""
        self.callback = None


class Lock:
    """One coroutine at a time, in the order of asking: `async with`."""

    __slots__ = ("_held", "_loop", "_queue")

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._held = False
        self._queue: deque[Future[None]] = deque()

    async def __aenter__(self) -> None:
        if self._held:
            turn: Future[None] = Future(self._loop)
            self._queue.append(turn)
            await turn
        self._held = True

    async def __aexit__(self, *exc: object) -> None:
        if self._queue:
            self._queue.popleft().set(None)  # stays held, for the next one
        else:
            self._held = False


class Loop:
    """One epoll, one heap of timers, one queue of what is ready."""

    def __init__(self, *, opened: bool = True) -> None:
        self._epoll: select.epoll = select.epoll() if opened else None  # type: ignore[assignment]  # until `open`
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._ready: deque[Callable[[], None]] = deque()
        self._stopped = False

    def open(self) -> None:
        """Get the epoll descriptor, for a loop that was made before a fork without one."""
        self._epoll = select.epoll()

    # -- descriptors -----------------------------------------------------------------------------------------------

    def on_read(self, fd: int, callback: Callable[[], None] | None) -> None:
        """Call back whenever `fd` is readable or at its end; None: no more. Raises PermissionError for files."""
        self._watch(fd, self._readers, callback)

    def on_write(self, fd: int, callback: Callable[[], None] | None) -> None:
        """Call back whenever `fd` takes data or is broken; None: no more."""
        self._watch(fd, self._writers, callback)

    def _watch(self, fd: int, table: dict[int, Callable[[], None]], callback: Callable[[], None] | None) -> None:
        watched = fd in self._readers or fd in self._writers
        if callback is None:
            if table.pop(fd, None) is None:
                return
        else:
            table[fd] = callback
        mask = (select.EPOLLIN if fd in self._readers else 0) | (select.EPOLLOUT if fd in self._writers else 0)
        try:
            if not mask:
                self._epoll.unregister(fd)
            elif watched:
                self._epoll.modify(fd, mask)
            else:
                self._epoll.register(fd, mask)
        except OSError:
            table.pop(fd, None)
            raise

    def forget(self, fd: int) -> None:
        """Stop watching a descriptor in both directions, before it is closed."""
        self.on_read(fd, None)
        self.on_write(fd, None)

    # -- time ------------------------------------------------------------------------------------------------------

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back in this turn of the loop."""
        self._ready.append(callback)

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call back after so many seconds."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def sleep(self, seconds: float) -> Future[None]:
        """A future that is settled after so many seconds."""
        future: Future[None] = Future(self)
        self.later(seconds, lambda: future.set(None))
        return future

    async def within(self, seconds: float, future: Future[T], what: str) -> T:
        """The future's value, or DeadlineExceeded naming `what`; the future goes on."""
        either: Future[None] = Future(self)
        future.add_callback(lambda: either.set(None))
        timer = self.later(seconds, lambda: either.set(None))
        await either
        timer.cancel()
        if not future.done:
            raise errors.DeadlineExceeded(f"{what}: not done within {seconds:g} s")
        return future.result()

    # -- coroutines ------------------------------------------------------------------------------------------------

    def future(self) -> Future[Any]:
        """A new future of this loop."""
        return Future(self)

    def spawn(self, coroutine: Coroutine[Future[Any], None, T]) -> Job[T]:
        """Run a coroutine, its first part at once."""
        return Job(self, coroutine)

    def run_until(self, coroutine: Coroutine[Future[Any], None, T]) -> T:
        """Run until the coroutine returned; for commands and tests."""
        job = self.spawn(coroutine)
        while not job.done:
            self.turn()
        return job.result()

    # -- running ---------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Leave `run` after this turn."""
        self._stopped = True

    def run(self) -> None:
        """Turn until `stop`."""
        while not self._stopped:
            self.turn()

    def turn(self) -> None:
        """Wait for something to happen, and do what is due."""
        for fd, events in self._epoll.poll(self._timeout()):
            # looked up one by one: a callback may have taken away what comes after it
            reader = self._readers.get(fd)
            if reader is not None and events & _READ:
                self._call(reader)
            writer = self._writers.get(fd)
            if writer is not None and events & _WRITE:
                self._call(writer)
        self._due()
        while self._ready:
            self._call(self._ready.popleft())

    def _timeout(self) -> float:
        if self._ready or self._stopped:
            return 0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1

    def _due(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                self._ready.append(callback)

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:  # noqa: BLE001  # a bug in one callback must not take the container's shim down
            traceback.print_exc(file=sys.stderr)

    def close(self) -> None:
        """Close the epoll descriptor."""
        self._epoll.close()


class Exit:
    """How a child ended: `status` as containerd counts it (128 + signal when killed), `at_ns` since the epoch."""

    __slots__ = ("at_ns", "pid", "status")

    def __init__(self, pid: int, status: int, at_ns: int) -> None:
        self.pid = pid
        self.status = status
        self.at_ns = at_ns


# the C function below signal.signal, without its turning of numbers into enums and back (20 pages)
set_signal: Callable[[int, Callable[[int, object], None]], object] = importlib.import_module("_signal").signal


def ignore(number: int, frame: object) -> None:
    """A signal's handler that does nothing; unlike SIG_IGN, execve doesn't hand it on."""


class Children:
    """Reaps every child, ours and those that became ours because their parent died (PR_SET_CHILD_SUBREAPER).

    An exit that nobody waits for yet is kept while somebody is `expecting`: a container's init may be gone before the
    runtime told its pid. Otherwise it is an orphan of the container and forgotten.
    """

    def __init__(self, loop: Loop, *, opened: bool = True) -> None:
        self._loop = loop
        self._waiting: dict[int, list[Future[Exit]]] = {}
        self._unclaimed: dict[int, Exit] = {}
        self._keepers: dict[int, Callable[[Exit], None]] = {}
        self._expecting = 0
        self._wake_read, self._wake_write = -1, -1
        if opened:
            self.open()

    def open(self) -> None:
        """Listen for the signal; once, in the process whose children they are."""
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        set_signal(signal.SIGCHLD, ignore)  # the wakeup descriptor needs a Python handler
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._loop.on_read(self._wake_read, self._woken)

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 512)
        self.reap()

    def reap(self) -> None:
        """Collect every child that has ended."""
        while True:
            try:
                seen = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if seen is None:
                return
            pid, status = seen.si_pid, seen.si_status
            end = Exit(pid, status if seen.si_code == os.CLD_EXITED else 128 + status, time.time_ns())
            # what is to be kept is kept before the kernel forgets it: a shim that dies here has lost nothing it knew
            keep = self._keepers.pop(pid, None)
            if keep is not None:
                keep(end)
            os.waitpid(pid, 0)
            self._ended(end)

    def _ended(self, end: Exit) -> None:
        waiting = self._waiting.pop(end.pid, None)
        if waiting is not None:
            for future in waiting:
                future.set(end)
        elif self._expecting:
            self._unclaimed[end.pid] = end

    def exited(self, pid: int) -> Future[Exit]:
        """The exit of a child; of one that is gone already if asked while `expecting`."""
        future: Future[Exit] = Future(self._loop)
        end = self._unclaimed.pop(pid, None)
        if end is not None:
            future.set(end)
        else:
            self._waiting.setdefault(pid, []).append(future)
        return future

    def keep(self, pid: int, keeper: Callable[[Exit], None]) -> None:
        """Have a child's exit told to `keeper` before it is reaped. It must not raise."""
        self._keepers[pid] = keeper

    def __enter__(self) -> None:
        self._expecting += 1

    def __exit__(self, *exc: object) -> None:
        self._expecting -= 1
        if not self._expecting:
            self._unclaimed.clear()

    def none_left(self) -> bool:
        """Whether there is no child, alive or not reaped yet."""
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return True
        return False

    def close(self) -> None:
        """Stop listening for the signal."""
        self._loop.forget(self._wake_read)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._wake_read)
        os.close(self._wake_write)
