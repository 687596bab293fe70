"""SPDY streams for coroutines: what `spdy.py` makes of bytes, over a carrier."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Final

import structlog

from wherry.cri.streaming import spdy
from wherry.cri.streaming.carrier import Carrier

log = structlog.get_logger(__name__)

# bytes of one stream that nobody has read yet, above which the connection isn't read: for peers that know no windows
_BACKLOG: Final = 256 << 10
# bytes of answers (to pings, of streams refused) to a peer that doesn't read them, above which it is cut off
_MAX_CHATTER: Final = 1 << 20
# seconds that a peer gets to close a connection on which everything has been said
_PARTING: Final = 5.0
# Kubernetes' servers answer without headers; the protocol wants these, and stricter clients do
_ACCEPTED: Final = {":status": "200 OK", ":version": "HTTP/1.1"}


class SpdyStream:
    """One stream. `read` until b""; `write` waits for the peer; `close` ends our direction."""

    def __init__(self, connection: SpdyConnection, number: int, headers: Mapping[str, str]) -> None:
        self.number = number
        self.headers = headers
        self._connection = connection
        self._chunks: deque[bytes] = deque()
        self._waiting = 0
        self._ended = False
        self._broken = asyncio.Event()
        self._news = asyncio.Event()

    async def read(self) -> bytes:
        """The next bytes, b"" at the end (also where the connection broke)."""
        while not self._chunks and not self._ended:
            self._news.clear()
            await self._news.wait()
        if not self._chunks:
            return b""
        data = self._chunks.popleft()
        self._waiting -= len(data)
        self._connection.consumed(self.number, len(data))
        return data

    async def write(self, data: bytes) -> None:
        """Send all of it. Raises ConnectionError where nobody takes it any more."""
        await self._connection.send(self, data)

    async def close(self) -> None:
        """Nothing more comes from us."""
        self._connection.finish(self.number)

    def reset(self) -> None:
        """Give it up, in both directions."""
        self._connection.reset(self)

    @property
    def broken(self) -> bool:
        """Whether the peer reset it, or the connection is gone."""
        return self._broken.is_set()

    async def wait_broken(self) -> None:
        """Wait until it is."""
        await self._broken.wait()

    @property
    def full(self) -> bool:
        """Whether too much waits to be read."""
        return self._waiting > _BACKLOG

    def take(self, data: bytes, *, fin: bool) -> None:
        """From the connection."""
        if data:
            self._chunks.append(data)
            self._waiting += len(data)
        self._ended = self._ended or fin
        self._news.set()

    def break_off(self) -> None:
        """From the connection: what came can still be read."""
        self._ended = True
        self._broken.set()
        self._news.set()


class SpdyConnection:
    """A session over a carrier; new streams come by `accept`."""

    def __init__(self, carrier: Carrier, idle: float = 0.0, *, client: bool = False) -> None:
        """`idle`: seconds without a frame after which the connection is closed, 0: never."""
        self._carrier = carrier
        self._session = spdy.Session(client=client)
        self._streams: dict[int, SpdyStream] = {}
        self._opened: deque[SpdyStream] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._held = False
        self._chatter = 0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection is gone."""
        self._idle = idle
        self._timer: asyncio.TimerHandle | None = None
        self._touch()
        carrier.attach(self._receive)

    # -- streams ---------------------------------------------------------------------------------------------------

    async def accept(self) -> AsyncIterator[SpdyStream]:
        """The streams that the peer opens, as they come, until the connection is gone. Each is accepted at once."""
        while True:
            while self._opened:
                yield self._opened.popleft()
            if self.closed.done():
                return
            self._news.clear()
            await self._news.wait()

    def open(self, headers: Mapping[str, str]) -> SpdyStream:
        """Open one."""
        number = self._session.open(headers)
        stream = self._streams[number] = SpdyStream(self, number, headers)
        self._flush()
        return stream

    async def send(self, stream: SpdyStream, data: bytes) -> None:
        """For SpdyStream."""
        rest = memoryview(data)
        while rest:
            if stream.broken or self.closed.done():
                raise ConnectionResetError("the client gave the stream up")
            sent = self._session.send(stream.number, rest)
            rest = rest[sent:]
            self._touch()
            self._flush()
            if rest and not sent:
                self._room.clear()
                await self._room.wait()
            else:
                await self._carrier.drain()

    def finish(self, number: int) -> None:
        """For SpdyStream."""
        self._session.finish(number)
        if not self._session.knows(number):
            self._streams.pop(number, None)
        self._flush()

    def reset(self, stream: SpdyStream) -> None:
        """For SpdyStream."""
        self._session.reset(stream.number)
        self._streams.pop(stream.number, None)
        stream.break_off()
        self._room.set()
        self._flush()
        self._unhold()

    def consumed(self, number: int, size: int) -> None:
        """For SpdyStream."""
        self._session.consumed(number, size)
        self._flush()
        self._unhold()

    def _unhold(self) -> None:
        if self._held and not any(stream.full for stream in self._streams.values()):
            self._held = False
            self._carrier.hold(False)

    # -- the connection --------------------------------------------------------------------------------------------

    async def part(self) -> None:
        """Everything has been said: let the peer close, close where it doesn't."""
        self._session.go_away()
        self._flush()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PARTING):
                await asyncio.shield(self.closed)
        self.close()

    def close(self) -> None:
        """Close; what waits to be sent is."""
        if not self.closed.done():
            self._flush()
            self._carrier.close()
            self._end()

    def _receive(self, data: bytes) -> None:
        if self.closed.done():
            return
        if not data:
            self._end()
            return
        self._touch()
        try:
            events = self._session.receive(data)
        except spdy.ProtocolError as error:
            log.info("a stream's client broke the protocol", error=str(error))
            self.close()
            return
        for event in events:
            self._take(event)
        self._room.set()
        self._chatter = self._chatter + self._flush() if self._carrier.congested else self._flush()
        if self._chatter > _MAX_CHATTER:
            log.info("a stream's client asks and doesn't read the answers")
            self._carrier.abort()
            self._end()
            return
        if not self._held and any(stream.full for stream in self._streams.values()):
            self._held = True
            self._carrier.hold(True)

    def _take(self, event: spdy.Event) -> None:
        if isinstance(event, spdy.Opened):
            if event.answer:
                return
            stream = self._streams[event.stream] = SpdyStream(self, event.stream, event.headers)
            if event.fin:
                stream.take(b"", fin=True)
            self._session.reply(event.stream, _ACCEPTED)
            self._opened.append(stream)
            self._news.set()
        elif isinstance(event, spdy.Data):
            known = self._streams.get(event.stream)
            if known is not None:
                known.take(event.data, fin=event.fin)
            if event.fin and not self._session.knows(event.stream):
                self._streams.pop(event.stream, None)
        elif isinstance(event, spdy.Reset):
            gone = self._streams.pop(event.stream, None)
            if gone is not None:
                gone.break_off()

    def _flush(self) -> int:
        """Hands what is to be sent to the carrier; how much it was."""
        out = self._session.take()
        if out:
            self._carrier.write(out)
        return len(out)

    def _touch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._idle and not self.closed.done():
            self._timer = asyncio.get_running_loop().call_later(self._idle, self.close)

    def _end(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        for stream in self._streams.values():
            stream.break_off()
        self._streams.clear()
        self._news.set()
        self._room.set()
