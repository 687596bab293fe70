"""A layer's bytes: read from a descriptor, decompressed and hashed by a thread of their own, handed on in chunks.

Reading, inflating and hashing release the GIL, so this thread runs beside the one that makes the files. Memory stays
bounded whatever the archive claims: a chunk has at most `CHUNK` bytes, at most `AHEAD` chunks wait.
"""

from __future__ import annotations

import hashlib
import os
import queue
import select
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import IO, cast

import zstandard
from isal import igzip_lib

from wherry.core.errors import InvalidArgument, Unavailable, WherryError
from wherry.snapshotter.limits import too_many

CHUNK = 256 << 10
"""Small enough to stay in the processor's cache from the inflating to the hashing to the writing."""
AHEAD = 16
READ = 128 << 10
ZSTD_WINDOW = 1 << 27
"""128 MiB: what zstd itself accepts without `--long`; a larger window is memory that the archive would choose."""

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"


# its stub says that the error is a variable
_GZIP_ERROR = cast("type[Exception]", igzip_lib.IsalError)


class Stream:
    """The uncompressed chunks of what `fd` holds from where it stands.

    `compressed`: look for gzip or zstd by their first bytes, anything else is taken as it is. `get()` returns the next
    chunk, b"" at the end, and raises InvalidArgument for a damaged stream, ResourceExhausted past `limit` bytes (0:
    none). When the end was reached, `digest` and `size` are those of all chunks.
    """

    def __init__(self, fd: int, *, compressed: bool, limit: int = 0, follow: int = -1) -> None:
        """`follow`: the pipe of an `fd` that is still being written (`Applier.apply`)."""
        self._fd = fd
        self._follow = follow
        self._compressed = compressed
        self._limit = limit
        self._queue: queue.Queue[bytes] = queue.Queue(AHEAD)
        self._error: Exception | None = None
        self._hash = hashlib.sha256()
        self.size = 0
        self._thread = threading.Thread(target=self._run, name="layer-stream", daemon=True)
        self._thread.start()

    @property
    def digest(self) -> str:
        """`sha256:…` of the uncompressed archive."""
        return f"sha256:{self._hash.hexdigest()}"

    def get(self) -> bytes:
        chunk = self._queue.get()
        if not chunk:
            self._queue.put(b"")  # the end stays the end
            if self._error is not None:
                raise self._error
        return chunk

    def _run(self) -> None:
        try:
            update = self._hash.update
            put = self._queue.put
            for chunk in self._chunks():
                self.size += len(chunk)
                if 0 < self._limit < self.size:
                    raise too_many(f"the layer has {self.size} bytes or more", self._limit, "layer_bytes")
                update(chunk)
                put(chunk)
        except WherryError as error:
            self._error = error
        except OSError as error:
            self._error = InvalidArgument(f"the layer can't be read: {error}")
        except Exception as error:  # noqa: BLE001 - a thread's exceptions are lost unless the reader gets them
            self._error = error
        finally:
            self._queue.put(b"")

    def _chunks(self) -> Iterator[bytes]:
        read = _Source(self._fd, self._follow)
        head = read.peek(4)
        if self._compressed and head.startswith(_GZIP):
            return _gunzip(read)
        if self._compressed and (head == _ZSTD or (head[1:] == b"\x2a\x4d\x18" and head[0] >> 4 == 5)):
            return _unzstd(read)
        return iter(read, b"")


class _Source:
    """Reads a descriptor to its end; `peek` looks at the first bytes, which are then read again.

    With `follow` the end is what is there so far, until a "." has come from that pipe.
    """

    def __init__(self, fd: int, follow: int) -> None:
        self._fd = fd
        self._follow = follow
        self._head = b""
        with suppress(OSError):  # a pipe
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def peek(self, size: int) -> bytes:
        while len(self._head) < size and (data := self._read()):
            self._head += data
        return self._head[:size]

    def __call__(self) -> bytes:
        if self._head:
            data, self._head = self._head, b""
            return data
        return self._read()

    def _read(self) -> bytes:
        while True:
            try:
                data = os.read(self._fd, READ)
            except BlockingIOError:  # a pipe of asyncio's: its flags are shared with the daemon, so they stay
                select.select([self._fd], [], [])
                continue
            if data or self._follow < 0:
                return data
            signs = os.read(self._follow, READ)
            if not signs:
                raise Unavailable("the layer's download was given up: unavailable")
            if b"." in signs:
                self._follow = -1


def _gunzip(read: Callable[[], bytes]) -> Iterator[bytes]:
    """RFC 1952: members one after the other; zeros may pad the end."""
    data = read()
    try:
        while data:
            member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            while True:
                chunk = member.decompress(data, CHUNK)
                if chunk:
                    yield chunk
                if member.eof:
                    break
                data = b""
                if member.needs_input and not (data := read()):
                    raise InvalidArgument("the gzip stream is cut short: unexpected EOF: invalid argument")
            data = (member.unused_data or read()).lstrip(b"\0")
            while not data and (data := read()):
                data = data.lstrip(b"\0")
            if data and len(data) < 18:  # shorter than the shortest member: its header may be cut by a read
                data += read()
    except (_GZIP_ERROR, EOFError) as error:
        raise InvalidArgument(f"gzip: invalid stream: {error}: invalid argument") from error


def _unzstd(read: Callable[[], bytes]) -> Iterator[bytes]:
    """RFC 8878: frames one after the other. The library doesn't say where a stream is cut, so that is watched here."""
    frames = ZstdFrames()

    class Watched:
        def read(self, size: int = -1) -> bytes:
            data = read()
            frames.feed(data)
            return data

    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        source = cast("IO[bytes]", Watched())  # it needs no more of a file than `read`
        reader = decompressor.stream_reader(source, read_size=READ, read_across_frames=True, closefd=False)
        while chunk := reader.read(CHUNK):
            yield chunk
    except zstandard.ZstdError as error:
        raise InvalidArgument(f"zstd: invalid stream: {error}: invalid argument") from error
    if not frames.between:
        raise InvalidArgument("the zstd stream is cut short: unexpected EOF: invalid argument")


class ZstdFrames:
    """Follows the frames and blocks of a zstd stream (RFC 8878, 3.1) by their headers alone, without decompressing.

    `between` is true where a frame has ended and none has begun: only there may a stream end.
    """

    def __init__(self) -> None:
        self.between = True
        self._buffer = bytearray()
        self._walk = self._frames()
        self._want = next(self._walk)
        self._skip = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes; InvalidArgument where a frame should begin and doesn't."""
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
                at += step
                continue
            if not self._want:
                self._advance()
                continue
            self.between = False
            step = min(self._want - len(self._buffer), len(data) - at)
            self._buffer += data[at : at + step]
            at += step
            if len(self._buffer) == self._want:
                self._advance()
        # nothing is left to skip: what comes next may already be known without another byte
        while not self._skip and not self._want:
            self._advance()

    def _advance(self) -> None:
        taken = bytes(self._buffer)
        self._buffer.clear()
        asked = self._walk.send(taken)
        self._want, self._skip = (0, -asked) if asked < 0 else (asked, 0)

    def _frames(self) -> Generator[int, bytes, None]:
        """Yields how many bytes it wants to see (positive) or to pass over (negative)."""
        while True:
            self.between = True
            magic = int.from_bytes((yield 4), "little")
            if magic >> 4 == 0x184D2A5:
                size = int.from_bytes((yield 4), "little")
                if size:
                    yield -size
                continue
            if magic != 0xFD2FB528:
                raise InvalidArgument("zstd: invalid stream: no frame begins where one should: invalid argument")
            descriptor = (yield 1)[0]
            single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
            content = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
            rest = (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3] + content
            if rest:
                yield -rest
            last = 0
            while not last:
                block = int.from_bytes((yield 3), "little")
                last, kind, size = block & 1, block >> 1 & 3, block >> 3
                size = 1 if kind == 1 else size
                if size:
                    yield -size
            if checksum:
                yield -4
