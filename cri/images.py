"""The CRI's ImageService over the daemon's own services: pull, list, status, remove, file systems.

Rules, names and texts are containerd's (internal/cri/server/images), so that a kubelet sees no difference: an image's
id is its configuration's digest, a pull answers with it, an unknown image is an empty status and its removal a success.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import structlog

from wherry.client.registry_end import Registry
from wherry.client.unpack import unpack, unpacked
from wherry.core import platforms
from wherry.core.errors import InvalidArgument, NotFound, WherryError
from wherry.core.reference import parse
from wherry.cri.batches import batches
from wherry.cri.image_auth import lookup
from wherry.cri.image_filesystems import Filesystems
from wherry.cri.image_pull import Watch, watched
from wherry.cri.image_settings import ImageSettings, complete
from wherry.cri.image_store import ImageIndex, LocalImage
from wherry.cri.image_volumes import ImageVolumes
from wherry.proto import cri_pb2 as pb

if TYPE_CHECKING:
    from wherry.cri.node import Node

log = structlog.get_logger(__name__)

# on a pod's configuration: the runtime handler that it will have, from before ImageSpec could say it
HANDLER = "io.containerd.cri.runtime-handler"


class Images:
    """The images of a node, in the client's namespace."""

    def __init__(self, node: Node) -> None:
        self._client = client = node.client
        state = os.path.join(node.places.state, "cri")
        self.settings = ImageSettings.of(node.settings, node.host.snapshots, folder=os.path.join(state, "registries"))
        self.volumes = ImageVolumes(client, self, os.path.join(state, "image-volumes"))
        self.index = ImageIndex(client, self.settings)
        self._filesystems = Filesystems(client, self.settings)
        self._watch = Watch()

    # -- for the node's other parts

    async def resolve(self, wanted: str) -> LocalImage:
        """An image by name, id or the beginning of an id, with all its names; raises NotFound."""
        return await self.index.find(wanted)

    async def quick(self, wanted: str) -> LocalImage:
        """The same, and `references` has only the name that was found: for starting containers."""
        return await self.index.quick(wanted)

    async def unpacked(self, image: LocalImage, snapshotter: str = "") -> str:
        """The snapshot (chain id) with the image's layers, made where a pull of somebody else's left them packed."""
        name = snapshotter or self.settings.snapshotter
        if not await unpacked(self._client, image.picture, name):
            return await unpack(self._client, image.picture, name)
        return image.picture.chain_id

    async def ensure(self, name: str) -> LocalImage:
        """An image that must be there (a pod's own), pulled where it isn't."""
        try:
            return await self.quick(name)
        except NotFound:
            return await self._pull(complete(name), None, self.settings.snapshotter)

    # -- the service

    async def pull_image(self, request: pb.PullImageRequest) -> pb.PullImageResponse:
        """Brings an image to the node, unpacked; answers with its id.

        Raises InvalidArgument for a name or credentials that can't be read, and what the registry says.
        """
        wanted = request.image.image
        if not wanted:
            raise InvalidArgument("PullImage: image must be named: invalid argument")
        try:
            name = complete(wanted)
        except InvalidArgument as error:
            raise InvalidArgument(f'failed to parse image reference "{wanted}": {error.message}') from error
        handler = request.image.runtime_handler or request.sandbox_config.annotations.get(HANDLER, "")
        auth = request.auth if request.HasField("auth") else None
        image = await self._pull(name, auth, self.settings.snapshotter_of(handler))
        return pb.PullImageResponse(image_ref=image.id)

    async def _pull(self, name: str, auth: pb.AuthConfig | None, snapshotter: str) -> LocalImage:
        parsed = parse(name)
        registry = Registry(
            name,
            hosts_dir=self.settings.config_path,
            headers=self.settings.headers,
            credentials=lookup(auth, parsed.host, self.settings.auths),
        )
        begun = time.monotonic()
        here = platforms.host()
        steps = self._client.transfer.pull(
            registry,
            name=name,
            platforms=[here],
            labels=self.index.labels(name),
            unpack=[(here, snapshotter)],
        )
        try:
            await watched(steps, self.settings.progress_seconds, self._watch)
            target = (await self._client.images.get(name)).target
            by_digest = name if parsed.digest else f"{parsed.name}@{target.digest}"
            image = await self.index.keep(target, dict.fromkeys((name, by_digest)))
        except WherryError as error:
            raise type(error)(f'failed to pull and unpack image "{name}": {error.message}') from error
        log.info("image pulled", name=name, id=image.id, seconds=round(time.monotonic() - begun, 3))
        return image

    async def list_images(self, request: pb.ListImagesRequest) -> pb.ListImagesResponse:
        """All images; with a filter the one that it names, by whatever `resolve` takes."""
        return pb.ListImagesResponse(images=await self._listed(request.filter))

    async def stream_images(self, request: pb.StreamImagesRequest) -> AsyncIterator[pb.StreamImagesResponse]:
        """The same in several messages, for nodes with more images than one message may have."""
        for some in batches(await self._listed(request.filter)):
            yield pb.StreamImagesResponse(images=some)

    async def _listed(self, wanted: pb.ImageFilter) -> list[pb.Image]:
        if wanted.image.image:
            try:
                return [_message(await self.index.find(wanted.image.image))]
            except NotFound:
                return []
        return [_message(image) for image in await self.index.all()]

    async def image_status(self, request: pb.ImageStatusRequest) -> pb.ImageStatusResponse:
        """One image, nothing where it isn't there; `verbose` adds its configuration and chain id as JSON."""
        try:
            image = await self.index.find(request.image.image)
        except NotFound:
            return pb.ImageStatusResponse()
        response = pb.ImageStatusResponse(image=_message(image))
        if request.verbose:
            info = {"chainID": image.picture.chain_id, "imageSpec": dict(image.picture.document)}
            response.info["info"] = json.dumps(info)
        return response

    async def remove_image(self, request: pb.RemoveImageRequest) -> pb.RemoveImageResponse:
        """Takes all names of an image away, and waits until what it alone had is gone; of an unknown one nothing."""
        try:
            image = await self.index.find(request.image.image)
        except NotFound:
            return pb.RemoveImageResponse()
        # the id goes last: an interrupted removal is still an image that can be removed
        names = sorted(image.references, key=lambda name: name == image.id)
        for number, name in enumerate(names, 1):
            try:
                await self._client.images.delete(name, sync=number == len(names))
            except NotFound:
                continue
        return pb.RemoveImageResponse()

    async def image_fs_info(self, request: pb.ImageFsInfoRequest) -> pb.ImageFsInfoResponse:
        """What images, and what containers' writable layers, use of the snapshotters' file systems."""
        return await self._filesystems.info()


def _message(image: LocalImage) -> pb.Image:
    made = pb.Image(
        id=image.id,
        repo_tags=image.repo_tags,
        repo_digests=image.repo_digests,
        size=image.size,
        pinned=image.pinned,
    )
    uid, made.username = user_of(str(image.picture.settings.get("User") or ""))
    if uid is not None:
        made.uid.value = uid
    return made


def user_of(user: str) -> tuple[int | None, str]:
    """An image's `User` without its group: a number, or a name (then the node looks it up when a container starts)."""
    name = user.partition(":")[0]
    if name.isascii() and name.isdigit():
        return int(name), ""
    return None, name
