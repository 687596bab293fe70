"""Archive to image store: OCI layouts, and what `docker save` writes, as one index of the images in it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import posixpath
import secrets
import zlib
from collections.abc import AsyncIterator
from typing import Any

from wherry.core import mediatypes, reference
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import InvalidArgument, ResourceExhausted, WherryError
from wherry.core.labels import UNCOMPRESSED
from wherry.core.platforms import Platform
from wherry.daemon.config import Limits
from wherry.daemon.content import ContentStore
from wherry.daemon.transfer_archive import ArchiveReader, Member
from wherry.daemon.transfer_image import MAX_DOCUMENT, parse_document
from wherry.proto import transfer_types_pb2 as types
from wherry.snapshotter.limits import too_many

# what containerd writes and reads: the image's full name, and its tag
NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# files of an archive that are read as documents
_DOCUMENTS = frozenset({"index.json", "oci-layout", "manifest.json", "repositories"})


class Importer:
    """Reads one archive into the content store."""

    def __init__(
        self, content: ContentStore, namespace: str, lease: str, limits: Limits, *, compress: bool = False
    ) -> None:
        """`compress` has plain layers of Docker's archives stored gzipped."""
        self._limits = limits
        self._compress = compress
        self._content = content
        self._namespace = namespace
        self._lease = lease
        self._documents: dict[str, bytes] = {}
        # name in the archive -> digest, size, first bytes
        self._files: dict[str, tuple[Digest, int, bytes]] = {}
        self._links: dict[str, str] = {}

    async def read(self, chunks: AsyncIterator[bytes]) -> tuple[Descriptor, list[Descriptor]]:
        """Store everything; returns an index of all images and the images themselves, with their names as annotations.

        Raises InvalidArgument for what is no archive of images, or has a blob that isn't what its name says.
        """
        reader = ArchiveReader(chunks)
        async for member in reader.members():
            if member.is_file:
                await self._file(member, reader)
            elif member.is_link:
                symbolic = member.kind == b"2"
                folder = posixpath.dirname(member.name) if symbolic else ""
                self._links[member.name] = posixpath.normpath(posixpath.join(folder, member.target))
        if "index.json" in self._documents and "oci-layout" in self._documents:
            images = self._layout_images()
        elif "manifest.json" in self._documents:
            images = await self._docker_images()
        else:
            raise InvalidArgument("unrecognized image format: no index.json and no manifest.json: invalid argument")
        images = [await self._with_platform(image) for image in images]
        document = {
            "schemaVersion": 2,
            "mediaType": mediatypes.OCI_INDEX,
            "manifests": [image.to_json() for image in images],
        }
        return await self._put(document, mediatypes.OCI_INDEX), images

    async def _file(self, member: Member, reader: ArchiveReader) -> None:
        if member.name in _DOCUMENTS:
            if member.size > MAX_DOCUMENT:
                raise ResourceExhausted(f"{member.name} has {member.size} bytes: resource exhausted")
            self._documents[member.name] = b"".join([chunk async for chunk in reader.content()])
            return
        # a few bytes of a compressed archive may stand for very many
        if 0 < self._limits.layer_bytes < member.size:
            raise too_many(f"{member.name} has {member.size} bytes", self._limits.layer_bytes, "layer_bytes")
        expected = self._expected(member.name)
        ref = f"import-{secrets.token_hex(8)}"
        head = b""
        try:
            async with await self._content.writer(self._namespace, ref, total=member.size, lease=self._lease) as writer:
                async for chunk in reader.content():
                    if len(head) < 4:
                        head += chunk[:4]
                    await writer.write(chunk)
                digest = Digest(await writer.digest())
                if expected is not None and expected.algorithm == digest.algorithm and digest != expected:
                    raise InvalidArgument(f"{member.name} has the digest {digest}: invalid argument")
                info = await self._content.commit_or_label(writer, member.size, expected or digest)
        except WherryError:
            with contextlib.suppress(WherryError):
                await self._content.abort(self._namespace, ref)
            raise
        self._files[member.name] = (Digest(info.digest), member.size, head)

    @staticmethod
    def _expected(name: str) -> Digest | None:
        """The digest that a blob's place says it has."""
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == "blobs":
            return Digest.parse(f"{parts[1]}:{parts[2]}")
        return None

    def _document(self, name: str) -> Any:
        try:
            return json.loads(self._documents[name])
        except ValueError as error:
            raise InvalidArgument(f"{name} of the archive is not JSON: {error}: invalid argument") from error

    # -- an OCI layout

    def _layout_images(self) -> list[Descriptor]:
        index = self._document("index.json")
        manifests = index.get("manifests") if isinstance(index, dict) else None
        if not isinstance(manifests, list):
            raise InvalidArgument("index.json of the archive has no manifests: invalid argument")
        return [Descriptor.from_json(item, f"index.json: manifests[{n}]") for n, item in enumerate(manifests)]

    # -- what `docker save` writes

    async def _docker_images(self) -> list[Descriptor]:
        entries = self._document("manifest.json")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InvalidArgument("manifest.json of the archive is no array of objects: invalid argument")
        images = []
        for entry in entries:
            manifest = await self._docker_manifest(entry)
            tags = [tag for tag in entry.get("RepoTags") or [] if isinstance(tag, str)]
            for tag in tags:
                name = reference.parse_familiar(tag)
                images.append(manifest.with_annotations({NAME: str(name), REF_NAME: name.tag}))
            if not tags:
                images.append(manifest)
        return images

    async def _docker_manifest(self, entry: dict[str, Any]) -> Descriptor:
        config_digest, config_size, _ = self._find(entry.get("Config"))
        layers = entry.get("Layers") or []
        if not isinstance(layers, list):
            raise InvalidArgument("manifest.json of the archive: Layers is no array: invalid argument")
        found = [self._find(layer) for layer in layers]
        if self._compress:
            found = [await self._gzipped(item) for item in found]
        document = {
            "schemaVersion": 2,
            "mediaType": mediatypes.DOCKER_MANIFEST,
            "config": {"mediaType": mediatypes.DOCKER_CONFIG, "digest": config_digest, "size": config_size},
            "layers": [{"mediaType": _layer_type(head), "digest": d, "size": size} for d, size, head in found],
        }
        return await self._put(document, mediatypes.DOCKER_MANIFEST)

    async def _gzipped(self, layer: tuple[Digest, int, bytes]) -> tuple[Digest, int, bytes]:
        """A plain layer's content once more, compressed, and with the label that says what it is uncompressed."""
        digest, _, head = layer
        if head.startswith((_GZIP, _ZSTD)):
            return layer
        # no name and no time in it: the same layer gives the same bytes
        state = zlib.compressobj(6, zlib.DEFLATED, 31)
        ref = f"compress-{secrets.token_hex(8)}"
        async with await self._content.writer(self._namespace, ref, lease=self._lease) as writer:
            async for chunk in self._content.read(self._namespace, digest):
                await writer.write(await asyncio.to_thread(state.compress, chunk))
            await writer.write(state.flush())
            size, made = writer.offset, Digest(await writer.digest())
            await self._content.commit_or_label(writer, size, made, {UNCOMPRESSED: digest})
        return made, size, _GZIP

    def _find(self, name: object) -> tuple[Digest, int, bytes]:
        """A file that a document names, through links. Raises InvalidArgument."""
        if not isinstance(name, str):
            raise InvalidArgument("manifest.json of the archive: a file's name is missing: invalid argument")
        target = posixpath.normpath(name)
        for _ in range(8):
            if target in self._files:
                return self._files[target]
            if target not in self._links:
                break
            target = self._links[target]
        raise InvalidArgument(f"the archive has no file {name}, which its manifest.json names: invalid argument")

    # -- both

    async def _put(self, document: dict[str, Any], media_type: str) -> Descriptor:
        data = json.dumps(document, separators=(",", ":")).encode()
        digest = Digest.of(data)
        await self._content.put(self._namespace, f"import-{digest}", data, expected=digest, lease=self._lease)
        return Descriptor(media_type, digest, len(data))

    async def _with_platform(self, image: Descriptor) -> Descriptor:
        """A manifest's platform from its configuration, where the index doesn't tell."""
        if image.platform is not None or not mediatypes.is_manifest(image.media_type):
            return image
        try:
            manifest = await self._read(image)
            config = Descriptor.from_json(manifest.get("config"))
            document = await self._read(config) if mediatypes.is_config(config.media_type) else {}
        except WherryError:
            # whether it is complete is found out by whoever wants it
            return image
        if not document.get("os") or not document.get("architecture"):
            return image
        return Descriptor(
            image.media_type, image.digest, image.size, image.annotations, Platform.from_json(document), image.urls
        )

    async def _read(self, descriptor: Descriptor) -> dict[str, Any]:
        return parse_document(
            await self._content.read_all(self._namespace, descriptor.digest, MAX_DOCUMENT), descriptor
        )


def _layer_type(head: bytes) -> str:
    if head.startswith(_GZIP):
        return mediatypes.DOCKER_LAYER_GZIP
    return mediatypes.DOCKER_LAYER_ZSTD if head.startswith(_ZSTD) else mediatypes.DOCKER_LAYER


def names_for(image: Descriptor, references: list[types.ImageReference]) -> list[str]:
    """The names that an image of an archive is stored under, by the prefixes that the client gave (containerd's rules).

    A full name in its annotations counts as it is, if it has the prefix or the prefix may be passed over; a mere tag is
    put behind the prefix; digests are added where they are asked for.
    """
    names: list[str] = []
    for wanted in references:
        if not wanted.is_prefix:
            continue
        name = _annotated(image, wanted)
        by_digest = f"{wanted.name}@{image.digest}"
        if name:
            names.append(name)
            if wanted.add_digest and not wanted.skip_named_digest:
                names.append(by_digest)
        elif wanted.add_digest:
            names.append(by_digest)
    return names


def _annotated(image: Descriptor, wanted: types.ImageReference) -> str:
    full = image.annotations.get(NAME, "")
    if full:
        return full if _translate(full, wanted) == full else ""
    return _translate(image.annotations.get(REF_NAME, ""), wanted)


def _translate(name: str, wanted: types.ImageReference) -> str:
    prefix = wanted.name
    if not name or not prefix:
        return ""
    if not any(char in name for char in "/:@"):
        return f"{prefix}:{name}"
    if wanted.allow_overwrite:
        return name
    rest = name.removeprefix(prefix)
    return name if rest != name and (not rest or rest[0] in "/:@") else ""
