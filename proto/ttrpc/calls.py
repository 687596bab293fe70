"""What both clients share: how a connection ends, and how a method is found and its response read."""

from __future__ import annotations

from google.protobuf.message import DecodeError, Message

from wherry.core.errors import Cancelled, Internal, Unavailable
from wherry.proto.service import Method, methods


class ConnectionLost(Unavailable):
    """The other side went away, or never was a ttrpc server."""


class ClientClosed(Cancelled):
    """This side closed the client."""


def find_method(service: str, name: str) -> Method:
    """The method by the full service name and the bare method name. Raises Internal: its module isn't imported."""
    try:
        return methods(service)[name]
    except KeyError:
        raise Internal(f"no imported module declares /{service}/{name}") from None


def parse_response(method: Method, payload: bytes) -> Message:
    """The response of a call. Raises Internal for bytes that are no such message."""
    try:
        return method.response.FromString(payload)
    except DecodeError as error:
        raise Internal(f"{method.path}: response can't be decoded: {error}") from error


def nanoseconds(timeout: float | None) -> int:
    """A timeout in seconds as the wire has it: 0 is none, so that an expired one is the least above it."""
    return 0 if timeout is None else max(1, int(timeout * 1e9))
