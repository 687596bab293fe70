"""A container from a checkpoint: CreateContainer with an archive in place of an image.

CRI-O and containerd (from 2.1 on) have two ways for it, and so has Wherry: the image of the configuration is the
absolute path of an archive that CheckpointContainer wrote, or an image whose layer has the archive's files, with one of
the annotations `ANNOTATIONS` at its manifest or index (a kubelet can be given it; `buildah config --annotation`).

    create   the archive's documents name the image below, which is pulled where it isn't there; what the container had
             changed in its files is applied to the new snapshot; criu's images lie in FOLDER/restore
    start    criu makes the processes, in the pod of the new container; FOLDER/restore goes
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import posixpath
import shutil
import tarfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from wherry.client import copies
from wherry.client.files import Root
from wherry.core import typeurl
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound, WherryError
from wherry.core.mediatypes import OCI_LAYER, OCI_LAYER_GZIP
from wherry.proto import cri_pb2 as cri
from wherry.proto import runc_options_pb2

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as Packed

    from wherry.client.api import Client
    from wherry.client.values import Mount
    from wherry.cri.image_store import LocalImage
    from wherry.cri.node import Node

# CRI-O's, and that of the tools around criu (checkpointctl), which containerd has
ANNOTATIONS = ("io.kubernetes.cri-o.annotations.checkpoint.name", "org.criu.checkpoint.container.name")
IMAGES, FILES, DELETED, LOG = "checkpoint", "rootfs-diff.tar", "deleted.files", "container.log"
SPEC, CONFIG, STATUS = "spec.dump", "config.dump", "status.dump"
# bytes of a document in an archive
_DOCUMENT = 16 << 20
_STEP = 1 << 20
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint that was unpacked into `folder`; `config` and `image` are what the container is to be made of."""

    folder: str
    config: cri.ContainerConfig
    image: LocalImage
    spec: Mapping[str, Any]


def is_checkpoint(image: LocalImage) -> bool:
    """Whether an image holds a checkpoint."""
    return any(name in image.picture.annotations for name in ANNOTATIONS)


async def unpacked(
    node: Node, config: cri.ContainerConfig, held: LocalImage | None, snapshotter: str, folder: str
) -> Restored:
    """Unpack a checkpoint into `folder`, which is made: the archive that `config` names, or the image `held`.

    Raises NotFound, InvalidArgument for what is no checkpoint, and what a pull of the image below raises. The caller
    removes the folder.
    """
    os.makedirs(folder, 0o700)
    what = config.image.user_specified_image or config.image.image
    if held is None:
        await asyncio.to_thread(_from_archive, config.image.image, folder)
    else:
        await _from_image(node.client, await node.images.unpacked(held, snapshotter), snapshotter, folder)
    found = await asyncio.to_thread(_documents, folder, what)
    image = await _below(node, found)
    return Restored(folder, _configured(config, image, what, found), image, found.spec)


async def apply(client: Client, restored: Restored, mounts: Sequence[Mount], key: str) -> None:
    """Give a new snapshot the files that the container had changed; `key` names the upload."""
    for number, (path, kind) in enumerate(await asyncio.to_thread(_layers, restored.folder)):
        async with client.lease() as leased:
            layer = await asyncio.to_thread(_described, path, kind)
            await leased.content.write(f"restore-{key}-{number}", _pieces(path), digest=layer.digest)
            await leased.diff.apply(layer, mounts)


def check_mounts(restored: Restored, spec: Mapping[str, Any]) -> None:
    """What was mounted from outside must be so again, or criu has nothing to put there: InvalidArgument, with where."""
    given = {_place(mount) for mount in spec.get("mounts") or ()}
    bound = [mount for mount in restored.spec.get("mounts") or () if mount.get("type") == "bind"]
    if missing := sorted({_place(mount) for mount in bound} - given):
        raise InvalidArgument(f"the checkpointed container had mounts at {', '.join(missing)}: invalid argument")


def options(own: Packed | None, folder: str) -> runc_options_pb2.Options:
    """A runtime's options with the folder of criu's images. Raises InvalidArgument for a runtime of another kind."""
    made = runc_options_pb2.Options(criu_image_path=os.path.join(folder, IMAGES))
    if own is not None:
        made.MergeFrom(typeurl.unpack_as(own, runc_options_pb2.Options))
    made.criu_work_path = made.criu_work_path or os.path.join(folder, "work")
    return made


def keep_log(folder: str, path: str) -> None:
    """What it had said goes on in its new log."""
    before = os.path.join(folder, LOG)
    if path and os.path.exists(before) and not os.path.lexists(path):
        shutil.copyfile(before, path)
        os.chmod(path, 0o640)


# -- unpacking --------------------------------------------------------------------------------------------------------


def _from_archive(path: str, folder: str) -> None:
    try:
        with open(path, "rb") as source:
            _extract(source, folder)
    except FileNotFoundError:
        raise NotFound(f"checkpoint archive {path}: not found") from None
    except tarfile.TarError as error:
        raise InvalidArgument(f"checkpoint archive {path} can't be read: {error}: invalid argument") from error
    except OSError as error:
        raise FailedPrecondition(f"checkpoint archive {path}: {error.strerror or error}") from error


async def _from_image(client: Client, chain: str, snapshotter: str, folder: str) -> None:
    """The files of an image's layers; nothing of it is followed out of it."""
    key = f"restore-{os.path.basename(os.path.dirname(folder))}"
    async with client.lease() as leased:
        snapshots = leased.snapshots(snapshotter)
        view = await snapshots.view(key, chain)
        try:
            await asyncio.to_thread(_from_mounts, view, folder)
        finally:
            await snapshots.remove(key)


def _from_mounts(view: Sequence[Mount], folder: str) -> None:
    with Root.of_mounts(view) as root:
        for name in (SPEC, CONFIG, STATUS, IMAGES, FILES, DELETED, LOG):
            if root.exists(f"/{name}"):
                with copies.packed(root, f"/{name}") as source:
                    _extract(source, folder)


def _extract(source: IO[bytes], folder: str) -> None:
    """The regular files that belong to a checkpoint, under names of their own: no links, nothing below."""
    wanted = {SPEC, CONFIG, STATUS, FILES, DELETED, LOG}
    with tarfile.open(fileobj=source, mode="r|*") as archive:
        for member in archive:
            name = posixpath.normpath(member.name).lstrip("/")
            inside, _, rest = name.partition("/")
            image = inside == IMAGES and rest and "/" not in rest and rest != ".."
            if inside == IMAGES:
                os.makedirs(os.path.join(folder, IMAGES), 0o700, exist_ok=True)
            if not member.isreg() or not (image or name in wanted):
                continue
            data = archive.extractfile(member)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            if data is not None:
                with open(os.open(os.path.join(folder, name), flags, 0o600), "wb") as target:
                    shutil.copyfileobj(data, target, _STEP)


class _Documents(NamedTuple):
    """What an archive says of its container."""

    spec: dict[str, Any]
    config: dict[str, Any]
    status: dict[str, Any]


def _documents(folder: str, what: str) -> _Documents:
    if not os.path.isdir(os.path.join(folder, IMAGES)):
        raise InvalidArgument(f"{what} is no checkpoint: it has no folder {IMAGES}: invalid argument")
    return _Documents(*(_document(folder, name, what) for name in (SPEC, CONFIG, STATUS)))


def _document(folder: str, name: str, what: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, name), "rb") as file:
            found = json.loads(file.read(_DOCUMENT))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what} is no checkpoint: {name}: {error}: invalid argument") from error
    if not isinstance(found, dict):
        raise InvalidArgument(f"{what} is no checkpoint: {name} is no JSON object: invalid argument")
    return found


# -- what the container is made of ------------------------------------------------------------------------------------


async def _below(node: Node, documents: _Documents) -> LocalImage:
    """The image that the checkpointed container was made of, by the names that the archive has for it."""
    before, shown = documents.config, _object(documents.status.get("image")).get("image")
    found = (before.get("rootfsImageRef"), before.get("rootfsImageName"), before.get("rootfsImage"), shown)
    names = [name for name in dict.fromkeys(found) if isinstance(name, str) and name]
    for name in names:
        try:
            image: LocalImage = await node.images.quick(name)
        except NotFound:
            continue
        return image
    pulled = next((name for name in names if not name.startswith("sha256:")), "")
    if not pulled:
        raise NotFound(f"the image of the checkpointed container, {', '.join(names) or 'which has no name'}: not found")
    try:
        brought: LocalImage = await node.images.ensure(pulled)
    except WherryError as error:
        raise type(error)(f"failed to pull checkpoint base image {pulled}: {error.message}") from error
    return brought


def _configured(
    config: cri.ContainerConfig, image: LocalImage, what: str, documents: _Documents
) -> cri.ContainerConfig:
    """The caller's configuration, and what the checkpoint says where that says nothing."""
    spec, before, status = documents
    made = cri.ContainerConfig()
    made.CopyFrom(config)
    made.image.Clear()
    made.image.image = image.id
    shown = _object(status.get("image"))
    made.image.user_specified_image = str(shown.get("user_specified_image") or shown.get("image") or image.id)
    for key, value in _object(status.get("annotations")).items():
        if key not in made.annotations:
            made.annotations[key] = str(value)
    if not made.labels:
        made.labels.update({key: str(value) for key, value in _object(status.get("labels")).items()})
    made.annotations.update(
        {"restored": "true", "checkpointedAt": str(before.get("checkpointedTime") or ""), "checkpointImage": what}
    )
    if not made.command and not made.args:
        made.command.extend(str(word) for word in _object(spec.get("process")).get("args") or ())
    return made


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _place(mount: Mapping[str, Any]) -> str:
    return posixpath.normpath("/" + str(mount.get("destination") or "").lstrip("/"))


# -- files ------------------------------------------------------------------------------------------------------------


def _layers(folder: str) -> list[tuple[str, str]]:
    """Layers to apply, by path and media type: podman and CRI-O list deleted files beside, others have whiteouts."""
    found = []
    deleted = os.path.join(folder, DELETED)
    if os.path.exists(deleted):
        try:
            with open(deleted, "rb") as file:
                names = json.loads(file.read(_DOCUMENT))
        except ValueError as error:
            raise InvalidArgument(f"{DELETED} of the checkpoint is no JSON: {error}: invalid argument") from error
        found.append((_whiteouts(names if isinstance(names, list) else [], folder), OCI_LAYER))
    files = os.path.join(folder, FILES)
    if os.path.exists(files):
        with open(files, "rb") as file:
            found.append((files, OCI_LAYER_GZIP if file.read(2) == _GZIP else OCI_LAYER))
    return found


def _described(path: str, kind: str) -> Descriptor:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Descriptor(kind, Digest(f"sha256:{digest}"), file.tell())


def _whiteouts(names: Iterable[object], folder: str) -> str:
    """A layer that deletes; `.wh.` files of the OCI image specification (layer.md)."""
    path = os.path.join(folder, "deleted.tar")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as layer:
        for name in names:
            parent, _, last = posixpath.normpath("/" + str(name)).lstrip("/").rpartition("/")
            if last:
                member = tarfile.TarInfo(posixpath.join(parent, f".wh.{last}"))
                member.mtime = int(time.time())
                layer.addfile(member, io.BytesIO())
    return path


async def _pieces(path: str) -> AsyncIterator[bytes]:
    with await asyncio.to_thread(open, path, "rb") as file:
        while piece := await asyncio.to_thread(file.read, _STEP):
            yield piece
