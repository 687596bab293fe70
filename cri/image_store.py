"""The node's images: what the image store's names mean, grouped by their configuration's digest (the image id).

Nothing is kept here that isn't in the daemon's stores: names come from the image store at each look, so that what `ctr`
or `wherry` pull, tag and remove in the same namespace is seen at once. What a target's digest stands for never changes,
and is remembered.

A pulled image has containerd's three names: its reference, `REPOSITORY@DIGEST` of the manifest or index, and the image
id (`sha256:…`), which keeps it while its tag moves on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from wherry.client.images import Image
from wherry.client.manifests import Picture, picture, read_json
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound, WherryError
from wherry.core.reference import parse
from wherry.cri.image_settings import ImageSettings, complete

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.core.descriptor import Descriptor

log = structlog.get_logger(__name__)

MANAGED, PINNED = "io.cri-containerd.image", "io.cri-containerd.pinned"
MANAGED_VALUE, PINNED_VALUE = "managed", "pinned"
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class LocalImage:
    """An image of the node. `references` are all its names in the store, the id among them."""

    id: str
    target: Descriptor
    picture: Picture
    size: int
    references: tuple[str, ...]
    pinned: bool = False

    @property
    def repo_tags(self) -> list[str]:
        """Names with a tag."""
        return [name for name in self.references if (parsed := _parsed(name)) and parsed[0]]

    @property
    def repo_digests(self) -> list[str]:
        """Names by digest."""
        return [name for name in self.references if (parsed := _parsed(name)) and parsed[1]]


def _parsed(name: str) -> tuple[str, str] | None:
    """Tag and digest of a repository's name; None for an id, and for what is no reference."""
    if name.startswith("sha256:"):
        return None
    try:
        parsed = parse(name)
    except InvalidArgument:
        return None
    return parsed.tag if not parsed.digest else "", parsed.digest or ""


class ImageIndex:
    """Looks images up by name, id or the beginning of an id."""

    def __init__(self, client: Client, settings: ImageSettings) -> None:
        self._client = client
        self._settings = settings
        self._known: dict[str, tuple[str, Picture, int]] = {}

    async def all(self) -> list[LocalImage]:
        """Every image that is complete enough to be run; what other clients brought becomes the CRI's, too."""
        names = await self._client.images.list()
        found = await self._grouped(names)
        there = {image.target.digest for image in names}
        self._known = {key: value for key, value in self._known.items() if key in there}
        return [await self._adopted(image, names) for image in found]

    async def find(self, wanted: str) -> LocalImage:
        """One image by any of its names, by its id or by the id's beginning; raises NotFound."""
        if not wanted:
            raise InvalidArgument("an image must be named: invalid argument")
        images = await self.all()
        spelled = {wanted, *_spellings(wanted)}
        for image in images:
            if wanted == image.id or spelled & set(image.references):
                return image
        short = wanted.removeprefix("sha256:")
        by_id = [image for image in images if _is_prefix(short) and image.id[7:].startswith(short)]
        if len(by_id) > 1:
            raise InvalidArgument(f"image id {wanted} is ambiguous: {len(by_id)} images begin so: invalid argument")
        if not by_id:
            raise NotFound(f'image "{wanted}": not found')
        return by_id[0]

    async def quick(self, wanted: str) -> LocalImage:
        """The same for those who need not know all names: `references` has only the one that was found."""
        for name in (wanted, *_spellings(wanted)):
            try:
                image = await self._client.images.get(name)
                return self._local(await self._look(image), [image])
            except NotFound:
                continue
        return await self.find(wanted)

    async def keep(self, target: Descriptor, names: Iterable[str]) -> LocalImage:
        """Gives what was pulled its names; the image id is one of them."""
        found = await self._look(Image("", target))
        for name in (found[0], *names):
            await self._client.images.put(Image(name, target, self.labels(name)))
        return await self.find(found[0])

    def labels(self, name: str) -> dict[str, str]:
        """What a name is marked with."""
        return {MANAGED: MANAGED_VALUE, **({PINNED: PINNED_VALUE} if name in self._settings.pinned else {})}

    async def _grouped(self, names: Iterable[Image]) -> list[LocalImage]:
        groups: dict[str, list[Image]] = {}
        looks: dict[str, tuple[str, Picture, int]] = {}
        for image in names:
            try:
                look = await self._look(image)
            except WherryError as error:
                # of another platform, an artifact, or content that isn't there (yet)
                log.debug("an image that can't be run", name=image.name, error=error.message)
                continue
            looks.setdefault(look[0], look)
            groups.setdefault(look[0], []).append(image)
        return [self._local(looks[key], group) for key, group in groups.items()]

    def _local(self, look: tuple[str, Picture, int], group: list[Image]) -> LocalImage:
        named = [image for image in group if image.name == look[0]] or group
        pinned = any(image.labels.get(PINNED) == PINNED_VALUE for image in group)
        names = tuple(image.name for image in group)
        pinned = pinned or bool(self._settings.pinned & set(names))
        return LocalImage(look[0], named[0].target, look[1], look[2], names, pinned)

    async def _look(self, image: Image) -> tuple[str, Picture, int]:
        """Id, parts and size (bytes of manifest, configuration and layers as they lie in the store)."""
        target = image.target
        known = self._known.get(target.digest)
        if known is None:
            parts = await picture(self._client.content, target)
            if not parts.is_image:
                raise InvalidArgument(f"{target.digest} is an artifact, no image of a file system")
            if target.digest != parts.manifest.digest:
                # an index has annotations, too
                more = (await read_json(self._client.content, target)).get("annotations")
                parts = parts._replace(annotations={**(more if isinstance(more, dict) else {}), **parts.annotations})
            sizes = {item.digest: item.size for item in (target, parts.manifest, parts.config, *parts.layers)}
            known = self._known[target.digest] = (str(parts.config.digest), parts, sum(sizes.values()))
        return known

    async def _adopted(self, image: LocalImage, names: list[Image]) -> LocalImage:
        """An image that another client brought, under its id as well."""
        if image.id in image.references:
            return image
        try:
            await self._client.images.create(Image(image.id, image.target, self.labels(image.id)))
            for item in names:
                if item.name in image.references and item.labels.get(MANAGED) != MANAGED_VALUE:
                    await self._client.images.label(item.name, self.labels(item.name))
        except (AlreadyExists, NotFound):
            # somebody was quicker, or it goes away at this moment
            pass
        return LocalImage(
            image.id, image.target, image.picture, image.size, (*image.references, image.id), image.pinned
        )


def _spellings(wanted: str) -> set[str]:
    """The complete name that a short one means; none for an id."""
    if wanted.startswith("sha256:"):
        return set()
    try:
        return {complete(wanted)}
    except InvalidArgument:
        return set()


def _is_prefix(text: str) -> bool:
    return bool(text) and len(text) <= 64 and set(text) <= _HEX
