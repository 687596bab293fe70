"""An image's layers as snapshots: each applied on the one below, committed under the chain's digest.

Where the snapshotter allows it (overlayfs), layers are applied side by side, each while it is still downloaded, and set
on their parents at the commit; else one after the other. The labels are containerd's, for its garbage collector and for
clients that look for what is unpacked: the configuration refers to the top snapshot, each layer says its digest
uncompressed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest, chain_ids
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted, Unavailable, WherryError
from wherry.core.labels import GC_REF_SNAPSHOT, SNAPSHOT_REF, UNCOMPRESSED
from wherry.daemon.content import ContentStore
from wherry.daemon.snapshots import SnapshotStore
from wherry.daemon.transfer_growing import Growing
from wherry.daemon.transfer_image import add_labels
from wherry.daemon.transfer_progress import Progress
from wherry.daemon.transfer_sharing import Turns
from wherry.snapshotter.applier import Applier
from wherry.snapshotter.limits import too_many


@dataclass(frozen=True, slots=True)
class Task:
    """One image to be unpacked: `ready` waits until a layer's content is in the store, `begun` until it is there or its
    download has begun, whose file it returns then."""

    namespace: str
    lease: str
    snapshotter: str
    config: Descriptor
    diff_ids: tuple[str, ...]
    layers: tuple[Descriptor, ...]
    ready: Callable[[Descriptor], Awaitable[None]]
    begun: Callable[[Descriptor], Awaitable[Growing | None]]


@dataclass(slots=True)
class _Layer:
    """One of an image's layers, by its number from below; `done` are all layers' ends, `growing` its file while it is
    downloaded."""

    task: Task
    index: int
    chains: Sequence[Digest]
    done: Sequence[asyncio.Future[None]]
    progress: Progress
    growing: Growing | None = None

    @property
    def layer(self) -> Descriptor:
        return self.task.layers[self.index]

    @property
    def chain(self) -> Digest:
        return self.chains[self.index]

    @property
    def diff_id(self) -> str:
        return self.task.diff_ids[self.index]

    @property
    def below(self) -> str:
        """The chain of the layer below; "" for the lowest one."""
        return self.chains[self.index - 1] if self.index else ""

    @property
    def below_is_done(self) -> bool:
        """Whether the layer below is committed, or there is none."""
        return self.index == 0 or self.done[self.index - 1].done()

    async def wait_below(self) -> None:
        """Until the layer below is committed."""
        if self.index:
            await asyncio.shield(self.done[self.index - 1])


class Unpacker:
    """Unpacks images into snapshotters."""

    def __init__(self, content: ContentStore, snapshots: SnapshotStore, applier: Applier, turns: Turns) -> None:
        self._content = content
        self._snapshots = snapshots
        self._applier = applier
        self._turns = turns

    async def unpack(self, task: Task, progress: Progress) -> str:
        """Unpack all layers; returns the chain id of the top one ("" for an image without layers).

        Raises InvalidArgument for an image whose layers don't fit its configuration or aren't what they say, and
        what the snapshotter and the applier raise; then nothing half done is left.
        """
        if len(task.layers) != len(task.diff_ids):
            raise InvalidArgument(
                f"mismatched image rootfs and manifest layers: {len(task.diff_ids)} diff ids, "
                f"{len(task.layers)} layers: invalid argument"
            )
        limit = self._applier.limits.image_layers
        if 0 < limit < len(task.layers):
            raise too_many(f"the image has {len(task.layers)} layers", limit, "image_layers")
        if not task.layers:
            return ""
        chains = chain_ids(task.diff_ids)
        # what is there already, as a stack from below
        start = len(chains)
        while start and not await self._there(task, chains[start - 1]):
            start -= 1
        done = [asyncio.get_running_loop().create_future() for _ in chains]
        for future in done[:start]:
            future.set_result(None)
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(start, len(chains)):
                    group.create_task(self._layer(_Layer(task, index, chains, done, progress)))
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
        for future in done:
            future.cancel()
        await add_labels(
            self._content, task.namespace, task.config.digest, {f"{GC_REF_SNAPSHOT}.{task.snapshotter}": chains[-1]}
        )
        return chains[-1]

    async def _there(self, task: Task, chain: Digest) -> bool:
        """Whether a snapshot is committed already; the lease holds it then."""
        try:
            await self._snapshots.stat(task.namespace, task.snapshotter, chain)
        except NotFound:
            return False
        # preparing towards it says that it is there, and puts it under the lease
        key = _key(chain)
        try:
            await self._snapshots.prepare(
                task.namespace, task.snapshotter, key, "", {SNAPSHOT_REF: chain}, lease=task.lease
            )
        except AlreadyExists:
            return True
        await self._remove(task, key)
        return False

    async def _layer(self, at: _Layer) -> None:
        """One layer, unless another transfer applies the same one now: then what it made is there."""
        task, layer, chain = at.task, at.layer, at.chain
        at.growing = await task.begun(layer)

        def told(event: str, progress_there: int) -> None:
            at.progress.update(layer, event, progress_there)

        # whoever has a chain's turn waits for those below it and for its download, so there is no circle
        async with self._turns.take((task.namespace, task.snapshotter, chain), told) as (turn, waited):
            turn.tell("extracting", 0)
            if not (waited and await self._there(task, chain)):
                await self._make(at)
        await task.ready(layer)
        await add_labels(self._content, task.namespace, layer.digest, {UNCOMPRESSED: at.diff_id})
        at.progress.finish(layer, "extracted")
        at.done[at.index].set_result(None)

    async def _make(self, at: _Layer) -> None:
        """Apply one layer and commit it once the one below is committed and its own blob is verified."""
        task = at.task
        beside = self._snapshots.rebases(task.snapshotter) and not at.below_is_done
        key = None
        if at.growing is not None and (beside or at.below_is_done):
            key = await self._follow(at, at.growing, "" if beside else at.below)
        try:
            await task.ready(at.layer)
        except BaseException:
            await asyncio.shield(self._remove(task, key or ""))
            raise
        if key is None:
            key, beside = await self._apply_whole(at, beside=beside)
        try:
            await at.wait_below()
            if key:
                await self._snapshots.commit(
                    task.namespace,
                    task.snapshotter,
                    at.chain,
                    key,
                    {SNAPSHOT_REF: at.chain},
                    parent=at.below if beside else "",
                    lease=task.lease,
                )
        except AlreadyExists:
            # another pull of the same layer was faster
            await self._remove(task, key)
        except BaseException:
            await asyncio.shield(self._remove(task, key))
            raise

    async def _follow(self, at: _Layer, growing: Growing, parent: str) -> str | None:
        """Apply a layer while it comes; None where that failed: what is wrong with it, the whole of it will say."""
        telling = asyncio.create_task(_tell_extracting(at))
        try:
            with growing.follow() as (file, signs):
                return await self._apply(at, parent, file, signs)
        except (WherryError, FileNotFoundError):
            return None
        finally:
            telling.cancel()

    async def _apply_whole(self, at: _Layer, *, beside: bool) -> tuple[str, bool]:
        """Apply a layer that is in the store; the snapshot's key, and whether it is still to be set on its parent."""
        source = self._content.path(at.task.namespace, at.layer.digest)
        if beside:
            with contextlib.suppress(InvalidArgument):
                return await self._apply(at, "", source), True
            # a hard link may lead to a file of a layer below: such a layer needs its parent from the start
        await at.wait_below()
        return await self._apply(at, at.below, source), False

    async def _apply(self, at: _Layer, parent: str, source: str | int, signs: int | None = None) -> str:
        """A snapshot with the layer applied; its key, "" where the committed one has come to be meanwhile.

        `source` is the blob's file, or with `signs` one that grows (`Growing.follow`).
        """
        task, key = at.task, _key(at.chain)
        try:
            mounts = await self._snapshots.prepare(
                task.namespace, task.snapshotter, key, parent, {SNAPSHOT_REF: at.chain}, lease=task.lease
            )
        except AlreadyExists:
            return ""
        try:
            if signs is None:
                at.progress.update(at.layer, "extracting", 0)
            await self._applier.apply(
                mounts,
                source,
                at.layer.media_type,
                expected=at.diff_id,
                overlay=True if at.index and not parent else None,
                follow=signs,
            )
        except BaseException as error:
            await asyncio.shield(self._remove(task, key))
            if isinstance(error, WherryError):
                raise type(error)(f"failed to extract layer {at.diff_id}: {error.message}") from error
            raise
        return key

    async def _remove(self, task: Task, key: str) -> None:
        if key:
            with contextlib.suppress(NotFound):
                await self._snapshots.remove(task.namespace, task.snapshotter, key, lease=task.lease)


async def _tell_extracting(at: _Layer) -> None:
    """A layer that has come is called what it is from then on."""
    with contextlib.suppress(Exception):  # what is wrong with the download is told by who waits for it
        await at.task.ready(at.layer)
        at.progress.update(at.layer, "extracting", 0)


def _key(chain: str) -> str:
    """A key for a snapshot on its way to become a chain's, as containerd names them."""
    return f"extract-{time.time_ns() % 1_000_000_000}-{secrets.token_urlsafe(3)} {chain}"


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error to tell of a task group: the first of ours, else the first of the system, else what there is."""
    flat: list[BaseException] = []
    pending: list[BaseException] = [errors]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending = [*error.exceptions, *pending]
        else:
            flat.append(error)
    for error in flat:
        if isinstance(error, WherryError):
            return error
    for error in flat:
        if isinstance(error, OSError):
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            return ResourceExhausted(f"{error}: resource exhausted") if full else Unavailable(f"{error}: unavailable")
    return flat[0]
