"""Images by what people call them: a name, a short name, an id (the digest of the configuration) or its beginning."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from wherry.client.manifests import picture
from wherry.core.errors import InvalidArgument, NotFound, WherryError
from wherry.core.tuples import NamedTuple

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.images import Image
    from wherry.client.manifests import Picture

_HEX = re.compile(r"(?:sha256:)?([0-9a-f]{2,64})")


class Found(NamedTuple):
    """An image, all names that it has, and its parts for this host (None where they aren't there)."""

    image: Image
    names: tuple[str, ...]
    look: Picture | None

    @property
    def id(self) -> str:
        """The digest of the configuration; of the target where there is no configuration here."""
        return str(self.look.config.digest if self.look is not None else self.image.target.digest)


async def all_images(client: Client) -> list[Found]:
    """Every name with its parts; one that has several names comes several times."""
    images = await client.images.list()
    names: dict[str, list[str]] = {}
    for image in images:
        names.setdefault(image.target.digest, []).append(image.name)
    looks: dict[str, Picture | None] = {}
    for image in images:
        if image.target.digest not in looks:
            try:
                looks[image.target.digest] = await picture(client.content, image.target)
            except WherryError:
                # of another platform, or not all there: listed all the same
                looks[image.target.digest] = None
    return [Found(image, tuple(names[image.target.digest]), looks[image.target.digest]) for image in images]


async def find_image(client: Client, reference: str) -> Found:
    """The image that `reference` means; raises NotFound, InvalidArgument where several ids begin so."""
    try:
        image = await client.images.find(reference)
    except (NotFound, InvalidArgument):
        return await _by_id(client, reference)
    same = [item.name for item in await client.images.list([f"target.digest=={image.target.digest}"])]
    try:
        look = await picture(client.content, image.target)
    except WherryError:
        look = None
    return Found(image, tuple(same or [image.name]), look)


async def _by_id(client: Client, reference: str) -> Found:
    match = _HEX.fullmatch(reference)
    missing = NotFound(f"no such image: {reference} ('wherry images' lists them, 'wherry pull' brings one)")
    if match is None:
        raise missing
    found: dict[str, Found] = {}
    for item in await all_images(client):
        for digest in (item.id, str(item.image.target.digest)):
            if digest.removeprefix("sha256:").startswith(match[1]):
                found.setdefault(item.id, item)
    if not found:
        raise missing
    if len(found) > 1:
        raise InvalidArgument(f"several images have an id that begins with {reference}: give more of it")
    return next(iter(found.values()))
