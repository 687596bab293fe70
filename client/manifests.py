"""What an image is made of: from its name's target to the manifest and configuration for one platform."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from wherry.core import platforms, quickjson
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest, chain_id
from wherry.core.errors import DataLoss, InvalidArgument, NotFound
from wherry.core.mediatypes import is_config, is_index, is_manifest
from wherry.core.tuples import NamedTuple

if TYPE_CHECKING:
    from wherry.client.content import Content
    from wherry.client.registries import Document
    from wherry.core.platforms import Platform

# an index may name indexes; nobody needs more than a few of them, and a loop would have no end
DEPTH = 4


class Picture(NamedTuple):
    """An image for one platform: its manifest, its configuration (OCI image-spec, config.md), its layers, and the
    manifest's annotations."""

    manifest: Descriptor
    config: Descriptor
    document: Mapping[str, Any]
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, Any] = MappingProxyType({})

    @property
    def is_image(self) -> bool:
        """Whether it is of a file system; else an artifact, which can be stored and moved, and not unpacked."""
        return is_config(self.config.media_type)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a container of it starts with: `Env`, `Cmd`, `Entrypoint`, `User`, `WorkingDir`, `Labels` …"""
        settings = self.document.get("config") or {}
        return settings if isinstance(settings, dict) else {}

    @property
    def diff_ids(self) -> tuple[str, ...]:
        """The digests of the layers, uncompressed, lowest first."""
        rootfs = self.document.get("rootfs") or {}
        found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
        return tuple(str(item) for item in found or ())

    @property
    def chain_id(self) -> str:
        """The name of the snapshot that has all layers; "" for an image without any."""
        return chain_id(self.diff_ids) if self.diff_ids else ""

    @property
    def platform(self) -> Platform:
        """What it was built for."""
        return platforms.Platform.from_json(dict(self.document))


async def read_json(content: Content, descriptor: Descriptor) -> dict[str, Any]:
    """A document of the content store; raises NotFound, InvalidArgument where it is no JSON object."""
    try:
        document = quickjson.loads(await content.blob(descriptor.digest))
    except ValueError as error:
        raise InvalidArgument(f"content {descriptor.digest} is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidArgument(f"content {descriptor.digest} is no JSON object")
    return document


async def manifest_of(content: Content, target: Descriptor, platform: Platform) -> tuple[Descriptor, dict[str, Any]]:
    """The manifest that fits a platform best, its descriptor and the document; raises NotFound where none does."""
    for _ in range(DEPTH):
        document = await read_json(content, target)
        if is_manifest(target.media_type) or "layers" in document:
            return target, document
        if not is_index(target.media_type) and "manifests" not in document:
            raise InvalidArgument(f"{target.digest} ({target.media_type}) is neither an index nor a manifest")
        offered = [Descriptor.from_json(item) for item in document.get("manifests") or ()]
        best = platforms.best(platform, [item.platform for item in offered])
        if best is None:
            # an index of one image that doesn't say what for (as tools that write layouts by hand make them)
            best = next((at for at, item in enumerate(offered) if item.platform is None), None)
        if best is None:
            raise NotFound(f"no match for platform {platform} in manifest {target.digest}: not found")
        target = offered[best]
    raise InvalidArgument(f"{target.digest}: indexes within indexes, more than {DEPTH} deep")


async def picture(content: Content, target: Descriptor, platform: Platform | None = None) -> Picture:
    """An image's parts for a platform (the host's where none is given)."""
    manifest, document = await manifest_of(content, target, platform or platforms.host())
    config = Descriptor.from_json(document.get("config"), "config of the manifest")
    layers = tuple(Descriptor.from_json(item) for item in document.get("layers") or ())
    try:
        found = await read_json(content, config)
    except (InvalidArgument, DataLoss):
        # of an artifact the configuration may be anything
        if is_config(config.media_type):
            raise
        found = {}
    notes = document.get("annotations")
    return Picture(manifest, config, found, layers, notes if isinstance(notes, dict) else {})


async def documents(content: Content, target: Descriptor, wanted: Iterable[Platform] = ()) -> list[Document]:
    """The root, and of an index the manifests for some platforms (all without), each manifest with its configuration.

    As `Registries.inspect` gives them. Raises NotFound where no manifest fits, or what fits isn't in the store.
    """
    from wherry.client.registries import Document

    async def read(item: Descriptor) -> Document:
        return Document(item, item.platform, await content.blob(item.digest))

    found = [await read(target)]
    manifests = [found[0]] if is_manifest(target.media_type) else []
    if is_index(target.media_type):
        offered = [Descriptor.from_json(item) for item in found[0].value.get("manifests") or ()]
        chosen = [item for item in offered if is_manifest(item.media_type)]
        if wanted:
            known = [item.platform for item in chosen]
            picked = {platforms.best(platform, known) for platform in wanted}
            chosen = [item for at, item in enumerate(chosen) if at in picked]
            if not chosen:
                raise NotFound(f"no match for platform in manifest {target.digest}: not found")
        manifests = [await read(item) for item in chosen]
        found = found[:1]
    else:
        found = [] if manifests else found
    for manifest in manifests:
        found.append(manifest)
        config = Descriptor.from_json(manifest.value.get("config"), "config of the manifest")
        if is_config(config.media_type):
            found.append(await read(config))
    return found


async def walk(content: Content, target: Descriptor) -> list[Descriptor]:
    """Everything below a target that is in the store or should be: indexes, manifests, configs, layers, each once."""
    found: dict[Digest, Descriptor] = {}
    queue = [target]
    while queue:
        item = queue.pop(0)
        if item.digest in found:
            continue
        found[item.digest] = item
        if is_index(item.media_type) or is_manifest(item.media_type):
            try:
                document = await read_json(content, item)
            except NotFound:
                # of another platform, never fetched
                continue
            children = [document["config"]] if "config" in document else []
            children += [*(document.get("layers") or ()), *(document.get("manifests") or ())]
            queue += [Descriptor.from_json(child) for child in children]
    return list(found.values())
