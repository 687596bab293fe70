"""Images on their way: the daemon moves them, the client says from where to where and sees how far it is."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import NamedTuple

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from wherry.client.transport import Calls, Stream
from wherry.client.values import platform_message
from wherry.core import typeurl
from wherry.core.credentials import Lookup
from wherry.core.errors import Unauthenticated, WherryError
from wherry.core.platforms import Platform
from wherry.proto import streaming_pb2
from wherry.proto import transfer_pb2 as pb
from wherry.proto import transfer_types_pb2 as types

_SERVICE = "containerd.services.transfer.v1.Transfer"
_STREAM = "containerd.services.streaming.v1.Streaming/Stream"


class Progress(NamedTuple):
    """How far one thing is: `event` (`downloading`, `complete`, `exists` …), its `name`, bytes of `total`."""

    event: str
    name: str
    parents: tuple[str, ...]
    progress: int
    total: int


class Registry(NamedTuple):
    """A registry as source or destination. `scheme` is `http`, or "" for the rule of hosts.

    Who the user is, `user` says (`name:password`, for this registry alone), else `credentials`, which the daemon has
    asked for each host that wants to know, a mirror as well.
    """

    reference: str
    user: str = ""
    scheme: str = ""
    hosts_dir: str = ""
    headers: Mapping[str, str] | None = None
    credentials: Lookup | None = None


class _Answers:
    """What the daemon is told when it asks who the user is. An error of the lookup is kept: it may not matter."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self.error: WherryError | None = None

    def __call__(self, packed: Packed) -> Message:
        try:
            credential = self._lookup(typeurl.unpack_as(packed, types.AuthRequest).host)
        except WherryError as error:
            self.error = error
            credential = None
        answer = types.AuthResponse()
        if credential is None:
            answer.authType = types.NONE
        elif credential.header:
            answer.authType, answer.secret = types.HEADER, credential.header
        elif credential.refresh_token:
            answer.authType, answer.secret = types.REFRESH, credential.refresh_token
        else:
            answer.authType = types.CREDENTIALS
            answer.username, answer.secret = credential.username, credential.secret
        return typeurl.pack(answer)


def _id(kind: str) -> str:
    return f"{kind}-{os.urandom(12).hex()}"


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
        async for progress in self._with_credentials(registry, store, pull=True):
            yield progress

    async def push(
        self, registry: Registry, *, name: str = "", platforms: Iterable[Platform] = ()
    ) -> AsyncIterator[Progress]:
        """Brings an image of the store to a registry."""
        store = types.ImageStore(
            name=name or registry.reference, platforms=[platform_message(item) for item in platforms]
        )
        async for progress in self._with_credentials(registry, store, pull=False):
            yield progress

    async def tag(self, source: str, destination: str) -> None:
        """Gives an image of the store a second name."""
        await self._transfer(types.ImageStore(name=source), types.ImageStore(name=destination), "")

    async def _with_credentials(
        self, registry: Registry, store: types.ImageStore, *, pull: bool
    ) -> AsyncIterator[Progress]:
        # a Basic header asks no questions back, the lookup is asked over a stream
        headers = dict(registry.headers or {})
        if registry.user:
            headers["Authorization"] = "Basic " + base64.b64encode(registry.user.encode()).decode()
        resolver = types.RegistryResolver(headers=headers, host_dir=registry.hosts_dir, default_scheme=registry.scheme)
        answers = None if registry.user or registry.credentials is None else _Answers(registry.credentials)
        stream = None
        try:
            if answers is not None:
                resolver.auth_stream = _id("auth")
                stream = await self._open(resolver.auth_stream)
                stream.answer(answers)
            end = types.OCIRegistry(reference=registry.reference, resolver=resolver)
            async for progress in self._run(end, store) if pull else self._run(store, end):
                yield progress
        except Unauthenticated as error:
            if answers is not None and answers.error is not None:
                raise answers.error from error
            raise
        finally:
            if stream is not None:
                await stream.close()

    async def _run(self, source: Message, destination: Message) -> AsyncIterator[Progress]:
        """The transfer, and its progress as it comes."""
        name = _id("progress")
        stream = await self._open(name)
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

    async def _open(self, name: str) -> Stream[Packed]:
        """A stream that other calls name; the daemon's first message says that it knows it."""
        stream = await self._calls.stream(_STREAM, None, Packed)
        try:
            await stream.send(typeurl.pack(streaming_pb2.StreamInit(id=name)))
            await stream.receive()
        except BaseException:
            await stream.close()
            raise
        return stream

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
