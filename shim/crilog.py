"""A container's log in Kubernetes' format, and clients that are attached to its output while it is written.

    2016-10-06T00:17:09.669794202Z stdout F a line
    2016-10-06T00:17:09.669794202Z stderr P a part of one; the next record of the stream goes on with it

A part is written when a line has more bytes than the limit, when a second passed without its end, and at the end of the
stream. The kubelet rotates: it renames the file and asks for another (`reopen`); what was read of a line by then goes
to the new one.

A client that is attached gets the bytes as they come, by a FIFO. While it is full nothing more is read, so that the
client misses nothing; one that took nothing of it for a second is cut off: the log, and with it the container, waits
for nobody longer than that.

The lock on the file, by which readers know whether more will come, and what a full disk does: `copying.py`.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Final

from wherry.core.errors import FailedPrecondition
from wherry.shim.copying import LineCopy, LogWriter, open_log
from wherry.shim.log import log
from wherry.shim.loop import Loop, Timer

# seconds that a part of a line waits for the rest of it
PATIENCE: Final = 1.0
# seconds that the output waits for a client whose FIFO is full; less than Delete waits for output (DRAIN_STEP)
CLIENT_PATIENCE: Final = 1.0
# what stands for "no limit": a line without an end can't eat the memory
LONGEST: Final = 1 << 20


class CriLog(LogWriter):
    """One log file; with the path "" nothing is kept. Nothing raises but the constructor and `reopen`."""

    def __init__(self, path: str, max_line: int) -> None:
        """Open the file to append to it, made where missing. `max_line`: bytes. Raises OSError."""
        super().__init__(path)
        self.max_line = max_line if 0 < max_line <= LONGEST else LONGEST
        if path:
            os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
            self._fd = open_log(path)

    def reopen(self) -> None:
        """Go on in the file that has the path now. Raises FailedPrecondition; the old one is kept then.

        The old one is locked until the new one is: one of them tells who follows that this isn't the end.
        """
        if not self._path:
            return
        if self._fd < 0:
            raise FailedPrecondition("the container's output has ended, and its log with it")
        try:
            fd = open_log(self._path)
        except OSError as error:
            raise FailedPrecondition(f"the log {self._path} can't be opened: {error.strerror}") from error
        os.close(self._fd)
        self._fd = fd

    def add(self, stream: str, lines: list[bytes]) -> None:
        """Write lines with their newlines, or parts of them without, as records of this moment."""
        if self._fd < 0:
            return
        start = f"{self._now()} {stream} ".encode()
        full, part = start + b"F ", start + b"P "
        records = [full + line if line.endswith(b"\n") else part + line + b"\n" for line in lines]
        if self._lost:
            records.insert(0, full + self._missing.encode())
        if self._append(b"".join(records)):
            self._lost = 0
        else:
            self._lost += len(lines)


class _Client:
    """A FIFO that output is copied to; `rest` is what it didn't take yet."""

    __slots__ = ("fd", "rest", "timer")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.rest = b""
        self.timer: Timer | None = None


class CriCopy(LineCopy):
    """Moves output into a `CriLog`, and to the clients that follow it."""

    def __init__(self, loop: Loop, source: int, sink: CriLog, stream: str, finished: Callable[[], None]) -> None:
        self.stream = stream
        self._clients: list[_Client] = []
        longest = sink.max_line + 1  # the newline doesn't count
        write, cut = partial(sink.add, stream), itemgetter(slice(sink.max_line))
        super().__init__(loop, source, finished, write=write, cut=cut, longest=longest, patience=PATIENCE)

    def follow(self, fd: int) -> None:
        """Copy what comes from now on to a FIFO's writing end, non-blocking, which is closed at the end."""
        for client in [each for each in self._clients if not _is_read(each.fd)]:
            self._drop(client)
        if self.done:
            os.close(fd)
        else:
            self._clients.append(_Client(fd))

    def stop(self) -> None:
        """Move nothing more; `finished` isn't called. Clients see the end."""
        super().stop()
        for client in list(self._clients):
            self._drop(client)

    def _held(self) -> bool:
        return any(client.rest for client in self._clients)

    # -- clients ---------------------------------------------------------------------------------------------------

    def _pass_on(self, data: bytes) -> None:
        for client in list(self._clients):
            try:
                client.rest = data[os.write(client.fd, data) :]
            except BlockingIOError:
                client.rest = data
            except OSError:  # EPIPE: it went away
                self._drop(client)
                continue
            if client.rest:
                self._loop.on_read(self._source, None)
                self._loop.on_write(client.fd, partial(self._hand_rest, client))
                client.timer = self._loop.later(CLIENT_PATIENCE, partial(self._give_up, client))

    def _hand_rest(self, client: _Client) -> None:
        try:
            written = os.write(client.fd, client.rest)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        client.rest = client.rest[written:]
        if client.timer is not None:
            client.timer.cancel()
            client.timer = None
        if client.rest:
            client.timer = self._loop.later(CLIENT_PATIENCE, partial(self._give_up, client))
        else:
            self._loop.on_write(client.fd, None)
            self._go_on()

    def _give_up(self, client: _Client) -> None:
        if client.rest:
            log("warning", "a client that was attached read too slowly and was cut off", stream=self.stream)
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        if client.timer is not None:
            client.timer.cancel()
        self._clients.remove(client)
        self._loop.forget(client.fd)
        os.close(client.fd)
        self._go_on()

    def _go_on(self) -> None:
        if not self.done and not self._held():
            self._loop.on_read(self._source, self._move)


def _is_read(fd: int) -> bool:
    """Whether a FIFO still has a reader: poll(2) tells an error where it has none."""
    poll = select.poll()
    poll.register(fd, 0)
    return not poll.poll(0)
