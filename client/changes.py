"""What a container changed in its file system, as docker's `diff` shows it."""

from __future__ import annotations

import os
import tarfile
from typing import TYPE_CHECKING

from wherry.client.users import layers
from wherry.core.errors import FailedPrecondition
from wherry.core.mediatypes import OCI_LAYER
from wherry.core.tuples import NamedTuple

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.containers import Container
    from wherry.client.content import Content
    from wherry.core.descriptor import Descriptor

_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"


class Change(NamedTuple):
    """`kind` is A (added), C (changed) or D (deleted); `path` is absolute."""

    kind: str
    path: str


async def changes(client: Client, container: Container) -> list[Change]:
    """The changes, by path. The daemon computes them as a layer, which the collector takes away again."""
    if not container.snapshot_key:
        raise FailedPrecondition(f"container {container.id} has no snapshot that its changes could be told from")
    snapshots = client.snapshots(container.snapshotter)
    info = await snapshots.stat(container.snapshot_key)
    upper = await snapshots.mounts(container.snapshot_key)
    async with client.lease() as leased:
        key = f"diff-{os.urandom(6).hex()}"
        lower = await leased.snapshots(container.snapshotter).view(key, info.parent) if info.parent else []
        try:
            layer = await leased.diff.compute(lower, upper, media_type=OCI_LAYER, ref=key)
            return await _read(leased.content, layer, layers(lower))
        finally:
            if lower:
                await leased.snapshots(container.snapshotter).remove(key)


async def _read(content: Content, layer: Descriptor, below: list[str]) -> list[Change]:
    import io

    data = io.BytesIO(await content.blob(layer.digest))
    found: dict[str, Change] = {}
    with tarfile.open(fileobj=data, mode="r:*") as archive:
        for member in archive:
            path = "/" + member.name.strip("./").rstrip("/") if member.name.strip("./") else "/"
            folder, _, name = path.rpartition("/")
            if name == _OPAQUE:
                continue
            if name.startswith(_WHITEOUT):
                gone = f"{folder}/{name.removeprefix(_WHITEOUT)}"
                found[gone] = Change("D", gone)
            elif path != "/":
                found[path] = Change("C" if _was_there(below, path) else "A", path)
    return [found[path] for path in sorted(found)]


def _was_there(below: list[str], path: str) -> bool:
    """Whether a path is in the layers below, the topmost of which says."""
    for folder in below:
        try:
            info = os.lstat(f"{folder}{path}")
        except FileNotFoundError:
            continue
        except OSError:
            return False
        # a whiteout: a device 0/0
        return not (info.st_rdev == 0 and info.st_mode & 0o170000 == 0o020000)
    return False
