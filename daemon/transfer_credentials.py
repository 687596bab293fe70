"""Who the user of a transfer is to a registry: what its headers say, or what the client answers when asked."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Sequence
from functools import partial

from wherry.core import typeurl
from wherry.core.errors import Unauthenticated
from wherry.core.reference import parse
from wherry.daemon.streaming import Stream
from wherry.proto import transfer_types_pb2 as types
from wherry.registry.credentials import Credential, Credentials, anonymous

# seconds for a client's answer: a person may be typing
ANSWER_SECONDS = 120.0


def credentials_for(reference: str, headers: dict[str, str], stream: Stream | None) -> Credentials:
    """The credentials of a transfer. A `Basic` header is taken out of `headers`: it is for tokens, too.

    Raises InvalidArgument for a reference that is none.
    """
    for key in list(headers):
        if key.lower() == "authorization":
            given = _basic(headers[key])
            if given is not None:
                del headers[key]
                return partial(_give, given, parse(reference).host)
    if stream is not None:
        return partial(_ask, stream, reference, asyncio.Lock())
    return anonymous


async def _give(credential: Credential, registry: str, host: str, challenges: Sequence[str]) -> Credential | None:
    """The user's password for the registry of the reference, and for nobody who stands in front of it."""
    return credential if host == registry else None


def _basic(header: str) -> Credential | None:
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        username, _, secret = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return Credential(username, secret)


async def _ask(
    stream: Stream, reference: str, lock: asyncio.Lock, host: str, challenges: Sequence[str]
) -> Credential | None:
    """Ask the client over its stream, and tell it the challenges. Raises Unauthenticated where it doesn't answer."""
    async with lock:
        await stream.send(types.AuthRequest(host=host, reference=reference, wwwauthenticate=challenges))
        try:
            packed = await asyncio.wait_for(stream.receive(), ANSWER_SECONDS)
        except TimeoutError:
            packed = None
    if packed is None:
        raise Unauthenticated(f"no credentials for {host} came from the client")
    answer = typeurl.unpack_as(packed, types.AuthResponse)
    if answer.authType == types.CREDENTIALS:
        return Credential(answer.username, answer.secret)
    if answer.authType == types.REFRESH and answer.secret:
        return Credential(refresh_token=answer.secret)
    if answer.authType == types.HEADER:
        return Credential(header=answer.secret)
    return None
