"""The transfer service over real stores, images made for it, and streams as a client holds them."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import Message

from tests.daemon.stores import NS, Stores, call, stores
from wherry.core import mediatypes, platforms, typeurl
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.platforms import Platform
from wherry.daemon.streaming import StreamingService, StreamManager
from wherry.daemon.transfer import TransferService
from wherry.proto import streaming_pb2, transfer_pb2, types_pb2
from wherry.proto import transfer_types_pb2 as types
from wherry.registry.resolver import Resolver
from wherry.snapshotter.applier import Applier


def tar(files: dict[str, bytes | None], links: dict[str, str] | None = None) -> bytes:
    """A layer: files by name (None: a whiteout of it), hard links by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            folder, _, base = name.rpartition("/")
            info = tarfile.TarInfo(name if data is not None else f"{folder}/.wh.{base}".lstrip("/"))
            info.size = len(data or b"")
            archive.addfile(info, io.BytesIO(data or b""))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            archive.addfile(info)
    return buffer.getvalue()


@dataclass
class Image:
    """An image as its blobs; `target` is its manifest or index."""

    target: Descriptor
    blobs: dict[str, tuple[Descriptor, bytes]] = field(default_factory=dict)

    def put(self, data: bytes, media_type: str, platform: Platform | None = None) -> Descriptor:
        descriptor = Descriptor(media_type, Digest.of(data), len(data), platform=platform)
        self.blobs[descriptor.digest] = (descriptor, data)
        return descriptor


def make_image(layers: list[bytes], platform: Platform | None = None, *, diff_ids: list[str] | None = None) -> Image:
    """An image of these layers (uncompressed tars, gzipped here)."""
    made = Image(Descriptor("", Digest.of(b""), 0))
    platform = platform or platforms.host()
    described = [made.put(gzip.compress(layer, 1, mtime=0), mediatypes.OCI_LAYER_GZIP) for layer in layers]
    config = {
        "architecture": platform.architecture,
        "os": platform.os,
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids or [str(Digest.of(layer)) for layer in layers]},
    }
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": mediatypes.OCI_MANIFEST,
        "config": made.put(json.dumps(config).encode(), mediatypes.OCI_CONFIG).to_json(),
        "layers": [layer.to_json() for layer in described],
    }
    made.target = made.put(json.dumps(manifest).encode(), mediatypes.OCI_MANIFEST, platform)
    return made


def make_index(images: list[Image]) -> Image:
    """An index of images, each for its own platform."""
    made = Image(images[0].target, {key: value for image in images for key, value in image.blobs.items()})
    document = {"schemaVersion": 2, "manifests": [image.target.to_json() for image in images]}
    made.target = made.put(json.dumps(document).encode(), mediatypes.OCI_INDEX)
    return made


async def publish(image: Image, ref: str) -> None:
    """Push an image to a real registry, by the client that is tested by itself."""
    async with Resolver() as resolver:
        pusher = resolver.pusher(ref)
        for descriptor, data in image.blobs.values():
            if descriptor.digest != image.target.digest:
                await pusher.push(descriptor, lambda offset, data=data: _once(data[offset:]))  # type: ignore[misc]
        data = image.blobs[image.target.digest][1]
        await pusher.push_manifest(image.target, lambda offset: _once(data), ref.rpartition(":")[2])


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


class ClientStream:
    """A stream as a client holds it."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[Packed | None] = asyncio.Queue()
        self.answers: asyncio.Queue[Packed | None] = asyncio.Queue()
        self.seen: list[Message] = []

    async def send(self, message: Message) -> None:
        await self.requests.put(typeurl.pack(message))

    async def close_send(self) -> None:
        await self.requests.put(None)

    async def receive(self) -> Message | None:
        packed = await self.answers.get()
        return None if packed is None else typeurl.unpack(packed)


@dataclass
class Rig:
    """The service, its stores and its streams."""

    stores: Stores
    service: TransferService
    manager: StreamManager
    progress: list[types.Progress] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def stream(self, name: str) -> AsyncIterator[ClientStream]:
        """Open a stream, and leave it at the end."""
        client = ClientStream()

        async def requests() -> AsyncIterator[Packed]:
            yield typeurl.pack(streaming_pb2.StreamInit(id=name))
            while (packed := await client.requests.get()) is not None:
                yield packed

        async def run() -> None:
            async with contextlib.aclosing(StreamingService(self.manager).stream(requests(), call())) as answers:
                async for packed in answers:
                    await client.answers.put(packed)
            await client.answers.put(None)

        task = asyncio.create_task(run())
        await client.receive()
        try:
            yield client
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def transfer(self, source: Message, destination: Message, *, namespace: str = NS, lease: str = "") -> None:
        """One transfer; its progress is kept."""
        request = transfer_pb2.TransferRequest(source=typeurl.pack(source), destination=typeurl.pack(destination))
        request.options.progress_stream = f"progress-{id(request)}"
        context = call(namespace, lease or None)
        if namespace != NS:
            request.options.progress_stream = ""
            await self.service.transfer(request, context)
            return
        async with self.stream(request.options.progress_stream) as stream:
            try:
                await self.service.transfer(request, context)
            finally:
                while (message := await stream.receive()) is not None:
                    assert isinstance(message, types.Progress)
                    self.progress.append(message)

    async def pull(self, ref: str, store: types.ImageStore, *, namespace: str = NS, lease: str = "") -> None:
        await self.transfer(registry_end(ref), store, namespace=namespace, lease=lease)

    def events(self, prefix: str) -> list[str]:
        """What was told of one thing, in order, each once."""
        told = [message.event for message in self.progress if message.name.startswith(prefix)]
        return list(dict.fromkeys(told))


def registry_end(ref: str, **resolver: Any) -> types.OCIRegistry:
    return types.OCIRegistry(reference=ref, resolver=types.RegistryResolver(default_scheme="http", **resolver))


def platform_message(platform: Platform) -> types_pb2.Platform:
    return types_pb2.Platform(os=platform.os, architecture=platform.architecture, variant=platform.variant)


def image_store(name: str, snapshotter: str = "overlayfs", *, unpack: bool = True, **more: Any) -> types.ImageStore:
    """An image store as destination: this host's platform, unpacked."""
    here = platform_message(platforms.host())
    made = types.ImageStore(name=name, **({"platforms": [here]} | more))
    if unpack:
        made.unpacks.add(platform=here, snapshotter=snapshotter)
    return made


@contextlib.asynccontextmanager
async def rig_on(root: Path) -> AsyncIterator[Rig]:
    """The service with stores on a folder."""
    applier, manager = Applier(), StreamManager()
    async with stores(root) as made:
        service = TransferService(
            content=made.content,
            images=made.images,
            leases=made.leases,
            snapshots=made.snapshots,
            applier=applier,
            streams=manager,
        )
        try:
            yield Rig(made, service, manager)
        finally:
            await applier.close()
