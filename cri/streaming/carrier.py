"""What carries the bytes of an SPDY session: a TCP or TLS connection, or the messages of a WebSocket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

# seconds that a peer gets to take what was sent before a close; one that reads nothing would keep it for ever
_LINGER = 5.0


class Carrier(Protocol):
    """A duplex stream of bytes. `attach` names who takes what comes; b"" is the end, and comes once."""

    def attach(self, receive: Callable[[bytes], None]) -> None:
        """Hand over what came already, and what comes."""

    def write(self, data: bytes) -> None:
        """Send; never waits, never raises."""

    async def drain(self) -> None:
        """Wait until not too much waits to be sent. Raises ConnectionError where nobody is there any more."""

    @property
    def congested(self) -> bool:
        """Whether more waits to be sent than should."""

    def hold(self, held: bool) -> None:
        """Read no more for the time being."""

    def close(self) -> None:
        """Send what waits, for some seconds, then close; the end is told."""

    def abort(self) -> None:
        """Close at once."""


class Raw(asyncio.Protocol):
    """A connection whose HTTP part is over."""

    def __init__(self, transport: asyncio.Transport, first: bytes) -> None:
        """`first`: bytes that came behind the request's head."""
        self._transport = transport
        self._first = first
        self._receive: Callable[[bytes], None] | None = None
        self._room = asyncio.Event()
        self._room.set()
        self._ended = False
        self._lingering: asyncio.TimerHandle | None = None
        transport.set_protocol(self)

    def attach(self, receive: Callable[[bytes], None]) -> None:
        """See Carrier."""
        self._receive = receive
        first, self._first = self._first, b""
        if first:
            receive(first)
        if self._ended:
            receive(b"")

    def data_received(self, data: bytes) -> None:
        """From asyncio."""
        if self._receive is not None:
            self._receive(data)
        else:
            self._first += data

    def connection_lost(self, exc: Exception | None) -> None:
        """From asyncio."""
        self._ended = True
        if self._lingering is not None:
            self._lingering.cancel()
        self._room.set()
        if self._receive is not None:
            self._receive(b"")

    def pause_writing(self) -> None:
        """From asyncio."""
        self._room.clear()

    def resume_writing(self) -> None:
        """From asyncio."""
        self._room.set()

    def write(self, data: bytes) -> None:
        """See Carrier."""
        if data and not self._ended:
            self._transport.write(data)

    async def drain(self) -> None:
        """See Carrier."""
        await self._room.wait()
        if self._ended:
            raise ConnectionResetError("the client is gone")

    @property
    def congested(self) -> bool:
        """See Carrier."""
        return not self._room.is_set()

    def hold(self, held: bool) -> None:
        """See Carrier."""
        if self._ended or self._transport.is_closing():
            return
        if held:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def close(self) -> None:
        """See Carrier."""
        if not self._ended:
            self._transport.close()
            if self._lingering is None:
                self._lingering = asyncio.get_running_loop().call_later(_LINGER, self._transport.abort)

    def abort(self) -> None:
        """See Carrier."""
        self._transport.abort()
