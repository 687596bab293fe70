"""A registry as the end of a call: its message, and the stream on which the daemon asks who the user is."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import Message

from wherry.client.transport import Calls, Stream
from wherry.core import typeurl
from wherry.core.credentials import Lookup
from wherry.core.errors import Unauthenticated, WherryError
from wherry.core.tuples import NamedTuple
from wherry.proto import streaming_pb2
from wherry.proto import transfer_types_pb2 as types

_STREAM = "containerd.services.streaming.v1.Streaming/Stream"


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


def stream_id(kind: str) -> str:
    """A name for a stream that nobody else has."""
    return f"{kind}-{os.urandom(12).hex()}"


async def open_stream(calls: Calls, name: str) -> Stream[Packed]:
    """A stream that other calls name; the daemon's first message says that it knows it."""
    stream = await calls.stream(_STREAM, None, Packed)
    try:
        await stream.send(typeurl.pack(streaming_pb2.StreamInit(id=name)))
        await stream.receive()
    except BaseException:
        await stream.close()
        raise
    return stream


@asynccontextmanager
async def registry_end(calls: Calls, registry: Registry) -> AsyncIterator[types.OCIRegistry]:
    """The message for a registry; inside of the `async with` the daemon's questions are answered.

    Where it isn't let in because the user's file or helper is broken, that error is raised instead.
    """
    # a Basic header asks no questions back, the lookup is asked over a stream
    headers = dict(registry.headers or {})
    if registry.user:
        headers["Authorization"] = "Basic " + base64.b64encode(registry.user.encode()).decode()
    resolver = types.RegistryResolver(headers=headers, host_dir=registry.hosts_dir, default_scheme=registry.scheme)
    answers = None if registry.user or registry.credentials is None else _Answers(registry.credentials)
    stream = None
    try:
        if answers is not None:
            resolver.auth_stream = stream_id("auth")
            stream = await open_stream(calls, resolver.auth_stream)
            stream.answer(answers)
        yield types.OCIRegistry(reference=registry.reference, resolver=resolver)
    except Unauthenticated as error:
        if answers is not None and answers.error is not None:
            raise answers.error from error
        raise
    finally:
        if stream is not None:
            await stream.close()
