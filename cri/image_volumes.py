"""Image volumes: an image's files as a read-only mount in a container (KEP-4639).

A pod has one view of an image, whatever number of its containers mount it; it goes with the pod. The view is a snapshot
of the image's layers, mounted under the node's state (`FOLDER/POD/IMAGE`), and a root for the collector, so that the
image may go before the pod does. All of it can be read back: folders tell what is mounted, snapshots' labels whose.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING

from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, WherryError
from wherry.core.labels import GC_ROOT
from wherry.linux import mounts as kernel
from wherry.linux import syscalls as sc

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.cri.images import Images

# on a view: the pod that it is for
POD = "io.wherry.cri.image-volume.pod"


class ImageVolumes:
    """The image volumes of a node's pods. `folder` is on a file system that a boot empties."""

    def __init__(self, client: Client, images: Images, folder: str) -> None:
        self._client = client
        self._images = images
        self._folder = folder
        # two containers of a pod may ask for the same at once
        self._locks: dict[str, asyncio.Lock] = {}

    async def mount(self, pod: str, image: str, sub_path: str = "", snapshotter: str = "") -> str:
        """The host's path of an image's files for a pod: mounted, read-only, or the folder below that is asked for.

        Raises NotFound for an image or path that isn't there, InvalidArgument for a path that leads out of the image.
        """
        name = snapshotter or self._images.settings.snapshotter
        found = await self._images.quick(image)
        target = os.path.join(self._folder, pod, found.id.removeprefix("sha256:"))
        async with self._locks.setdefault(pod, asyncio.Lock()):
            if not await asyncio.to_thread(kernel.is_mountpoint, target):
                view = await self._view(pod, found.id, name)
                await asyncio.to_thread(_mount, view, target)
        if not sub_path:
            return target
        return await asyncio.to_thread(_below, target, sub_path)

    async def _view(self, pod: str, image: str, snapshotter: str) -> list[kernel.Mount]:
        """The snapshot of the image for the pod, also where an earlier daemon has made it."""
        snapshots = self._client.snapshots(snapshotter)
        key = _key(pod, image)
        found = await self._images.quick(image)
        chain = await self._images.unpacked(found, snapshotter)
        labels = {GC_ROOT: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), POD: pod}
        try:
            made = await snapshots.view(key, chain, labels)
        except AlreadyExists:
            made = await snapshots.mounts(key)
        return [kernel.Mount(item.type, item.source, item.target, [*item.options]) for item in made]

    async def release(self, pod: str) -> None:
        """Unmounts all of a pod's and removes the views; what isn't there is fine."""
        self._locks.pop(pod, None)
        await asyncio.to_thread(_unmount, os.path.join(self._folder, pod))
        settings = self._images.settings
        for name in dict.fromkeys([settings.snapshotter, *settings.snapshotters.values()]):
            snapshots = self._client.snapshots(name)
            try:
                keys = [item.name async for item in snapshots.list([f'labels."{POD}"=={pod}'])]
            except WherryError:
                continue  # a handler's snapshotter that isn't there
            for key in keys:
                with contextlib.suppress(NotFound):
                    await snapshots.remove(key)


def _key(pod: str, image: str) -> str:
    return f"image-volume-{pod}-{image.removeprefix('sha256:')}"


def _mount(view: list[kernel.Mount], target: str) -> None:
    os.makedirs(target, mode=0o711, exist_ok=True)
    try:
        kernel.mount_all(view, target)
        # a view of a single layer is a bind mount: read-only by its options, as an overlay without an upper directory
        kernel.mount("", target, target, ["remount", "bind", "ro"])
    except OSError as error:
        kernel.unmount_all(target)
        raise FailedPrecondition(f"mounting image volume at {target}: {error}") from error


def _unmount(folder: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            at = os.path.join(folder, name)
            kernel.unmount_all(at)
            # never recursively: were it still mounted, an image's files would be in reach
            os.rmdir(at)
        os.rmdir(folder)


def _below(root: str, sub_path: str) -> str:
    """A path in the image; symbolic links lead nowhere but into it, and nobody can write there."""
    if os.path.isabs(sub_path) or ".." in sub_path.split("/"):
        raise InvalidArgument(f"image_sub_path {sub_path!r} must be relative, without ..: invalid argument")
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = sc.openat2(folder, sub_path, os.O_PATH | os.O_CLOEXEC, resolve=sc.RESOLVE_IN_ROOT | sc.RESOLVE_NO_XDEV)
    except OSError as error:
        raise NotFound(f"image_sub_path {sub_path!r} in the image: {error.strerror}: not found") from error
    finally:
        os.close(folder)
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
