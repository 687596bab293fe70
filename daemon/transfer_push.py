"""Image store to registry: children first, so that a manifest never names what isn't there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from wherry.core import mediatypes, reference
from wherry.core.descriptor import Descriptor
from wherry.core.errors import FailedPrecondition, NotFound
from wherry.core.platforms import Platform
from wherry.daemon.content import ContentStore
from wherry.daemon.transfer_image import Selection, check_depth, read_children, source_label
from wherry.daemon.transfer_progress import Progress
from wherry.daemon.transfer_unpack import first_error
from wherry.registry.pusher import OpenContent, Pusher


class Push:
    """Pushes one image."""

    def __init__(
        self, content: ContentStore, namespace: str, pusher: Pusher, progress: Progress, slots: asyncio.Semaphore
    ) -> None:
        self._content = content
        self._namespace = namespace
        self._pusher = pusher
        self._progress = progress
        self._slots = slots

    async def push(self, target: Descriptor, ref: str, platforms: list[Platform]) -> None:
        """Push the tree below `target` and name it by the reference's tag.

        With platforms only their manifests go, and the only one takes the tag itself. Raises NotFound for content
        that isn't in the store (an image of which only some platforms were pulled), and what the registry says.
        """
        root = await self._choose(target, platforms)
        parsed = reference.parse(ref)
        self._progress.add(root)
        try:
            await self._tree(root, parsed.host)
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        pushed = await self._pusher.push_manifest(root, self._reader(root), parsed.tag or str(root.digest))
        self._progress.finish(root, "complete" if pushed else "already exists")

    async def _choose(self, target: Descriptor, platforms: list[Platform]) -> Descriptor:
        if not platforms or not mediatypes.is_index(target.media_type):
            return target
        return choose_one(target, await read_children(self._content, self._namespace, target), Selection(platforms))

    async def _tree(self, node: Descriptor, host: str, depth: int = 0) -> None:
        """Everything below a node."""
        check_depth(node, depth)
        children = await read_children(self._content, self._namespace, node)
        self._progress.children(node, children)
        async with asyncio.TaskGroup() as group:
            for child in children:
                group.create_task(self._child(child, host, depth + 1))

    async def _child(self, child: Descriptor, host: str, depth: int) -> None:
        if mediatypes.is_nondistributable(child.media_type):
            return
        self._progress.add(child)
        await self._tree(child, host, depth)
        async with self._slots:
            pushed = await self._pusher.push(child, self._reader(child), self._neighbours(child, host))
        self._progress.finish(child, "complete" if pushed else "already exists")

    def _neighbours(self, child: Descriptor, host: str) -> list[str]:
        """Repositories of the same host that are known to have the content: it is mounted from there."""
        labels = self._content.info(self._namespace, child.digest).labels
        key, _ = source_label(host, "")
        return [name for name in labels.get(key, "").split(",") if name]

    def _reader(self, child: Descriptor) -> OpenContent:
        if not self._content.exists(self._namespace, child.digest):
            raise NotFound(f"content digest {child.digest}: not found")
        return partial(self._read, child)

    async def _read(self, child: Descriptor, offset: int) -> AsyncIterator[bytes]:
        """The content, with progress."""
        done = offset
        async for chunk in self._content.read(self._namespace, child.digest, offset):
            yield chunk
            done += len(chunk)
            self._progress.update(child, "uploading", done)


def choose_one(index: Descriptor, children: list[Descriptor], selection: Selection) -> Descriptor:
    """What goes by the index's name for some platforms: the one manifest, or the index where it is for these alone.

    Raises FailedPrecondition for a part of an index that isn't one manifest.
    """
    chosen = selection.choose(children)
    if len(chosen) == len(children):
        return index
    if len(chosen) != 1:
        names = ", ".join(str(platform) for platform in selection.platforms)
        raise FailedPrecondition(
            f"an index can't be pushed in part: {len(chosen)} of its {len(children)} manifests are for {names}, "
            "choose one or all: failed precondition"
        )
    return chosen[0]
