"""Exec and attach as Kubernetes' clients know them (`remotecommand`): versions, channels, and what is said at the end.

Versions differ in this: 2 waits for the streams to be accepted, 3 has `resize`, 4 tells the end as a `v1.Status` with
the exit code, 5 lets a WebSocket's client close its input. Before 4 an error is told in words, a success by nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from wherry.core.errors import WherryError

log = structlog.get_logger(__name__)

# the best one first; a peer that names none means the first of them
VERSIONS: Final = {
    "v5.channel.k8s.io": 5,
    "v4.channel.k8s.io": 4,
    "v3.channel.k8s.io": 3,
    "v2.channel.k8s.io": 2,
    "channel.k8s.io": 1,
}
EXEC, ATTACH, PORTS = "exec", "attach", "portforward"
# a size is some thirty bytes of JSON
_MAX_SIZE_TEXT: Final = 4096


@dataclass(frozen=True)
class Call:
    """What was asked for by gRPC, and is kept under a token until somebody comes for it."""

    kind: str
    id: str
    command: tuple[str, ...] = ()
    tty: bool = False
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    ports: tuple[int, ...] = ()


class Source(Protocol):
    """Where bytes come from."""

    async def read(self) -> bytes:
        """The next ones; b"" at the end."""


class Sink(Protocol):
    """Where bytes go."""

    async def write(self, data: bytes) -> None:
        """Waits until they are taken. Raises ConnectionError where nobody takes them any more."""


@dataclass
class Channels:
    """A client's streams, None for those that it doesn't have. `sizes` are those of its terminal."""

    stdin: Source | None = None
    stdout: Sink | None = None
    stderr: Sink | None = None
    sizes: Sizes | None = None
    gone: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when the client is gone."""


class Sizes:
    """Sizes of a terminal as they come, `{"Width":80,"Height":24}` one after the other; only the last one counts."""

    def __init__(self) -> None:
        self._text = ""
        self._last: tuple[int, int] | None = None
        self._news = asyncio.Event()
        self._ended = False

    def feed(self, data: bytes) -> None:
        """What came of the stream. Raises ValueError for what is no size; nothing is taken after that."""
        self._text += data.decode("utf-8", "replace")
        decoder = json.JSONDecoder()
        while text := self._text.lstrip():
            try:
                value, end = decoder.raw_decode(text)
            except ValueError:
                if len(text) > _MAX_SIZE_TEXT:
                    self.end()
                    raise
                self._text = text  # a part of one
                return
            self._text = text[end:]
            if not isinstance(value, dict):
                self.end()
                raise ValueError(f"no size of a terminal: {text[:end]!r}")
            width, height = value.get("Width", 0), value.get("Height", 0)
            if isinstance(width, int) and isinstance(height, int) and 0 < width <= 0xFFFF and 0 < height <= 0xFFFF:
                self._last = width, height
                self._news.set()
        self._text = ""

    def end(self) -> None:
        """None come any more."""
        self._ended = True
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, int]]:
        while True:
            last, self._last = self._last, None
            if last is not None:
                yield last
            elif self._ended:
                return
            else:
                self._news.clear()
                await self._news.wait()


Run = Callable[[Call, Channels], Awaitable[int]]
"""Does what was asked for: the exit code (0 for attach). Raises WherryError."""


async def run(call: Call, channels: Channels, runner: Run, version: int) -> bytes:
    """Do what was asked for; what the error channel says of its end in this version, b"" for nothing."""
    try:
        code = await runner(call, channels)
    except WherryError as error:
        return _failure(call, error.message, version)
    except OSError as error:
        log.warning("streaming", kind=call.kind, id=call.id, error=str(error))
        return _failure(call, str(error), version)
    if not code:
        return _json({"metadata": {}, "status": "Success"}) if version >= 4 else b""
    command = " ".join(call.command)
    words = f"command terminated with non-zero exit code: error executing command [{command}], exit code {code}"
    if version < 4:
        return words.encode()
    return _json(
        {
            "metadata": {},
            "status": "Failure",
            "message": words,
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
        }
    )


def _failure(call: Call, message: str, version: int) -> bytes:
    doing = "executing command in" if call.kind == EXEC else "attaching to"
    words = f"error {doing} container: {message}"
    if version < 4:
        return f"Internal error occurred: {words}".encode()
    return _json(
        {
            "metadata": {},
            "status": "Failure",
            "message": f"Internal error occurred: {words}",
            "reason": "InternalError",
            "details": {"causes": [{"message": words}]},
            "code": 500,
        }
    )


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
