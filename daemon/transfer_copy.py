"""Registry to registry: an image's tree is passed on as it comes, nothing is stored here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from wherry.core import mediatypes
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import FailedPrecondition
from wherry.core.platforms import Platform
from wherry.core.reference import Reference
from wherry.daemon.config import Limits
from wherry.daemon.transfer_image import Selection, check_depth, check_size, children_of, parse_document, ref_key
from wherry.daemon.transfer_progress import Progress
from wherry.daemon.transfer_push import choose_one
from wherry.daemon.transfer_unpack import first_error
from wherry.registry.fetcher import Fetcher
from wherry.registry.pusher import Pusher
from wherry.snapshotter.limits import too_many


async def read_document(fetcher: Fetcher, descriptor: Descriptor, limits: Limits) -> bytes:
    """A manifest, index or configuration of a registry, verified. Raises as `Fetcher.fetch`, FailedPrecondition."""
    check_size(descriptor, limits)
    while True:
        async with aclosing(fetcher.fetch(descriptor)) as chunks:
            data = b"".join([chunk async for chunk in chunks])
        digest = Digest.of(data, descriptor.digest.algorithm)
        if digest == descriptor.digest and len(data) == descriptor.size:
            return data
        if not fetcher.distrust(descriptor):
            raise FailedPrecondition(f"{ref_key(descriptor)}: content of {digest} came: failed precondition")


def is_document(descriptor: Descriptor) -> bool:
    """Whether it has children."""
    return mediatypes.is_index(descriptor.media_type) or mediatypes.is_manifest(descriptor.media_type)


@dataclass(slots=True)
class Copy:
    """One image on its way. `mounts` are repositories of the target's host that have its blobs."""

    fetcher: Fetcher
    pusher: Pusher
    progress: Progress
    slots: asyncio.Semaphore
    limits: Limits
    mounts: list[str]
    nodes: int = 0

    async def copy(self, root: Descriptor, target: Reference, platforms: list[Platform]) -> Descriptor:
        """Copy the tree below `root`, name it by the target's tag, return what has the name now.

        With platforms only the manifest of the one that fits goes. Raises what either registry says.
        """
        document = await self._children(root)
        if platforms and mediatypes.is_index(root.media_type):
            root = choose_one(root, document, Selection(platforms))
        self.progress.add(root)
        try:
            await self._tree(root, 0)
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        data = await read_document(self.fetcher, root, self.limits) if is_document(root) else None
        if data is None:
            await self._blob(root)
        else:
            pushed = await self.pusher.push_manifest(root, partial(_from, data), target.tag or str(root.digest))
            self.progress.finish(root, "complete" if pushed else "already exists")
        return root

    async def _children(self, node: Descriptor) -> list[Descriptor]:
        if not is_document(node):
            return []
        children = children_of(parse_document(await read_document(self.fetcher, node, self.limits), node), node)
        self.nodes += len(children)
        if 0 < self.limits.image_parts < self.nodes:
            raise too_many(f"the image has {self.nodes} parts or more", self.limits.image_parts, "image_parts")
        return children

    async def _tree(self, node: Descriptor, depth: int) -> None:
        """Everything below a node, before the node."""
        check_depth(node, depth)
        children = await self._children(node)
        self.progress.children(node, children)
        async with asyncio.TaskGroup() as group:
            for child in children:
                group.create_task(self._child(child, depth + 1))

    async def _child(self, child: Descriptor, depth: int) -> None:
        if mediatypes.is_nondistributable(child.media_type):
            return
        self.progress.add(child)
        await self._tree(child, depth)
        if not is_document(child):
            await self._blob(child)
            return
        data = await read_document(self.fetcher, child, self.limits)
        pushed = await self.pusher.push(child, partial(_from, data))
        self.progress.finish(child, "complete" if pushed else "already exists")

    async def _blob(self, blob: Descriptor) -> None:
        async with self.slots:
            pushed = await self.pusher.push(blob, partial(self._read, blob), self.mounts)
        self.progress.finish(blob, "complete" if pushed else "already exists")

    async def _read(self, blob: Descriptor, offset: int) -> AsyncIterator[bytes]:
        """The content as it comes; the registry that takes it compares the digest."""
        done = offset
        async with aclosing(self.fetcher.fetch(blob, offset)) as chunks:
            async for chunk in chunks:
                yield chunk
                done += len(chunk)
                self.progress.update(blob, "copying", done)


async def _from(data: bytes, offset: int) -> AsyncIterator[bytes]:
    yield data[offset:]
