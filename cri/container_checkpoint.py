"""CheckpointContainer: a running container's state as an archive, in the layout that CRI-O and containerd write.

spec.dump       the OCI specification               config.dump     what the container is (JSON)
checkpoint/     criu's images                       status.dump     its status
rootfs-diff.tar what it changed in its files        dump.log        criu's log, where it wrote one
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict

from wherry.client.runtimes import checkpoint_options
from wherry.core.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, WherryError
from wherry.core.mediatypes import OCI_LAYER
from wherry.cri import container_status
from wherry.cri.records import Member

if TYPE_CHECKING:
    from wherry.cri.node import Node

# seconds, where the request says 0: the kubelet's limit for a checkpoint is its caller's
_SECONDS = 300.0


async def checkpoint(node: Node, member: Member, location: str, seconds: int) -> None:
    """Write the archive to `location`, an absolute path. The container runs on; nothing is left where this fails.

    Raises InvalidArgument, FailedPrecondition with criu's words, DeadlineExceeded after `seconds` (0: 5 minutes).
    """
    if not location.startswith("/"):
        raise InvalidArgument(f"checkpoint location {location!r} isn't an absolute path: invalid argument")
    if seconds < 0:
        raise InvalidArgument(f"timeout {seconds} is negative: invalid argument")
    limit = seconds or _SECONDS
    parent = os.path.join(node.places.root, "cri", "checkpoints")
    os.makedirs(parent, 0o700, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f"{member.id[:12]}-", dir=parent)
    try:
        async with asyncio.timeout(limit):
            await _dump(node, member, folder)
            await asyncio.to_thread(_archive, folder, location)
    except TimeoutError:
        raise DeadlineExceeded(
            f'checkpointing container "{member.id}" takes longer than {limit:g} s: deadline exceeded'
        ) from None
    except OSError as error:
        raise FailedPrecondition(f"can't write the checkpoint {location}: {error.strerror or error}") from error
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _dump(node: Node, member: Member, folder: str) -> None:
    client = node.client
    images = os.path.join(folder, "checkpoint")
    os.mkdir(images, 0o700)
    options = checkpoint_options(leave=True, images=images)
    try:
        await client.tasks.checkpoint(member.id, options)
    except WherryError as error:
        raise type(error)(f'failed to checkpoint container "{member.id}": {error.message}') from error
    record = await client.containers.get(member.id)
    facts = member.facts
    documents: dict[str, Any] = {
        "spec.dump": record.spec,
        "config.dump": {
            "id": member.id,
            "name": member.config.metadata.name,
            "rootfsImage": facts.image,
            "rootfsImageRef": facts.image_ref,
            "runtime": record.runtime,
            "createdTime": facts.created_at,
            "checkpointedTime": facts.started_at,
        },
        "status.dump": MessageToDict(container_status.plain(member), preserving_proto_field_name=True),
    }
    await asyncio.to_thread(_write, folder, documents)
    await _files(node, member, os.path.join(folder, "rootfs-diff.tar"))


async def _files(node: Node, member: Member, path: str) -> None:
    """What the container changed, as a layer. It is in the content store for a moment, under a lease."""
    facts = member.facts
    async with node.client.lease() as client:
        snapshots = client.snapshots(facts.snapshotter)
        parent = (await snapshots.stat(facts.snapshot)).parent
        upper = await snapshots.mounts(facts.snapshot)
        view = f"{facts.snapshot}-checkpoint"
        lower = await snapshots.view(view, parent)
        try:
            layer = await client.diff.compute(lower, upper, media_type=OCI_LAYER)
        finally:
            await snapshots.remove(view)
        file = await asyncio.to_thread(open, path, "wb")
        with file:
            async for chunk in client.content.read(layer.digest):
                await asyncio.to_thread(file.write, chunk)


def _write(folder: str, documents: Mapping[str, Any]) -> None:
    for name, document in documents.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(document, file)


def _archive(folder: str, location: str) -> None:
    temporary = f"{location}.part"
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            for name in sorted(os.listdir(folder)):
                archive.add(os.path.join(folder, name), arcname=name)
        os.chmod(temporary, 0o600)
        os.rename(temporary, location)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
