"""Port-forward: a connection of the client's, and one to a port within the pod, joined."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from wherry.core.errors import WherryError
from wherry.cri.streaming.dialing import dial
from wherry.cri.streaming.remote import Sink, Source

_CHUNK: Final = 64 << 10
# seconds that a client may go on sending after the pod's end said that it is done; kubectl waits for us then, not we
# for kubectl (containerd has the same)
_AFTERMATH: Final = 1.0

Netns = Callable[[str], Awaitable[str]]
"""A pod's network namespace: a path, "" for the host's. Raises WherryError."""


class Duplex(Source, Sink, Protocol):
    """A stream of the client's, both ways."""

    async def close(self) -> None:
        """Nothing more comes from us."""

    async def wait_broken(self) -> None:
        """Wait until the client has given the stream up, or is gone."""


async def forward(netns: Netns, pod: str, port: int, client: Duplex) -> str:
    """Join one connection until both sides are done; what went wrong in words, "" for nothing."""
    try:
        there = await dial(await netns(pod), port)
    except WherryError as error:
        return f"error forwarding port {port} to pod {pod}, uid : {error.message}"
    with there:
        out = asyncio.create_task(_to_pod(client, there))
        back = asyncio.create_task(_to_client(there, client))
        gone = asyncio.create_task(client.wait_broken())
        try:
            await asyncio.wait([back, gone], return_when=asyncio.FIRST_COMPLETED)
            if back.done():
                back.result()
                await asyncio.wait([out, gone], timeout=_AFTERMATH, return_when=asyncio.FIRST_COMPLETED)
        except OSError as error:
            return f"error forwarding port {port} to pod {pod}, uid : {error}"
        finally:
            for task in (out, back, gone):
                task.cancel()
            await asyncio.wait([out, back, gone])
    return ""


async def _to_pod(client: Source, there: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):  # it reads no more; what it still says is brought back
        while data := await client.read():
            await loop.sock_sendall(there, data)
        there.shutdown(socket.SHUT_WR)


async def _to_client(there: socket.socket, client: Duplex) -> None:
    loop = asyncio.get_running_loop()
    try:
        while data := await loop.sock_recv(there, _CHUNK):
            try:
                await client.write(data)
            except ConnectionError:
                return  # the client went away: that isn't the port's fault
    finally:
        with contextlib.suppress(ConnectionError):
            await client.close()
