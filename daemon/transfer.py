"""Images from one kind of place to another, moved by the daemon: `containerd.services.transfer.v1`.

Registry to image store (pull), back (push), archive to image store (import), back (export), one name to another (tag).
Events and rules are those of containerd's `core/transfer`. Registry to registry (copy) is an addition of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from wherry.core import mediatypes, reference, typeurl
from wherry.core.descriptor import Descriptor
from wherry.core.errors import DeadlineExceeded, InvalidArgument, NotFound, Unavailable, Unimplemented
from wherry.core.labels import GC_EXPIRE, MAX_LABEL
from wherry.core.platforms import host
from wherry.daemon.config import Limits
from wherry.daemon.config import Transfer as Options
from wherry.daemon.content import ContentStore
from wherry.daemon.images import ImageStore
from wherry.daemon.leases import LeaseStore
from wherry.daemon.namespaces import require_namespace
from wherry.daemon.snapshots import SnapshotStore
from wherry.daemon.streaming import ByteSender, StreamManager, receive_bytes
from wherry.daemon.transfer_image import Selection, from_proto, platform_from_proto, to_proto
from wherry.daemon.transfer_progress import Progress
from wherry.daemon.transfer_pull import Source, Tree, Unpack, Wanted
from wherry.daemon.transfer_registry import Registries
from wherry.daemon.transfer_sharing import Turns
from wherry.daemon.transfer_unpack import Unpacker
from wherry.proto import images_pb2, transfer_pb2
from wherry.proto import transfer_types_pb2 as types
from wherry.proto import wherry_registry_pb2 as registry_pb2
from wherry.proto.service import Context
from wherry.snapshotter.applier import Applier

# hours that a transfer's lease stays when the daemon dies in it, or a pull is interrupted
LEASE_HOURS = 24
# on the lease of a pull: what is pulled
PULLED = "wherry/pulled"

T = TypeVar("T", bound=Message)
Handler = Callable[["_Call", Message, Message], Awaitable[None]]


class _Call:
    """What belongs to one transfer."""

    def __init__(self, namespace: str, lease: str, progress: Progress) -> None:
        self.namespace = namespace
        self.lease = lease
        self.progress = progress


class TransferService:
    """containerd.services.transfer.v1."""

    SERVICE = "containerd.services.transfer.v1.Transfer"

    def __init__(
        self,
        *,
        content: ContentStore,
        images: ImageStore,
        leases: LeaseStore,
        snapshots: SnapshotStore,
        applier: Applier,
        streams: StreamManager,
        options: Options | None = None,
        limits: Limits | None = None,
        default_snapshotter: str = "overlayfs",
    ) -> None:
        self._content = content
        self._images = images
        self._leases = leases
        self._snapshots = snapshots
        self._streams = streams
        self._options = options or Options()
        self._default_snapshotter = default_snapshotter
        self._applier = applier
        self._limits = limits or Limits()
        # leases of transfers that are under way
        self._active: set[str] = set()
        self._turns = Turns()
        self.registries = Registries(streams, self._options, self._limits)
        self._unpacker = Unpacker(content, snapshots, applier, self._turns)
        self._downloads = asyncio.Semaphore(max(1, self._options.max_concurrent_downloads))
        self._uploads = asyncio.Semaphore(max(1, self._options.max_concurrent_uploaded_layers))
        self._handlers: dict[tuple[type[Message], type[Message]], Handler] = {
            (types.OCIRegistry, types.ImageStore): self._pull,
            (types.ImageStore, types.OCIRegistry): self._push,
            (types.ImageImportStream, types.ImageStore): self._import,
            (types.ImageStore, types.ImageExportStream): self._export,
            (types.ImageStore, types.ImageStore): self._tag,
            (types.OCIRegistry, types.OCIRegistry): self._copy,
            (registry_pb2.CopySource, types.OCIRegistry): self._copy,
        }

    async def transfer(self, request: transfer_pb2.TransferRequest, context: Context) -> Empty:
        """Do one transfer; returns when it is done. Raises Unimplemented for a pair of ends that isn't known."""
        namespace = require_namespace(context)
        name = request.options.progress_stream
        stream = self._streams.get(namespace, name) if name else None
        progress = Progress(stream)
        try:
            source, destination = typeurl.unpack(request.source), typeurl.unpack(request.destination)
            handler = self._handlers.get((type(source), type(destination)))
            if handler is None:
                names = f"{source.DESCRIPTOR.full_name} to {destination.DESCRIPTOR.full_name}"
                raise Unimplemented(f"transfer from {names} is not supported: not implemented")
            async with self._lease(namespace, context.lease, source) as lease, progress.ticking():
                await handler(_Call(namespace, lease, progress), source, destination)
        finally:
            # also after an error: the client waits for the end of it
            if stream is not None:
                stream.close()
        return Empty()

    @contextlib.asynccontextmanager
    async def _lease(self, namespace: str, lease: str | None, source: Message) -> AsyncIterator[str]:
        """The caller's lease, or one for the time of the transfer.

        That of a pull which was interrupted stays, with what came, until its time is over or the same is pulled again.
        """
        if lease:
            yield lease
            return
        pulled = source.reference if isinstance(source, types.OCIRegistry) else ""
        expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=LEASE_HOURS)
        labels = {GC_EXPIRE: expires.strftime("%Y-%m-%dT%H:%M:%SZ")}
        if 0 < len(pulled) < MAX_LABEL - len(PULLED):
            labels[PULLED] = pulled
        made = await self._leases.create(namespace, labels=labels)
        self._active.add(made.id)
        keep = False
        try:
            yield made.id
            if PULLED in labels:
                await self._forget_interrupted(namespace, pulled)
        except (asyncio.CancelledError, Unavailable, DeadlineExceeded):
            keep = PULLED in labels and bool(await asyncio.shield(self._leases.list_resources(namespace, made.id)))
            raise
        finally:
            self._active.discard(made.id)
            if not keep:
                with contextlib.suppress(NotFound):
                    await asyncio.shield(self._leases.delete(namespace, made.id))

    async def _forget_interrupted(self, namespace: str, pulled: str) -> None:
        """The leases of earlier pulls of the same that were interrupted; also of a daemon that was killed meanwhile."""
        for old in await self._leases.list(namespace, [f'labels."{PULLED}"=={json.dumps(pulled)}']):
            if old.id not in self._active:
                with contextlib.suppress(NotFound):
                    await self._leases.delete(namespace, old.id)

    # -- registry and image store

    async def _pull(self, call: _Call, source: Message, destination: Message) -> None:
        registry, store = _expect(source, types.OCIRegistry), _expect(destination, types.ImageStore)
        place = f"OCI Registry ({registry.reference})"
        # refused before anything is asked for: a snapshotter that isn't there
        wanted = self._wanted(call, store)
        async with self._warmed(wanted), self.registries.resolver(call.namespace, registry) as resolver:
            call.progress.say(f"Resolving from {place}")
            try:
                name, root = await resolver.resolve(registry.reference)
            except NotFound as error:
                raise NotFound(f"failed to resolve image: {error.message}") from error
            if root.media_type == mediatypes.DOCKER_MANIFEST_V1:
                raise InvalidArgument("schema 1 image manifests are no longer supported: invalid argument")
            call.progress.say(f"Pulling from {place}")
            call.progress.say("fetching image content", name, root)
            call.progress.start(name)
            parsed = reference.parse(registry.reference)
            wanted.host, wanted.repository = parsed.host, parsed.path
            tree = self._tree(call, wanted, resolver.fetcher(registry.reference))
            await tree.bring(root)
        await self._save(call, store, root, _names(store, root))
        call.progress.say(f"Completed pull from {place}")

    async def _push(self, call: _Call, source: Message, destination: Message) -> None:
        # loaded when somebody pushes: aiohttp takes a while to import
        from wherry.daemon.transfer_push import Push  # noqa: PLC0415

        store, registry = _expect(source, types.ImageStore), _expect(destination, types.OCIRegistry)
        place = f"OCI Registry ({registry.reference})"
        target = from_proto(self._images.get(call.namespace, store.name).target)
        async with self.registries.resolver(call.namespace, registry) as resolver:
            call.progress.say(f"Pushing to {place}")
            call.progress.say("pushing content", store.name, target)
            call.progress.start(store.name)
            pusher = resolver.pusher(registry.reference)
            push = Push(self._content, call.namespace, pusher, call.progress, self._uploads)
            await push.push(target, registry.reference, [platform_from_proto(item) for item in store.platforms])
        call.progress.say("pushed content", store.name, target)
        call.progress.say(f"Completed push to {place}", "", target)

    async def _copy(self, call: _Call, source: Message, destination: Message) -> None:
        """From registry to registry. Both may ask the client who the user is, each over its own stream."""
        from wherry.daemon.transfer_copy import Copy  # noqa: PLC0415

        wanted = source if isinstance(source, registry_pb2.CopySource) else None
        old = wanted.registry if wanted is not None else _expect(source, types.OCIRegistry)
        new = _expect(destination, types.OCIRegistry)
        before, after = reference.parse(old.reference), reference.parse(new.reference)
        async with (
            self.registries.resolver(call.namespace, old) as pulling,
            self.registries.resolver(call.namespace, new) as pushing,
        ):
            call.progress.say(f"Resolving from OCI Registry ({old.reference})")
            name, root = await pulling.resolve(old.reference)
            call.progress.say(f"Copying to OCI Registry ({new.reference})")
            call.progress.start(name)
            fetcher, pusher = pulling.fetcher(old.reference), pushing.pusher(new.reference)
            mounts = [before.path] if before.host == after.host else []
            copy = Copy(fetcher, pusher, call.progress, self._uploads, self._limits, mounts)
            platforms = [platform_from_proto(item) for item in wanted.platforms] if wanted is not None else []
            root = await copy.copy(root, after, platforms)
        call.progress.say(f"Completed copy to OCI Registry ({new.reference})", "", root)

    # -- archives

    async def _import(self, call: _Call, source: Message, destination: Message) -> None:
        from wherry.daemon.transfer_archive import decompressed  # noqa: PLC0415
        from wherry.daemon.transfer_import import Importer, names_for  # noqa: PLC0415

        archive, store = _expect(source, types.ImageImportStream), _expect(destination, types.ImageStore)
        stream = self._streams.get(call.namespace, archive.stream)
        call.progress.say("Importing")
        try:
            importer = Importer(
                self._content, call.namespace, call.lease, self._limits, compress=archive.force_compress
            )
            index, images = await importer.read(decompressed(receive_bytes(stream)))
        finally:
            stream.close()
        call.progress.start(store.name)
        if not images:
            raise InvalidArgument("the archive has no images: invalid argument")
        tree = self._tree(call, self._wanted(call, store), None)
        saved = 0
        chosen = Selection([platform_from_proto(item) for item in store.platforms]).choose(images)
        if not chosen:
            raise NotFound("no image of the archive is for the wanted platform: not found")
        if store.name or any(not item.is_prefix for item in store.extra_references):
            await tree.bring(index)
            saved += await self._save(call, store, index, _names(store, index))
        for image in chosen:
            names = names_for(image, list(store.extra_references))
            if names:
                await self._tree(call, self._wanted(call, store), None).bring(image)
                saved += await self._save(call, store, image, names)
        if not saved:
            raise NotFound("no image name found in the archive: not found")
        call.progress.say("Completed import")

    async def _export(self, call: _Call, source: Message, destination: Message) -> None:
        from wherry.daemon.transfer_export import Exporter  # noqa: PLC0415

        store, archive = _expect(source, types.ImageStore), _expect(destination, types.ImageExportStream)
        stream = self._streams.get(call.namespace, archive.stream)
        try:
            names = [*([store.name] if store.name else []), *(item.name for item in store.extra_references)]
            if not names:
                raise InvalidArgument("no image was named: invalid argument")
            if any(item.is_prefix for item in store.extra_references):
                raise Unimplemented("images to export are named one by one, not by prefix: not implemented")
            platforms = [platform_from_proto(item) for item in archive.platforms or store.platforms]
            if archive.all_platforms:
                platforms = []
            elif not platforms:
                platforms = [host()]
            exporter = Exporter(self._content, call.namespace, Selection(platforms))
            exporter.skip_compatibility = archive.skip_compatibility_manifest
            exporter.skip_nondistributable = archive.skip_non_distributable
            images = [(name, from_proto(self._images.get(call.namespace, name).target)) for name in names]
            call.progress.say("Exporting")
            sender = ByteSender(stream)
            await exporter.write(images, sender.write)
            call.progress.say("Completed export")
        finally:
            stream.close()

    async def _tag(self, call: _Call, source: Message, destination: Message) -> None:
        """Another name for an image; and its snapshots, where the destination asks for them."""
        old, new = _expect(source, types.ImageStore), _expect(destination, types.ImageStore)
        target = from_proto(self._images.get(call.namespace, old.name).target)
        if new.unpacks:
            wanted = self._wanted(call, new)
            wanted.selection = Selection([item.platform for item in wanted.unpacks])
            call.progress.start(old.name)
            await self._tree(call, wanted, None).bring(target)
        await self._save(call, new, target, _names(new, target))

    # -- the image store

    @contextlib.asynccontextmanager
    async def _warmed(self, wanted: Wanted) -> AsyncIterator[None]:
        """Have the process that applies layers start beside the first questions to the registry."""
        warming = asyncio.create_task(self._applier.warm()) if wanted.unpacks else None
        try:
            yield
        finally:
            if warming is not None:
                # an error of it comes again, to whoever applies
                await asyncio.gather(warming, return_exceptions=True)

    def _wanted(self, call: _Call, store: types.ImageStore) -> Wanted:
        platforms = [platform_from_proto(item) for item in store.platforms]
        unpacks = []
        for item in store.unpacks:
            snapshotter = item.snapshotter or self._default_snapshotter
            if snapshotter not in self._snapshots.names:
                raise NotFound(f"snapshotter {snapshotter} is not loaded: not found")
            platform = platform_from_proto(item.platform) if item.platform.os else host()
            unpacks.append(Unpack(platform, snapshotter))
        selection = Selection(platforms, store.manifest_limit)
        return Wanted(call.namespace, call.lease, selection, store.all_metadata, unpacks)

    def _tree(self, call: _Call, wanted: Wanted, source: Source | None) -> Tree:
        return Tree(
            self._content,
            self._unpacker,
            call.progress,
            wanted,
            source=source,
            slots=self._downloads,
            turns=self._turns,
            limits=self._limits,
        )

    async def _save(self, call: _Call, store: types.ImageStore, target: Descriptor, names: list[str]) -> int:
        """Store the image under all its names. Raises NotFound where it has none."""
        if not names:
            raise NotFound("no image name found: not found")
        for name in names:
            image = images_pb2.Image(name=name, labels=store.labels, target=to_proto(target))
            await self._images.put(call.namespace, image, lease=call.lease)
            call.progress.say("saved", name, target)
        return len(names)


def _expect(message: Message, kind: type[T]) -> T:
    if not isinstance(message, kind):
        have, want = message.DESCRIPTOR.full_name, kind.DESCRIPTOR.full_name
        raise InvalidArgument(f"{have} where {want} belongs: invalid argument")
    return message


def _names(store: types.ImageStore, target: Descriptor) -> list[str]:
    """The names that the client gave; prefixes are for archives."""
    names = [store.name] if store.name else []
    plain = [item for item in store.extra_references if not item.is_prefix]
    return names + [f"{item.name}@{target.digest}" if item.add_digest else item.name for item in plain]
