"""Parts of a blob: one by one connection, or several by several at once, given in order all the same."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import aiohttp

from wherry.core.descriptor import Descriptor
from wherry.core.errors import Aborted, DeadlineExceeded, Unavailable, WherryError
from wherry.registry import transport as transport_module
from wherry.registry.hosts import Host
from wherry.registry.retry import Backoff
from wherry.registry.transport import Transport

# connections for one blob; what they bring ahead of its turn is in memory, a piece each
CONNECTIONS = 4
# bytes that a peer brings at least in the time that it may be silent: a trickle counts as silence
TRICKLE = 4096


class Unsupported(Exception):
    """The server doesn't know ranges."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a blob is: at a host, under a URL or path, in the repository of a registry's name."""

    transport: Transport
    host: Host
    url: str
    name: str
    scope: str


async def read_range(
    place: Place, descriptor: Descriptor, start: int, end: int | None = None
) -> AsyncGenerator[bytes, None]:
    """The bytes from `start` up to `end` (not included; None is the blob's end) that one connection brings.

    Where the server doesn't know ranges, what is in front of `start` is read and thrown away; with an `end` Unsupported
    is raised. Raises Unavailable where it ends too early or is cut, DeadlineExceeded for a trickle, Aborted for another
    range than the one asked for. More bytes than there should be may come.
    """
    headers = {"Accept": f"{descriptor.media_type}, */*" if descriptor.media_type else "*/*"}
    if start or end is not None:
        headers["Range"] = f"bytes={start}-" if end is None else f"bytes={start}-{end - 1}"
    came, last = start, descriptor.size if end is None else end
    async with place.transport.request(
        "GET",
        place.host,
        place.url,
        name=place.name,
        scope=place.scope,
        headers=headers,
        expect=frozenset({200, 206}),
    ) as response:
        if end is not None and response.status != 206:
            raise Unsupported
        skip = _to_skip(response, start, descriptor.size)
        try:
            async for received in _watched(response):
                if skip >= len(received):
                    skip -= len(received)
                    continue
                chunk, skip = received[skip:], 0
                came += len(chunk)
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(
                f"{descriptor.digest}: connection to {place.host.netloc} was cut after {came} of {descriptor.size} "
                f"bytes: {error or type(error).__name__}"
            ) from error
    if came < last:
        raise Unavailable(f"{descriptor.digest}: ended after {came} of {descriptor.size} bytes")


def _to_skip(response: aiohttp.ClientResponse, start: int, size: int) -> int:
    """How many bytes of the body are there already: none where the range was honoured."""
    if response.status == 200:
        return start
    stated = response.headers.get("Content-Range", "")
    if not stated.startswith(f"bytes {start}-") or not stated.endswith((f"/{size}", "/*")):
        raise Aborted(f"{response.url}: asked for bytes from {start} on of {size}, got {stated[:100]!r}: aborted")
    return 0


async def _watched(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """The body as it comes. Only the time that is waited for the peer counts, not what is done with the bytes."""
    waited, came = 0.0, 0
    while True:
        before = time.monotonic()
        chunk = await response.content.readany()
        if not chunk:
            return
        waited += time.monotonic() - before
        came += len(chunk)
        if waited >= transport_module.IDLE_SECONDS:
            if came < TRICKLE:
                raise DeadlineExceeded(f"{response.url}: {came} bytes in {waited:.0f} s are too few")
            waited, came = 0.0, 0
        yield chunk


async def in_parallel(place: Place, descriptor: Descriptor, start: int, size: int) -> AsyncGenerator[bytes, None]:
    """The blob from `start` on, in pieces of `size` bytes, CONNECTIONS of them on their way at any time.

    Raises Unsupported before the first byte where the server doesn't know ranges; else as `read_range`, and what was
    given before is right.
    """
    pending: deque[asyncio.Task[bytes]] = deque()
    at = start
    try:
        while pending or at < descriptor.size:
            while at < descriptor.size and len(pending) < CONNECTIONS:
                end = min(at + size, descriptor.size)
                pending.append(asyncio.create_task(_piece(place, descriptor, at, end)))
                at = end
            data = await pending[0]
            pending.popleft()
            yield data
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _piece(place: Place, descriptor: Descriptor, start: int, end: int) -> bytes:
    """One piece whole, over as many connections as it takes."""
    data = bytearray()
    backoff = Backoff()
    while len(data) < end - start:
        before = len(data)
        try:
            async with aclosing(read_range(place, descriptor, start + before, end)) as chunks:
                async for chunk in chunks:
                    data += chunk
                    if len(data) > end - start:
                        raise Aborted(f"{descriptor.digest}: more bytes than asked for came: aborted")
        except WherryError as error:
            if len(data) > before:
                backoff.moved()
            await backoff.wait(error)
    return bytes(data)
