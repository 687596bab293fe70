"""Copies between descriptors, in the loop: pipes are spliced, everything else goes through a small buffer; and what
the logs of all formats share (`logfile.py`, `crilog.py`): their file, and output that is cut into lines.

A copy ends at the end of its source, or when its destination is broken. A destination that takes nothing stops it, and
so, by a full pipe, the writer in the container; nothing is lost and nothing is hoarded.

The writer of a log holds a lock on its file (fcntl(2), F_OFD_SETLK), by which readers know whether more will come.

What can't be written to a log (a full disk) is dropped and counted: the container goes on. When there is room again a
record says how much is missing there. A disk that doesn't answer at all stops the shim, as it stops every writer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import stat
import struct
import time
from collections.abc import Callable
from typing import Final

from wherry.shim.log import log
from wherry.shim.loop import Loop, Timer

# the default size of a pipe (pipe(7)); more than that is never there to be moved at once
_CHUNK: Final = 65536
# a flood must not keep the loop from everything else: after so many chunks the other callbacks get their turn
_CHUNKS_PER_TURN: Final = 16
# splice(2): the flags of the two pipes don't matter for it, only this one does
_SPLICE_NONBLOCK: Final = 0x02
_LOCK: Final = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class Copy:
    """Moves bytes from `source` to `sink` until the end; then calls `finished` once. Owns neither descriptor."""

    def __init__(self, loop: Loop, source: int, sink: int, finished: Callable[[], None]) -> None:
        self._loop = loop
        self._source = source
        self._sink = sink
        self._finished: Callable[[], None] | None = finished
        self._rest = b""
        self.moved = 0
        """Bytes that went through so far."""
        self._for_sink = False
        self._splice = _is_pipe(source) and _is_pipe(sink)
        # epoll refuses regular files, which never make anybody wait
        self._sink_waits = sink >= 0 and not stat.S_ISREG(os.fstat(sink).st_mode)
        loop.on_read(source, self._move)

    @property
    def done(self) -> bool:
        """True once nothing more will be moved."""
        return self._finished is None

    def flush(self) -> None:
        """Move what is there now and fits."""
        if not self.done:
            self._move()

    def stop(self) -> None:
        """Move nothing more; `finished` isn't called."""
        if self._finished is not None:
            self._finished = None
            self._loop.on_read(self._source, None)
            if self._sink_waits:
                self._loop.on_write(self._sink, None)

    def _end(self) -> None:
        finished = self._finished
        self.stop()
        if finished is not None:
            finished()

    def _move(self) -> None:
        step = self._splice_once if self._splice else self._copy_once
        for _ in range(_CHUNKS_PER_TURN):
            if not step():
                return

    def _splice_once(self) -> bool:
        """Move a chunk; False when there is nothing to do now."""
        try:
            moved = os.splice(self._source, self._sink, _CHUNK, flags=_SPLICE_NONBLOCK)
        except BlockingIOError:
            self._wait(for_sink=_readable(self._source))
            return False
        except OSError as error:
            self._broken(error)
            return False
        if not moved:
            self._end()
            return False
        self.moved += moved
        return True

    def _copy_once(self) -> bool:
        try:
            data = self._rest or os.read(self._source, _CHUNK)
        except BlockingIOError:
            self._wait(for_sink=False)
            return False
        except OSError as error:  # EIO: the other end of a terminal is closed everywhere
            self._broken(error)
            return False
        if not data:
            self._end()
            return False
        return self._put(data)

    def _put(self, data: bytes) -> bool:
        if self._sink < 0:  # nobody wants it: read only so that the writer goes on
            return True
        try:
            written = os.write(self._sink, data)
        except BlockingIOError:
            written = 0
        except OSError as error:
            self._broken(error)
            return False
        self.moved += written
        self._rest = data[written:]
        self._wait(for_sink=bool(self._rest))
        return not self._rest

    def _wait(self, *, for_sink: bool) -> None:
        if self.done or for_sink == self._for_sink:
            return
        self._for_sink = for_sink
        self._loop.on_read(self._source, None if for_sink else self._move)
        if self._sink_waits:
            self._loop.on_write(self._sink, self._move if for_sink else None)

    def _broken(self, error: OSError) -> None:
        if error.errno == errno.EAGAIN:
            return
        if error.errno == errno.EINTR:
            self._loop.soon(self._move)
            return
        self._rest = b""
        self._end()


class LogWriter:
    """A file that records are appended to; -1 while there is none."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._lost = 0
        self._second, self._prefix = -1, ""

    def close(self) -> None:
        """That was all; readers see it by the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, data: bytes) -> bool:
        """Write records; False where they aren't in the file, and no half of one either."""
        written = 0
        try:
            written = os.write(self._fd, data)
            if written < len(data):
                written += os.write(self._fd, data[written:])  # says why it was short
        except OSError as error:
            if not self._lost:
                log("error", f"the container's log can't be written: {error.strerror}", path=self._path)
            if written:
                with contextlib.suppress(OSError):  # whoever else truncates it keeps the rest
                    os.ftruncate(self._fd, max(0, os.fstat(self._fd).st_size - written))
            return False
        return True

    @property
    def _missing(self) -> str:
        """The line that stands where some could not be written."""
        return f"[wherry: {self._lost} lines of output could not be written and are missing here]\n"

    def _now(self) -> str:
        """RFC 3339 with nanoseconds."""
        second, nanosecond = divmod(time.time_ns(), 10**9)
        if second != self._second:
            self._second, self._prefix = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._prefix}.{nanosecond:09d}Z"


def open_log(path: str, *, fresh: bool = False) -> int:
    """Open a log's file to append to it, made where missing, with `fresh` emptied, and lock it. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if fresh else 0)
    fd = os.open(path, flags, 0o640)
    with contextlib.suppress(OSError):  # another shim of the same container is about to end, or a file system
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _LOCK)
    return fd


class LineCopy:
    """Moves what comes from a pipe or a terminal into a log as lines, until the end; then calls `finished` once.

    Has what `Copy` has; owns neither the descriptors nor the log. A part of a line is written when it is longer than a
    record may be, when `patience` seconds passed without its end, and at the end of the stream. Whoever gets the output
    besides the log is a subclass's: `_pass_on` takes it, `_held` says that nothing more is to be read.
    """

    def __init__(
        self,
        loop: Loop,
        source: int,
        finished: Callable[[], None],
        *,
        write: Callable[[list[bytes]], None],
        cut: Callable[[bytes], bytes],
        longest: int,
        patience: float,
        prompt: bool = False,
    ) -> None:
        """`write` puts lines with their newlines, and parts without, into the log; `cut` gives the first part of what
        is too long for a record. `longest`: bytes of a record, with its newline. `prompt`: a part waits for nothing."""
        self._loop = loop
        self._source = source
        self._finished: Callable[[], None] | None = finished
        self._write = write
        self._cut = cut
        self._longest = longest
        self._patience = patience
        self._prompt = prompt
        self._part = b""
        self._timer: Timer | None = None
        self.moved = 0
        """Bytes that went through so far."""
        loop.on_read(source, self._move)

    @property
    def done(self) -> bool:
        """True once nothing more will be moved."""
        return self._finished is None

    def flush(self) -> None:
        """Move what is there now."""
        if not self.done:
            self._move()

    def stop(self) -> None:
        """Move nothing more; `finished` isn't called."""
        if self._finished is not None:
            self._finished = None
            self._loop.on_read(self._source, None)
        self._flush_part()

    def _held(self) -> bool:
        return False

    def _pass_on(self, data: bytes) -> None:
        """Nobody follows."""

    def _move(self) -> None:
        for _ in range(_CHUNKS_PER_TURN):
            if self.done or self._held():
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
            self._pass_on(data)

    def _take(self, data: bytes) -> None:
        """Write the lines that are there, hold the part that isn't one."""
        lines = (self._part + data).split(b"\n")
        self._part = lines.pop()
        records = [line + b"\n" for line in lines]
        if any(len(record) > self._longest for record in records):
            records = [part for record in records for part in self._parts(record)]
        while len(self._part) >= self._longest:
            part = self._cut(self._part)
            records.append(part)
            self._part = self._part[len(part) :]
        if self._prompt and self._part:
            records.append(self._part)
            self._part = b""
        if records:
            self._write(records)
        if self._part and self._timer is None:
            self._timer = self._loop.later(self._patience, self._flush_part)
        elif not self._part and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _flush_part(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        part, self._part = self._part, b""
        if part:
            self._write([part])

    def _parts(self, record: bytes) -> list[bytes]:
        found = []
        while len(record) > self._longest:
            part = self._cut(record)
            found.append(part)
            record = record[len(part) :]
        return [*found, record] if record else found


def _is_pipe(fd: int) -> bool:
    return fd >= 0 and stat.S_ISFIFO(os.fstat(fd).st_mode)


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
