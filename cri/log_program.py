"""A container's log in Kubernetes' format, written by a program: for somebody else's shims, which know `binary://`.

Such a shim starts the program for each container and gives it the container's output as descriptors 3 and 4; it closes
descriptor 5 when it is ready (containerd's runtime/v2/logging). A line is cut at `LONGEST` bytes, as containerd does.
When the file was moved away, the next line, or the next look a moment later, goes to a new one under the name.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from typing import Final

LONGEST: Final = 16 << 10
# seconds between looks whether the file is still there under its name
_LOOK: Final = 0.2
_STREAMS: Final = {3: b"stdout", 4: b"stderr"}


class Log:
    """The file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1
        self._rests: dict[int, bytes] = {}
        self.look()

    def look(self) -> None:
        """Open it, where it isn't what is under the name."""
        with contextlib.suppress(OSError):
            if self._fd >= 0:
                there, ours = os.stat(self._path), os.fstat(self._fd)
                if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino):
                    return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        with contextlib.suppress(OSError):
            made = os.open(self._path, flags, 0o640)
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = made

    def write(self, stream: int, data: bytes) -> None:
        """Output as it came; b"" is its end."""
        whole = self._rests.pop(stream, b"") + data
        now = time.time_ns()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)).encode() + b".%09dZ " % (now % 10**9)
        head = stamp + _STREAMS[stream]
        lines = whole.split(b"\n")
        rest = lines.pop()
        out = []
        for line in lines:
            while len(line) > LONGEST:
                out.append(b"%s P %s\n" % (head, line[:LONGEST]))
                line = line[LONGEST:]  # noqa: PLW2901 -- what is left of it
            out.append(b"%s F %s\n" % (head, line))
        while len(rest) >= LONGEST:
            out.append(b"%s P %s\n" % (head, rest[:LONGEST]))
            rest = rest[LONGEST:]
        if rest and not data:
            out.append(b"%s P %s\n" % (head, rest))
            rest = b""
        if rest:
            self._rests[stream] = rest
        if out:
            self.look()
            with contextlib.suppress(OSError):  # a full disk: the container goes on
                os.write(self._fd, b"".join(out))


def main(path: str) -> None:
    """Write the log until both streams have ended."""
    log = Log(path)
    os.close(5)
    with selectors.DefaultSelector() as selector:
        for fd in _STREAMS:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(_LOOK):
                data = os.read(key.fd, 1 << 16)
                log.write(key.fd, data)
                if not data:
                    selector.unregister(key.fd)
            log.look()
