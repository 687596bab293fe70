"""Containers by what people call them: a name, an id, or the beginning of an id that only one container has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound
from wherry.core.labels import CONTAINER_NAME

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.containers import Container

# docker's rule for names of containers and volumes. (Patterns are compiled when they are used: listings do without.)
_NAME = r"[a-zA-Z0-9][a-zA-Z0-9_.-]*"
# digits of an id that people see
SHORT = 12
_ID_LENGTH = 64
_ANY_ID = r"[A-Za-z0-9._-]+"


def is_name(text: str) -> bool:
    """Whether a text can be the name of a container or a volume."""
    return re.fullmatch(_NAME, text) is not None


def check_name(kind: str, name: str) -> str:
    """The name, when it is one; raises InvalidArgument."""
    if not is_name(name):
        raise InvalidArgument(
            f"invalid {kind} name {name!r}: only letters, digits, '_', '.' and '-' are allowed, a letter or digit first"
        )
    return name


def name_of(container: Container) -> str:
    """The name that a person gave or that was made up; a container without one (of ctr) is called by its id."""
    return container.labels.get(CONTAINER_NAME) or container.id


def short_id(identity: str) -> str:
    """Twelve digits of an id of ours; other ids (ctr's are words) as they are."""
    return identity[:SHORT] if len(identity) == _ID_LENGTH and identity.isalnum() else identity


def short_image(name: str) -> str:
    """An image's name without what is filled in for short ones: `docker.io/library/`."""
    return name.removeprefix("docker.io/").removeprefix("library/") if name.startswith("docker.io/") else name


async def find(client: Client, reference: str) -> Container:
    """The container that `reference` means: an exact id, else a name, else the only id that begins so.

    Raises NotFound, InvalidArgument where several ids begin so.
    """
    (found,) = await find_all(client, [reference])
    return found


async def find_all(client: Client, references: Iterable[str]) -> list[Container]:
    """`find` for several, with one call."""
    wanted = list(references)
    filters = [text for reference in wanted for text in _filters(reference)]
    candidates = await client.containers.list(filters) if filters else []
    return [choose(reference, candidates) for reference in wanted]


async def find_some(client: Client, references: Iterable[str]) -> list[Container | NotFound | InvalidArgument]:
    """`find` for several; in place of a container stands why there is none."""
    found: list[Container | NotFound | InvalidArgument] = []
    wanted = list(references)
    filters = [text for reference in wanted for text in _filters(reference)]
    candidates = await client.containers.list(filters) if filters else []
    for reference in wanted:
        try:
            found.append(choose(reference, candidates))
        except (NotFound, InvalidArgument) as error:
            found.append(error)
    return found


def _filters(reference: str) -> list[str]:
    # nothing else can be an id or a name, and would have to be quoted
    if not re.fullmatch(_ANY_ID, reference):
        return []
    pattern = reference.replace(".", "[.]")
    return [f'labels."{CONTAINER_NAME}"=="{reference}"', f'id~="^{pattern}"']


def choose(reference: str, candidates: Iterable[Container]) -> Container:
    """The one of the candidates that `reference` means; see `find`."""
    items = list(candidates)
    for item in items:
        if item.id == reference:
            return item
    reference = reference.removeprefix("/")
    for item in items:
        if item.labels.get(CONTAINER_NAME) == reference:
            return item
    begun = [item for item in items if reference and item.id.startswith(reference)]
    if len(begun) > 1:
        raise InvalidArgument(f"several containers have an id that begins with {reference}: give more of it")
    if not begun:
        raise NotFound(f"no such container: {reference} ('wherry ps -a' lists them)")
    return begun[0]


async def check_free(client: Client, name: str) -> None:
    """Raises AlreadyExists where a container has this name, or this id."""
    check_name("container", name)
    for item in await client.containers.list([f'labels."{CONTAINER_NAME}"=="{name}"', f'id=="{name}"']):
        raise AlreadyExists(
            f"the container name {name!r} is in use by container {short_id(item.id)}: remove that one "
            f"('wherry rm {name}') or take another name"
        )
