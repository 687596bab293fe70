"""A container's log in Kubernetes' format, and clients that are attached to its output while it is written.

    2016-10-06T00:17:09.669794202Z stdout F a line
    2016-10-06T00:17:09.669794202Z stderr P a part of one; the next record of the stream goes on with it

A part is written when a line has more bytes than the limit, when a second passed without its end, and at the end of the
stream. The kubelet rotates: it renames the file and asks for another (`reopen`); what was read of a line by then goes
to the new one.

What can't be written (a full disk) is dropped and counted, and a record says so when there is room again, as in
`logfile.py`. A client that is attached gets the bytes as they come, by a FIFO. While it is full nothing more is read,
so that the client misses nothing; one that took nothing of it for a second is cut off: the log, and with it the
container, waits for nobody longer than that.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from wherry.core.errors import FailedPrecondition
from wherry.shim.log import log
from wherry.shim.loop import Loop, Timer

# seconds that a part of a line waits for the rest of it
PATIENCE: Final = 1.0
# seconds that the output waits for a client whose FIFO is full; less than Delete waits for output (DRAIN_STEP)
CLIENT_PATIENCE: Final = 1.0
# what stands for "no limit": a line without an end can't eat the memory
LONGEST: Final = 1 << 20
_CHUNK: Final = 65536
# so many chunks, then the other callbacks get their turn
_CHUNKS_PER_TURN: Final = 16
_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


class CriLog:
    """One log file; with the path "" nothing is kept. Nothing raises but the constructor and `reopen`."""

    def __init__(self, path: str, max_line: int) -> None:
        """Open the file to append to it, made where missing. `max_line`: bytes. Raises OSError."""
        self._path = path
        self.max_line = max_line if 0 < max_line <= LONGEST else LONGEST
        self._fd = -1
        self._lost = 0
        self._second, self._prefix = -1, ""
        if path:
            os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
            self._fd = os.open(path, _FLAGS, 0o640)

    def reopen(self) -> None:
        """Go on in the file that has the path now. Raises FailedPrecondition; the old one is kept then."""
        if not self._path:
            return
        if self._fd < 0:
            raise FailedPrecondition("the container's output has ended, and its log with it")
        try:
            fd = os.open(self._path, _FLAGS, 0o640)
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
            note = f"[wherry: {self._lost} lines of output could not be written and are missing here]\n"
            records.insert(0, full + note.encode())
        if self._write(b"".join(records)):
            self._lost = 0
        else:
            self._lost += len(lines)

    def _write(self, data: bytes) -> bool:
        written = 0
        try:
            written = os.write(self._fd, data)
            if written < len(data):
                written += os.write(self._fd, data[written:])  # says why it was short
        except OSError as error:
            if not self._lost:
                log("error", f"the container's log can't be written: {error.strerror}", path=self._path)
            if written:
                with contextlib.suppress(OSError):  # half a record is none; whoever else truncates it keeps the rest
                    os.ftruncate(self._fd, max(0, os.fstat(self._fd).st_size - written))
            return False
        return True

    def _now(self) -> str:
        second, nanosecond = divmod(time.time_ns(), 10**9)
        if second != self._second:
            self._second, self._prefix = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._prefix}.{nanosecond:09d}Z"

    def close(self) -> None:
        """That was all."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Client:
    """A FIFO that output is copied to; `rest` is what it didn't take yet."""

    __slots__ = ("fd", "rest", "timer")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.rest = b""
        self.timer: Timer | None = None


class CriCopy:
    """Moves what comes from a pipe or a terminal into a `CriLog`, and to the clients that follow it, until the end;
    then calls `finished` once. Has what `Copy` has; owns neither the descriptor nor the log."""

    def __init__(self, loop: Loop, source: int, sink: CriLog, stream: str, finished: Callable[[], None]) -> None:
        self._loop = loop
        self._source = source
        self._sink = sink
        self.stream = stream
        self._finished: Callable[[], None] | None = finished
        self._part = b""
        self._timer: Timer | None = None
        self._clients: list[_Client] = []
        self.moved = 0
        """Bytes that went through so far."""
        loop.on_read(source, self._move)

    @property
    def done(self) -> bool:
        """True once nothing more will be moved."""
        return self._finished is None

    def follow(self, fd: int) -> None:
        """Copy what comes from now on to a FIFO's writing end, non-blocking, which is closed at the end."""
        for client in [each for each in self._clients if not _is_read(each.fd)]:
            self._drop(client)
        if self.done:
            os.close(fd)
        else:
            self._clients.append(_Client(fd))

    def flush(self) -> None:
        """Move what is there now."""
        if not self.done:
            self._move()

    def stop(self) -> None:
        """Move nothing more; `finished` isn't called. Clients see the end."""
        if self._finished is not None:
            self._finished = None
            self._loop.on_read(self._source, None)
        self._flush_part()
        for client in list(self._clients):
            self._drop(client)

    def _move(self) -> None:
        for _ in range(_CHUNKS_PER_TURN):
            if self.done or any(client.rest for client in self._clients):
                return
            try:
                data = os.read(self._source, _CHUNK)
            except BlockingIOError:
                return
            except InterruptedError:
                continue
            except OSError:  # EIO: the other end of a terminal is closed everywhere
                data = b""
            if not data:
                finished = self._finished
                self.stop()
                if finished is not None:
                    finished()
                return
            self.moved += len(data)
            self._take(data)
            if self._clients:
                self._hand_out(data)

    def _take(self, data: bytes) -> None:
        """Write the lines that are there, hold the part that isn't one."""
        lines = (self._part + data).split(b"\n")
        self._part = lines.pop()
        records = [line + b"\n" for line in lines]
        if any(len(record) > self._sink.max_line + 1 for record in records):
            records = [part for record in records for part in self._parts(record)]
        while len(self._part) > self._sink.max_line:
            records.append(self._part[: self._sink.max_line])
            self._part = self._part[self._sink.max_line :]
        if records:
            self._sink.add(self.stream, records)
        if self._part and self._timer is None:
            self._timer = self._loop.later(PATIENCE, self._flush_part)
        elif not self._part and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _flush_part(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        part, self._part = self._part, b""
        if part:
            self._sink.add(self.stream, [part])

    def _parts(self, record: bytes) -> list[bytes]:
        found = []
        while len(record) > self._sink.max_line + 1:  # the newline doesn't count
            found.append(record[: self._sink.max_line])
            record = record[self._sink.max_line :]
        return [*found, record]

    # -- clients ---------------------------------------------------------------------------------------------------

    def _hand_out(self, data: bytes) -> None:
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
        if not self.done and not any(client.rest for client in self._clients):
            self._loop.on_read(self._source, self._move)


def _is_read(fd: int) -> bool:
    """Whether a FIFO still has a reader: poll(2) tells an error where it has none."""
    poll = select.poll()
    poll.register(fd, 0)
    return not poll.poll(0)
