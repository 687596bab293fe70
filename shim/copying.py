"""Copies between descriptors, in the loop: pipes are spliced, everything else goes through a small buffer.

A copy ends at the end of its source, or when its destination is broken. A destination that takes nothing stops it, and
so, by a full pipe, the writer in the container; nothing is lost and nothing is hoarded.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Callable
from typing import Final

from wherry.shim.loop import Loop

# the default size of a pipe (pipe(7)); more than that is never there to be moved at once
_CHUNK: Final = 65536
# a flood must not keep the loop from everything else: after so many chunks the other callbacks get their turn
_CHUNKS_PER_TURN: Final = 16
# splice(2): the flags of the two pipes don't matter for it, only this one does
_SPLICE_NONBLOCK: Final = 0x02


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


def _is_pipe(fd: int) -> bool:
    return fd >= 0 and stat.S_ISFIFO(os.fstat(fd).st_mode)


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
