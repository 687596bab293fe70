"""What the runtime and the process that becomes the container say to each other: one JSON array a line, over pipes.

Both ends have the same memory at the fork, so messages carry only what happened since.
"""

from __future__ import annotations

import os

from wherry.runtime import quickjson
from wherry.runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Channel:
    """One end: a descriptor to read from, one to write to; both close-on-exec."""

    def __init__(self, reader: int, writer: int) -> None:
        self.reader = reader
        self.writer = writer
        self._buffer = b""

    def send(self, kind: str, value: Any = None) -> None:
        """BrokenPipeError (as ContainerError) if the other side is gone."""
        try:
            os.write(self.writer, quickjson.dumps([kind, value]).encode() + b"\n")
        except BrokenPipeError:
            raise ContainerError("the other process is gone") from None

    def receive(self) -> tuple[str, Any]:
        """The next message; ("", None) when the other side has closed."""
        while b"\n" not in self._buffer:
            chunk = os.read(self.reader, 65536)
            if not chunk:
                return "", None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        kind, value = quickjson.loads(line)
        return kind, value

    def expect(self, wanted: str) -> Any:
        """The value of the next message, which must be `wanted`."""
        kind, value = self.receive()
        if kind != wanted:
            raise ContainerError(f"the runtime is gone (waited for {wanted!r}, got {kind!r})")
        return value

    def fds(self) -> tuple[int, int]:
        return self.reader, self.writer

    def close(self) -> None:
        for fd in self.fds():
            if fd >= 0:
                os.close(fd)
        self.reader = self.writer = -1


def pair() -> tuple[Channel, Channel]:
    """(the parent's end, the child's end)."""
    down_reader, down_writer = os.pipe()
    up_reader, up_writer = os.pipe()
    return Channel(up_reader, down_writer), Channel(down_reader, up_writer)
