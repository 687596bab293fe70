"""Registries looked at without pulling: `wherry.registry.v1`, an addition of ours beside the transfer service."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from wherry.core import mediatypes
from wherry.core.descriptor import Descriptor
from wherry.core.errors import InvalidArgument, NotFound, WherryError
from wherry.core.platforms import Platform
from wherry.core.reference import parse
from wherry.daemon.config import Limits
from wherry.daemon.config import Transfer as Options
from wherry.daemon.namespaces import require_namespace
from wherry.daemon.streaming import ByteSender, StreamManager
from wherry.daemon.transfer_image import Selection, children_of, parse_document, platform_from_proto, to_proto
from wherry.proto import transfer_types_pb2 as types
from wherry.proto import types_pb2
from wherry.proto import wherry_registry_pb2 as pb
from wherry.proto.service import Context

if TYPE_CHECKING:
    from wherry.registry.resolver import Resolver


# heads of requests and answers that wait for a client that wants to see them
MAX_TEXTS = 256
_CLIENT = "wherry.registry.resolver"


class Registries:
    """Clients of registries, as the messages of a transfer describe them."""

    # ruff: noqa: PLC0415 - aiohttp takes a while to import, and is loaded when somebody asks a registry

    def __init__(self, streams: StreamManager, options: Options, limits: Limits) -> None:
        self._streams = streams
        self._options = options
        self.limits = limits

    @contextlib.asynccontextmanager
    async def resolver(self, namespace: str, registry: types.OCIRegistry) -> AsyncIterator[Resolver]:
        """A client for the time of the `async with`; its credentials come from the headers or the client's stream.

        Raises NotFound for a stream that nobody opened, InvalidArgument for a reference or a file that is wrong.
        """
        if _CLIENT not in sys.modules:
            # in a thread: a tenth of a second in which the daemon should answer others
            await asyncio.to_thread(importlib.import_module, _CLIENT)
        from wherry.daemon.transfer_credentials import credentials_for
        from wherry.registry.hosts import Host, hosts_for, netloc_of
        from wherry.registry.resolver import Resolver

        asked = registry.resolver
        headers = dict(asked.headers)
        stream = self._streams.get(namespace, asked.auth_stream) if asked.auth_stream else None
        credentials = credentials_for(registry.reference, headers, stream)

        def find(name: str) -> list[Host]:
            config_dir = asked.host_dir or self._options.config_path
            found = hosts_for(name, config_dir=config_dir, default_scheme=asked.default_scheme)
            own = netloc_of(name)
            return [replace(host, headers={**_for(host.netloc == own, headers), **host.headers}) for host in found]

        piece = self._options.concurrent_layer_fetch_buffer
        try:
            async with (
                self._dumping(namespace, asked) as dump,
                Resolver(find, credentials, piece=piece, dump=dump) as resolver,
            ):
                yield resolver
        finally:
            if stream is not None:
                stream.close()

    @contextlib.asynccontextmanager
    async def _dumping(
        self, namespace: str, asked: types.RegistryResolver
    ) -> AsyncIterator[Callable[[str], None] | None]:
        """What a client that wants to see the requests (`ctr --http-dump`) is told, over the stream that it named."""
        if asked.http_debug == types.DISABLED or not asked.logs_stream:
            yield None
            return
        stream = self._streams.get(namespace, asked.logs_stream)
        sender = ByteSender(stream)
        texts: asyncio.Queue[str | None] = asyncio.Queue(MAX_TEXTS)

        async def send() -> None:
            with contextlib.suppress(WherryError):
                while (text := await texts.get()) is not None:
                    await sender.write(text.encode(errors="replace"))

        def dump(text: str) -> None:
            # whoever is too slow to read it misses some
            with contextlib.suppress(asyncio.QueueFull):
                texts.put_nowait(text)

        sending = asyncio.create_task(send())
        try:
            yield dump
        finally:
            with contextlib.suppress(asyncio.QueueFull):
                texts.put_nowait(None)
            await asyncio.wait({sending}, timeout=1)
            sending.cancel()
            stream.close()


def _for(registry: bool, headers: Mapping[str, str]) -> Mapping[str, str]:
    """The client's headers for a host: only the registry itself learns who the user is, no mirror of it."""
    return {key: value for key, value in headers.items() if registry or key.lower() != "authorization"}


class RegistryService:
    """wherry.registry.v1.Registry."""

    SERVICE = "wherry.registry.v1.Registry"

    def __init__(self, registries: Registries) -> None:
        self._registries = registries

    async def inspect(self, request: pb.InspectRequest, context: Context) -> pb.InspectResponse:
        """The documents that a reference stands for. Raises NotFound (also where no platform fits), ….

        A root that is neither index nor manifest is given as it is.
        """
        namespace = require_namespace(context)
        reference = request.registry.reference
        async with self._registries.resolver(namespace, request.registry) as resolver:
            _, root = await resolver.resolve(reference)
            inspection = _Inspection(resolver, reference, self._registries.limits)
            platforms = [platform_from_proto(item) for item in request.platforms]
            await inspection.look(root, Selection(platforms), below=bool(platforms) or request.all_platforms)
            return inspection.response

    async def tags(self, request: pb.TagsRequest, context: Context) -> pb.TagsResponse:
        """The tags of a repository. Raises NotFound, InvalidArgument for a reference with a tag."""
        namespace = require_namespace(context)
        parsed = parse(request.registry.reference)
        if parsed.object:
            raise InvalidArgument(f"{request.registry.reference} is no repository, but one of its images")
        async with self._registries.resolver(namespace, request.registry) as resolver:
            return pb.TagsResponse(tags=await resolver.tags(parsed.name))


class _Inspection:
    """The documents of one image, as they are found."""

    def __init__(self, resolver: Resolver, reference: str, limits: Limits) -> None:
        self._fetcher = resolver.fetcher(reference)
        self._limits = limits
        self.response = pb.InspectResponse()

    async def look(self, node: Descriptor, selection: Selection, *, below: bool) -> None:
        """A node, and what is wanted below it: one level of an index, a manifest's configuration."""
        data = await self._add(node)
        kind = node.media_type
        if mediatypes.is_index(kind) and below:
            children = children_of(parse_document(data, node), node)
            chosen = selection.choose(children)
            if children and not chosen:
                names = ", ".join(str(platform) for platform in selection.platforms)
                raise NotFound(f"no match for platform in manifest {node.digest}: {names}: not found")
            for child in chosen:
                if mediatypes.is_manifest(child.media_type):
                    await self._manifest(child, await self._add(child))
        elif mediatypes.is_manifest(kind):
            await self._manifest(node, data)

    async def _manifest(self, node: Descriptor, data: bytes) -> None:
        config = children_of(parse_document(data, node), node)[0]
        if mediatypes.is_config(config.media_type):
            await self._add(config, node.platform)

    async def _add(self, node: Descriptor, platform: Platform | None = None) -> bytes:
        from wherry.daemon.transfer_copy import read_document

        limit = replace(self._limits, document_bytes=self._limits.document_bytes or 8 << 20)
        data = await read_document(self._fetcher, node, limit)
        made = self.response.documents.add(target=to_proto(node), data=data)
        wanted = platform or node.platform
        if wanted is not None:
            made.platform.CopyFrom(
                types_pb2.Platform(os=wanted.os, architecture=wanted.architecture, variant=wanted.variant)
            )
        return data
