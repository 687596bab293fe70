"""A container's changes as a new image: its base's layers and one more, which `Diff` computes."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shlex
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from wherry.client.building import store_document, timestamp
from wherry.client.finding import find
from wherry.client.images import Image
from wherry.client.manifests import Picture, picture
from wherry.core import mediatypes, platforms
from wherry.core.descriptor import Descriptor
from wherry.core.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, WherryError
from wherry.core.labels import UNCOMPRESSED
from wherry.core.tuples import NamedTuple

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.containers import Container


class Changes(NamedTuple):
    """What the new image says beside its files.

    `instructions` are a Dockerfile's (`CMD ["sh"]`, `ENV A=b`); `pause` stops the container meanwhile.
    """

    author: str = ""
    message: str = ""
    instructions: tuple[str, ...] = ()
    pause: bool = True


async def commit(client: Client, reference: str, name: str, changes: Changes | None = None) -> Image:
    """Make an image of a container's file system as it is now, under `name`, and return it.

    `reference` is the container's id, its name or how its id begins.
    It has the media types of its base (OCI's without one). Raises NotFound (the container, its snapshot, the image's
    content), FailedPrecondition for a container whose image isn't its base any more, InvalidArgument for an instruction
    that is none.
    """
    wanted = changes or Changes()
    instructions = [parse_instruction(text) for text in wanted.instructions]
    container = await find(client, reference)
    async with client.lease() as leased:
        base = await _base(leased, container)
        docker = base is not None and base.manifest.media_type == mediatypes.DOCKER_MANIFEST
        async with _paused(client, container.id) if wanted.pause else contextlib.nullcontext():
            kind = mediatypes.DOCKER_LAYER_GZIP if docker else mediatypes.OCI_LAYER_GZIP
            layer = await _diff(leased, container, kind)
        info = await leased.content.info(layer.digest)
        diff_id = info.labels.get(UNCOMPRESSED, "")
        if not diff_id:
            raise DataLoss(f"the daemon doesn't say what layer {layer.digest} is uncompressed")
        document = _document(base, wanted, instructions, diff_id)
        config_kind = mediatypes.DOCKER_CONFIG if docker else mediatypes.OCI_CONFIG
        config = await store_document(leased.content, document, config_kind)
        manifest_kind = mediatypes.DOCKER_MANIFEST if docker else mediatypes.OCI_MANIFEST
        layers = [*(base.layers if base is not None else ()), layer]
        manifest = {
            "schemaVersion": 2,
            "mediaType": manifest_kind,
            "config": config.to_json(),
            "layers": [item.to_json() for item in layers],
        }
        target = await store_document(leased.content, manifest, manifest_kind)
        return await leased.images.put(Image(name, target))


async def _base(client: Client, container: Container) -> Picture | None:
    """The image that the container's snapshot stands on; None for a container without one."""
    if not container.snapshot_key:
        raise FailedPrecondition(f"container {container.id} has no snapshot of its own, so nothing to make an image of")
    parent = (await client.snapshots(container.snapshotter).stat(container.snapshot_key)).parent
    if not parent:
        return None
    if container.image:
        with contextlib.suppress(NotFound):
            image = await client.images.get(container.image)
            look = await picture(client.content, image.target)
            # a snapshot with shifted owners has the chain in its name
            if look.chain_id and look.chain_id in parent:
                return look
    found = await _search(client, parent)
    if found is None:
        raise FailedPrecondition(
            f"container {container.id}: no image here has the layers of its snapshot ({parent}): failed precondition"
        )
    return found


async def _search(client: Client, parent: str) -> Picture | None:
    """An image whose layers are those of a snapshot: the container's own name may stand for another one by now."""
    for image in await client.images.list():
        try:
            look = await picture(client.content, image.target)
        except WherryError:
            continue
        if look.chain_id and look.chain_id in parent:
            return look
    return None


async def _diff(client: Client, container: Container, media_type: str) -> Descriptor:
    """The layer between the container's snapshot and its parent."""
    snapshots = client.snapshots(container.snapshotter)
    parent = (await snapshots.stat(container.snapshot_key)).parent
    upper = await snapshots.mounts(container.snapshot_key)
    key = f"commit-{os.urandom(6).hex()}"
    lower = await snapshots.view(key, parent)
    try:
        return await client.diff.compute(lower, upper, media_type=media_type, ref=key)
    finally:
        with contextlib.suppress(NotFound):
            await snapshots.remove(key)


@contextlib.asynccontextmanager
async def _paused(client: Client, container_id: str) -> AsyncIterator[None]:
    """The container frozen, where it runs and isn't frozen anyway."""
    try:
        await client.tasks.pause(container_id)
    except WherryError:
        # it doesn't run, or is paused already, or can't be: its files are taken as they are
        yield
        return
    try:
        yield
    finally:
        await client.tasks.resume(container_id)


def _document(
    base: Picture | None, changes: Changes, instructions: list[tuple[str, str]], diff_id: str
) -> dict[str, Any]:
    """The new configuration (OCI image-spec, config.md)."""
    if base is not None:
        document: dict[str, Any] = copy.deepcopy(dict(base.document))
    else:
        here = platforms.host()
        document = {"architecture": here.architecture, "os": here.os} | (
            {"variant": here.variant} if here.variant else {}
        )
    now = timestamp()
    settings = document.get("config")
    settings = settings if isinstance(settings, dict) else {}
    for word, rest in instructions:
        apply_instruction(settings, word, rest)
    history = {"created": now, "created_by": "wherry commit", "author": changes.author, "comment": changes.message}
    old = document.get("history")
    document |= {
        "created": now,
        "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [*(base.diff_ids if base is not None else ()), diff_id]},
        "history": [*(old if isinstance(old, list) else ()), {key: value for key, value in history.items() if value}],
    }
    if changes.author:
        document["author"] = changes.author
    # what docker's builder notes there is about the base
    for key in ("container", "container_config"):
        document.pop(key, None)
    return document


_WORDS = ("CMD", "ENTRYPOINT", "ENV", "EXPOSE", "LABEL", "ONBUILD", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR")


def parse_instruction(text: str) -> tuple[str, str]:
    """A Dockerfile's instruction as its word and the rest. Raises InvalidArgument for one that says nothing here."""
    word, _, rest = text.strip().partition(" ")
    word, rest = word.upper(), rest.strip()
    if word not in _WORDS or not rest:
        raise InvalidArgument(f"{text!r} is no instruction that changes an image: {', '.join(_WORDS)}")
    return word, rest


def apply_instruction(settings: dict[str, Any], word: str, rest: str) -> None:
    """Change an image's settings as an instruction says."""
    if word in {"CMD", "ENTRYPOINT"}:
        settings["Cmd" if word == "CMD" else "Entrypoint"] = _words(rest) or ["/bin/sh", "-c", rest]
    elif word == "ENV":
        new = _pairs(rest)
        kept = [item for item in settings.get("Env") or [] if str(item).partition("=")[0] not in new]
        settings["Env"] = kept + [f"{key}={value}" for key, value in new.items()]
    elif word == "LABEL":
        settings["Labels"] = {**(settings.get("Labels") or {}), **_pairs(rest)}
    elif word == "EXPOSE":
        ports: dict[str, Any] = {port if "/" in port else f"{port}/tcp": {} for port in rest.split()}
        settings["ExposedPorts"] = {**(settings.get("ExposedPorts") or {}), **ports}
    elif word == "VOLUME":
        places: Iterable[str] = _words(rest) or rest.split()
        settings["Volumes"] = {**(settings.get("Volumes") or {}), **{place: {} for place in places}}
    elif word == "WORKDIR":
        settings["WorkingDir"] = os.path.normpath(os.path.join(settings.get("WorkingDir") or "/", rest))
    elif word == "ONBUILD":
        settings["OnBuild"] = [*(settings.get("OnBuild") or []), rest]
    else:
        settings["User" if word == "USER" else "StopSignal"] = rest


def _words(text: str) -> list[str]:
    """A JSON array of strings, as the exec form has it; none for the shell form."""
    if not text.startswith("["):
        return []
    try:
        value = json.loads(text)
    except ValueError:
        return []
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else []


def _pairs(text: str) -> Mapping[str, str]:
    """`A=b C="d e"`, or the old form `A b c`."""
    first, space, rest = text.partition(" ")
    if "=" not in first and space:
        return {first: rest.strip()}
    try:
        items = shlex.split(text)
    except ValueError as error:
        raise InvalidArgument(f"{text!r}: {error}") from error
    if not all("=" in item for item in items):
        raise InvalidArgument(f"{text!r} is no list of NAME=VALUE")
    return {key: value for key, _, value in (item.partition("=") for item in items)}
