"""Port-forward over SPDY (`portforward.k8s.io`): for each connection a stream for errors and one for data.

Both name the port and, by `requestid`, that they belong together. Clients before 1.2 named no request: there the error
stream comes right before the data stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Final

from wherry.cri.streaming.ports import Netns, forward
from wherry.cri.streaming.remote import Call
from wherry.cri.streaming.remote_spdy import CREATION, STREAM_TYPE
from wherry.cri.streaming.spdy_connection import SpdyConnection, SpdyStream

PROTOCOL: Final = "portforward.k8s.io"


@dataclass
class _Pair:
    error: SpdyStream | None = None
    data: SpdyStream | None = None
    timer: asyncio.TimerHandle | None = None


class PortForward:
    """The port-forwards of one connection."""

    def __init__(self, connection: SpdyConnection, call: Call, netns: Netns, creation: float = CREATION) -> None:
        self._connection = connection
        self._call = call
        self._netns = netns
        self._creation = creation
        self._pairs: dict[str, _Pair] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Serve until the client is gone."""
        try:
            async for stream in self._connection.accept():
                self._sort(stream)
        finally:
            for pair in self._pairs.values():
                if pair.timer is not None:
                    pair.timer.cancel()
            for task in self._running:
                task.cancel()
            if self._running:
                await asyncio.wait(self._running)
            self._connection.close()

    def _sort(self, stream: SpdyStream) -> None:
        headers = stream.headers
        kind, port = headers.get(STREAM_TYPE, ""), headers.get("port", "")
        if kind not in ("error", "data") or not (port.isascii() and port.isdigit() and 0 < int(port) <= 0xFFFF):
            stream.reset()
            return
        # without a name the data stream follows its error stream, whose number is two less
        request = headers.get("requestid") or f"#{stream.number - (2 if kind == 'data' else 0)}"
        pair = self._pairs.setdefault(request, _Pair())
        if getattr(pair, kind) is not None:
            stream.reset()
            return
        setattr(pair, kind, stream)
        if pair.timer is None:
            loop = asyncio.get_running_loop()
            pair.timer = loop.call_later(self._creation, self._give_up, request)
        if pair.error is not None and pair.data is not None:
            pair.timer.cancel()
            del self._pairs[request]
            task = asyncio.create_task(self._forward(int(port), pair.error, pair.data))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    def _give_up(self, request: str) -> None:
        pair = self._pairs.pop(request, None)
        for stream in (pair.error, pair.data) if pair is not None else ():
            if stream is not None:
                stream.reset()

    async def _forward(self, port: int, error: SpdyStream, data: SpdyStream) -> None:
        words = await forward(self._netns, self._call.id, port, data)
        with contextlib.suppress(ConnectionError):
            if words:
                await error.write(words.encode())
            await error.close()
        if words:
            data.reset()
        else:
            await data.close()
