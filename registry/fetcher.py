"""Fetching content: from the first host that has it, going on where a connection was cut.

Nothing is verified here: the content store computes the digest of what it is given anyway, and says by
`Fetcher.distrust` that a host gave something else.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from wherry.core import mediatypes
from wherry.core.descriptor import Descriptor
from wherry.core.errors import Aborted, NotFound, OutOfRange, WherryError
from wherry.core.reference import DEFAULT_HOST, Reference
from wherry.registry.hosts import Host, is_local
from wherry.registry.ranges import Place, Unsupported, in_parallel, read_range
from wherry.registry.retry import Backoff
from wherry.registry.transport import Transport

# a connection that brings fewer bytes a second than FAST is helped by others, once it was watched for a while
# (seconds), as long as there is enough left (bytes) to be worth it, and where it is the distance that makes it slow:
# not on a loopback address, and not while this process itself has more to do than that share of the time
FAST = 16 << 20
BUSY = 0.5
WATCHED = 1.0
WORTH_SHARING = 32 << 20
# the least size of a piece that `concurrent_layer_fetch_buffer` may ask for (bytes; containerd's)
MIN_PIECE = 512
PIECE = 4 << 20


class Fetcher:
    """Fetches content of one repository; any number of fetches at once.

    `piece` (bytes) has everything larger fetched in pieces of that size by several connections at once; with 0 that is
    done for what comes slowly.
    """

    def __init__(self, transport: Transport, hosts: list[Host], reference: Reference, piece: int = 0) -> None:
        self._transport = transport
        self._hosts = hosts
        self._reference = reference
        self._piece = piece
        self._served: dict[str, Host] = {}
        self._distrusted: set[tuple[str, Host]] = set()

    async def fetch(self, descriptor: Descriptor, offset: int = 0) -> AsyncGenerator[bytes, None]:
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
        state = _Progress(offset)
        failure: WherryError | None = None
        failed: Host | None = None
        places = self._places(descriptor)
        for number, place in enumerate(places):
            if place.host == failed:
                continue
            others = any(other.host != place.host for other in places[number + 1 :])
            self._served[descriptor.digest] = place.host
            try:
                async with aclosing(self._from(place, descriptor, state, others=others)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except NotFound:
                continue
            except WherryError as error:
                failure, failed = failure or error, place.host
        if failure is not None:
            raise failure
        raise NotFound(f"{descriptor.digest}: not found")

    def distrust(self, descriptor: Descriptor) -> bool:
        """What came for a descriptor wasn't its content: its host isn't asked for it again. Whether another one is."""
        host = self._served.get(descriptor.digest)
        if host is None or not host.netloc:
            return False
        self._distrusted.add((descriptor.digest, host))
        return any(place.host.netloc for place in self._places(descriptor))

    def _places(self, descriptor: Descriptor) -> list[Place]:
        """Where to look, in order."""
        kinds = ["blobs", "manifests"]
        if mediatypes.is_index(descriptor.media_type) or mediatypes.is_manifest(descriptor.media_type):
            kinds.reverse()
        home = "registry-1.docker.io" if self._reference.host == DEFAULT_HOST else self._reference.host
        name, path = self._reference.host, self._reference.path
        scope = f"repository:{path}:pull"
        places = []
        for host in self._hosts:
            if (descriptor.digest, host) in self._distrusted:
                continue
            # a mirror is told whose content is asked for
            query = "" if host.netloc == home else f"?ns={name}"
            places += [
                Place(self._transport, host, f"/{path}/{kind}/{descriptor.digest}{query}", name, scope)
                for kind in kinds
            ]
        # a layer that registries may not keep names where it is
        foreign = [url for url in descriptor.urls if url.startswith(("http://", "https://"))]
        return places + [Place(self._transport, Host("https", ""), url, "", scope) for url in foreign]

    async def _from(
        self, place: Place, descriptor: Descriptor, state: _Progress, *, others: bool
    ) -> AsyncGenerator[bytes, None]:
        """All the rest from one place, over as many connections as it takes."""
        backoff = Backoff(others=others)
        parallel = MIN_PIECE <= self._piece < descriptor.size
        while state.offset < descriptor.size or not descriptor.size:
            before = state.offset
            try:
                read = self._several if parallel else self._one
                async with aclosing(read(place, descriptor, state)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except _SlowlyError:
                parallel = True
            except Unsupported:
                parallel, self._piece = False, -1
            except WherryError as error:
                if state.offset > before:
                    backoff.moved()
                await backoff.wait(error)

    async def _one(self, place: Place, descriptor: Descriptor, state: _Progress) -> AsyncGenerator[bytes, None]:
        """What one connection brings. Raises Unavailable where it ends too early."""
        began, first, spent = time.monotonic(), state.offset, time.process_time()
        may_share = self._piece == 0 and not is_local(place.host.netloc)
        async with aclosing(read_range(place, descriptor, state.offset)) as chunks:
            async for chunk in chunks:
                if state.offset + len(chunk) > descriptor.size:
                    raise Aborted(f"{descriptor.digest}: more than its {descriptor.size} bytes came: aborted")
                state.offset += len(chunk)
                yield chunk
                passed = time.monotonic() - began
                if not may_share or passed < WATCHED:
                    continue
                may_share = False
                slow = state.offset - first < FAST * passed and time.process_time() - spent < BUSY * passed
                if slow and descriptor.size - state.offset >= WORTH_SHARING:
                    raise _SlowlyError

    async def _several(self, place: Place, descriptor: Descriptor, state: _Progress) -> AsyncGenerator[bytes, None]:
        """The rest by several connections at once."""
        size = self._piece if self._piece >= MIN_PIECE else PIECE
        async with aclosing(in_parallel(place, descriptor, state.offset, size)) as chunks:
            async for chunk in chunks:
                state.offset += len(chunk)
                yield chunk


class _SlowlyError(Exception):
    """One connection alone doesn't bring much."""


@dataclass(slots=True)
class _Progress:
    """How far the fetch of a descriptor has come, over all attempts."""

    offset: int
