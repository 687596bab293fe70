"""What stands before aiohttp: it reads a request's head, keeps SPDY's upgrades for us and hands everything else on.

aiohttp gives no connection away whose upgrade it doesn't know. So the first request of a connection is looked at
before aiohttp sees it; as answers close the connection there is no second one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

# bytes of a head, and seconds until it must be there: who only connects holds nothing for long
_MAX_HEAD: Final = 32 << 10
_HEAD_SECONDS: Final = 30.0


@dataclass(frozen=True)
class Head:
    """A request's head; names of headers in lower case, those that come more than once joined by commas."""

    method: str
    target: str
    headers: dict[str, str]

    def words(self, name: str) -> list[str]:
        """A header's values, split at commas."""
        return [word for word in (part.strip() for part in self.headers.get(name, "").split(",")) if word]


def parse(head: bytes) -> Head | None:
    """A head without its empty line; None where it is none."""
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
        return None
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            return None
        key = name.lower()
        headers[key] = f"{headers[key]}, {value.strip()}" if key in headers else value.strip()
    return Head(words[0], words[1], headers)


class Front(asyncio.Protocol):
    """One connection until its head is read."""

    def __init__(
        self,
        spdy: Callable[[asyncio.Transport, Head, bytes], None],
        other: Callable[[], asyncio.Protocol],
        seen: set[asyncio.BaseTransport],
    ) -> None:
        """`spdy` gets the transport, the head, and what came behind it; `seen` holds transports until then."""
        self._spdy = spdy
        self._other = other
        self._seen = seen
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """From asyncio."""
        self._transport = transport  # type: ignore[assignment]  # of a stream server it is a Transport
        self._seen.add(transport)
        self._timer = asyncio.get_running_loop().call_later(_HEAD_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """From asyncio."""
        self._done()

    def data_received(self, data: bytes) -> None:
        """From asyncio."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        transport = self._transport
        if transport is None:
            return
        if end < 0 and len(self._buffer) <= _MAX_HEAD:
            return
        if not 0 <= end <= _MAX_HEAD:
            answer(transport, 431, "Request Header Fields Too Large", "the request's head is too large")
            return
        head = parse(bytes(self._buffer[:end]))
        self._done()
        if head is not None and head.headers.get("upgrade", "").lower().startswith("spdy/"):
            self._spdy(transport, head, bytes(self._buffer[end + 4 :]))
            return
        protocol = self._other()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        protocol.data_received(bytes(self._buffer))

    def _done(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._seen.discard(self._transport)


def answer(transport: asyncio.Transport, status: int, reason: str, text: str, *headers: str) -> None:
    """Answer a request and close the connection."""
    body = text.encode() + b"\n"
    lines = [
        f"HTTP/1.1 {status} {reason}",
        "Content-Type: text/plain; charset=utf-8",
        "X-Content-Type-Options: nosniff",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *headers,
    ]
    transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    transport.close()
