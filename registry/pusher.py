"""Pushing content: what is there already isn't sent, what a neighbouring repository has is mounted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from functools import partial
from urllib.parse import quote, urljoin

from aiohttp import ClientResponse

from wherry.core import mediatypes
from wherry.core.descriptor import Descriptor
from wherry.core.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WherryError,
)
from wherry.core.reference import Reference
from wherry.registry.hosts import Host
from wherry.registry.transport import Transport

# attempts for one blob, each from its start
MAX_ATTEMPTS = 3
FIRST_PAUSE = 0.3
_RETRIED = (Unavailable, DeadlineExceeded, ResourceExhausted)

# opens the content at an offset (bytes)
OpenContent = Callable[[int], AsyncIterator[bytes]]


class Pusher:
    """Pushes content to one repository of one host; any number of pushes at once."""

    def __init__(
        self, transport: Transport, host: Host, reference: Reference, *, chunk_size: int | None = None
    ) -> None:
        """`chunk_size` (bytes) uploads blobs in pieces of that size; None uploads each in one request."""
        self._transport = transport
        self._host = host
        self._reference = reference
        self._chunk_size = chunk_size

    @property
    def _scope(self) -> str:
        return f"repository:{self._reference.path}:pull,push"

    async def push(self, descriptor: Descriptor, content: OpenContent, mount_from: Iterable[str] = ()) -> bool:
        """Bring content into the repository; False where it was there already.

        A manifest or index goes under the reference's tag when `descriptor` is the reference's own target, see
        `push_manifest`; here it goes under its digest. `mount_from` are repositories of the same host that may have the
        blob. Raises Unauthenticated, PermissionDenied, Unavailable, InvalidArgument (the registry refused it), ….
        """
        if mediatypes.is_index(descriptor.media_type) or mediatypes.is_manifest(descriptor.media_type):
            return await self.push_manifest(descriptor, content, str(descriptor.digest))
        if await self._exists("blobs", descriptor, str(descriptor.digest)):
            return False
        pause = FIRST_PAUSE
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                await self._upload(descriptor, content, list(mount_from))
                return True
            except _RETRIED:
                if attempt == MAX_ATTEMPTS:
                    raise
                await asyncio.sleep(pause)
                pause *= 2
        return True

    async def push_manifest(self, descriptor: Descriptor, content: OpenContent, name: str) -> bool:
        """Put a manifest or index under a name (tag or digest); False where the name stands for it already."""
        if await self._exists("manifests", descriptor, name):
            return False
        data = b"".join([chunk async for chunk in content(0)])
        url = f"/{self._reference.path}/manifests/{name}"
        async with self._request(
            "PUT", url, {"Content-Type": descriptor.media_type}, lambda: data, expect={200, 201, 202}
        ):
            return True

    def _request(
        self,
        method: str,
        url: str,
        headers: dict[str, str] | None = None,
        body: Callable[[], bytes | AsyncIterator[bytes] | None] | None = None,
        *,
        expect: set[int],
    ) -> AbstractAsyncContextManager[ClientResponse]:
        return self._transport.request(
            method,
            self._host,
            url,
            name=self._reference.host,
            scope=self._scope,
            headers=headers,
            body=body,
            expect=frozenset(expect),
        )

    async def _exists(self, kind: str, descriptor: Descriptor, name: str) -> bool:
        url = f"/{self._reference.path}/{kind}/{name}"
        accept = f"{descriptor.media_type}, */*"
        try:
            async with self._request("HEAD", url, {"Accept": accept}, expect={200}) as response:
                stated = response.headers.get("Docker-Content-Digest")
                return kind == "blobs" or stated == descriptor.digest
        except NotFound:
            return False

    async def _upload(self, descriptor: Descriptor, content: OpenContent, mount_from: list[str]) -> None:
        location = await self._begin(descriptor, mount_from)
        if location is None:
            return
        if self._chunk_size is not None:
            location = await self._chunks(descriptor, content, location)
        separator = "&" if "?" in location else "?"
        url = f"{location}{separator}digest={quote(descriptor.digest, safe='')}"
        headers = {"Content-Type": mediatypes.OCTET_STREAM}
        if self._chunk_size is not None or descriptor.size == 0:
            body: Callable[[], bytes | AsyncIterator[bytes]] = bytes
        else:
            headers["Content-Length"] = str(descriptor.size)
            body = partial(content, 0)
        try:
            async with self._request("PUT", url, headers, body, expect={201, 204}):
                return
        except WherryError as error:
            if type(error) is WherryError:
                raise InvalidArgument(f"pushing {descriptor.digest}: {error.message}") from error
            raise

    async def _begin(self, descriptor: Descriptor, mount_from: list[str]) -> str | None:
        """Open an upload: its URL, or None where the blob was mounted."""
        uploads = f"/{self._reference.path}/blobs/uploads/"
        queries = [
            f"?mount={quote(descriptor.digest, safe='')}&from={quote(name, safe='')}"
            for name in mount_from
            if name != self._reference.path
        ]
        for query in [*queries[:3], ""]:
            try:
                async with self._request(
                    "POST", uploads + query, {"Content-Length": "0"}, expect={201, 202}
                ) as response:
                    if response.status == 201:
                        return None
                    location = response.headers.get("Location", "")
                    if not location:
                        raise Unavailable(f"{response.url}: the registry opened an upload without saying where")
                    return urljoin(str(response.url), location)
            except WherryError:
                # a repository that can't be read can't be mounted from; without a mount it is an error
                if not query:
                    raise
        return None

    async def _chunks(self, descriptor: Descriptor, content: OpenContent, location: str) -> str:
        """Send the content by PATCH requests of the chunk size; returns where to finish."""
        size = self._chunk_size or descriptor.size
        offset = 0
        async for piece in _pieces(content(0), size):
            headers = {
                "Content-Type": mediatypes.OCTET_STREAM,
                "Content-Range": f"{offset}-{offset + len(piece) - 1}",
                "Content-Length": str(len(piece)),
            }
            async with self._request("PATCH", location, headers, partial(bytes, piece), expect={202, 204}) as response:
                location = urljoin(str(response.url), response.headers.get("Location") or location)
            offset += len(piece)
        return location


async def _pieces(chunks: AsyncIterator[bytes], size: int) -> AsyncIterator[bytes]:
    """The same bytes in pieces of `size`, the last one shorter."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) >= size:
            yield bytes(buffer[:size])
            del buffer[:size]
    if buffer:
        yield bytes(buffer)
