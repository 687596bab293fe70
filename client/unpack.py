"""Layers made into snapshots, step by step over the API: for daemons and images that nobody unpacked before."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from wherry.core.digest import chain_ids
from wherry.core.errors import AlreadyExists, DataLoss, InvalidArgument, NotFound, WherryError
from wherry.core.labels import GC_REF_SNAPSHOT, SNAPSHOT_REF, UNCOMPRESSED

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.manifests import Picture
    from wherry.client.snapshots import Snapshots
    from wherry.core.descriptor import Descriptor


async def unpacked(client: Client, picture: Picture, snapshotter: str) -> bool:
    """Whether the snapshot with all layers of the image is there."""
    if not picture.diff_ids:
        return True
    try:
        await client.snapshots(snapshotter).stat(picture.chain_id)
    except NotFound:
        return False
    return True


async def unpack(client: Client, picture: Picture, snapshotter: str) -> str:
    """Makes the snapshots of an image's layers and returns the name (chain id) of the topmost.

    Those that are there are used. Raises NotFound for a layer that isn't in the store, DataLoss for one whose content
    isn't what the image's configuration says.
    """
    if len(picture.layers) != len(picture.diff_ids):
        raise InvalidArgument(
            f"manifest {picture.manifest.digest} has {len(picture.layers)} layers, its configuration "
            f"{len(picture.diff_ids)} diff ids"
        )
    async with client.lease() as leased:
        parent = ""
        for layer, diff_id, chain in zip(picture.layers, picture.diff_ids, chain_ids(picture.diff_ids), strict=True):
            await _layer(leased, leased.snapshots(snapshotter), layer, diff_id, (parent, chain))
            parent = chain
        # what keeps the snapshots from the garbage collector as long as the image is there
        await leased.content.label(picture.config.digest, {f"{GC_REF_SNAPSHOT}.{snapshotter}": parent})
    return parent


async def _layer(
    client: Client, snapshots: Snapshots, layer: Descriptor, diff_id: str, chains: tuple[str, str]
) -> None:
    """One layer; `chains` are the snapshot below it and the one that it becomes."""
    parent, chain = chains
    try:
        await snapshots.stat(chain)
    except NotFound:
        pass
    else:
        return
    key = f"extract-{os.urandom(6).hex()} {chain}"
    try:
        mounts = await snapshots.prepare(key, parent, {SNAPSHOT_REF: chain})
    except AlreadyExists:
        # a snapshotter that knows the layer already (by the label) has committed it
        await snapshots.stat(chain)
        return
    try:
        applied = await client.diff.apply(layer, mounts)
        if applied.digest != diff_id:
            raise DataLoss(f"layer {layer.digest} unpacks to {applied.digest}, the image says {diff_id}")
        await client.content.label(layer.digest, {UNCOMPRESSED: diff_id})
        await snapshots.commit(chain, key)
    except BaseException as error:
        with contextlib.suppress(WherryError):
            await snapshots.remove(key)
        # somebody else may have been quicker: then the layer is there all the same
        if not isinstance(error, AlreadyExists):
            raise
