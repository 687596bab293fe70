"""Registries looked at through the daemon, without pulling: `wherryd` alone offers that."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from wherry.client.registry_end import Registry, registry_end
from wherry.client.transport import Calls
from wherry.client.values import descriptor_from, platform_message
from wherry.core.descriptor import Descriptor
from wherry.core.errors import DataLoss
from wherry.core.platforms import Platform
from wherry.core.tuples import NamedTuple
from wherry.proto import wherry_registry_pb2 as pb

_SERVICE = "wherry.registry.v1.Registry"


class Document(NamedTuple):
    """A manifest, index or configuration as a registry has it. `platform` is None where nobody says it."""

    target: Descriptor
    platform: Platform | None
    data: bytes

    @property
    def value(self) -> dict[str, Any]:
        """The JSON object; raises DataLoss for what is none."""
        try:
            value = json.loads(self.data)
        except ValueError as error:
            raise DataLoss(f"{self.target.digest} is no JSON: {error}") from error
        if not isinstance(value, dict):
            raise DataLoss(f"{self.target.digest} is no JSON object")
        return value


class Registries:
    """Registries, as the daemon sees them. Other daemons answer Unimplemented."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def inspect(
        self, registry: Registry, *, platforms: Iterable[Platform] = (), all_platforms: bool = False
    ) -> list[Document]:
        """What a reference stands for: the root, then (of an index: for the platforms) manifests and configurations."""
        async with registry_end(self._calls, registry) as end:
            request = pb.InspectRequest(
                registry=end, platforms=[platform_message(item) for item in platforms], all_platforms=all_platforms
            )
            answer = await self._calls.begin(f"{_SERVICE}/Inspect", request, pb.InspectResponse).result()
        return [_document(item) for item in answer.documents]

    async def tags(self, registry: Registry) -> list[str]:
        """The tags of a repository; the registry's reference is `host/path`."""
        async with registry_end(self._calls, registry) as end:
            request = pb.TagsRequest(registry=end)
            answer = await self._calls.begin(f"{_SERVICE}/Tags", request, pb.TagsResponse).result()
        return list(answer.tags)


def _document(message: pb.Document) -> Document:
    seen = message.platform
    platform = Platform(seen.os, seen.architecture, seen.variant) if seen.os or seen.architecture else None
    return Document(descriptor_from(message.target), platform, message.data)
