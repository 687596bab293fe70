"""The tree of an image in the content store: its nodes, their children, and the labels that hold the children."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from wherry.core import mediatypes
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import InvalidArgument
from wherry.core.labels import DISTRIBUTION_SOURCE, GC_REF_CONTENT
from wherry.core.platforms import Platform, ranker
from wherry.daemon.config import Limits
from wherry.daemon.content import ContentStore
from wherry.proto import content_pb2, types_pb2
from wherry.snapshotter.limits import too_many

# bytes of a manifest, index or configuration that is read into memory
MAX_DOCUMENT = 8 << 20
# indexes within indexes: real ones have two
MAX_DEPTH = 16


def from_proto(message: types_pb2.Descriptor) -> Descriptor:
    """A descriptor of the API as core's. Raises InvalidArgument for what is no digest."""
    return Descriptor(message.media_type, Digest.parse(message.digest), message.size, dict(message.annotations))


def to_proto(descriptor: Descriptor) -> types_pb2.Descriptor:
    """A descriptor as the API has it (without the platform)."""
    return types_pb2.Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size=descriptor.size,
        annotations=descriptor.annotations,
    )


def platform_from_proto(message: types_pb2.Platform) -> Platform:
    """A platform of the API as core's."""
    return Platform(message.os, message.architecture, message.variant, message.os_version, tuple(message.os_features))


def ref_key(descriptor: Descriptor) -> str:
    """The name of an upload for this content, which clients also see as the name of its progress (containerd's)."""
    kind = descriptor.media_type
    if mediatypes.is_manifest(kind):
        prefix = "manifest"
    elif mediatypes.is_index(kind):
        prefix = "index"
    elif mediatypes.is_layer(kind):
        prefix = "layer"
    elif mediatypes.is_config(kind):
        prefix = "config"
    else:
        prefix = "unknown"
    return f"{prefix}-{descriptor.digest}"


def parse_document(data: bytes, descriptor: Descriptor) -> dict[str, Any]:
    """A manifest, index or configuration as an object. Raises InvalidArgument that names it."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{ref_key(descriptor)} is not JSON: {error}: invalid argument") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"{ref_key(descriptor)} is no JSON object: invalid argument")
    return value


def children_of(document: Mapping[str, Any], descriptor: Descriptor) -> list[Descriptor]:
    """What a manifest or index refers to: a manifest's configuration first, then its layers. Raises InvalidArgument."""
    where = ref_key(descriptor)
    if mediatypes.is_index(descriptor.media_type):
        if document.get("layers") or document.get("config"):
            raise InvalidArgument(f"{where}: an index with layers or config is ambiguous: invalid argument")
        return _list(document.get("manifests"), f"{where}: manifests")
    if mediatypes.is_manifest(descriptor.media_type):
        if document.get("manifests"):
            raise InvalidArgument(f"{where}: a manifest with manifests is ambiguous: invalid argument")
        if document.get("fsLayers"):
            raise InvalidArgument(f"{where}: schema 1 image manifests are not supported: invalid argument")
        config = Descriptor.from_json(document.get("config"), f"{where}: config")
        return [config, *_list(document.get("layers"), f"{where}: layers")]
    return []


def _list(value: object, where: str) -> list[Descriptor]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidArgument(f"{where} is no array: invalid argument")
    return [Descriptor.from_json(item, f"{where}[{index}]") for index, item in enumerate(value)]


def check_size(descriptor: Descriptor, limits: Limits) -> None:
    """Raises ResourceExhausted for a manifest, index or configuration that is larger than one may be."""
    kind, limit = descriptor.media_type, limits.document_bytes
    document = mediatypes.is_index(kind) or mediatypes.is_manifest(kind) or mediatypes.is_config(kind)
    if document and 0 < limit < descriptor.size:
        raise too_many(f"{ref_key(descriptor)} has {descriptor.size} bytes", limit, "document_bytes")


def check_depth(descriptor: Descriptor, depth: int) -> None:
    """Raises InvalidArgument for an index that is too deep within others."""
    if depth > MAX_DEPTH:
        raise InvalidArgument(
            f"{ref_key(descriptor)}: indexes within indexes, more than {MAX_DEPTH} deep: invalid argument"
        )


async def read_children(content: ContentStore, namespace: str, descriptor: Descriptor) -> list[Descriptor]:
    """The children of a node that is in the store; none for a blob. Raises NotFound, InvalidArgument."""
    if not (mediatypes.is_index(descriptor.media_type) or mediatypes.is_manifest(descriptor.media_type)):
        return []
    data = await content.read_all(namespace, descriptor.digest, MAX_DOCUMENT)
    return children_of(parse_document(data, descriptor), descriptor)


def children_labels(children: Iterable[Descriptor]) -> dict[str, str]:
    """The labels on a node that keep its children from being collected: one key for each (containerd's scheme)."""
    labels: dict[str, str] = {}
    counts: dict[str, int] = {}
    for child in children:
        if mediatypes.is_config(child.media_type):
            key = f"{GC_REF_CONTENT}.config"
        elif mediatypes.is_manifest(child.media_type):
            key = f"{GC_REF_CONTENT}.m."
        elif mediatypes.is_layer(child.media_type):
            key = f"{GC_REF_CONTENT}.l."
        else:
            key = f"{GC_REF_CONTENT}."
        index = counts.get(key, 0)
        counts[key] = index + 1
        labels[f"{key}{index}" if index or key.endswith(".") else key] = child.digest
    return labels


async def add_labels(content: ContentStore, namespace: str, digest: str, labels: Mapping[str, str]) -> None:
    """Put labels on content that is there; nothing is written where they are on it already. Raises NotFound."""
    have = content.info(namespace, digest).labels
    missing = {key: value for key, value in labels.items() if have.get(key) != value}
    if missing:
        await content.update(
            namespace, content_pb2.Info(digest=digest, labels=missing), [f"labels.{key}" for key in missing]
        )


def source_label(host: str, path: str, existing: str = "") -> tuple[str, str]:
    """The label that says which repository of a host has this content: key and value, joined with what was there.

    containerd leaves the port out of the key.
    """
    host = re.sub(r":[0-9]+$", "", host)
    repositories = sorted({*filter(None, existing.split(",")), path})
    return f"{DISTRIBUTION_SOURCE}.{host}", ",".join(repositories)


class Selection:
    """Which manifests of an index are wanted: those of some platforms (all without), at most `limit` (0: all)."""

    def __init__(self, platforms: list[Platform], limit: int = 0) -> None:
        self.platforms = platforms
        self._strict = ranker(platforms, strict=True)
        self._loose = ranker(platforms)
        self._limit = limit

    def wants(self, platform: Platform | None) -> bool:
        """Whether content of a platform is wanted; what has none always is."""
        return platform is None or self._loose(platform) is not None

    def choose(self, children: list[Descriptor]) -> list[Descriptor]:
        """The wanted among an index's children: those of the very platforms, else what these can run, best first.

        Attestations (platform `unknown/unknown`) are wanted only where no platform is asked for.
        """
        if not self.platforms and not self._limit:
            return children
        for rank in (self._strict, self._loose):
            ranked = [(rank(child.platform) if child.platform else 0, child) for child in children]
            fitting = sorted(((value, child) for value, child in ranked if value is not None), key=lambda pair: pair[0])
            if fitting:
                chosen = [child for _, child in fitting]
                if rank is self._loose:
                    chosen = chosen[: len(self.platforms)]
                return chosen[: self._limit] if self._limit else chosen
        return []
