"""Volumes: folders that outlive containers, `ROOT/volumes/NAMESPACE/NAME/_data`.

What is known of one is in the file `volume.json` beside the data. It is written last and removed first, so that a crash
leaves a folder without it, never a record without a folder; such folders are removed at the start. Who uses a volume is
asked of the containers' records (their label `wherry/mounts`), which outlive everything else.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from google.protobuf import empty_pb2

from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound
from wherry.core.labels import CONTAINER_NAME, MOUNTS, check_labels
from wherry.daemon.containers import ContainerStore
from wherry.daemon.fields import timestamp
from wherry.daemon.namespaces import require_namespace
from wherry.proto import volumes_pb2 as pb
from wherry.proto.service import Context

log = structlog.get_logger(__name__)

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,254}")
_RECORD, _DATA = "volume.json", "_data"


class VolumeStore:
    """The volumes of one daemon. Its methods block on the disk: the service calls them in a thread."""

    def __init__(self, root: str) -> None:
        """`root` is made where it isn't there; what an earlier daemon left half-made or half-removed goes."""
        self._root = root
        os.makedirs(root, mode=0o711, exist_ok=True)
        self._sweep()

    def create(self, namespace: str, name: str, labels: Mapping[str, str], options: Mapping[str, str]) -> pb.Volume:
        """Make a volume, "" has a name made up; one that is there is returned as it is. Raises InvalidArgument."""
        if options:
            raise InvalidArgument(
                f"volume option {next(iter(options))!r}: volumes are folders of the daemon; mount what you need with "
                "--mount type=…,src=…"
            )
        check_labels(labels)
        anonymous = not name
        name = name or os.urandom(32).hex()
        folder = self._folder(namespace, name)
        with contextlib.suppress(NotFound):
            return self.get(namespace, name)
        os.makedirs(os.path.join(folder, _DATA), mode=0o755, exist_ok=True)
        os.chmod(folder, 0o711)
        record = {"labels": dict(labels), "created": time.time_ns(), "anonymous": anonymous}
        beside = os.path.join(folder, f".{_RECORD}.{os.urandom(4).hex()}")
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, os.path.join(folder, _RECORD))
        _sync(folder)
        return self.get(namespace, name)

    def get(self, namespace: str, name: str) -> pb.Volume:
        """Raises NotFound."""
        folder = self._folder(namespace, name)
        try:
            with open(os.path.join(folder, _RECORD), encoding="utf-8") as file:
                record: dict[str, Any] = json.load(file)
        except (OSError, ValueError):
            raise NotFound(f"no such volume: {name} ('wherry volume ls' lists them)") from None
        return pb.Volume(
            name=name,
            labels=record.get("labels") or {},
            mountpoint=os.path.join(folder, _DATA),
            created_at=timestamp(int(record.get("created") or 0)),
            anonymous=bool(record.get("anonymous")),
        )

    def list(self, namespace: str) -> Sequence[pb.Volume]:
        """All of a namespace, by name."""
        found = []
        for name in sorted(_names(os.path.join(self._root, namespace))):
            with contextlib.suppress(NotFound, InvalidArgument):
                found.append(self.get(namespace, name))
        return found

    def remove(self, namespace: str, name: str) -> None:
        """Remove one with what is in it; who uses it is the caller's question. Raises NotFound."""
        self.get(namespace, name)
        folder = self._folder(namespace, name)
        os.unlink(os.path.join(folder, _RECORD))
        _sync(folder)
        shutil.rmtree(folder, ignore_errors=True)

    def usage(self, namespace: str, name: str) -> int:
        """Bytes on disk. Raises NotFound."""
        total, seen = 0, set()
        for folder, folders, files in os.walk(self.get(namespace, name).mountpoint):
            for entry in (*folders, *files):
                with contextlib.suppress(OSError):
                    info = os.lstat(os.path.join(folder, entry))
                    if info.st_nlink > 1 and (info.st_dev, info.st_ino) in seen:
                        continue
                    seen.add((info.st_dev, info.st_ino))
                    total += info.st_blocks * 512
        return total

    def _folder(self, namespace: str, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise InvalidArgument(
                f"invalid volume name {name!r}: two characters or more of letters, digits, '_', '.' and '-', "
                "a letter or digit first"
            )
        return os.path.join(self._root, namespace, name)

    def _sweep(self) -> None:
        for namespace in _names(self._root):
            for name in _names(os.path.join(self._root, namespace)):
                folder = os.path.join(self._root, namespace, name)
                if not os.path.exists(os.path.join(folder, _RECORD)):
                    log.info("half a volume removed", folder=folder)
                    shutil.rmtree(folder, ignore_errors=True)


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class VolumeService:
    """wherry.volumes.v1."""

    SERVICE = "wherry.volumes.v1.Volumes"

    def __init__(self, store: VolumeStore, containers: ContainerStore) -> None:
        self._store = store
        self._containers = containers
        # a removal and the question who uses it, one at a time
        self._lock = asyncio.Lock()

    async def create(self, request: pb.CreateVolumeRequest, context: Context) -> pb.VolumeResponse:
        """A new one, or the one of that name."""
        namespace = require_namespace(context)
        async with self._lock:
            volume = await asyncio.to_thread(
                self._store.create, namespace, request.name, dict(request.labels), dict(request.options)
            )
        return pb.VolumeResponse(volume=volume)

    async def get(self, request: pb.GetVolumeRequest, context: Context) -> pb.VolumeResponse:
        """One volume, with who uses it."""
        namespace = require_namespace(context)
        volume = self._store.get(namespace, request.name)
        volume.containers.extend((await self._users(namespace)).get(request.name, ()))
        return pb.VolumeResponse(volume=volume)

    async def list(self, request: pb.ListVolumesRequest, context: Context) -> pb.ListVolumesResponse:
        """All of them, with who uses them."""
        namespace = require_namespace(context)
        volumes = await asyncio.to_thread(self._store.list, namespace)
        users = await self._users(namespace)
        for volume in volumes:
            volume.containers.extend(users.get(volume.name, ()))
        return pb.ListVolumesResponse(volumes=volumes)

    async def remove(self, request: pb.RemoveVolumeRequest, context: Context) -> empty_pb2.Empty:
        """One that no container names."""
        namespace = require_namespace(context)
        async with self._lock:
            self._store.get(namespace, request.name)
            users = (await self._users(namespace)).get(request.name)
            if users:
                raise FailedPrecondition(
                    f"volume {request.name} is in use by container {', '.join(item[:12] for item in users)}: "
                    "remove that first ('wherry rm')"
                )
            await asyncio.to_thread(self._store.remove, namespace, request.name)
        return empty_pb2.Empty()

    async def prune(self, request: pb.PruneVolumesRequest, context: Context) -> pb.PruneVolumesResponse:
        """Those that no container names."""
        namespace = require_namespace(context)
        answer = pb.PruneVolumesResponse()
        async with self._lock:
            users = await self._users(namespace)
            for volume in await asyncio.to_thread(self._store.list, namespace):
                if volume.name in users or not (request.all or volume.anonymous) or not _fits(volume, request.labels):
                    continue
                answer.freed += await asyncio.to_thread(self._store.usage, namespace, volume.name)
                await asyncio.to_thread(self._store.remove, namespace, volume.name)
                answer.names.append(volume.name)
        return answer

    async def usage(self, request: pb.GetVolumeRequest, context: Context) -> pb.VolumeUsageResponse:
        """What its files take."""
        namespace = require_namespace(context)
        return pb.VolumeUsageResponse(size=await asyncio.to_thread(self._store.usage, namespace, request.name))

    async def _users(self, namespace: str) -> dict[str, builtins.list[str]]:
        """Ids of the containers whose records name volumes, by the volume."""
        users: dict[str, builtins.list[str]] = {}
        for container in await self._containers.list(namespace, [f'labels."{CONTAINER_NAME}"']):
            for name in named_volumes(container.labels.get(MOUNTS, "")):
                users.setdefault(name, []).append(container.id)
        return users


def named_volumes(text: str, *, anonymous: bool = False) -> list[str]:
    """The volumes in a container's label `wherry/mounts`; with `anonymous` those alone that nobody named."""
    try:
        mounts = json.loads(text or "{}").get("mounts") or ()
    except (ValueError, AttributeError):
        return []
    return [
        str(mount["Name"])
        for mount in mounts
        if isinstance(mount, dict) and mount.get("Name") and (mount.get("Anonymous") or not anonymous)
    ]


def _fits(volume: pb.Volume, labels: Sequence[str]) -> bool:
    for item in labels:
        key, equals, value = item.partition("=")
        if key not in volume.labels or (equals and volume.labels[key] != value):
            return False
    return True
