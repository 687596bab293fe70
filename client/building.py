"""New manifests, configurations and indexes in the content store, with the labels that keep what they name."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import InvalidArgument
from wherry.core.labels import GC_REF_CONTENT

if TYPE_CHECKING:
    from wherry.client.content import Content


def children(document: Any) -> list[tuple[str, Descriptor]]:
    """What a manifest or an index names, each with the label that keeps it from the garbage collector."""
    if not isinstance(document, dict):
        raise InvalidArgument("a manifest is no JSON object")
    found = []
    if "config" in document:
        found.append((f"{GC_REF_CONTENT}.config", Descriptor.from_json(document["config"], "config")))
    for kind, name in (("l", "layers"), ("m", "manifests")):
        items = document.get(name) or ()
        if not isinstance(items, list | tuple):
            raise InvalidArgument(f"{name} of a manifest is no array")
        for number, item in enumerate(items):
            found.append((f"{GC_REF_CONTENT}.{kind}.{number}", Descriptor.from_json(item, name)))
    return found


async def store(content: Content, data: bytes, media_type: str, labels: Mapping[str, str] | None = None) -> Descriptor:
    """A small blob, stored; one that is there is fine, its labels are added."""
    digest = Digest.of(data)
    await content.write(f"import-{digest}", [data], size=len(data), digest=digest, labels=labels)
    return Descriptor(media_type, digest, len(data))


async def store_document(
    content: Content, document: Mapping[str, Any], media_type: str, labels: Mapping[str, str] | None = None
) -> Descriptor:
    """A manifest, index or configuration; what it names must be in the store by then."""
    data = json.dumps(document, separators=(",", ":")).encode()
    kept = {label: str(child.digest) for label, child in children(document)} if _names_others(document) else {}
    return await store(content, data, media_type, {**kept, **(labels or {})})


def _names_others(document: Mapping[str, Any]) -> bool:
    # a configuration has a `config`, too: the container's
    return "layers" in document or "manifests" in document


def timestamp(seconds: float | None = None) -> str:
    """A time as configurations have it (RFC 3339, nanoseconds)."""
    now = time.time() if seconds is None else seconds
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e9):09}Z"
