"""What the daemon and its fork server say to each other: messages that are lists of strings, each ended by a zero byte.

    request   operation, sequence number, and for "spawn" and "delete" the fields of `ShimWords`
    answer    sequence number, "" or an error's code, and what was asked for, or the error's text

No string may contain a zero byte: none of these can (paths, identifiers, numbers), and an error's text is cleaned.
"""

from __future__ import annotations

from typing import Final, NamedTuple

# the service by which a shim is told to be another container's, in the same words
REUSE: Final = "wherry.shim.v1.Reuse"


class ShimWords(NamedTuple):
    """A shim's description, as `wherry.shim.client.ShimRequest` has it; numbers in decimal, "" for none."""

    namespace: str
    id: str
    bundle: str
    socket: str
    ttrpc_address: str
    grpc_address: str
    log_level: str
    oom_score_adj: str
    shim_cgroup: str
    state: str


def join(*words: str) -> bytes:
    """A message."""
    return b"".join([word.replace("\0", " ").encode(errors="surrogateescape") + b"\0" for word in words])


def split(data: bytes) -> list[str]:
    """The words of a message."""
    return data.decode(errors="surrogateescape").split("\0")[:-1]
