"""Digests of content: `algorithm:hex`, as the OCI image specification and go-digest have them."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from wherry.core.errors import InvalidArgument
from wherry.core.names import quote

if TYPE_CHECKING:
    from _hashlib import HASH
    from collections.abc import Iterable

# the algorithms that OCI registers, with the length of their hex form
ALGORITHMS = {"sha256": 64, "sha384": 96, "sha512": 128}
# compiled when they are used: commands do without
_SHAPE = r"[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[a-zA-Z0-9=_-]+"
_HEX = "0123456789abcdef"


class Digest(str):
    """A digest that was checked; a plain string to everybody else."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Check a digest from outside. Raises InvalidArgument with go-digest's texts."""
        if type(text) is Digest:
            return text
        algorithm, _, encoded = text.partition(":")
        length = ALGORITHMS.get(algorithm)
        if len(encoded) == length and not encoded.strip(_HEX):
            return cls(text)
        if not re.fullmatch(_SHAPE, text):
            raise InvalidArgument(f"invalid checksum digest format: {quote(text[:200])}: invalid argument")
        if length is None:
            raise InvalidArgument(f"unsupported digest algorithm: {quote(text[:200])}: invalid argument")
        if len(encoded) != length:
            raise InvalidArgument(f"invalid checksum digest length: {quote(text[:200])}: invalid argument")
        raise InvalidArgument(f"invalid checksum digest format: {quote(text[:200])}: invalid argument")

    @classmethod
    def of(cls, data: bytes | bytearray | memoryview, algorithm: str = "sha256") -> Digest:
        """The digest of these bytes."""
        return cls(f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")

    @classmethod
    def of_chunks(cls, chunks: Iterable[bytes], algorithm: str = "sha256") -> Digest:
        """The digest of a stream of chunks."""
        state = hashlib.new(algorithm)
        for chunk in chunks:
            state.update(chunk)
        return cls.of_hash(state)

    @classmethod
    def of_hash(cls, state: HASH) -> Digest:
        """The digest that a hashlib object has come to."""
        return cls(f"{state.name}:{state.hexdigest()}")

    @property
    def algorithm(self) -> str:
        """`sha256` of `sha256:…`."""
        return self.partition(":")[0]

    @property
    def encoded(self) -> str:
        """The hex digits."""
        return self.partition(":")[2]

    def hasher(self) -> HASH:
        """A fresh hashlib object of this digest's algorithm."""
        return hashlib.new(self.algorithm)


def chain_id(diff_ids: Iterable[str]) -> Digest:
    """The chain id of a stack of layers, lowest first (OCI image config, "Layer ChainID").

    Raises InvalidArgument for an empty stack and for what is no digest.
    """
    chain: Digest | None = None
    for diff_id in diff_ids:
        digest = Digest.parse(diff_id)
        chain = digest if chain is None else Digest.of(f"{chain} {digest}".encode())
    if chain is None:
        raise InvalidArgument("chain id of no layers: invalid argument")
    return chain


def chain_ids(diff_ids: Iterable[str]) -> list[Digest]:
    """The chain id at each height of the stack, lowest first."""
    chains: list[Digest] = []
    for diff_id in diff_ids:
        digest = Digest.parse(diff_id)
        chains.append(Digest.of(f"{chains[-1]} {digest}".encode()) if chains else digest)
    return chains
