"""What both gRPC transports have in common: the channel's options, the target's name, statuses as errors."""

from __future__ import annotations

from typing import cast

import grpc
from google.protobuf.message import Message

from wherry.core.errors import WherryError, from_code

# containerd's clients take messages up to 16 MiB (its defaults.DefaultMaxRecvMsgSize): a list of images may be long
MAX_MESSAGE = 16 << 20
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", MAX_MESSAGE),
    # without it grpc makes the authority from the socket's path, which HTTP/2 servers of other languages may refuse
    ("grpc.default_authority", "localhost"),
    # a daemon that restarts is back in a fraction of a second; grpc's own back-off starts at one
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


def target(address: str) -> str:
    """A socket's path as gRPC names it; what has a scheme already stays as it is."""
    return address if "://" in address or address.startswith("unix:") else f"unix:{address}"


def as_error(code: grpc.StatusCode, details: str | None) -> WherryError:
    """The error kind for a status."""
    number = cast(int, code.value[0])
    return from_code(number, details or code.name)


def serialize(message: Message) -> bytes:
    """A message for the wire."""
    return message.SerializeToString()
