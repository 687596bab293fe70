"""A process in a container, as if it ran here: its streams are copied, signals go to it, its end is waited for.

One thread does it all with poll(2). Signals are handled where they interrupt, over a connection of their own, so that
they go through also while this process waits for a slow reader of its output.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import struct
import time
from collections.abc import Collection, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from wherry.cli import startup
from wherry.cli.following import AWAY, RETRY
from wherry.cli.terminal import raw, window
from wherry.client.blocking import drive
from wherry.core.errors import NotFound, Unavailable, WherryError
from wherry.core.signals import signal

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.client.api import Client
    from wherry.client.fifos import Fifos
    from wherry.client.tasks import Exit, PendingExit

# bytes copied at once: what a FIFO of ours holds
CHUNK = 1 << 20
# a connection that held this long (seconds) was a good one: the next loss starts a new count
GOOD = 5.0
# after the end of a process its streams close; when a child that outlived it holds them open, this silence is enough
SILENCE = 2.0
# ioctl_pipe(2), without `termios`
FIONREAD = 0x541B
# ^D: the default VEOF of a terminal
END_OF_INPUT = b"\x04"
# those that a person or a supervisor sends to stop or steer a program
FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGCONT,
)
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Waiter:
    """Waits for a process' end, also over restarts of the daemon."""

    def __init__(self, client: Client, container: str, exec_id: str = "") -> None:
        """Sends the wait at once."""
        self._client = client
        self._container = container
        self._exec_id = exec_id
        self._pending: PendingExit | None = client.tasks.waiting(container, exec_id)
        self._began = time.monotonic()
        self._lost = 0.0

    def fileno(self) -> int:
        """What becomes readable with the end; -1 while the daemon is away."""
        return -1 if self._pending is None else self._pending.fileno()

    def check(self) -> Exit | None:
        """The end, None where it hasn't come. Raises what the daemon says against the wait."""
        if self._pending is None and not self._again():
            return None
        if self._pending is None or not self._pending.ready():
            return None
        try:
            return drive(self._pending.result())
        except Unavailable:
            now = time.monotonic()
            if not self._lost or now - self._began > GOOD:
                self._lost = now
            if now - self._lost > AWAY:
                raise
            self._pending = None
            return None

    def _again(self) -> bool:
        try:
            self._pending = self._client.tasks.waiting(self._container, self._exec_id)
        except Unavailable:
            if time.monotonic() - self._lost > AWAY:
                raise
            return False
        self._began = time.monotonic()
        return True


class Attachment:
    """The copying between this process' streams and those of a container's process."""

    def __init__(
        self,
        fifos: Fifos | None,
        waiter: Waiter,
        client: Client,
        container: str,
        exec_id: str = "",
        *,
        keys: bytes = b"",
        stdin: bool = True,
        hidden: Collection[int] = (),
    ) -> None:
        """`fifos` None waits without copying. `keys`, typed in a row, end it; without `stdin` our input isn't read.

        What is for a descriptor in `hidden` goes nowhere.
        """
        self._nowhere = {number: os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC) for number in hidden}
        self._keys = keys
        self._matched = b""
        self._left = False
        self._takes_input = stdin
        self._fifos = fifos
        self._waiter = waiter
        self._client = client
        self._process = (container, exec_id)
        self._poll = select.poll()
        self._outputs: dict[int, int] = {}
        self._terminal = fifos is not None and fifos.stdio.terminal
        self._ended = False
        self._splice = {1: True, 2: True, **dict.fromkeys(self._nowhere.values(), False)}
        self._typed = b""
        self._watched = -1

    def run(self) -> Exit | None:
        """Copies until the process has ended and all of its output was passed on; None where the keys were typed."""
        startup.settle()
        self._open()
        exit_: Exit | None = None
        heard = time.monotonic()
        while True:
            if exit_ is None:
                exit_ = self._waiter.check()
                if exit_ is not None:
                    heard = time.monotonic()
                    # nobody is there any more to be told of the end of the input
                    self._stop_input()
            if exit_ is not None and (not self._outputs or time.monotonic() - heard > SILENCE):
                return exit_
            if self._step(exit_ is not None):
                heard = time.monotonic()
            if self._left and exit_ is None:
                return None

    def _open(self) -> None:
        fifos = self._fifos
        if fifos is None:
            return
        for source, target in ((fifos.stdout, 1), (fifos.stderr, 2)):
            if source >= 0:
                self._outputs[source] = self._nowhere.get(target, target)
                self._poll.register(source, select.POLLIN)
        if fifos.stdin >= 0 and self._takes_input:
            try:
                os.fstat(0)
            except OSError:
                # started without an input
                self._end_input()
            else:
                self._poll.register(0, select.POLLIN)

    def _watch(self, ended: bool) -> int:
        """Keeps the poll on the wait's descriptor; how long it may take, in milliseconds."""
        descriptor = -1 if ended else self._waiter.fileno()
        if descriptor != self._watched:
            if self._watched >= 0:
                # the kernel forgot it where it was closed, this object remembers it
                with contextlib.suppress(KeyError):
                    self._poll.unregister(self._watched)
            if descriptor >= 0:
                self._poll.register(descriptor, select.POLLIN)
            self._watched = descriptor
        return int((SILENCE if ended else RETRY) * 1000) if descriptor < 0 else -1

    def _step(self, ended: bool) -> bool:
        """One round; whether there was output."""
        heard = False
        for descriptor, events in self._poll.poll(self._watch(ended)):
            if descriptor in self._outputs:
                heard = True
                if not self._copy(descriptor, self._outputs[descriptor]) and events & _GONE:
                    self._poll.unregister(descriptor)
                    del self._outputs[descriptor]
            elif descriptor == 0 and self._fifos is not None and self._fifos.stdin >= 0:
                self._read_input()
            elif self._fifos is not None and descriptor == self._fifos.stdin:
                self._write_input()
        return heard

    def _copy(self, source: int, target: int) -> bool:
        """Passes on what is there; False where nothing was."""
        if self._splice[target]:
            try:
                return os.splice(source, target, CHUNK) > 0
            except BlockingIOError:
                if not _has_data(source):
                    return False
                # between two pipes the kernel doesn't wait for the second one either: it is full
                select.select([], [target], [])
                return True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # a terminal, or a file opened for appending
                self._splice[target] = False
        try:
            data = os.read(source, CHUNK)
        except BlockingIOError:
            return False
        view = memoryview(data)
        while view:
            view = view[os.write(target, view) :]
        return bool(data)

    def _read_input(self) -> None:
        try:
            data = os.read(0, 1 << 16)
        except OSError:
            # a terminal that went away, or that this job may not read
            data = b""
        if not data and not self._terminal:
            self._end_input()
            return
        if not data:
            # closing a terminal's input would hang it up and lose output; this is what a person types at the end
            self._poll.unregister(0)
            self._ended = True
        self._typed += self._without_keys(data) if data and self._keys else data or END_OF_INPUT
        self._write_input()

    def _without_keys(self, data: bytes) -> bytes:
        """What was typed, without the detach keys; the beginning of them is held back until it is clear what it is."""
        passed = b""
        for value in data:
            self._matched += bytes((value,))
            if self._matched == self._keys:
                self._left = True
                return passed
            while self._matched and not self._keys.startswith(self._matched):
                passed, self._matched = passed + self._matched[:1], self._matched[1:]
        return passed

    def _write_input(self) -> None:
        """Writes what was typed; while the container doesn't read, nothing more is taken from our input."""
        fifos = self._fifos
        if fifos is None or fifos.stdin < 0:
            return
        was_full = bool(self._typed)
        try:
            while self._typed:
                self._typed = self._typed[os.write(fifos.stdin, self._typed) :]
        except BlockingIOError:
            with contextlib.suppress(KeyError):
                self._poll.unregister(0)
            self._poll.register(fifos.stdin, select.POLLOUT)
            return
        if was_full:
            with contextlib.suppress(KeyError):
                self._poll.unregister(fifos.stdin)
            if not self._ended:
                self._poll.register(0, select.POLLIN)

    def _stop_input(self) -> None:
        fifos = self._fifos
        if fifos is None or fifos.stdin < 0:
            return
        for descriptor in (0, fifos.stdin):
            with contextlib.suppress(KeyError):
                self._poll.unregister(descriptor)
        fifos.close_stdin()

    def _end_input(self) -> None:
        if self._fifos is None or self._fifos.stdin < 0:
            return
        self._stop_input()
        # the process may have ended meanwhile, and the daemon may be away: nothing reads any more in either case
        with contextlib.suppress(WherryError):
            drive(self._client.tasks.close_stdin(*self._process))


def _has_data(source: int) -> bool:
    """Whether a FIFO holds something."""
    return bool(struct.unpack("i", fcntl.ioctl(source, FIONREAD, b"\0" * 4))[0])


@contextlib.contextmanager
def forwarding(session: Session, container: str, exec_id: str = "", *, active: bool = True) -> Iterator[None]:
    """Signals that this process gets go to the process in the container, for the time of the block."""
    if not active:
        yield
        return

    def forward(number: int, _: FrameType | None) -> None:
        # the process has just ended, or isn't there yet: its end will be told, or nothing was lost
        with contextlib.suppress(NotFound, Unavailable), _connection(session) as client:
            drive(client.tasks.kill(container, number, exec_id))

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def terminal(session: Session, container: str, exec_id: str = "", *, active: bool = True) -> Iterator[None]:
    """This terminal lent to the container: raw, and its size told now and whenever it changes."""
    if not active:
        yield
        return

    def resize(_: int, __: FrameType | None) -> None:
        size = window()
        if size is not None:
            with contextlib.suppress(WherryError), _connection(session) as client:
                drive(client.tasks.resize(container, *size, exec_id))

    before = signal.signal(signal.SIGWINCH, resize)
    try:
        resize(signal.SIGWINCH, None)
        with raw(active):
            yield
    finally:
        signal.signal(signal.SIGWINCH, before)


@contextlib.contextmanager
def _connection(session: Session) -> Iterator[Client]:
    client = session.another()
    try:
        yield client
    finally:
        drive(client.close())
