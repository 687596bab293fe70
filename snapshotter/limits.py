"""What a layer may ask of the machine that unpacks it."""

from __future__ import annotations

from dataclasses import dataclass

from wherry.core.errors import ResourceExhausted

MEMORY = 1 << 30
"""Bytes of data that the process which handles a layer may have (setrlimit(2), RLIMIT_DATA). A usual one has 40 MiB;
what grows with an archive is 200 bytes a directory and, of a layer applied over files, as many an entry."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and members of one layer's archive, uncompressed, and how many layers an image may have; 0: no limit. The
    names are those of the configuration's table `[limits]`."""

    layer_bytes: int = 0
    layer_entries: int = 0
    image_layers: int = 0


NO_LIMITS = Limits()


def too_many(what: str, limit: int, name: str) -> ResourceExhausted:
    """The error for a limit passed, which names it."""
    return ResourceExhausted(
        f"{what}, more than the limit of {limit} that limits.{name} in the configuration sets: resource exhausted"
    )
