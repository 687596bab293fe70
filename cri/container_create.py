"""CreateContainer: from the kubelet's configuration to a record and a snapshot; the task comes with StartContainer.

The record is written first and names its snapshot, so that the collector spares the snapshot from its first moment on.
What was made is taken back where a later step fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import posixpath
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog

from wherry.client import copies, users
from wherry.client.containers import Container
from wherry.client.spec_defaults import default_spec
from wherry.client.users import User
from wherry.client.values import Mount
from wherry.core import container_logs
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound, WherryError
from wherry.core.failpoints import reach
from wherry.core.labels import LOG_URI, MAX_LABEL, OWN
from wherry.cri import container_restore, container_security
from wherry.cri.container_restore import Restored
from wherry.cri.container_spec import Making, build
from wherry.cri.handlers import choose
from wherry.cri.records import KIND, NAMESPACE, READY, Member, MemberFacts, Pod, member_name
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from wherry.cri.image_store import LocalImage
    from wherry.cri.node import Node
    from wherry.cri.settings import Settings

log = structlog.get_logger(__name__)

# what the daemon does for a container by itself: nothing that an image may ask for
_NOT_FROM_IMAGES = (OWN, "containerd.io/restart.")
# users that were looked up, by image and what was asked; an image's files don't change
_USERS_KEPT = 512
# in a record's facts: it is to be started from a checkpoint
RESTORED = "restored"
# in a record's facts: its specification isn't the container's yet
_HALF = "half"
# the label that has a snapshot's owners mapped: wherry.snapshotter.remap reads it
_MAPPED = ("containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping")


class Maker:
    """Makes containers of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._users: dict[tuple[Any, ...], User] = {}

    async def create(self, request: cri.CreateContainerRequest) -> Member:
        """A container of a pod, recorded and with a snapshot, not yet running.

        Raises NotFound for the pod, the image or a name in it, AlreadyExists where the name is taken, InvalidArgument,
        FailedPrecondition.
        """
        records, config = self._node.records, request.config
        if not config.metadata.name:
            raise InvalidArgument("container config must include metadata with a name: invalid argument")
        pod = records.pod(request.pod_sandbox_id)
        if pod.facts.state != READY:
            raise FailedPrecondition(f'sandbox container "{pod.id}" is not running: failed precondition')
        identity = os.urandom(32).hex()
        name = member_name(config.metadata, pod.config.metadata)
        records.reserve_member(name, identity)
        try:
            return await self._create(identity, name, pod, config)
        except BaseException:
            records.release_member(name, identity)
            raise

    async def _create(self, identity: str, name: str, pod: Pod, config: cri.ContainerConfig) -> Member:
        handler = choose(self._node.settings, pod.facts.handler).handler
        snapshotter = pod.facts.snapshotter or handler.snapshotter or self._node.settings.default_snapshotter
        image, restored = None, None
        if not config.image.image.startswith("/"):
            image = await self._image(config)
        if image is None or container_restore.is_checkpoint(image):
            restored = await self._restored(identity, config, image, snapshotter)
            config, image = restored.config, restored.image
        member = Member(identity, config)
        member.facts = MemberFacts(
            name=name,
            pod=pod.id,
            image=config.image.user_specified_image or config.image.image,
            image_ref=image.id,
            image_id=image.id,
            created_at=time.time_ns(),
            stop_signal=_stop_signal(config, image.picture.settings),
            log_path=_log_path(pod.config.log_directory, config.log_path),
            snapshotter=snapshotter,
            snapshot=identity,
            more={RESTORED: True} if restored else {},
        )
        making = Making(
            id=identity,
            pod=pod,
            config=await self._with_image_mounts(pod, config, snapshotter),
            image=image.picture.settings,
            image_name=member.facts.image,
            folder=self._node.places.pod(pod.id),
            settings=self._node.settings,
            handler=handler,
            target_pid=self._target(pod, config),
        )
        try:
            await self._record(member, making, image, restored)
        except BaseException:
            await asyncio.shield(self.take_back(member))
            raise
        self._node.records.add_member(member)
        return member

    async def _restored(
        self, identity: str, config: cri.ContainerConfig, held: LocalImage | None, snapshotter: str
    ) -> Restored:
        """A checkpoint that was asked for in place of an image."""
        folder = self.restored(identity)
        try:
            return await container_restore.unpacked(self._node, config, held, snapshotter, folder)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, self.folder(identity), ignore_errors=True)
            raise

    async def _image(self, config: cri.ContainerConfig) -> LocalImage:
        try:
            found: LocalImage = await self._node.images.quick(config.image.image)
        except NotFound as error:
            raise NotFound(f'failed to resolve image "{config.image.image}": {error.message}') from error
        return found

    async def _with_image_mounts(self, pod: Pod, config: cri.ContainerConfig, snapshotter: str) -> cri.ContainerConfig:
        """The configuration with image volumes mounted on the host, as binds of those folders; they are read-only."""
        if not any(mount.image.image for mount in config.mounts):
            return config
        changed = cri.ContainerConfig()
        changed.CopyFrom(config)
        for mount in changed.mounts:
            if mount.image.image:
                mount.host_path = await self._node.images.volumes.mount(
                    pod.id, mount.image.image, mount.image_sub_path, snapshotter
                )
                mount.readonly = True
                # an overlay can't be mapped; where ids are, the files are nobody's, and read as others may
                del mount.uidMappings[:], mount.gidMappings[:]
        return changed

    def _target(self, pod: Pod, config: cri.ContainerConfig) -> int:
        """The process whose PID namespace is joined, 0 where none is asked for."""
        options = config.linux.security_context.namespace_options
        if options.pid != cri.TARGET:
            return 0
        target = self._node.records.member(options.target_id)
        if target.facts.pod != pod.id:
            raise InvalidArgument(
                f'container "{target.id}" (target) and the container are of different sandboxes: invalid argument'
            )
        if target.state != cri.CONTAINER_RUNNING or not target.facts.pid:
            raise FailedPrecondition(f'container "{target.id}" (target) is not running: failed precondition')
        return target.facts.pid

    async def _record(self, member: Member, making: Making, image: LocalImage, restored: Restored | None) -> None:
        """The record, the snapshot, and what depends on the image's files."""
        client, pod = self._node.client, making.pod
        facts = member.facts
        key = self._user_key(making, image)
        known = self._users.get(key)
        making = replace(making, user=known) if known is not None else making
        ignored = self._node.settings.ignore_image_defined_volumes
        declared = {} if ignored else _volumes(making, self.folder(member.id))
        # without the image's files the specification isn't complete, and the record goes first all the same
        final = known is not None and not declared and restored is None
        facts.more[_HALF] = not final
        chosen = choose(self._node.settings, pod.facts.handler)
        spec = await _built(making) if final else default_spec(NAMESPACE, member.id)
        record = Container(
            id=member.id,
            image=image.references[0] if image.references else image.id,
            labels=_labels(making, log_uri(facts, self._node.settings)),
            runtime=chosen.runtime,
            runtime_options=chosen.options,
            spec=spec,
            snapshotter=facts.snapshotter,
            snapshot_key=facts.snapshot,
            sandbox="" if pod.facts.more.get("apart") else pod.id,  # another's shim finds its pod by annotations
            extensions=self._noted(member, making),
        )
        await client.containers.create(record)
        reach("cri.create.recorded")
        mounts = await self._prepare(member, pod, image)
        reach("cri.create.prepared")
        member.transient["mounts"] = mounts
        if final:
            return
        if restored is not None:
            await container_restore.apply(client, restored, mounts, member.id)
        user = known or container_security.user(making.context, making.image, users.reader(mounts))
        self._keep_user(key, user)
        extra = [await self._volume(member, place, source, mounts) for place, source in declared.items()]
        making = replace(making, user=user, mounts=tuple(extra))
        spec = await _built(making)
        if restored is not None:
            container_restore.check_mounts(restored, spec)
            await asyncio.to_thread(container_restore.keep_log, restored.folder, facts.log_path)
        del facts.more[_HALF]
        record = record._replace(spec=spec, extensions=self._noted(member, making))
        await client.containers.update(record, ["spec", "extensions"])

    def _noted(self, member: Member, making: Making) -> Mapping[str, Any]:
        """The record's extensions, with the user for the status."""
        user = making.user
        member.facts.more["user"] = [user.uid, user.gid, list(user.groups)]
        return member.extensions()

    def _user_key(self, making: Making, image: LocalImage) -> tuple[Any, ...]:
        context = making.context
        name = container_security.user_name(context, making.image)
        return image.id, name, context.supplemental_groups_policy, tuple(context.supplemental_groups)

    def _keep_user(self, key: tuple[Any, ...], user: User) -> None:
        if len(self._users) >= _USERS_KEPT:
            self._users.pop(next(iter(self._users)))
        self._users[key] = user

    async def _prepare(self, member: Member, pod: Pod, image: LocalImage) -> list[Mount]:
        facts = member.facts
        snapshots = self._node.client.snapshots(facts.snapshotter)
        labels = {}
        if pod.facts.uid_map:
            for label, ranges in zip(_MAPPED, (pod.facts.uid_map, pod.facts.gid_map), strict=True):
                labels[label] = ",".join(":".join(map(str, entry)) for entry in ranges)
        try:
            return await snapshots.prepare(facts.snapshot, image.picture.chain_id, labels)
        except NotFound:
            chain = await self._node.images.unpacked(image, facts.snapshotter)
            return await snapshots.prepare(facts.snapshot, chain, labels)

    async def _volume(self, member: Member, place: str, source: str, mounts: list[Mount]) -> cri.Mount:
        """A folder for a volume that the image declares, with what the image has there."""
        await asyncio.to_thread(_fill, source, place, mounts)
        facts = self._node.records.pod(member.facts.pod).facts
        maps = [[cri.IDMapping(container_id=a, host_id=b, length=size) for a, b, size in ranges]
                for ranges in (facts.uid_map, facts.gid_map)]  # fmt: skip
        return cri.Mount(
            container_path=place, host_path=source, selinux_relabel=True, uidMappings=maps[0], gidMappings=maps[1]
        )

    async def sweep(self) -> None:
        """Take back what a killed daemon left half made: nobody was told of such a container."""
        for member in list(self._node.records.members.values()):
            if member.state == cri.CONTAINER_CREATED and await self._is_half(member):
                log.info("a container that was half made is removed", id=member.id, name=member.facts.name)
                await self.take_back(member)
                self._node.records.drop_member(member)

    async def _is_half(self, member: Member) -> bool:
        if member.facts.more.get(_HALF):
            return True
        try:
            await self._node.client.snapshots(member.facts.snapshotter).stat(member.facts.snapshot)
        except NotFound:
            return True
        except WherryError as error:
            log.warning("a container's snapshot is unknown", id=member.id, error=error.message)
        return False

    async def take_back(self, member: Member) -> None:
        """Remove what was made of a container: record, snapshot, folder. What isn't there is fine."""
        client = self._node.client.tidying()
        with contextlib.suppress(WherryError):
            await client.snapshots(member.facts.snapshotter).remove(member.facts.snapshot)
        with contextlib.suppress(WherryError):
            await client.containers.delete(member.id)
        await self.remove_folder(member)

    async def remove_folder(self, member: Member) -> None:
        """Remove what a container keeps on disk; most have nothing there."""
        path = self.folder(member.id)
        if os.access(path, os.F_OK):  # a look into the kernel's cache, and mostly nothing more
            await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    def restored(self, identity: str) -> str:
        """Where the checkpoint lies that a container is to be started from."""
        return os.path.join(self.folder(identity), "restore")

    def folder(self, identity: str) -> str:
        """Where a container keeps what is to last; most have nothing there."""
        return os.path.join(self._node.places.root, "cri", "containers", identity)


async def _built(making: Making) -> dict[str, Any]:
    """The specification; in a thread where files of the host are looked at, which may be those of a dead server."""
    if making.config.mounts or making.config.devices or making.context.privileged:
        return await asyncio.to_thread(build, making)
    return build(making)


def _log_path(folder: str, name: str) -> str:
    """Where its output goes, "" for nowhere: without a pod's folder a relative name says nothing."""
    path = posixpath.join(folder, name) if name else ""
    return path if path.startswith("/") else ""


def log_uri(facts: MemberFacts, settings: Settings) -> str:
    """Where the shim writes its output; without a path it can be attached to all the same."""
    return container_logs.cri_uri(facts.log_path, settings.max_container_log_line_size)


def _stop_signal(config: cri.ContainerConfig, settings: Mapping[str, Any]) -> str:
    """The name of the signal that ends it: the kubelet's, else the image's, else SIGTERM."""
    if config.stop_signal != cri.RUNTIME_DEFAULT:
        return cri.Signal.Name(config.stop_signal).replace("PLUS", "+").replace("MINUS", "-")
    return str(settings.get("StopSignal") or "SIGTERM")


def _labels(making: Making, log_uri: str) -> dict[str, str]:
    """The image's, the kubelet's, what the record is, and where other clients of the daemon find the log."""
    found = {
        str(key): str(value)
        for key, value in (making.image.get("Labels") or {}).items()
        if not str(key).startswith(_NOT_FROM_IMAGES) and len(str(key)) + len(str(value)) <= MAX_LABEL
    }
    found |= {**making.config.labels, KIND: "container"}
    if container_logs.cri_path_of(log_uri) and len(LOG_URI) + len(log_uri.encode()) <= MAX_LABEL:
        found[LOG_URI] = log_uri
    return found


def _volumes(making: Making, folder: str) -> dict[str, str]:
    """Where the image declares volumes that the kubelet mounts nothing at, and a folder of the host for each."""
    taken = {posixpath.normpath(mount.container_path) for mount in making.config.mounts}
    places = [posixpath.normpath(f"/{place}") for place in making.image.get("Volumes") or {}]
    places = sorted({"/" + place.lstrip("/") for place in places} - {"/"} - taken)
    return {place: os.path.join(folder, "volumes", str(number)) for number, place in enumerate(places)}


def _fill(source: str, place: str, mounts: list[Mount]) -> None:
    os.makedirs(source, mode=0o755, exist_ok=True)
    copies.fill(source, mounts, place)
