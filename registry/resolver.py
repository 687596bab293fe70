"""From a reference to a descriptor, and from there to what fetches and pushes its content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

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
from wherry.registry.transport import Transport

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
    ) -> None:
        self._hosts = hosts
        self._transport = Transport(credentials, headers)

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
        for host in hosts:
            for kind in ("manifests", "blobs") if parsed.digest else ("manifests",):
                try:
                    return ref, await self._ask(host, parsed, kind)
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
        return Fetcher(self._transport, self._capable(parsed, Capability.PULL), parsed)

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
        scope = f"repository:{parsed.path}:pull"
        common = {"name": parsed.host, "scope": scope, "headers": {"Accept": ACCEPT}, "expect": frozenset({200})}
        try:
            async with self._transport.request("HEAD", host, url, **common) as response:  # type: ignore[arg-type]
                stated = response.headers.get("Docker-Content-Digest", "")
                media_type = mediatypes.bare(response.headers.get("Content-Type", ""))
                length = response.headers.get("Content-Length", "")
                digest = parsed.digest or (Digest.parse(stated) if stated else None)
                if digest is not None and media_type and length.isdigit():
                    return Descriptor(media_type, digest, int(length))
        except NotFound:
            raise
        except WherryError as error:
            # some registries don't do HEAD: what GET says is what counts
            if error.code not in {InvalidArgument.code, WherryError.code}:
                raise
        async with self._transport.request("GET", host, url, **common) as response:  # type: ignore[arg-type]
            data = await response.content.read(MAX_MANIFEST + 1)
            while len(data) <= MAX_MANIFEST and (more := await response.content.read(MAX_MANIFEST + 1 - len(data))):
                data += more
            media_type = mediatypes.bare(response.headers.get("Content-Type", "")) or mediatypes.OCTET_STREAM
        if len(data) > MAX_MANIFEST:
            raise ResourceExhausted(f"manifest of {parsed} is larger than {MAX_MANIFEST} bytes")
        digest = Digest.of(data, parsed.digest.algorithm if parsed.digest else "sha256")
        if parsed.digest and digest != parsed.digest:
            raise Aborted(f"{host.netloc} answered for {parsed.digest} with content of {digest}")
        return Descriptor(media_type, digest, len(data))


def query(host: Host, parsed: Reference) -> str:
    """The query that tells a mirror whose content is asked for."""
    home = "registry-1.docker.io" if parsed.host == DEFAULT_HOST else parsed.host
    return "" if host.netloc == home else f"?ns={parsed.host}"


def _parse(ref: str) -> Reference:
    parsed = reference.parse(ref)
    if not parsed.object:
        raise InvalidArgument(f"{ref}: object required: invalid argument")
    return parsed
