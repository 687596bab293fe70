"""Checkpoints of tasks as content: criu's images as a tar, and the container's specification beside it.

The media types and what is in them are containerd's, so that its clients make an image of them (`ctr containers
checkpoint`) and start a task from it, on either daemon.

    ROOT/checkpoints/NAME/      where a task's processes are written to before they become a blob, and where a task is
                                restored from; a bundle's link `checkpoint` says that it still is
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tarfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import structlog

from wherry.core.errors import InvalidArgument
from wherry.core.names import quote
from wherry.daemon.bundle import Bundle
from wherry.daemon.content import ContentStore
from wherry.proto.containers_pb2 import Container
from wherry.proto.types_pb2 import Descriptor

log = structlog.get_logger(__name__)

IMAGES = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
SPEC = "application/vnd.containerd.container.checkpoint.config.v1+proto"


class Checkpoints:
    """Between folders of criu's images and the content store."""

    def __init__(self, root: str, content: ContentStore) -> None:
        """`root` is the folder for what is on its way; it is made when it is needed."""
        self._root = root
        self._content = content

    def sweep(self, bundles: Sequence[Bundle]) -> None:
        """Remove what a daemon before this one left and no bundle uses. Before anything is served."""
        used = {os.path.basename(link) for bundle in bundles if (link := bundle.checkpoint())}
        try:
            names = os.listdir(self._root)
        except FileNotFoundError:
            return
        for name in names:
            if name not in used:
                shutil.rmtree(os.path.join(self._root, name), ignore_errors=True)

    @asynccontextmanager
    async def folder(self) -> AsyncIterator[str]:
        """A folder for criu to write into, for the time of a block."""
        path = self._make()
        try:
            yield path
        finally:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    async def store(
        self, namespace: str, container: Container, images: str, lease: str | None
    ) -> tuple[Descriptor, Descriptor]:
        """Take criu's images and the container's specification into the content store."""
        ref = f"checkpoint-{os.path.basename(images)}"
        async with await self._content.writer(namespace, ref, lease=lease) as writer:
            try:
                await writer.truncate()
                await asyncio.to_thread(_pack, images, writer.path)
                await writer.adopt()
                saved = await self._content.commit_or_label(writer, 0, "")
            except BaseException:
                await writer.discard()
                raise
        data = container.spec.SerializeToString()
        info = await self._content.put(namespace, f"{ref}/spec", data, lease=lease)
        return (
            Descriptor(media_type=IMAGES, digest=saved.digest, size=saved.size),
            Descriptor(media_type=SPEC, digest=info.digest, size=info.size),
        )

    async def fetch(self, namespace: str, descriptor: Descriptor) -> str:
        """Unpack criu's images for a task that is to be made from them; the folder, which `Bundle.keep` takes over.

        Raises InvalidArgument for content of another type, NotFound.
        """
        if descriptor.media_type != IMAGES:
            raise InvalidArgument(f"unsupported checkpoint type {quote(descriptor.media_type)}: invalid argument")
        self._content.info(namespace, descriptor.digest)
        path = self._make()
        try:
            await asyncio.to_thread(_unpack, self._content.path(namespace, descriptor.digest), path)
        except BaseException as error:
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
            if isinstance(error, tarfile.TarError):
                raise InvalidArgument(f"checkpoint {descriptor.digest} is damaged: {error}") from error
            raise
        return path

    def _make(self) -> str:
        os.makedirs(self._root, 0o700, exist_ok=True)
        path = os.path.join(self._root, secrets.token_hex(8))
        os.mkdir(path, 0o700)
        return path


def _pack(folder: str, tar: str) -> None:
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as file:
        for name in sorted(os.listdir(folder)):
            file.add(os.path.join(folder, name), name)


def _unpack(tar: str, folder: str) -> None:
    with tarfile.open(tar) as file:
        # nothing gets out of the folder, and no device or set-uid file into it
        file.extractall(folder, filter="data")
