"""CheckpointContainer: a running container's state as an archive, in the layout that CRI-O and containerd write.

spec.dump       the OCI specification               config.dump     what the container is (JSON)
checkpoint/     criu's images                       status.dump     its status (JSON, as Go writes it)
rootfs-diff.tar what it changed in its files        container.log   what it has said
dump.log        criu's log                          stats-dump      criu's figures

`container_restore.py` is the way back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from wherry.client.runtimes import checkpoint_options
from wherry.core.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, WherryError
from wherry.core.mediatypes import OCI_LAYER
from wherry.cri import container_restore
from wherry.cri.records import Member
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message

    from wherry.cri.node import Node

# what criu writes beside its images, and tools around it read
_KEPT = ("dump.log", "stats-dump")
# seconds, where the request says 0: the kubelet's limit for a checkpoint is its caller's
_SECONDS = 300.0


async def checkpoint(node: Node, member: Member, shown: cri.ContainerStatus, location: str, seconds: int) -> None:
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
            await _dump(node, member, shown, folder)
            await asyncio.to_thread(_archive, folder, location)
    except TimeoutError:
        raise DeadlineExceeded(
            f'checkpointing container "{member.id}" takes longer than {limit:g} s: deadline exceeded'
        ) from None
    except OSError as error:
        raise FailedPrecondition(f"can't write the checkpoint {location}: {error.strerror or error}") from error
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _dump(node: Node, member: Member, shown: cri.ContainerStatus, folder: str) -> None:
    """Processes and files of one moment: criu refuses to restore a process whose open files have another size."""
    tasks = node.client.tasks
    now = datetime.now(UTC)
    paused = False
    try:
        await tasks.pause(member.id)
        paused = True
        await _processes(node, member, folder)
        await _files(node, member, os.path.join(folder, container_restore.FILES))
    except WherryError as error:
        raise type(error)(f'failed to checkpoint container "{member.id}": {error.message}') from error
    finally:
        if paused:
            await node.client.tidying().tasks.resume(member.id)
    record = await node.client.containers.get(member.id)
    documents: dict[str, Any] = {
        container_restore.SPEC: record.spec,
        container_restore.CONFIG: {
            "id": member.id,
            "name": member.config.metadata.name,
            "rootfsImage": shown.image.image,
            "rootfsImageName": shown.image.image,
            "rootfsImageRef": shown.image_ref,
            "runtime": record.runtime,
            "createdTime": datetime.fromtimestamp(member.facts.created_at / 1e9, UTC).isoformat(),
            "checkpointedTime": now.isoformat(),
            "restoredTime": "0001-01-01T00:00:00Z",
            "restored": False,
        },
        container_restore.STATUS: _plain(shown),
    }
    await asyncio.to_thread(_write, folder, documents, member.facts.log_path)


async def _processes(node: Node, member: Member, folder: str) -> None:
    images, work = os.path.join(folder, container_restore.IMAGES), os.path.join(folder, "work")
    os.mkdir(images, 0o700)
    os.mkdir(work, 0o700)
    try:
        await node.client.tasks.checkpoint(member.id, checkpoint_options(leave=True, images=images, work=work))
        for name in _KEPT:
            with contextlib.suppress(FileNotFoundError):
                os.rename(os.path.join(work, name), os.path.join(folder, name))
    finally:
        await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)


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


def _plain(message: Message) -> dict[str, Any]:
    """A message as Go's encoding/json writes it, which is what other projects read: numbers, also of enums."""

    def value(field: FieldDescriptor, given: Any) -> Any:
        return _plain(given) if field.type == field.TYPE_MESSAGE else given

    found: dict[str, Any] = {}
    for field, given in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            found[field.name] = dict(given)
        elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
            found[field.name] = [value(field, item) for item in given]
        else:
            found[field.name] = value(field, given)
    return found


def _write(folder: str, documents: Mapping[str, Any], log: str) -> None:
    for name, document in documents.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(document, file)
    if log and os.path.exists(log):
        shutil.copyfile(log, os.path.join(folder, container_restore.LOG))


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
