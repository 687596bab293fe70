"""Images as tar archives: read into the store, and written from it, over the content API.

Read are OCI layouts (image-spec, image-layout.md) and what `docker save` writes; written are layouts that carry
docker's `manifest.json` too. It works with every daemon, also those without a transfer service.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from wherry.client.images import Image
from wherry.client.manifests import picture, walk
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import InvalidArgument, NotFound
from wherry.core.labels import GC_REF_CONTENT
from wherry.core.mediatypes import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_MANIFEST,
    OCI_INDEX,
    is_index,
    is_manifest,
)

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.content import Content
    from wherry.core.platforms import Platform

# the annotations that name an image in a layout: containerd's whole name, the specification's (often only a tag)
IMAGE_NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"
CHUNK = 1 << 20
MAX_DOCUMENT = 8 << 20


class Naming(NamedTuple):
    """How images of an archive get their names.

    `base` completes names that are tags only (`v1` becomes `BASE:v1`), and keeps out whole names that don't start with
    it. `digests` adds a name by digest for each image; `index_name` is for the
    archive's whole index.
    """

    base: str = ""
    digests: bool = False
    index_name: str = ""

    def names(self, descriptor: Descriptor) -> list[str]:
        """The names for an image of an archive; none where it has none."""
        found = []
        whole = descriptor.annotations.get(IMAGE_NAME, "")
        ref = descriptor.annotations.get(REF_NAME, "")
        base = self.base or f"import-{time.strftime('%Y-%m-%d')}"
        if whole:
            found = [whole] if not self.base or whole.startswith(self.base) else []
        elif ref:
            # a tag has no slash and no colon; tools also write whole names here
            found = [ref if "/" in ref or ":" in ref else f"{base}:{ref}"]
        if self.digests or not (whole or ref):
            found.append(f"{base}@{descriptor.digest}")
        return found


async def load(client: Client, source: IO[bytes], naming: Naming | None = None) -> list[Image]:
    """Reads an archive (a file that can seek; compressed by gzip, bzip2 or xz also) into the store.

    Blobs are checked against their digests by the daemon. Returns the images that have names now; raises
    InvalidArgument for what is no such archive.
    """
    naming = naming or Naming()
    try:
        with tarfile.open(fileobj=source) as archive:
            members = {member.name.removeprefix("./"): member for member in archive if member.isfile()}
            async with client.lease() as leased:
                if "index.json" in members:
                    found = await _load_layout(leased, archive, members)
                elif "manifest.json" in members:
                    found = await _load_docker(leased, archive, members)
                else:
                    raise InvalidArgument("the archive is neither an OCI layout nor docker's format")
                return await _name(leased, found, naming)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InvalidArgument(f"the archive can't be read: {error}") from error


async def _name(client: Client, found: list[Descriptor], naming: Naming) -> list[Image]:
    images = []
    if naming.index_name:
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [descriptor.to_json() for descriptor in found],
        }
        index = await _store(client.content, json.dumps(document).encode(), OCI_INDEX)
        images.append(await client.images.put(Image(naming.index_name, index)))
    for descriptor in found:
        plain = Descriptor(descriptor.media_type, descriptor.digest, descriptor.size)
        images += [await client.images.put(Image(name, plain)) for name in naming.names(descriptor)]
    return images


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo | None, name: str) -> bytes:
    if member is None:
        raise InvalidArgument(f"the archive lacks {name}")
    if member.size > MAX_DOCUMENT:
        raise InvalidArgument(f"{name} of the archive has {member.size} bytes, more than any such document")
    return b"".join(_chunks(archive, member))


def _chunks(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    file = archive.extractfile(member)
    if file is None:
        raise InvalidArgument(f"{member.name} of the archive is no file")
    with file:
        while piece := file.read(CHUNK):
            yield piece


def _json(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise InvalidArgument(f"{name} of the archive is no JSON: {error}") from error


async def _load_layout(
    client: Client, archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]
) -> list[Descriptor]:
    index = _json(_read(archive, members["index.json"], "index.json"), "index.json")
    if not isinstance(index, dict):
        raise InvalidArgument("index.json of the archive is no object")
    top = [Descriptor.from_json(item, "index.json") for item in index.get("manifests") or ()]
    for descriptor in top:
        await _load_tree(client, archive, members, descriptor)
    return top


async def _load_tree(
    client: Client, archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], descriptor: Descriptor
) -> None:
    """A blob and all below it, from the leaves up: a parent's labels may only name what is there."""
    name = f"blobs/{descriptor.digest.algorithm}/{descriptor.digest.encoded}"
    member = members.get(name)
    if not (is_index(descriptor.media_type) or is_manifest(descriptor.media_type)):
        if member is None:
            raise InvalidArgument(f"the archive lacks {name}")
        await client.content.write(
            f"import-{descriptor.digest}", _chunks(archive, member), size=descriptor.size, digest=descriptor.digest
        )
        return
    data = _read(archive, member, name)
    document = _json(data, name)
    labels = {}
    for label, child in children(document):
        child_name = f"blobs/{child.digest.algorithm}/{child.digest.encoded}"
        if child_name not in members and is_index(descriptor.media_type):
            # an archive of some of an index's platforms
            continue
        await _load_tree(client, archive, members, child)
        labels[label] = str(child.digest)
    await client.content.write(
        f"import-{descriptor.digest}", [data], size=len(data), digest=descriptor.digest, labels=labels
    )


def children(document: Any) -> list[tuple[str, Descriptor]]:
    """What a manifest or an index names, each with the label that keeps it from the garbage collector."""
    if not isinstance(document, dict):
        raise InvalidArgument("a manifest of the archive is no object")
    found = []
    if "config" in document:
        found.append((f"{GC_REF_CONTENT}.config", Descriptor.from_json(document["config"], "config")))
    for kind, name in (("l", "layers"), ("m", "manifests")):
        for number, item in enumerate(document.get(name) or ()):
            found.append((f"{GC_REF_CONTENT}.{kind}.{number}", Descriptor.from_json(item, name)))
    return found


async def _load_docker(
    client: Client, archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]
) -> list[Descriptor]:
    """What `docker save` wrote before 25: documents and layers by file name, without manifests."""
    entries = _json(_read(archive, members["manifest.json"], "manifest.json"), "manifest.json")
    found = []
    for entry in entries if isinstance(entries, list) else ():
        config_data = _read(archive, members.get(entry.get("Config", "")), "the configuration")
        config = await _store(client.content, config_data, DOCKER_CONFIG)
        layers = [await _docker_layer(client, archive, members, str(name)) for name in entry.get("Layers") or ()]
        document = {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": config.to_json(),
            "layers": [layer.to_json() for layer in layers],
        }
        labels = {label: str(child.digest) for label, child in children(document)}
        manifest = await _store(client.content, json.dumps(document).encode(), DOCKER_MANIFEST, labels)
        from wherry.core.reference import parse_familiar

        tags = [str(parse_familiar(tag)) for tag in entry.get("RepoTags") or ()]
        found += [manifest.with_annotations({IMAGE_NAME: tag}) for tag in tags] or [manifest]
    return found


async def _docker_layer(
    client: Client, archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: str
) -> Descriptor:
    member = members.get(name)
    if member is None:
        raise InvalidArgument(f"the archive lacks the layer {name}")
    first = next(_chunks(archive, member), b"")
    digest = Digest.of_chunks(_chunks(archive, member))
    await client.content.write(f"import-{digest}", _chunks(archive, member), size=member.size, digest=digest)
    kind = DOCKER_LAYER_GZIP if first.startswith(b"\x1f\x8b") else DOCKER_LAYER
    return Descriptor(kind, digest, member.size)


async def _store(content: Content, data: bytes, media_type: str, labels: dict[str, str] | None = None) -> Descriptor:
    digest = Digest.of(data)
    await content.write(f"import-{digest}", [data], size=len(data), digest=digest, labels=labels)
    return Descriptor(media_type, digest, len(data))


async def save(
    client: Client, images: Iterable[Image], target: IO[bytes], *, platform: Platform | None = None, whole: bool = False
) -> None:
    """Writes images as a tar archive: for one platform (the host's where none is given), or with `whole` for all.

    Raises NotFound for content that isn't in the store.
    """
    top: list[dict[str, Any]] = []
    docker: list[dict[str, Any]] = []
    wanted: dict[Digest, Descriptor] = {}
    for image in images:
        look = await picture(client.content, image.target, platform)
        root = image.target if whole else look.manifest
        for descriptor in await walk(client.content, root):
            wanted.setdefault(descriptor.digest, descriptor)
        tag = image.name.rpartition("/")[2].partition(":")[2]
        names = {IMAGE_NAME: image.name, REF_NAME: tag or image.name}
        top.append(Descriptor(root.media_type, root.digest, root.size).with_annotations(names).to_json())
        docker.append(
            {
                "Config": _path(look.config.digest),
                "RepoTags": [image.name],
                "Layers": [_path(layer.digest) for layer in look.layers],
            }
        )
    with tarfile.open(fileobj=target, mode="w|") as archive:
        for digest, descriptor in sorted(wanted.items()):
            await _add(archive, client.content, descriptor, _path(digest))
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": top}
        for name, document in (
            ("index.json", index),
            ("manifest.json", docker),
            ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
        ):
            data = json.dumps(document).encode()
            archive.addfile(_member(name, len(data)), BytesIO(data))


def _path(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.encoded}"


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    return member


async def _add(archive: tarfile.TarFile, content: Content, descriptor: Descriptor, name: str) -> None:
    """One blob; a large one by way of a temporary file, because `tarfile` reads and layers are too large for memory."""
    with tempfile.SpooledTemporaryFile(max_size=MAX_DOCUMENT) as spool:
        try:
            async for piece in content.read(descriptor.digest):
                spool.write(piece)
        except NotFound:
            if is_manifest(descriptor.media_type):
                # of a platform that was never fetched: the index names it all the same
                return
            raise
        spool.seek(0)
        archive.addfile(_member(name, descriptor.size), spool)
