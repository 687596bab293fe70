"""Images on their way: the daemon moves them, the client says from where to where and sees how far it is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from wherry.client.registry_end import Registry, open_stream, registry_end, stream_id
from wherry.client.transport import Calls
from wherry.client.values import platform_message
from wherry.core import typeurl
from wherry.core.platforms import Platform
from wherry.core.tuples import NamedTuple
from wherry.proto import transfer_pb2 as pb
from wherry.proto import transfer_types_pb2 as types
from wherry.proto import wherry_registry_pb2 as registry_pb

_SERVICE = "containerd.services.transfer.v1.Transfer"

__all__ = ["Progress", "Registry", "Transfer"]


class Progress(NamedTuple):
    """How far one thing is: `event` (`downloading`, `complete`, `exists` …), its `name`, bytes of `total`."""

    event: str
    name: str
    parents: tuple[str, ...]
    progress: int
    total: int


class Transfer:
    """The transfer service of `wherryd` and of containerd from 2.0 on; others answer Unimplemented."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def pull(
        self,
        registry: Registry,
        *,
        name: str = "",
        platforms: Iterable[Platform] = (),
        labels: Mapping[str, str] | None = None,
        all_metadata: bool = False,
        unpack: Iterable[tuple[Platform, str]] = (),
    ) -> AsyncIterator[Progress]:
        """Brings an image from a registry into the store and unpacks it, for each pair of platform and snapshotter.

        Iterate to the end: then it is there. Raises NotFound, Unauthenticated and what else the registry says.
        """
        store = types.ImageStore(
            name=name or registry.reference,
            labels=dict(labels or {}),
            platforms=[platform_message(item) for item in platforms],
            all_metadata=all_metadata,
            unpacks=[
                types.UnpackConfiguration(platform=platform_message(platform), snapshotter=snapshotter)
                for platform, snapshotter in unpack
            ],
        )
        async with registry_end(self._calls, registry) as end:
            async for progress in self._run(end, store):
                yield progress

    async def push(
        self, registry: Registry, *, name: str = "", platforms: Iterable[Platform] = ()
    ) -> AsyncIterator[Progress]:
        """Brings an image of the store to a registry."""
        store = types.ImageStore(
            name=name or registry.reference, platforms=[platform_message(item) for item in platforms]
        )
        async with registry_end(self._calls, registry) as end:
            async for progress in self._run(store, end):
                yield progress

    async def copy(
        self, source: Registry, destination: Registry, *, platforms: Iterable[Platform] = ()
    ) -> AsyncIterator[Progress]:
        """Brings an image from a registry to a registry, without storing it; `wherryd` alone does that.

        All of it; with platforms the manifest of the one that fits.
        """
        async with registry_end(self._calls, source) as old, registry_end(self._calls, destination) as new:
            wanted = registry_pb.CopySource(registry=old, platforms=[platform_message(item) for item in platforms])
            async for progress in self._run(wanted, new):
                yield progress

    async def tag(self, source: str, destination: str) -> None:
        """Gives an image of the store a second name."""
        await self._transfer(types.ImageStore(name=source), types.ImageStore(name=destination), "")

    async def _run(self, source: Message, destination: Message) -> AsyncIterator[Progress]:
        """The transfer, and its progress as it comes."""
        name = stream_id("progress")
        stream = await open_stream(self._calls, name)
        try:
            pending = self._calls.begin(f"{_SERVICE}/Transfer", self._request(source, destination, name), Empty)
            try:
                while (packed := await stream.receive()) is not None:
                    message = typeurl.unpack_as(packed, types.Progress)
                    yield Progress(message.event, message.name, tuple(message.parents), message.progress, message.total)
                await pending.result()
            except BaseException:
                pending.cancel()
                raise
        finally:
            await stream.close()

    async def _transfer(self, source: Message, destination: Message, progress: str) -> None:
        await self._calls.unary(
            f"{_SERVICE}/Transfer", self._request(source, destination, progress), Empty, endless=True
        )

    @staticmethod
    def _request(source: Message, destination: Message, progress: str) -> pb.TransferRequest:
        request = pb.TransferRequest(source=typeurl.pack(source), destination=typeurl.pack(destination))
        if progress:
            request.options.progress_stream = progress
        return request
