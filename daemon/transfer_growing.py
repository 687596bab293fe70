"""A layer that is extracted while it is downloaded: the file grows, and who reads it is told so.

    download (this process)          file                 applier's child
      writes, in order          ──►  …bytes…        ──►   reads to the end that there is
      "+" each megabyte, "."    ──►  pipe           ──►   waits at that end; "." is the real one
      the pipe's end without "."                    ──►   gives up: the download failed

Nothing is committed on its word: the snapshot is, when the blob is in the store with its digest verified.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

STEP = 1 << 20
"""Bytes between two signs. A pipe holds 65536 of them, so that the last one finds room for layers of up to 64 GiB."""


class Growing:
    """The file at `path`, of which so far nothing is known but that somebody appends to it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._told = 0
        self._whole: bool | None = None
        self._pipes: set[int] = set()

    @contextlib.contextmanager
    def follow(self) -> Iterator[tuple[int, int]]:
        """The file and the end of a pipe to read from, as `Applier.apply` takes them; both are closed at the end.

        Raises FileNotFoundError where the file went meanwhile.
        """
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        signs, pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(signs, True)
        self._pipes.add(pipe)
        try:
            if self._whole is not None:
                self.end(whole=self._whole)
            yield file, signs
        finally:
            self._drop(pipe)
            os.close(signs)
            os.close(file)

    def more(self, offset: int) -> None:
        """The file has grown to about `offset` bytes."""
        if offset - self._told >= STEP:
            self._told = offset
            for pipe in tuple(self._pipes):
                self._sign(pipe, b"+")

    def end(self, *, whole: bool) -> None:
        """Nothing more comes: it is all there and in the store, or the download was given up."""
        self._whole = whole
        for pipe in tuple(self._pipes):
            if whole:
                self._sign(pipe, b".")
            self._drop(pipe)

    def _sign(self, pipe: int, sign: bytes) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(pipe, sign)

    def _drop(self, pipe: int) -> None:
        if pipe in self._pipes:
            self._pipes.discard(pipe)
            os.close(pipe)
