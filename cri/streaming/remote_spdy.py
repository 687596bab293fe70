"""Exec and attach over SPDY: the client opens a stream for each channel and says in a header which it is."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from wherry.cri.streaming.remote import Call, Channels, Run, Sizes, run
from wherry.cri.streaming.spdy_connection import SpdyConnection, SpdyStream

STREAM_TYPE: Final = "streamtype"
# seconds that a client may take to open its streams (Kubernetes' DefaultStreamCreationTimeout)
CREATION: Final = 30.0
# the end is told to a client that reads slowly, but not for ever
_FAREWELL: Final = 30.0


async def serve(connection: SpdyConnection, call: Call, version: int, runner: Run, creation: float = CREATION) -> None:
    """Serve one call until it is over; the connection is closed then."""
    sizes: asyncio.Task[None] | None = None
    try:
        async with asyncio.timeout(creation):
            streams = await _streams(connection, call, version)
        if streams is None:
            return
        channels = Channels(streams.get("stdin"), streams.get("stdout"), streams.get("stderr"), gone=connection.closed)
        if "resize" in streams:
            channels.sizes = Sizes()
            sizes = asyncio.create_task(_read_sizes(streams["resize"], channels.sizes))
        said = await run(call, channels, runner, version)
        with contextlib.suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                for name in ("stdout", "stderr"):
                    if name in streams:
                        await streams[name].close()
                if said:
                    await streams["error"].write(said)
                await streams["error"].close()
        for name in ("stdin", "resize"):
            if name in streams:
                await streams[name].close()
        await connection.part()
    except TimeoutError:  # it didn't open what it wants to use
        pass
    finally:
        if sizes is not None:
            sizes.cancel()
        connection.close()


async def _streams(connection: SpdyConnection, call: Call, version: int) -> dict[str, SpdyStream] | None:
    wanted = {"error"} | {name for name in ("stdin", "stdout", "stderr") if getattr(call, name)}
    if call.tty and version >= 3:
        wanted.add("resize")
    found: dict[str, SpdyStream] = {}
    async for stream in connection.accept():
        kind = stream.headers.get(STREAM_TYPE, "")
        if kind not in wanted or kind in found:
            stream.reset()
            continue
        found[kind] = stream
        if len(found) == len(wanted):
            return found
    return None


async def _read_sizes(stream: SpdyStream, sizes: Sizes) -> None:
    with contextlib.suppress(ValueError):
        while data := await stream.read():
            sizes.feed(data)
    sizes.end()
