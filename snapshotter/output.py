"""Where a computed layer goes: hashed, compressed, hashed again, written."""

from __future__ import annotations

import hashlib
import os
import select
from collections.abc import Callable
from typing import Protocol

import zstandard
from isal import isal_zlib

GZIP_LEVEL = 3
"""isal's best: near zlib's level 3 in size and ten times as fast."""
ZSTD_LEVEL = 3
PIECE = 256 << 10
PROGRESS_BYTES = 4 << 20


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


class Output:
    """Takes the plain archive by `write`; after `close` the digests and the size of what was written are there.

    `compression` is `gzip`, `zstd` or "" for none. Small pieces are gathered before they are worked on.
    """

    def __init__(self, fd: int, compression: str, progress: Callable[[int], None] | None) -> None:
        self._fd = fd
        self._compressor = _compressor(compression)
        self._progress = progress
        self._pending: list[bytes] = []
        self._held = 0
        self._done = self._told = 0
        self._plain = hashlib.sha256()
        self._written = hashlib.sha256() if self._compressor else self._plain
        self.size = 0

    @property
    def digest(self) -> str:
        """Of what was written."""
        return f"sha256:{self._written.hexdigest()}"

    @property
    def diff_id(self) -> str:
        """Of the plain archive."""
        return f"sha256:{self._plain.hexdigest()}"

    def write(self, data: bytes) -> None:
        self._pending.append(data)
        self._held += len(data)
        if self._held >= PIECE:
            self._work()

    def close(self) -> None:
        """Write what is left. The descriptor stays open."""
        self._work()
        if self._compressor:
            self._put(self._compressor.flush())

    def _work(self) -> None:
        data = b"".join(self._pending)
        self._pending.clear()
        self._held = 0
        self._plain.update(data)
        self._put(self._compressor.compress(data) if self._compressor else data)
        self._done += len(data)
        if self._progress is not None and self._done - self._told >= PROGRESS_BYTES:
            self._told = self._done
            self._progress(self._done)

    def _put(self, data: bytes) -> None:
        if self._compressor:
            self._written.update(data)
        self.size += len(data)
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # a pipe of asyncio's: its flags are shared with the daemon, so they stay
                select.select([], [self._fd], [])


def _compressor(compression: str) -> _Compressor | None:
    if compression == "gzip":
        made: _Compressor = isal_zlib.compressobj(level=GZIP_LEVEL, wbits=31)
        return made
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compressobj()
    return None
