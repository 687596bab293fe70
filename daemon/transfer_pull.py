"""Registry to image store: fetch an image's tree, label it, unpack it while the rest of it still comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from wherry.core import mediatypes
from wherry.core.descriptor import Descriptor
from wherry.core.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from wherry.core.platforms import Platform, matches, normalize
from wherry.daemon.config import Limits
from wherry.daemon.content import ContentStore
from wherry.daemon.content_writer import ContentWriter
from wherry.daemon.transfer_growing import Growing
from wherry.daemon.transfer_image import (
    Selection,
    add_labels,
    check_depth,
    check_size,
    children_labels,
    children_of,
    parse_document,
    ref_key,
    source_label,
)
from wherry.daemon.transfer_progress import Progress
from wherry.daemon.transfer_sharing import Turn, Turns
from wherry.daemon.transfer_unpack import Task, Unpacker, first_error
from wherry.snapshotter.limits import too_many

# seconds between two tries for content that a client of the content service is writing
LOCKED_PAUSE = 0.1


class Source(Protocol):
    """Where content comes from; a repository (`registry.Fetcher`)."""

    def fetch(self, descriptor: Descriptor, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """The content from an offset (bytes) on."""

    def distrust(self, descriptor: Descriptor) -> bool:
        """What came wasn't the content; whether it may come from elsewhere."""


@dataclass(frozen=True, slots=True)
class Unpack:
    """What to unpack: the platform's image into a snapshotter."""

    platform: Platform
    snapshotter: str


@dataclass(slots=True)
class Wanted:
    """What a transfer into the image store is to bring."""

    namespace: str
    lease: str
    selection: Selection
    all_metadata: bool = False
    unpacks: list[Unpack] = field(default_factory=list)
    # host and repository that the content comes from, for its labels; "" for none
    host: str = ""
    repository: str = ""


class Tree:
    """Brings the tree of one image into the store. `source` is None where everything is there already (an import)."""

    def __init__(
        self,
        content: ContentStore,
        unpacker: Unpacker,
        progress: Progress,
        wanted: Wanted,
        *,
        source: Source | None,
        slots: asyncio.Semaphore,
        turns: Turns,
        limits: Limits,
    ) -> None:
        self._content = content
        self._unpacker = unpacker
        self._progress = progress
        self._wanted = wanted
        self._source = source
        self._slots = slots
        self._turns = turns
        self._limits = limits
        self._nodes = 0
        # the fetch of each digest, so that what two parents share comes once
        self._fetches: dict[str, asyncio.Task[None]] = {}
        # what is being written now, for those who read it meanwhile
        self._growing: dict[str, asyncio.Future[Growing]] = {}
        self._group: asyncio.TaskGroup | None = None
        self.unpacked = 0

    async def bring(self, root: Descriptor) -> None:
        """Fetch and unpack everything that is wanted below `root`. Raises the first error."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await self._node(root, root.platform)
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        if self._group is None:
            raise Unavailable("the transfer has ended: unavailable")
        return self._group.create_task(work)

    def _have(self, descriptor: Descriptor) -> asyncio.Task[None]:
        """The task that gets a descriptor's content; waiting for it may be cancelled, it goes on."""
        task = self._fetches.get(descriptor.digest)
        if task is None:
            self._progress.add(descriptor)
            task = self._fetches[descriptor.digest] = self._spawn(self._get(descriptor))
        return task

    async def _ready(self, descriptor: Descriptor) -> None:
        await asyncio.shield(self._have(descriptor))

    async def _begin(self, descriptor: Descriptor) -> Growing | None:
        """Wait until a layer's content is in the store (None), or its download has begun."""
        fetch = self._have(descriptor)
        begun = self._growing.setdefault(descriptor.digest, asyncio.get_running_loop().create_future())
        waited: set[asyncio.Future[Any]] = {fetch, begun}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if fetch.done():
            await asyncio.shield(fetch)
            return None
        return begun.result()

    def _grow(self, descriptor: Descriptor, writer: ContentWriter) -> Growing:
        growing = Growing(writer.path)
        begun = self._growing.setdefault(descriptor.digest, asyncio.get_running_loop().create_future())
        if not begun.done():
            begun.set_result(growing)
        return growing

    async def _node(self, descriptor: Descriptor, platform: Platform | None, depth: int = 0) -> None:
        """One node with all that is below it."""
        check_depth(descriptor, depth)
        await self._ready(descriptor)
        kind = descriptor.media_type
        if not (mediatypes.is_index(kind) or mediatypes.is_manifest(kind)):
            return
        wanted = self._wanted
        # its size was looked at before it was fetched
        data = await self._content.read_all(wanted.namespace, descriptor.digest, descriptor.size)
        children = children_of(parse_document(data, descriptor), descriptor)
        self._count(descriptor, len(children))
        self._progress.children(descriptor, children)
        await add_labels(self._content, wanted.namespace, descriptor.digest, children_labels(children))
        if mediatypes.is_index(kind):
            await self._index(descriptor, children, depth)
        else:
            await self._manifest(children, platform)

    def _count(self, descriptor: Descriptor, more: int) -> None:
        """Before anything is begun for a manifest's parts: a manifest of a few bytes may name very many."""
        self._nodes += more
        limit = self._limits.image_parts
        if 0 < limit < self._nodes:
            what = f"{ref_key(descriptor)}: the image has {self._nodes} parts or more"
            raise too_many(what, limit, "image_parts")

    async def _index(self, descriptor: Descriptor, children: list[Descriptor], depth: int) -> None:
        chosen = self._wanted.selection.choose(children)
        if children and not chosen:
            names = ", ".join(str(platform) for platform in self._wanted.selection.platforms)
            raise NotFound(f"{ref_key(descriptor)}: no match for platform in manifest: {names}: not found")
        others = [child for child in children if child not in chosen] if self._wanted.all_metadata else []
        for child in [*chosen, *others]:
            self._spawn(self._node(child, child.platform, depth + 1))

    async def _manifest(self, children: list[Descriptor], platform: Platform | None) -> None:
        """A manifest's configuration now, its layers beside each other; unpacking begins with the first one there."""
        config, layers = children[0], children[1:]
        if not self._wanted.selection.wants(platform):
            # metadata only
            await self._ready(config)
            return
        limit = self._limits.image_layers
        if self._wanted.unpacks and mediatypes.is_config(config.media_type) and 0 < limit < len(layers):
            raise too_many(f"the image has {len(layers)} layers", limit, "image_layers")
        for layer in layers:
            self._have(layer)
        await self._ready(config)
        if self._wanted.unpacks and mediatypes.is_config(config.media_type):
            data = await self._content.read_all(self._wanted.namespace, config.digest, config.size)
            await self._start_unpacks(config, parse_document(data, config), layers, platform)

    async def _start_unpacks(
        self, config: Descriptor, document: dict[str, Any], layers: list[Descriptor], platform: Platform | None
    ) -> None:
        rootfs = document.get("rootfs")
        diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
        if not isinstance(diff_ids, list) or not all(isinstance(item, str) for item in diff_ids):
            raise InvalidArgument(f"{ref_key(config)} has no rootfs.diff_ids: invalid argument")
        own = Platform.from_json(document, ref_key(config)) if document.get("os") else None
        have = normalize(platform or own or Platform("linux"))
        for unpack in self._wanted.unpacks:
            selection = Selection([unpack.platform] if unpack.platform.os else [])
            if matches(unpack.platform, have) or selection.wants(have):
                self.unpacked += 1
                task = Task(
                    self._wanted.namespace,
                    self._wanted.lease,
                    unpack.snapshotter,
                    config,
                    tuple(diff_ids),
                    tuple(layers),
                    self._ready,
                    self._begin,
                )
                self._spawn(self._unpack(task))

    async def _unpack(self, task: Task) -> None:
        await self._unpacker.unpack(task, self._progress)

    # -- content

    async def _get(self, descriptor: Descriptor) -> None:
        """Have a descriptor's content in the store, under the lease, with the label that says where it is from."""
        namespace = self._wanted.namespace
        check_size(descriptor, self._limits)
        if self._source is None:
            if not self._content.exists(namespace, descriptor.digest):
                raise NotFound(f"content digest {descriptor.digest}: not found")
            self._progress.finish(descriptor)
            return

        def told(event: str, progress: int) -> None:
            self._progress.update(descriptor, event, progress)

        # what another pull is fetching comes once, and holds no place of ours meanwhile
        async with self._turns.take((namespace, descriptor.digest), told) as (turn, _):
            existed = await self._download(self._source, descriptor, turn)
        if existed:
            await self._label_source(descriptor)
        self._progress.finish(descriptor, "already exists" if existed else "complete")

    async def _download(self, source: Source, descriptor: Descriptor, turn: Turn) -> bool:
        """Fetch into the store; True where it was there already."""
        # few layers at once; what is small needn't wait for them
        kind = descriptor.media_type
        small = mediatypes.is_index(kind) or mediatypes.is_manifest(kind) or mediatypes.is_config(kind)
        while True:
            async with nullcontext() if small else self._slots:
                try:
                    return await self._write(source, descriptor, turn)
                except AlreadyExists:
                    return True
                except FailedPrecondition as error:
                    if not source.distrust(descriptor):
                        raise FailedPrecondition(f"{ref_key(descriptor)}: {error.message}") from error
                except Unavailable as error:
                    if "locked" not in error.message:
                        raise
            # a client of the content service is writing it: what it got we have
            await asyncio.sleep(LOCKED_PAUSE)

    async def _write(self, source: Source, descriptor: Descriptor, turn: Turn) -> bool:
        """One upload into the store, which goes on where an earlier one stopped; True where nothing had to be sent."""
        wanted = self._wanted
        writer = await self._content.writer(
            wanted.namespace,
            ref_key(descriptor),
            total=descriptor.size,
            expected=descriptor.digest,
            lease=wanted.lease,
        )
        async with writer:
            if writer.offset > descriptor.size:
                await writer.truncate()
            existed = bool(writer.shared)
            growing = self._grow(descriptor, writer) if not existed else None
            whole = False
            try:
                if not existed and writer.offset < descriptor.size:
                    async with aclosing(source.fetch(descriptor, writer.offset)) as chunks:
                        async for chunk in chunks:
                            offset = await writer.write(chunk)
                            self._progress.update(descriptor, "downloading", offset)
                            turn.tell("downloading", offset)
                            if growing is not None:
                                growing.more(offset)
                await self._content.commit_or_label(writer, descriptor.size, descriptor.digest, self._source_labels())
                whole = True
            finally:
                if growing is not None:
                    growing.end(whole=whole)
            return existed

    def _source_labels(self, existing: str = "") -> dict[str, str]:
        if not self._wanted.host:
            return {}
        key, value = source_label(self._wanted.host, self._wanted.repository, existing)
        return {key: value}

    async def _label_source(self, descriptor: Descriptor) -> None:
        if self._wanted.host:
            key, _ = source_label(self._wanted.host, "")
            existing = self._content.info(self._wanted.namespace, descriptor.digest).labels.get(key, "")
            labels = self._source_labels(existing)
            await add_labels(self._content, self._wanted.namespace, descriptor.digest, labels)
