"""Fetching content: from the first host that has it, going on where a connection was cut.

Nothing is verified here: the content store computes the digest of what it is given anyway.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import aiohttp

from wherry.core import mediatypes
from wherry.core.descriptor import Descriptor
from wherry.core.errors import (
    Aborted,
    DeadlineExceeded,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
    WherryError,
)
from wherry.core.reference import DEFAULT_HOST, Reference
from wherry.registry.hosts import Host
from wherry.registry.transport import TooBusy, Transport

# attempts in a row that bring no byte, before a host is given up
MAX_ATTEMPTS = 5
# seconds before the second attempt, doubled for each further one
FIRST_PAUSE = 0.1
# seconds that a registry's `Retry-After` may make us wait
MAX_PAUSE = 20.0
_RETRIED = (Unavailable, DeadlineExceeded, ResourceExhausted)


class Fetcher:
    """Fetches content of one repository; any number of fetches at once."""

    def __init__(self, transport: Transport, hosts: list[Host], reference: Reference) -> None:
        self._transport = transport
        self._hosts = hosts
        self._reference = reference

    async def fetch(self, descriptor: Descriptor, offset: int = 0) -> AsyncIterator[bytes]:
        """The content from `offset` (bytes) on, in chunks of whatever size the network gives.

        A cut connection is taken up again by a range request. Raises NotFound (`DIGEST: not found`) where no host has
        it, OutOfRange for an offset behind its end, Unavailable, Unauthenticated, ….
        """
        if offset > descriptor.size:
            raise OutOfRange(
                f"{descriptor.digest}: offset {offset} is behind its {descriptor.size} bytes: out of range"
            )
        if descriptor.data is not None and len(descriptor.data) == descriptor.size:
            yield descriptor.data[offset:]
            return
        state = _Progress(descriptor, offset)
        failure: WherryError | None = None
        for host, url in self._places(descriptor):
            try:
                async for chunk in self._from(host, url, state):
                    yield chunk
                return
            except NotFound:
                continue
            except WherryError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        raise NotFound(f"{descriptor.digest}: not found")

    def _places(self, descriptor: Descriptor) -> list[tuple[Host, str]]:
        """Where to look, in order."""
        kinds = ["blobs", "manifests"]
        if mediatypes.is_index(descriptor.media_type) or mediatypes.is_manifest(descriptor.media_type):
            kinds.reverse()
        home = "registry-1.docker.io" if self._reference.host == DEFAULT_HOST else self._reference.host
        places = []
        for host in self._hosts:
            # a mirror is told whose content is asked for
            query = "" if host.netloc == home else f"?ns={self._reference.host}"
            places += [(host, f"/{self._reference.path}/{kind}/{descriptor.digest}{query}") for kind in kinds]
        # a layer that registries may not keep names where it is
        foreign = [(Host("https", ""), url) for url in descriptor.urls if url.startswith(("http://", "https://"))]
        return places + foreign

    async def _from(self, host: Host, url: str, state: _Progress) -> AsyncIterator[bytes]:
        """All the rest from one place, over as many connections as it takes."""
        attempts = 0
        while True:
            before = state.offset
            try:
                async for chunk in self._once(host, url, state):
                    yield chunk
                return
            except _RETRIED as error:
                attempts = 1 if state.offset > before else attempts + 1
                if attempts >= MAX_ATTEMPTS:
                    raise
                pause = FIRST_PAUSE * 2 ** (attempts - 1) * random.uniform(0.7, 1.3)  # noqa: S311 - no secret
                wanted = error.retry_after if isinstance(error, TooBusy) else 0.0
                await asyncio.sleep(min(max(pause, wanted), MAX_PAUSE))

    async def _once(self, host: Host, url: str, state: _Progress) -> AsyncIterator[bytes]:
        """What one connection brings. Raises Unavailable where it ends too early."""
        descriptor = state.descriptor
        if state.offset and state.offset == descriptor.size:
            return
        headers = {"Accept": f"{descriptor.media_type}, */*" if descriptor.media_type else "*/*"}
        if state.offset:
            headers["Range"] = f"bytes={state.offset}-"
        async with self._transport.request(
            "GET",
            host,
            url,
            name=self._reference.host if host.netloc else "",
            scope=f"repository:{self._reference.path}:pull",
            headers=headers,
            expect=frozenset({200, 206}),
        ) as response:
            skip = _to_skip(response, state.offset)
            try:
                async for received in response.content.iter_any():
                    chunk = received
                    if skip:
                        skip, chunk = max(0, skip - len(chunk)), chunk[skip:]
                        if not chunk:
                            continue
                    if state.offset + len(chunk) > descriptor.size:
                        raise Aborted(f"{descriptor.digest}: more than its {descriptor.size} bytes came: aborted")
                    state.offset += len(chunk)
                    yield chunk
            except (aiohttp.ClientError, OSError) as error:
                raise Unavailable(f"{descriptor.digest}: connection to {host.netloc} was cut: {error}") from error
        if state.offset < descriptor.size:
            raise Unavailable(f"{descriptor.digest}: ended after {state.offset} of {descriptor.size} bytes")


class _Progress:
    """How far the fetch of a descriptor has come, over all attempts."""

    def __init__(self, descriptor: Descriptor, offset: int) -> None:
        self.descriptor = descriptor
        self.offset = offset


def _to_skip(response: aiohttp.ClientResponse, offset: int) -> int:
    """How many bytes of the body are there already: none where the range was honoured."""
    if response.status == 200:
        return offset
    stated = response.headers.get("Content-Range", "")
    if offset and not stated.startswith(f"bytes {offset}-"):
        raise Aborted(f"{response.url}: asked for bytes from {offset} on, got {stated!r}: aborted")
    return 0
