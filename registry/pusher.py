"""Pushing content: what is there already isn't sent, what a neighbouring repository has is mounted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

from aiohttp import ClientResponse

from wherry.core import mediatypes
from wherry.core.descriptor import Descriptor
from wherry.core.errors import (
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    WherryError,
)
from wherry.core.reference import Reference
from wherry.registry.hosts import Host
from wherry.registry.retry import Backoff, retried, worth_a_retry
from wherry.registry.transport import Transport, joined

# bytes from which on a blob goes in chunks, and how large these are: what is lost at most when a connection is cut
CHUNK = 64 << 20
# repositories that are asked for a mount
MAX_MOUNTS = 3

# opens the content at an offset (bytes)
OpenContent = Callable[[int], AsyncIterator[bytes]]


class _NoChunksError(Exception):
    """The registry doesn't take a blob in chunks."""


class Pusher:
    """Pushes content to one repository of one host; any number of pushes at once."""

    def __init__(self, transport: Transport, host: Host, reference: Reference, *, chunk_size: int = CHUNK) -> None:
        """What is larger than `chunk_size` (bytes) goes in chunks of that size, the rest in one request."""
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
        blob. An upload that is cut goes on with the chunk that was lost. Raises Unauthenticated, PermissionDenied,
        Unavailable, InvalidArgument (the registry refused it), ….
        """
        if mediatypes.is_index(descriptor.media_type) or mediatypes.is_manifest(descriptor.media_type):
            return await self.push_manifest(descriptor, content, str(descriptor.digest))
        if await retried(lambda: self._exists("blobs", descriptor, str(descriptor.digest))):
            return False
        location = await retried(lambda: self._begin(descriptor, list(mount_from)))
        if location is not None:
            await self._send(descriptor, content, location)
        return True

    async def push_manifest(self, descriptor: Descriptor, content: OpenContent, name: str) -> bool:
        """Put a manifest or index under a name (tag or digest); False where the name stands for it already."""
        if await retried(lambda: self._exists("manifests", descriptor, name)):
            return False
        data = b"".join([chunk async for chunk in content(0)])
        url = f"/{self._reference.path}/manifests/{name}"
        headers = {"Content-Type": descriptor.media_type}

        async def put() -> None:
            async with self._request("PUT", url, headers, lambda: data, expect={200, 201, 202}):
                pass

        await retried(put)
        return True

    def _request(
        self,
        method: str,
        url: str,
        headers: dict[str, str] | None = None,
        body: Callable[[], bytes | AsyncIterator[bytes] | None] | None = None,
        *,
        expect: set[int],
        also: str = "",
    ) -> AbstractAsyncContextManager[ClientResponse]:
        """A request to the registry; `also` is a further scope that it takes."""
        return self._transport.request(
            method,
            self._host,
            url,
            name=self._reference.host,
            scope=f"{self._scope} {also}".strip(),
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
                length = response.headers.get("Content-Length", "")
                if kind == "blobs":
                    return not length.isdigit() or int(length) == descriptor.size
                return stated == descriptor.digest
        except NotFound:
            return False

    # -- an upload

    async def _begin(self, descriptor: Descriptor, mount_from: list[str]) -> str | None:
        """Open an upload: its URL, or None where the blob was mounted."""
        uploads = f"/{self._reference.path}/blobs/uploads/"
        names = [name for name in mount_from if name != self._reference.path][:MAX_MOUNTS]
        for name in [*names, ""]:
            query = f"?mount={quote(descriptor.digest, safe='')}&from={quote(name, safe='')}" if name else ""
            try:
                async with self._request(
                    "POST",
                    uploads + query,
                    {"Content-Length": "0"},
                    expect={201, 202},
                    also=f"repository:{name}:pull" if name else "",
                ) as response:
                    if response.status == 201 and name:
                        return None
                    return _location(response)
            except WherryError as error:
                # a repository that can't be read can't be mounted from; without a mount it is an error
                if not name or worth_a_retry(error):
                    raise
        return None

    async def _send(self, descriptor: Descriptor, content: OpenContent, location: str) -> None:
        """Bring a blob's bytes, over as many requests and connections as it takes, and close the upload."""
        backoff = Backoff()
        upload = _Upload(location, chunked=descriptor.size > self._chunk_size)
        while True:
            before = upload.offset
            try:
                if upload.chunked:
                    await self._chunks(descriptor, content, upload)
                await self._finish(descriptor, content, upload)
                return
            except _NoChunksError:
                upload = _Upload(await retried(partial(self._begin_anew, descriptor)), chunked=False)
            except WherryError as error:
                if upload.offset > before:
                    backoff.moved()
                await backoff.wait(error)
                # the answer alone may have been lost
                if await retried(lambda: self._exists("blobs", descriptor, str(descriptor.digest))):
                    return
                await self._take_up(descriptor, upload)

    async def _begin_anew(self, descriptor: Descriptor) -> str:
        location = await self._begin(descriptor, [])
        if location is None:
            raise Unavailable(f"{descriptor.digest}: the registry opened no upload")
        return location

    async def _take_up(self, descriptor: Descriptor, upload: _Upload) -> None:
        """After a cut: where the registry says that it is, or a new upload where it doesn't say."""
        if upload.chunked:
            try:
                async with self._request("GET", upload.location, expect={204, 202, 200}) as response:
                    upload.location = _location(response, upload.location)
                    upload.offset = _offset(response, descriptor.size)
                    return
            except WherryError:
                # nothing of it is known any more: from the start
                pass
        upload.location, upload.offset = await retried(partial(self._begin_anew, descriptor)), 0

    async def _chunks(self, descriptor: Descriptor, content: OpenContent, upload: _Upload) -> None:
        """Send the rest of the content by PATCH requests. Raises _NoChunksError where the first one isn't taken."""
        while upload.offset < descriptor.size:
            end = min(upload.offset + self._chunk_size, descriptor.size)
            headers = {
                "Content-Type": mediatypes.OCTET_STREAM,
                "Content-Range": f"{upload.offset}-{end - 1}",
                "Content-Length": str(end - upload.offset),
            }
            body = partial(_part, content, upload.offset, end)
            try:
                async with self._request("PATCH", upload.location, headers, body, expect={201, 202, 204}) as response:
                    upload.location = _location(response, upload.location)
                    upload.offset = end
            except (Unauthenticated, PermissionDenied):
                raise
            except WherryError as error:
                if upload.offset == 0 and not worth_a_retry(error):
                    raise _NoChunksError from error
                raise

    async def _finish(self, descriptor: Descriptor, content: OpenContent, upload: _Upload) -> None:
        """Close the upload, with the whole content where nothing was sent yet."""
        separator = "&" if "?" in upload.location else "?"
        url = f"{upload.location}{separator}digest={quote(descriptor.digest, safe='')}"
        headers = {"Content-Type": mediatypes.OCTET_STREAM}
        body: Callable[[], Any] = bytes
        if not upload.chunked and descriptor.size:
            headers["Content-Length"] = str(descriptor.size)
            body = partial(content, 0)
        try:
            async with self._request("PUT", url, headers, body, expect={201, 202, 204}):
                return
        except WherryError as error:
            if type(error) is WherryError:
                raise InvalidArgument(f"pushing {descriptor.digest}: {error.message}") from error
            raise


class _Upload:
    """Where an upload is, and how much of it the registry has acknowledged."""

    def __init__(self, location: str, *, chunked: bool) -> None:
        self.location = location
        self.chunked = chunked
        self.offset = 0


def _location(response: ClientResponse, otherwise: str = "") -> str:
    """Where an upload goes on. A registry behind a proxy that ends TLS may not know that it is https from outside."""
    location = response.headers.get("Location") or otherwise
    if not location:
        raise Unavailable(f"{response.url}: the registry opened an upload without saying where")
    url = joined(str(response.url), location)
    asked, said = urlsplit(str(response.url)), urlsplit(url)
    if asked.scheme == "https" and said.scheme == "http" and said.hostname == asked.hostname:
        return said._replace(scheme="https", netloc=asked.netloc).geturl()
    return url


def _offset(response: ClientResponse, size: int) -> int:
    """How many bytes of an upload the registry has (`Range: 0-LAST`, distribution-spec, pushing a blob in chunks)."""
    stated = response.headers.get("Range", "").removeprefix("bytes=")
    first, _, last = stated.partition("-")
    if first != "0" or not last.isdigit():
        raise Unavailable(f"{response.url}: the registry doesn't say how far the upload is: {stated[:100]!r}")
    # `0-0` is said of one byte and of none
    have = int(last) + 1 if int(last) else 0
    if have > size:
        raise InvalidArgument(f"{response.url}: the upload has {have} bytes, the blob {size}: invalid argument")
    return have


async def _part(content: OpenContent, start: int, end: int) -> AsyncIterator[bytes]:
    """The content's bytes from `start` up to `end`."""
    left = end - start
    chunks = content(start)
    try:
        async for chunk in chunks:
            yield chunk[:left]
            left -= len(chunk)
            if left <= 0:
                return
    finally:
        if hasattr(chunks, "aclose"):
            await chunks.aclose()
