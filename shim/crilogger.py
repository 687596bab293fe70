"""Writes a container's log in Kubernetes' format for shims of other projects: their `binary://` logging program.

    python -IOOc 'from wherry.shim.crilogger import main; main(PATH, MAX_LINE, SOCKET, STDIN)'

Descriptors 3 and 4 are the container's outputs, 5 is closed when all is ready (containerd's logging package). STDIN is
the FIFO of a terminal's input, "" for none: it is held open, because such shims take a FIFO that nobody writes to for
the end of the input. (Without a terminal they read no input where a program writes the log.) On SOCKET a line of JSON
is answered by one, {} or {"error": TEXT}:

    {"do": "reopen"}                                     the kubelet has renamed the file
    {"do": "attach", "stdout": FIFO, "stderr": FIFO}     copy what comes to these, too

A process of its own for each container: our own shim does the same in itself, for nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from functools import partial
from typing import Final

from wherry.core.errors import FailedPrecondition, WherryError
from wherry.proto.ttrpc import sockets
from wherry.shim.crilog import CriCopy, CriLog
from wherry.shim.loop import Loop

_STREAMS: Final = ((3, "stdout"), (4, "stderr"))
_READY: Final = 5
_MAX_REQUEST: Final = 16 << 10


class Logger:
    """The log of one container. Raises OSError where it can't be opened."""

    def __init__(self, path: str, max_line: int, listener: socket.socket) -> None:
        self._loop = Loop()
        self._log = CriLog(path, max_line)
        self._left = len(_STREAMS)
        self._copies: list[CriCopy] = []
        for fd, stream in _STREAMS:
            os.set_blocking(fd, False)
            self._copies.append(CriCopy(self._loop, fd, self._log, stream, self._ended))
        self._listener = listener
        self._loop.on_read(listener.fileno(), self._accept)

    def run(self) -> None:
        """Until both streams have ended."""
        self._loop.run()
        self._log.close()

    def _ended(self) -> None:
        self._left -= 1
        if not self._left:
            self._loop.stop()

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError:
            return
        peer.setblocking(False)
        self._loop.on_read(peer.fileno(), partial(self._read, peer))

    def _read(self, peer: socket.socket) -> None:
        try:
            line = peer.recv(_MAX_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            line = b""
        if line:
            with contextlib.suppress(OSError):
                peer.send(json.dumps(self._answer(line)).encode() + b"\n")
        self._loop.forget(peer.fileno())
        peer.close()

    def _answer(self, line: bytes) -> dict[str, str]:
        try:
            asked = json.loads(line)
            if asked["do"] == "reopen":
                self._log.reopen()
            else:
                self._attach({"stdout": str(asked["stdout"]), "stderr": str(asked["stderr"])})
        except WherryError as error:
            return {"error": error.message}
        except (ValueError, KeyError, TypeError, OSError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {}

    def _attach(self, paths: dict[str, str]) -> None:
        for copy in self._copies:
            path = paths[copy.stream]
            if not path:
                continue
            try:
                fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise FailedPrecondition(f"attaching to {path}: {error.strerror}") from error
            copy.follow(fd)


def main(path: str, max_line: int, place: str, stdin: str) -> None:
    """Write the log until both streams have ended; listens at `place`."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # its end is that of the streams; who wants it sooner has SIGKILL
        signal.signal(number, signal.SIG_IGN)
    if stdin:
        os.open(stdin, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)  # for as long as this process lives
    with sockets.bind(place, replace=True) as listener:
        logger = Logger(path, max_line, listener)
        os.close(_READY)
        logger.run()
    with contextlib.suppress(OSError):
        os.unlink(place)
