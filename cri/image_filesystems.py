"""How much the node's images and containers take of the disk, by the snapshotter's folder."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from wherry.core.errors import NotFound, WherryError
from wherry.cri.image_settings import ImageSettings
from wherry.proto import cri_pb2 as pb

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.snapshots import Usage

_SNAPSHOTTERS = "type==io.containerd.snapshotter.v1"


class Filesystems:
    """Usages by snapshotter. What is committed never changes and is asked for once."""

    def __init__(self, client: Client, settings: ImageSettings) -> None:
        self._client = client
        self._settings = settings
        self._committed: dict[tuple[str, str], Usage] = {}
        self._active: dict[tuple[str, str], tuple[float, Usage]] = {}
        self._roots: dict[str, str] = {}

    async def info(self) -> pb.ImageFsInfoResponse:
        """Of each snapshotter in use one entry: committed layers for images, all others for containers."""
        response = pb.ImageFsInfoResponse()
        for name in dict.fromkeys([self._settings.snapshotter, *self._settings.snapshotters.values()]):
            at = await self.root(name)
            images, containers = await self._sums(name)
            for entries, (size, inodes) in (
                (response.image_filesystems, images),
                (response.container_filesystems, containers),
            ):
                entry = entries.add(timestamp=time.time_ns())
                entry.fs_id.mountpoint = at
                entry.used_bytes.value = size
                entry.inodes_used.value = inodes
        return response

    async def root(self, snapshotter: str) -> str:
        """The folder that a snapshotter keeps its files in; "" for one that doesn't say."""
        if snapshotter not in self._roots:
            root = self._settings.roots.get(snapshotter, "")
            if not root:
                plugins = await self._client.introspection.plugins([f"{_SNAPSHOTTERS},id=={snapshotter}"])
                root = next((plugin.exports.get("root", "") for plugin in plugins), "")
            self._roots[snapshotter] = root
        return self._roots[snapshotter]

    async def writable(self, snapshotter: str, key: str) -> Usage:
        """What a container's own layer uses, not older than `collect_seconds`: measuring walks it. Raises NotFound."""
        known = self._active.get((snapshotter, key))
        if known is None or known[0] + self._settings.collect_seconds < time.monotonic():
            known = (time.monotonic(), await self._client.snapshots(snapshotter).usage(key))
            self._active[snapshotter, key] = known
        return known[1]

    async def _sums(self, snapshotter: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Bytes and inodes of committed snapshots, and of the others."""
        try:
            found = [item async for item in self._client.snapshots(snapshotter).list()]
        except WherryError:
            # configured for a handler, and not there
            return (0, 0), (0, 0)
        names = {(snapshotter, item.name) for item in found}
        for cache in (self._committed, self._active):
            for key in [key for key in cache if key[0] == snapshotter and key not in names]:
                cache.pop(key)
        images, containers = (0, 0), (0, 0)
        for item in found:
            try:
                if item.kind == "Committed":
                    usage = self._committed.get((snapshotter, item.name))
                    if usage is None:
                        usage = await self._client.snapshots(snapshotter).usage(item.name)
                        self._committed[snapshotter, item.name] = usage
                    images = (images[0] + usage.size, images[1] + usage.inodes)
                else:
                    usage = await self.writable(snapshotter, item.name)
                    containers = (containers[0] + usage.size, containers[1] + usage.inodes)
            except NotFound:
                continue  # removed meanwhile
        return images, containers
