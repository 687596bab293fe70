"""Port-forward over a WebSocket, in both of Kubernetes' ways.

`v4.channel.k8s.io`: the i-th port of the request has the channels 2i (data) and 2i+1 (errors), and each begins with the
port in two bytes, the lower one first. `SPDY/3.1+portforward.k8s.io`: messages carry the bytes of an SPDY session.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable
from typing import Final

from aiohttp import WSMsgType, web

from wherry.cri.streaming.ports import Netns, forward
from wherry.cri.streaming.ports_spdy import PROTOCOL, PortForward
from wherry.cri.streaming.remote import Call
from wherry.cri.streaming.remote_websocket import Idle, Input, Output, decode
from wherry.cri.streaming.spdy_connection import SpdyConnection

TUNNEL: Final = f"SPDY/3.1+{PROTOCOL}"
# subprotocol → whether in base64
PROTOCOLS: Final = {"v4.channel.k8s.io": False, "v4.base64.channel.k8s.io": True, "": False}
# bytes that wait to be sent, above which who writes waits
_UNSENT: Final = 256 << 10
_FAREWELL: Final = 10.0


class _Channel:
    """Both directions of one data channel."""

    def __init__(self, source: Input, sink: Output) -> None:
        self.source = source
        self._sink = sink

    async def read(self) -> bytes:
        return await self.source.read()

    async def write(self, data: bytes) -> None:
        await self._sink.write(data)

    async def close(self) -> None:
        """A channel has no end of its own in this protocol."""

    async def wait_broken(self) -> None:
        await self.source.ended.wait()


async def serve(socket: web.WebSocketResponse, call: Call, protocol: str, netns: Netns, seconds: float = 0.0) -> None:
    """Serve the request's ports until all connections are done, or nothing came or went for so many seconds."""
    text = PROTOCOLS[protocol]
    idle = Idle(socket, seconds)
    channels = [_Channel(Input(), Output(socket, idle, 2 * index, text=text)) for index in range(len(call.ports))]
    errors = [Output(socket, idle, 2 * index + 1, text=text) for index in range(len(call.ports))]
    reading = asyncio.create_task(_read(socket, idle, channels, text=text))
    try:
        for port, channel, error in zip(call.ports, channels, errors, strict=True):
            for sink in (channel, error):
                await sink.write(struct.pack("<H", port))

        async def one(index: int) -> None:
            words = await forward(netns, call.id, call.ports[index], channels[index])
            if words:
                with contextlib.suppress(ConnectionError):
                    await errors[index].write(words.encode())

        await asyncio.gather(*(one(index) for index in range(len(call.ports))))
        reading.cancel()
        await asyncio.wait([reading])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                await socket.close()
    except ConnectionError:
        pass
    finally:
        idle.stop()
        reading.cancel()


async def _read(socket: web.WebSocketResponse, idle: Idle, channels: list[_Channel], *, text: bool) -> None:
    try:
        async for message in socket:
            idle.touch()
            if message.type not in (WSMsgType.BINARY, WSMsgType.TEXT):
                continue
            number, data = decode(message.data, text=text)
            if number % 2 == 0 and number // 2 < len(channels):
                await channels[number // 2].source.put(data)
    except ValueError:
        await socket.close(code=1003, message=b"a message that is none of the protocol's")
    finally:
        for channel in channels:
            channel.source.end()


class _Tunnel:
    """A WebSocket as a carrier: bytes go out as binary messages, in order, by a task."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket
        self._receive: Callable[[bytes], None] | None = None
        self._out = bytearray()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._readable = asyncio.Event()
        self._readable.set()
        self._closing = False
        self.ended = False

    def attach(self, receive: Callable[[bytes], None]) -> None:
        self._receive = receive

    def write(self, data: bytes) -> None:
        self._out += data
        self._wake.set()

    async def drain(self) -> None:
        while len(self._out) > _UNSENT and not self.ended:
            self._room.clear()
            await self._room.wait()
        if self.ended:
            raise ConnectionResetError("the client is gone")

    @property
    def congested(self) -> bool:
        return len(self._out) > _UNSENT

    def hold(self, held: bool) -> None:
        if held:
            self._readable.clear()
        else:
            self._readable.set()

    def close(self) -> None:
        self._closing = True
        self._readable.set()
        self._wake.set()

    def abort(self) -> None:
        self._out.clear()
        self.close()

    def end(self) -> None:
        """The WebSocket is closed."""
        self.ended = True
        self._room.set()
        self.close()
        if self._receive is not None:
            self._receive(b"")

    async def send(self) -> None:
        """Sends what is written until `close`."""
        while True:
            while self._out:
                out, self._out = bytes(self._out), bytearray()
                await self._socket.send_bytes(out)
                self._room.set()
            if self._closing:
                await self._socket.close()
                return
            self._wake.clear()
            await self._wake.wait()

    async def read(self) -> None:
        """Hands over what comes."""
        async for message in self._socket:
            await self._readable.wait()
            if message.type is WSMsgType.BINARY and message.data and self._receive is not None:
                self._receive(message.data)


async def serve_tunnel(socket: web.WebSocketResponse, call: Call, netns: Netns, idle: float) -> None:
    """Serve an SPDY session in a WebSocket until it ends."""
    tunnel = _Tunnel(socket)
    forwarding = PortForward(SpdyConnection(tunnel, idle), call, netns)
    serving = asyncio.create_task(forwarding.serve())
    reading = asyncio.create_task(tunnel.read())
    sending = asyncio.create_task(tunnel.send())
    try:
        await asyncio.wait([reading, sending], return_when=asyncio.FIRST_COMPLETED)
    finally:
        tunnel.end()
        reading.cancel()
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_FAREWELL):
                await asyncio.wait([serving, reading])
                await sending
        for task in (serving, sending):
            task.cancel()
