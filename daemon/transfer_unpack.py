"""An image's layers as snapshots: each applied on the one below, committed under the chain's digest.

Where the snapshotter allows it (overlayfs), layers are applied side by side, each as soon as it is there, and set on
their parents at the commit; else one after the other. The labels are containerd's, for its garbage collector and for
clients that look for what is unpacked: the configuration refers to the top snapshot, each layer says its digest
uncompressed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest, chain_ids
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted, Unavailable, WherryError
from wherry.core.labels import GC_REF_SNAPSHOT, SNAPSHOT_REF, UNCOMPRESSED
from wherry.daemon.content import ContentStore
from wherry.daemon.snapshots import SnapshotStore
from wherry.daemon.transfer_image import add_labels
from wherry.daemon.transfer_progress import Progress
from wherry.daemon.transfer_sharing import Turns
from wherry.snapshotter.applier import Applier
from wherry.snapshotter.limits import too_many


@dataclass(frozen=True, slots=True)
class Task:
    """One image to be unpacked: `ready` waits until a layer's content is in the store."""

    namespace: str
    lease: str
    snapshotter: str
    config: Descriptor
    diff_ids: tuple[str, ...]
    layers: tuple[Descriptor, ...]
    ready: Callable[[Descriptor], Awaitable[None]]


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
                    group.create_task(self._layer(task, index, chains, done, progress))
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

    async def _layer(
        self,
        task: Task,
        index: int,
        chains: list[Digest],
        done: list[asyncio.Future[None]],
        progress: Progress,
    ) -> None:
        """One layer, unless another transfer applies the same one now: then what it made is there."""
        layer, chain = task.layers[index], chains[index]
        await task.ready(layer)

        def told(event: str, progress_there: int) -> None:
            progress.update(layer, event, progress_there)

        # whoever has a chain's turn waits for nobody but those below it, so there is no circle
        async with self._turns.take((task.namespace, task.snapshotter, chain), told) as (turn, waited):
            turn.tell("extracting", 0)
            if not (waited and await self._there(task, chain)):
                await self._make(task, index, chains, done, progress)
        await add_labels(self._content, task.namespace, layer.digest, {UNCOMPRESSED: task.diff_ids[index]})
        progress.finish(layer, "extracted")
        done[index].set_result(None)

    async def _make(
        self,
        task: Task,
        index: int,
        chains: list[Digest],
        done: list[asyncio.Future[None]],
        progress: Progress,
    ) -> None:
        """Apply one layer and commit it once the one below is committed."""
        chain = chains[index]
        below = chains[index - 1] if index else ""
        beside = self._snapshots.rebases(task.snapshotter) and bool(below) and not done[index - 1].done()
        if beside:
            try:
                key = await self._apply(task, index, chain, "", progress)
            except InvalidArgument:
                # a hard link may lead to a file of a layer below: such a layer needs its parent from the start
                beside = False
        if not beside:
            if below:
                await asyncio.shield(done[index - 1])
            key = await self._apply(task, index, chain, below, progress)
        try:
            if below:
                await asyncio.shield(done[index - 1])
            if key:
                await self._snapshots.commit(
                    task.namespace,
                    task.snapshotter,
                    chain,
                    key,
                    {SNAPSHOT_REF: chain},
                    parent=below if beside else "",
                    lease=task.lease,
                )
        except AlreadyExists:
            # another pull of the same layer was faster
            await self._remove(task, key)
        except BaseException:
            await asyncio.shield(self._remove(task, key))
            raise

    async def _apply(self, task: Task, index: int, chain: Digest, parent: str, progress: Progress) -> str:
        """A snapshot with the layer applied; its key, "" where the committed one has come to be meanwhile."""
        layer = task.layers[index]
        key = _key(chain)
        try:
            mounts = await self._snapshots.prepare(
                task.namespace, task.snapshotter, key, parent, {SNAPSHOT_REF: chain}, lease=task.lease
            )
        except AlreadyExists:
            return ""
        try:
            progress.update(layer, "extracting", 0)
            await self._applier.apply(
                mounts,
                self._content.path(task.namespace, layer.digest),
                layer.media_type,
                expected=task.diff_ids[index],
                overlay=True if index and not parent else None,
            )
        except BaseException as error:
            await asyncio.shield(self._remove(task, key))
            if isinstance(error, WherryError):
                raise type(error)(f"failed to extract layer {task.diff_ids[index]}: {error.message}") from error
            raise
        return key

    async def _remove(self, task: Task, key: str) -> None:
        if key:
            with contextlib.suppress(NotFound):
                await self._snapshots.remove(task.namespace, task.snapshotter, key, lease=task.lease)


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
