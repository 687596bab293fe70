"""Images as tar archives: read into the store, and written from it, over the content API.

Read are OCI layouts (image-spec, image-layout.md) and what `docker save` writes, as streams: member by member, into the
store; written are layouts that carry docker's `manifest.json` too. It works with every daemon, also those without a
transfer service. Nothing here touches the file system: names of members are only compared.
"""

from __future__ import annotations

import json
import lzma
import posixpath
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any, cast

from wherry.client.building import children, store_document
from wherry.client.images import Image
from wherry.client.manifests import picture, read_json, walk
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound
from wherry.core.mediatypes import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
    DOCKER_MANIFEST,
    OCI_INDEX,
    is_index,
    is_manifest,
)
from wherry.core.tuples import NamedTuple

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.content import Content
    from wherry.core.platforms import Platform

# the annotations that name an image in a layout: containerd's whole name, the specification's (often only a tag)
IMAGE_NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"
CHUNK = 1 << 20
MAX_DOCUMENT = 8 << 20
# members of an archive, and indexes within indexes
MAX_MEMBERS = 100_000
MAX_DEPTH = 16
BLOCK = 512
_DOCUMENTS = frozenset({"index.json", "oci-layout", "manifest.json", "repositories"})
# what `docker save` of old wrote beside each layer, and nobody reads
_USELESS = frozenset({"VERSION", "json"})


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
    """Reads an archive (any file or stream; compressed by gzip, bzip2, xz or zstd also) into the store.

    Blobs are checked against their digests by the daemon. Returns the images that have names now; raises
    InvalidArgument for what is no such archive.
    """
    naming = naming or Naming()
    async with client.lease() as leased:
        loading = _Loading(leased.content)
        try:
            with tarfile.open(fileobj=_plain(source), mode="r|*") as archive:
                await loading.take(archive)
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise InvalidArgument(f"the archive can't be read: {error}") from error
        return await _name(leased, await loading.images(), naming)


async def _name(client: Client, found: list[Descriptor], naming: Naming) -> list[Image]:
    images = []
    if naming.index_name:
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [descriptor.to_json() for descriptor in found],
        }
        index = await store_document(client.content, document, OCI_INDEX)
        images.append(await client.images.put(Image(naming.index_name, index)))
    for descriptor in found:
        plain = Descriptor(descriptor.media_type, descriptor.digest, descriptor.size)
        images += [await client.images.put(Image(name, plain)) for name in naming.names(descriptor)]
    return images


class _Peeked:
    """A stream whose first bytes were looked at already."""

    def __init__(self, first: bytes, source: IO[bytes]) -> None:
        self._first = first
        self._source = source

    def read(self, size: int = -1) -> bytes:
        if not self._first:
            return self._source.read(size)
        taken, self._first = (self._first, b"") if size < 0 else (self._first[:size], self._first[size:])
        return taken


def _plain(source: IO[bytes]) -> IO[bytes]:
    """The same without zstd around it, which tarfile doesn't know before Python 3.14."""
    first = b""
    while len(first) < 4 and (more := source.read(4 - len(first))):
        first += more
    peeked = cast("IO[bytes]", _Peeked(first, source))
    if first != b"\x28\xb5\x2f\xfd":
        return peeked
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    return cast("IO[bytes]", _Decompressed(context.stream_reader(peeked, read_across_frames=True)))


class _Decompressed:
    """zstd's errors as those of a file, so that whoever reads knows them."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def read(self, size: int = -1) -> bytes:
        import zstandard

        try:
            return bytes(self._source.read(size))
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error


class _Loading:
    """One archive on its way into the store."""

    def __init__(self, content: Content) -> None:
        self._content = content
        self._documents: dict[str, bytes] = {}
        # member -> digest, size, first bytes
        self._files: dict[str, tuple[Digest, int, bytes]] = {}
        self._links: dict[str, str] = {}

    async def take(self, archive: tarfile.TarFile) -> None:
        """Store the members, in their order."""
        for count, member in enumerate(archive):
            if count >= MAX_MEMBERS:
                raise InvalidArgument(f"the archive has more than {MAX_MEMBERS} members")
            name = posixpath.normpath(member.name)
            if member.issym() or member.islnk():
                folder = posixpath.dirname(name) if member.issym() else ""
                self._links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
            elif member.isfile():
                await self._file(archive, member, name)

    async def _file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        if name in _DOCUMENTS:
            if member.size > MAX_DOCUMENT:
                raise InvalidArgument(f"{name} of the archive has {member.size} bytes, more than any such document")
            self._documents[name] = b"".join(_chunks(archive, member))
            return
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == "blobs":
            digest = Digest.parse(f"{parts[1]}:{parts[2]}")
            first = await self._blob(archive, member, digest)
            self._files[name] = (digest, member.size, first)
        elif posixpath.basename(name) not in _USELESS:
            # docker's archives of old: what a file is nobody knows before it was read
            self._files[name] = await self._unknown(archive, member)

    async def _blob(self, archive: tarfile.TarFile, member: tarfile.TarInfo, digest: Digest) -> bytes:
        """A blob, stored; its first bytes."""
        pieces = _chunks(archive, member)
        first = next(pieces, b"")

        def everything() -> Iterator[bytes]:
            yield first
            yield from pieces

        await self._content.write(f"import-{digest}", everything(), size=member.size, digest=digest)
        return first[:4]

    async def _unknown(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[Digest, int, bytes]:
        import hashlib
        import os

        state, first = hashlib.sha256(), b""
        async with await self._content.writer(f"import-{os.urandom(8).hex()}", total=member.size) as writer:
            for piece in _chunks(archive, member):
                first = first or piece[:4]
                state.update(piece)
                await writer.write(piece)
            digest = Digest(f"sha256:{state.hexdigest()}")
            try:
                await writer.commit(member.size, digest)
            except AlreadyExists:
                # written once more: take it under the lease, and throw away what came
                await self._content.label(digest, {})
        return digest, member.size, first

    async def images(self) -> list[Descriptor]:
        """The images of the archive, with labels on all that keeps something."""
        if "index.json" in self._documents:
            index = _json(self._documents["index.json"], "index.json")
            if not isinstance(index, dict) or not isinstance(index.get("manifests") or [], list):
                raise InvalidArgument("index.json of the archive is no index")
            found = [Descriptor.from_json(item, "index.json") for item in index.get("manifests") or ()]
            for descriptor in found:
                await self._keep(descriptor, 0)
            return found
        if "manifest.json" in self._documents:
            return await self._docker_images()
        raise InvalidArgument("the archive is neither an OCI layout nor docker's format")

    async def _keep(self, descriptor: Descriptor, depth: int) -> None:
        """Labels for a blob's children and theirs. Raises InvalidArgument for one that isn't there."""
        if depth > MAX_DEPTH:
            raise InvalidArgument(f"{descriptor.digest}: indexes within indexes, more than {MAX_DEPTH} deep")
        if not (is_index(descriptor.media_type) or is_manifest(descriptor.media_type)):
            try:
                await self._content.info(descriptor.digest)
            except NotFound:
                raise InvalidArgument(f"the archive lacks {_path(descriptor.digest)}") from None
            return
        try:
            document = await read_json(self._content, descriptor)
        except NotFound:
            raise InvalidArgument(f"the archive lacks {_path(descriptor.digest)}") from None
        labels = {}
        for label, child in children(document):
            if is_index(descriptor.media_type) and not await self._there(child):
                # an archive of some of an index's platforms
                continue
            await self._keep(child, depth + 1)
            labels[label] = str(child.digest)
        if labels:
            await self._content.label(descriptor.digest, labels)

    async def _there(self, descriptor: Descriptor) -> bool:
        try:
            await self._content.info(descriptor.digest)
        except NotFound:
            return False
        return True

    # -- what `docker save` writes

    async def _docker_images(self) -> list[Descriptor]:
        from wherry.core.reference import parse_familiar

        entries = _json(self._documents["manifest.json"], "manifest.json")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InvalidArgument("manifest.json of the archive is no array of objects")
        found: list[Descriptor] = []
        for entry in entries:
            manifest = await self._docker_manifest(entry)
            tags = [str(parse_familiar(str(tag))) for tag in _list(entry, "RepoTags")]
            found += [manifest.with_annotations({IMAGE_NAME: tag}) for tag in tags] or [manifest]
        return found

    async def _docker_manifest(self, entry: dict[str, Any]) -> Descriptor:
        digest, size, _ = self._find(entry.get("Config"))
        layers = [self._find(name) for name in _list(entry, "Layers")]
        document = {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": Descriptor(DOCKER_CONFIG, digest, size).to_json(),
            "layers": [Descriptor(_layer_type(first), name, length).to_json() for name, length, first in layers],
        }
        return await store_document(self._content, document, DOCKER_MANIFEST)

    def _find(self, name: object) -> tuple[Digest, int, bytes]:
        """A file that a document names, through links. Raises InvalidArgument."""
        target = posixpath.normpath(str(name))
        for _ in range(8):
            if target in self._files:
                return self._files[target]
            target = self._links.get(target, "")
        raise InvalidArgument(f"the archive lacks {name}, which its manifest.json names")


def _list(entry: dict[str, Any], key: str) -> list[Any]:
    value = entry.get(key) or []
    if not isinstance(value, list):
        raise InvalidArgument(f"manifest.json of the archive: {key} is no array")
    return value


def _layer_type(first: bytes) -> str:
    if first.startswith(b"\x1f\x8b"):
        return DOCKER_LAYER_GZIP
    return DOCKER_LAYER_ZSTD if first.startswith(b"\x28\xb5\x2f\xfd") else DOCKER_LAYER


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
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{name} of the archive is no JSON: {error}") from error


async def save(
    client: Client, images: Iterable[Image], target: IO[bytes], *, platform: Platform | None = None, whole: bool = False
) -> None:
    """Writes images as a tar archive: for one platform (the host's where none is given), or with `whole` for all.

    The same images give the same bytes. `target` needs no seek. Raises NotFound for content that isn't in the store.
    """
    top: list[dict[str, Any]] = []
    docker: dict[str, dict[str, Any]] = {}
    wanted: dict[Digest, Descriptor] = {}
    for image in images:
        look = await picture(client.content, image.target, platform)
        root = image.target if whole else look.manifest
        for descriptor in await walk(client.content, root):
            wanted.setdefault(descriptor.digest, descriptor)
        tag = image.name.rpartition("/")[2].partition("@")[0].partition(":")[2]
        names = {IMAGE_NAME: image.name, REF_NAME: tag or image.name}
        top.append(Descriptor(root.media_type, root.digest, root.size).with_annotations(names).to_json())
        if not look.is_image:
            # docker has no use for it
            continue
        entry = docker.setdefault(
            look.config.digest,
            {
                "Config": _path(look.config.digest),
                "RepoTags": [],
                "Layers": [_path(layer.digest) for layer in look.layers],
            },
        )
        # a name by digest is none that docker takes
        entry["RepoTags"] += [] if "@" in image.name else [image.name]
    for digest, descriptor in sorted(wanted.items()):
        await _add(target, client.content, descriptor, _path(digest))
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": top}
    documents: list[tuple[str, Any]] = [("index.json", index), ("oci-layout", {"imageLayoutVersion": "1.0.0"})]
    if docker:
        documents.insert(1, ("manifest.json", list(docker.values())))
    for name, document in documents:
        data = json.dumps(document).encode()
        target.write(_header(name, len(data)) + data + bytes(-len(data) % BLOCK))
    target.write(bytes(2 * BLOCK))


def _path(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.encoded}"


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    return member.tobuf(tarfile.PAX_FORMAT)


async def _add(target: IO[bytes], content: Content, descriptor: Descriptor, name: str) -> None:
    """One blob, as it comes."""
    try:
        size = (await content.info(descriptor.digest)).size
    except NotFound:
        if is_manifest(descriptor.media_type):
            # of a platform that was never fetched: the index names it all the same
            return
        raise
    target.write(_header(name, size))
    async for piece in content.read(descriptor.digest):
        target.write(piece)
    target.write(bytes(-size % BLOCK))
