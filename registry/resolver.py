"""From a reference to a descriptor, and from there to what fetches and pushes its content."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self, TypedDict
from urllib.parse import urlsplit

from wherry.core import mediatypes, reference
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    WherryError,
)
from wherry.core.reference import DEFAULT_HOST, Reference
from wherry.registry.credentials import Credentials, anonymous
from wherry.registry.fetcher import Fetcher
from wherry.registry.hosts import Capability, Host, hosts_for
from wherry.registry.pusher import Pusher
from wherry.registry.retry import retried
from wherry.registry.transport import Transport, joined, read_all

# bytes of a manifest that is read to learn its digest (the distribution specification's limit)
MAX_MANIFEST = 4 << 20
# what a registry may answer with; order is preference
ACCEPT = ", ".join(
    (
        mediatypes.DOCKER_MANIFEST,
        mediatypes.DOCKER_LIST,
        mediatypes.OCI_MANIFEST,
        mediatypes.OCI_INDEX,
        "*/*",
    )
)

# names of one repository that are listed, and requests that it may take
MAX_TAGS = 100_000
MAX_PAGES = 1000


class _Common(TypedDict):
    name: str
    scope: str
    headers: dict[str, str]
    expect: frozenset[int]


FindHosts = Callable[[str], Sequence[Host]]


class Resolver:
    """A client of registries; close it in the end (`async with`).

    `hosts` gives the hosts for a registry's name, by default without any `hosts.toml`.
    """

    def __init__(
        self,
        hosts: FindHosts = hosts_for,
        credentials: Credentials = anonymous,
        headers: Mapping[str, str] | None = None,
        piece: int = 0,
        dump: Callable[[str], None] | None = None,
    ) -> None:
        """`piece` is the fetchers', `dump` the transport's: see there."""
        self._hosts = hosts
        self._piece = piece
        self._transport = Transport(credentials, headers, dump)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.close()

    async def resolve(self, ref: str) -> tuple[str, Descriptor]:
        """Find what a complete reference (`host/path:tag`, `host/path@digest`) stands for now.

        Returns the reference as it is stored and the descriptor of the manifest or index. Every host that may resolve
        is asked, in order. Raises InvalidArgument, NotFound (`REF: not found`), Unauthenticated, Unavailable, ….
        """
        parsed = _parse(ref)
        wanted = Capability.PULL if parsed.digest else Capability.PULL | Capability.RESOLVE
        hosts = self._capable(parsed, wanted)
        failure: WherryError | None = None
        for number, host in enumerate(hosts):
            others = number + 1 < len(hosts)
            for kind in ("manifests", "blobs") if parsed.digest else ("manifests",):
                try:
                    return ref, await retried(partial(self._ask, host, parsed, kind), others=others)
                except NotFound as error:
                    failure = failure or error
                except WherryError as error:
                    # the reason why a host couldn't tell says more than that another one doesn't have it
                    failure = error if failure is None or isinstance(failure, NotFound) else failure
                    break
        if failure is None or isinstance(failure, NotFound):
            raise NotFound(f"{ref}: not found")
        raise type(failure)(f"failed to resolve reference {ref!r}: {failure.message}") from failure

    def fetcher(self, ref: str) -> Fetcher:
        """What fetches content of a reference's repository."""
        parsed = _parse(ref)
        return Fetcher(self._transport, self._capable(parsed, Capability.PULL), parsed, self._piece)

    async def tags(self, repository: str, limit: int = MAX_TAGS) -> list[str]:
        """The tags of a repository (`host/path`), sorted (the specification wants it so, older registries don't).

        Raises NotFound (`REPOSITORY: not found`), ResourceExhausted for more than `limit`, else as `resolve`.
        """
        parsed = reference.parse(repository)
        failure: WherryError | None = None
        hosts = self._capable(parsed, Capability.PULL | Capability.RESOLVE)
        for number, host in enumerate(hosts):
            try:
                return sorted(await self._all_tags(host, parsed, limit, others=number + 1 < len(hosts)))
            except WherryError as error:
                failure = error if failure is None or isinstance(failure, NotFound) else failure
        if failure is None or isinstance(failure, NotFound):
            raise NotFound(f"{parsed.name}: not found")
        raise failure

    async def _all_tags(self, host: Host, parsed: Reference, limit: int, *, others: bool) -> list[str]:
        """All pages of a host's list (distribution-spec, listing tags)."""
        found: list[str] = []
        url = f"/{parsed.path}/tags/list{query(host, parsed)}"
        for _ in range(MAX_PAGES):
            document, link = await retried(partial(self._tag_page, host, parsed, url), others=others)
            names = document.get("tags") or []
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise InvalidArgument(f"{host.netloc}: its list of tags is none: invalid argument")
            found += names
            if len(found) > limit:
                raise ResourceExhausted(f"{parsed.name} has more than {limit} tags: resource exhausted")
            if not link or not names:
                return found
            following = urlsplit(joined(host.root + url, link))
            if following.netloc != host.netloc or not following.path.startswith(f"{host.path}/"):
                raise InvalidArgument(f"{host.netloc}: the next page of tags is elsewhere: invalid argument")
            url = following.path.removeprefix(host.path) + (f"?{following.query}" if following.query else "")
        raise ResourceExhausted(f"{parsed.name}: more than {MAX_PAGES} pages of tags: resource exhausted")

    async def _tag_page(self, host: Host, parsed: Reference, url: str) -> tuple[dict[str, object], str]:
        async with self._transport.request("GET", host, url, **_common(parsed)) as response:
            document = _object(await read_all(response, MAX_MANIFEST))
            link = response.headers.get("Link", "")
        if document is None:
            raise InvalidArgument(f"{host.netloc}: its list of tags is no JSON object: invalid argument")
        match = re.match(r"\s*<([^>]*)>", link) if "next" in link else None
        return document, match[1] if match else ""

    def pusher(self, ref: str) -> Pusher:
        """What pushes content to a reference's repository."""
        parsed = _parse(ref)
        return Pusher(self._transport, self._capable(parsed, Capability.PUSH)[0], parsed)

    def _capable(self, parsed: Reference, wanted: Capability) -> list[Host]:
        hosts = [host for host in self._hosts(parsed.host) if wanted in host.capabilities]
        if not hosts:
            names = "|".join(item.name.lower() for item in wanted if item.name)
            raise FailedPrecondition(f"no host of {parsed.host} is configured for {names}: failed precondition")
        return hosts

    async def _ask(self, host: Host, parsed: Reference, kind: str) -> Descriptor:
        """HEAD, and where that doesn't tell enough, GET."""
        url = f"/{parsed.path}/{kind}/{parsed.object}{query(host, parsed)}"
        try:
            found = await self._head(host, parsed, url)
        except NotFound:
            raise
        except WherryError as error:
            # some registries don't do HEAD: what GET says is what counts
            if error.code not in {InvalidArgument.code, WherryError.code}:
                raise
            found = None
        return found or (await self._get(host, parsed, url))[0]

    async def _head(self, host: Host, parsed: Reference, url: str) -> Descriptor | None:
        """What HEAD says; None where that isn't enough."""
        async with self._transport.request("HEAD", host, url, **_common(parsed)) as response:
            stated = response.headers.get("Docker-Content-Digest", "")
            media_type = mediatypes.bare(response.headers.get("Content-Type", ""))
            length = response.headers.get("Content-Length", "")
        if not stated and not parsed.digest:
            return None
        digest = parsed.digest or Digest.parse(stated)
        if stated and stated != digest and stated.partition(":")[0] == digest.algorithm:
            raise Aborted(f"{host.netloc} answered for {parsed.digest} with {stated[:100]!r}: aborted")
        if not media_type or media_type.startswith("text/") or not length.isdigit():
            return None
        return Descriptor(media_type, digest, int(length))

    async def _get(self, host: Host, parsed: Reference, url: str) -> tuple[Descriptor, bytes]:
        """A manifest whole. Raises InvalidArgument for what is none, Aborted for another than the one asked for."""
        async with self._transport.request("GET", host, url, **_common(parsed)) as response:
            media_type = mediatypes.bare(response.headers.get("Content-Type", "")) or mediatypes.OCTET_STREAM
            data = await read_all(response, MAX_MANIFEST)
        digest = Digest.of(data, parsed.digest.algorithm if parsed.digest else "sha256")
        if parsed.digest and digest != parsed.digest:
            raise Aborted(f"{host.netloc} answered for {parsed.digest} with content of {digest}: aborted")
        # whatever its type is, a manifest is a JSON object; a login page isn't
        document = _object(data)
        if document is None:
            raise InvalidArgument(f"{host.netloc} answered for {parsed} with {media_type} that is no manifest")
        if media_type.startswith("text/") or media_type in {mediatypes.OCTET_STREAM, "application/json"}:
            media_type = str(document.get("mediaType") or media_type)
        return Descriptor(media_type, digest, len(data)), data


def _common(parsed: Reference) -> _Common:
    """What all questions about a reference have in common."""
    return {
        "name": parsed.host,
        "scope": f"repository:{parsed.path}:pull",
        "headers": {"Accept": ACCEPT},
        "expect": frozenset({200}),
    }


def _object(data: bytes) -> dict[str, object] | None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def query(host: Host, parsed: Reference) -> str:
    """The query that tells a mirror whose content is asked for."""
    home = "registry-1.docker.io" if parsed.host == DEFAULT_HOST else parsed.host
    return "" if host.netloc == home else f"?ns={parsed.host}"


def _parse(ref: str) -> Reference:
    parsed = reference.parse(ref)
    if not parsed.object:
        raise InvalidArgument(f"{ref}: object required: invalid argument")
    return parsed
