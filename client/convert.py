"""An image made into another form of itself: layers compressed otherwise, OCI's media types, fewer platforms.

The files in it stay the same, and so do the digests of the uncompressed layers and the snapshots that they became.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from wherry.client.building import store_document
from wherry.client.images import Image
from wherry.client.manifests import read_json
from wherry.core import mediatypes, platforms
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import AlreadyExists, DataLoss, InvalidArgument, NotFound
from wherry.core.labels import UNCOMPRESSED
from wherry.core.platforms import Platform

if TYPE_CHECKING:
    from wherry.client.api import Client

COMPRESSIONS = ("zstd", "gzip", "none")
_ENDINGS = {"zstd": "+zstd", "gzip": "+gzip", "none": ""}
# zstd's own default, and zlib's; as fast as a disk, and small enough
LEVELS = {"zstd": 3, "gzip": 6, "none": 0}
MAX_DEPTH = 4


class Form(NamedTuple):
    """What an image is to become.

    `compression` is of COMPRESSIONS, "" leaves the layers alone; anything but gzip makes OCI of it, whether `oci` says
    so or not, because Docker's types don't know zstd. `only` are the platforms that stay (all without).
    """

    compression: str = ""
    oci: bool = False
    only: tuple[Platform, ...] = ()
    level: int = 0


async def convert(
    client: Client, image: Image, name: str, form: Form, told: Callable[[Descriptor, Descriptor], None] | None = None
) -> Image:
    """Make an image of that form under `name`, and return it; `told` hears of each layer that became another.

    Of an index the manifests that are in the store stay; where one platform is wanted, its manifest alone. Raises
    NotFound where none of the platforms is there, DataLoss for a layer whose content isn't what the image says.
    """
    if form.compression and form.compression not in COMPRESSIONS:
        raise InvalidArgument(f"{form.compression!r} is no compression: {', '.join(COMPRESSIONS)}")
    async with client.lease() as leased:
        conversion = _Conversion(leased, form, told)
        target = await conversion.node(image.target)
        if target is None:
            wanted = ", ".join(str(item) for item in form.only) or "any platform"
            raise NotFound(f"{image.name}: nothing for {wanted} is here: not found")
        plain = Descriptor(target.media_type, target.digest, target.size)
        return await leased.images.put(Image(name, plain, image.labels))


class _Conversion:
    """One conversion; layers that several manifests share are done once."""

    def __init__(self, client: Client, form: Form, told: Callable[[Descriptor, Descriptor], None] | None) -> None:
        self._content = client.content
        self._form = form
        self._oci = form.oci or form.compression in {"zstd", "none"}
        self._told = told
        self._layers: dict[str, Descriptor] = {}

    async def node(self, item: Descriptor, depth: int = 0) -> Descriptor | None:
        """An index or a manifest as the other form; None where it isn't here. What is neither stays as it is."""
        if depth > MAX_DEPTH:
            raise InvalidArgument(f"{item.digest}: indexes within indexes, more than {MAX_DEPTH} deep")
        try:
            document = await read_json(self._content, item)
        except NotFound:
            return None
        if mediatypes.is_index(item.media_type):
            return await self._index(item, document, depth)
        return await self._manifest(item, document) if mediatypes.is_manifest(item.media_type) else item

    async def _index(self, item: Descriptor, document: dict[str, Any], depth: int) -> Descriptor | None:
        offered = [Descriptor.from_json(value) for value in document.get("manifests") or ()]
        chosen = _chosen(offered, self._form.only)
        made = [(old, await self.node(old, depth + 1)) for old in chosen]
        found = [(old, new) for old, new in made if new is not None]
        if not found:
            return None
        if len(self._form.only) == 1 and len(found) == 1:
            return found[0][1]
        described = [{**old.to_json(), **new.to_json(), "annotations": {**old.annotations}} for old, new in found]
        for value in described:
            value.pop("data", None)
            if not value["annotations"]:
                del value["annotations"]
        kind = mediatypes.OCI_INDEX if self._oci else item.media_type
        return await store_document(self._content, {**document, "mediaType": kind, "manifests": described}, kind)

    async def _manifest(self, item: Descriptor, document: dict[str, Any]) -> Descriptor | None:
        config = Descriptor.from_json(document.get("config"), "config of the manifest")
        layers = [Descriptor.from_json(value, "layers") for value in document.get("layers") or ()]
        if not mediatypes.is_config(config.media_type):
            # no image of a file system: nothing in it is ours to change
            return item
        diff_ids = ((await read_json(self._content, config)).get("rootfs") or {}).get("diff_ids") or []
        if len(diff_ids) != len(layers):
            raise DataLoss(
                f"manifest {item.digest} has {len(layers)} layers, its configuration {len(diff_ids)} diff ids"
            )
        made = [await self._layer(layer, str(diff_id)) for layer, diff_id in zip(layers, diff_ids, strict=True)]
        kind = mediatypes.OCI_MANIFEST if self._oci else item.media_type
        config_kind = mediatypes.OCI_CONFIG if self._oci else config.media_type
        changed = {
            **document,
            "mediaType": kind,
            "config": {**config.to_json(), "mediaType": config_kind},
            "layers": [layer.to_json() for layer in made],
        }
        return await store_document(self._content, changed, kind)

    async def _layer(self, layer: Descriptor, diff_id: str) -> Descriptor:
        if layer.digest in self._layers:
            return self._layers[layer.digest]
        old = mediatypes.compression(layer.media_type)
        wanted = self._form.compression
        if mediatypes.is_nondistributable(layer.media_type) or not mediatypes.is_layer(layer.media_type):
            made = layer
        elif not wanted or old == {"none": ""}.get(wanted, wanted):
            made = _renamed(layer, old) if self._oci else layer
        else:
            made = await self._recompressed(layer, diff_id, wanted)
            if self._told is not None:
                self._told(layer, made)
        self._layers[layer.digest] = made
        return made

    async def _recompressed(self, layer: Descriptor, diff_id: str, wanted: str) -> Descriptor:
        """The layer, unpacked and packed otherwise; its digest uncompressed is compared on the way."""
        pack = _packer(wanted, self._form.level or LEVELS[wanted])
        unpack = _Unpacker()
        plain, packed, size = hashlib.sha256(), hashlib.sha256(), 0
        async with await self._content.writer(f"convert-{os.urandom(8).hex()}") as writer:

            async def put(data: bytes) -> None:
                nonlocal size
                if data:
                    packed.update(data)
                    size += len(data)
                    await writer.write(data)

            async for piece in self._content.read(layer.digest):
                for data in unpack.feed(piece):
                    plain.update(data)
                    await put(pack.compress(data))
            unpack.end(layer)
            await put(pack.flush())
            if f"sha256:{plain.hexdigest()}" != diff_id:
                raise DataLoss(f"layer {layer.digest} is {plain.hexdigest()} uncompressed, the image says {diff_id}")
            digest = Digest(f"sha256:{packed.hexdigest()}")
            labels = {UNCOMPRESSED: diff_id}
            try:
                await writer.commit(size, digest, labels)
            except AlreadyExists:
                await self._content.label(digest, labels)
        kind = mediatypes.OCI_LAYER + _ENDINGS[wanted] if self._oci else mediatypes.DOCKER_LAYER_GZIP
        return Descriptor(kind, digest, size, layer.annotations)


def _renamed(layer: Descriptor, compression: str | None) -> Descriptor:
    """The same layer by OCI's name; one whose old name doesn't tell stays gzip, as docker writes it."""
    ending = {"": "", "gzip": "+gzip", "zstd": "+zstd", None: "+gzip"}[compression]
    if layer.media_type == mediatypes.DOCKER_LAYER:
        ending = ""
    return Descriptor(mediatypes.OCI_LAYER + ending, layer.digest, layer.size, layer.annotations)


def _chosen(offered: list[Descriptor], only: Iterable[Platform]) -> list[Descriptor]:
    """The manifests for some platforms, each once; all where none is named."""
    wanted = list(only)
    if not wanted:
        return offered
    known = [item.platform for item in offered]
    picked = {platforms.best(platform, known) for platform in wanted}
    return [item for at, item in enumerate(offered) if at in picked]


class _Packer(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _packer(wanted: str, level: int) -> _Packer:
    if wanted == "zstd":
        import zstandard

        return zstandard.ZstdCompressor(level=level, threads=-1, write_checksum=True).compressobj()
    # 31: gzip around it, without a name or a time, so that the same layer gives the same bytes
    return zlib.compressobj(level, zlib.DEFLATED, 31) if wanted == "gzip" else _Plain()


class _Unpacker:
    """Bytes of a layer in, its archive out; gzip, zstd or nothing, told by the first bytes."""

    def __init__(self) -> None:
        self._first = b""
        self._state: Any = None
        self._plain = False
        self._gzip = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What comes out of some more bytes."""
        if self._plain:
            yield data
            return
        if self._state is None:
            self._first += data
            if len(self._first) < 4:
                return
            data, self._first = self._first, b""
            self._begin(data)
            if self._plain:
                yield data
                return
        if not self._gzip:
            yield self._state.decompress(data)
            return
        while data:
            if self._state.eof:
                # gzip may be several members in a row
                self._state = zlib.decompressobj(31)
            try:
                yield self._state.decompress(data, 1 << 20)
            except zlib.error as error:
                raise DataLoss(f"a layer's compression is damaged: {error}") from error
            data = self._state.unused_data if self._state.eof else self._state.unconsumed_tail

    def _begin(self, data: bytes) -> None:
        if data.startswith(b"\x1f\x8b"):
            self._gzip, self._state = True, zlib.decompressobj(31)
        elif data.startswith(b"\x28\xb5\x2f\xfd"):
            import zstandard

            context = zstandard.ZstdDecompressor(max_window_size=1 << 27)
            self._state = context.decompressobj(read_across_frames=True)
        else:
            self._plain = True

    def end(self, layer: Descriptor) -> None:
        """All was fed. Raises DataLoss where the compression isn't complete."""
        if self._gzip and not self._state.eof:
            raise DataLoss(f"layer {layer.digest} ends in the middle of its compression")
