"""Exec and attach over a WebSocket: one message is a channel's number and bytes of it.

In the base64 protocols the number is a digit and the rest is base64, in text messages. In version 5 the channel 255
says that the channel in its one byte is closed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections import deque
from typing import Final

from aiohttp import WSMsgType, web

from wherry.cri.streaming.remote import Call, Channels, Run, Sizes, run

STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
# subprotocol → version of the protocol, whether in base64; the one that is none is the oldest
PROTOCOLS: Final = {
    "v5.channel.k8s.io": (5, False),
    "v4.channel.k8s.io": (4, False),
    "v4.base64.channel.k8s.io": (4, True),
    "channel.k8s.io": (1, False),
    "base64.channel.k8s.io": (1, True),
    "": (1, False),
}
# bytes of input that nobody has read yet, above which the connection isn't read
_BACKLOG: Final = 256 << 10
# seconds for the client's own farewell
_FAREWELL: Final = 10.0


class Idle:
    """Ends a WebSocket over which nothing came or went for so many seconds (0: never); pings don't count."""

    def __init__(self, socket: web.WebSocketResponse, seconds: float) -> None:
        self._socket = socket
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[bool] | None = None
        self.touch()

    def touch(self) -> None:
        """Something came or goes."""
        self.stop()
        if self._seconds:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)

    def stop(self) -> None:
        """It is over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._closing = asyncio.create_task(self._socket.close(code=1001, message=b"idle"))


class Input:
    """A channel that a client writes to."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._waiting = 0
        self.ended = asyncio.Event()
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, data: bytes) -> None:
        """Give it bytes; waits while too much is there."""
        if self.ended.is_set():
            return
        self._chunks.append(data)
        self._waiting += len(data)
        self._news.set()
        while self._waiting > _BACKLOG and not self.ended.is_set():
            self._room.clear()
            await self._room.wait()

    def end(self) -> None:
        """Nothing more comes."""
        self.ended.set()
        self._news.set()
        self._room.set()

    async def read(self) -> bytes:
        """See Source."""
        while not self._chunks:
            if self.ended.is_set():
                return b""
            self._news.clear()
            await self._news.wait()
        data = self._chunks.popleft()
        self._waiting -= len(data)
        self._room.set()
        return data


class Output:
    """A channel that is written to."""

    def __init__(self, socket: web.WebSocketResponse, idle: Idle, number: int, *, text: bool) -> None:
        self._socket = socket
        self._idle = idle
        self._number = number
        self._text = text

    async def write(self, data: bytes) -> None:
        """See Sink."""
        self._idle.touch()
        if self._text:
            await self._socket.send_str(f"{self._number}{base64.b64encode(data).decode()}")
        else:
            await self._socket.send_bytes(bytes([self._number]) + data)


def decode(data: bytes | str, *, text: bool) -> tuple[int, bytes]:
    """A message's channel and bytes. Raises ValueError."""
    raw = data.encode() if isinstance(data, str) else data
    if not raw:
        raise ValueError("an empty message names no channel")
    if not text:
        return raw[0], raw[1:]
    try:
        return raw[0] - ord("0"), base64.b64decode(raw[1:], validate=True)
    except binascii.Error as error:
        raise ValueError(f"a message that is no base64: {error}") from None


async def serve(socket: web.WebSocketResponse, call: Call, protocol: str, runner: Run, seconds: float = 0.0) -> None:
    """Serve one call until it is over, or idle for so many seconds; the WebSocket is closed then."""
    version, text = PROTOCOLS[protocol]
    idle = Idle(socket, seconds)
    outputs = {number: Output(socket, idle, number, text=text) for number in (STDOUT, STDERR, ERROR)}
    stdin = Input()
    channels = Channels(
        stdin if call.stdin else None,
        outputs[STDOUT] if call.stdout else None,
        outputs[STDERR] if call.stderr else None,
        Sizes() if call.tty else None,
    )
    reading = asyncio.create_task(_read(socket, idle, channels, stdin, version, text=text))
    try:
        # so that the client knows that it is connected, as Kubernetes' servers do it
        first = STDOUT if call.stdout else STDERR if call.stderr else ERROR
        await outputs[first].write(b"")
        said = await run(call, channels, runner, version)
        if said and not socket.closed:
            await outputs[ERROR].write(said)
        stdin.end()  # the reader may wait for room in it, and has the client's farewell to read
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                reading.cancel()
                await asyncio.wait([reading])
                await socket.close()
    except ConnectionError:
        pass
    finally:
        idle.stop()
        reading.cancel()


async def _read(
    socket: web.WebSocketResponse, idle: Idle, channels: Channels, stdin: Input, version: int, *, text: bool
) -> None:
    try:
        async for message in socket:
            idle.touch()
            if message.type not in (WSMsgType.BINARY, WSMsgType.TEXT):
                continue
            number, data = decode(message.data, text=text)
            if number == STDIN and channels.stdin is not None:
                if data:
                    await stdin.put(data)
            elif number == RESIZE and channels.sizes is not None:
                channels.sizes.feed(data)
            elif number == CLOSE and version >= 5 and data[:1] == bytes([STDIN]):
                stdin.end()
    except ValueError:
        await socket.close(code=1003, message=b"a message that is none of the protocol's")
    finally:
        stdin.end()
        if channels.sizes is not None:
            channels.sizes.end()
        if not channels.gone.done():
            channels.gone.set_result(None)
