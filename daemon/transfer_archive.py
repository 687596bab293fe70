"""Tar archives of images as streams: read member by member as the bytes come, written block by block.

Nothing touches the file system: members go into the content store by digest, names are only compared.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import zstandard

from wherry.core.errors import InvalidArgument, ResourceExhausted

BLOCK = 512
# bytes of extended headers (long names, pax records) of one member
MAX_EXTENDED = 1 << 20
MAX_MEMBERS = 100_000
# bytes that decompression gives or takes at once, and zstd's window at most (what `zstd --long=27` needs)
OUTPUT = 1 << 20
PIECE = 4 << 10
MAX_WINDOW = 1 << 27
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class Member:
    """One entry: `name` without a leading `./`, `kind` is tar's type byte, `target` that of a link."""

    name: str
    size: int
    kind: bytes
    target: str

    @property
    def is_file(self) -> bool:
        """A regular file."""
        return self.kind in {tarfile.REGTYPE, tarfile.AREGTYPE}

    @property
    def is_link(self) -> bool:
        """A link of either kind; `target` is relative to the member's folder for a symbolic one."""
        return self.kind in {tarfile.LNKTYPE, tarfile.SYMTYPE}


class ArchiveReader:
    """Reads a tar archive from a stream of chunks. Raises InvalidArgument for what is none, or is cut short."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = b""
        self._left = 0
        self._padding = 0

    async def members(self) -> AsyncIterator[Member]:
        """The members in order; the content of one is read by `content` before the next is asked for, or skipped."""
        extended: dict[str, str] = {}
        count = 0
        while True:
            await self._skip_rest()
            block = await self._exactly(BLOCK, at_end_ok=True)
            if not block or block == bytes(BLOCK):
                await self._drain()
                return
            count += 1
            if count > MAX_MEMBERS:
                raise ResourceExhausted(f"the archive has more than {MAX_MEMBERS} members: resource exhausted")
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise InvalidArgument(f"not a tar archive: {error}: invalid argument") from error
            if header.size < 0:
                raise InvalidArgument("not a tar archive: a member of negative size: invalid argument")
            self._left, self._padding = header.size, -header.size % BLOCK
            if header.type in {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE}:
                extended |= await self._extension(header.type)
                continue
            size = int(extended["size"]) if extended.get("size", "").isdigit() else header.size
            self._left, self._padding = size, -size % BLOCK
            name = extended.get("path", header.name)
            yield Member(_clean(name), size, header.type, extended.get("linkpath", header.linkname))
            extended = {}

    async def content(self) -> AsyncIterator[bytes]:
        """The content of the member that was given last."""
        while self._left:
            if not self._buffer:
                await self._more()
            chunk, self._buffer = self._buffer[: self._left], self._buffer[self._left :]
            self._left -= len(chunk)
            yield chunk

    async def _extension(self, kind: bytes) -> dict[str, str]:
        if self._left > MAX_EXTENDED:
            raise ResourceExhausted("an extended header of the archive is too long: resource exhausted")
        data = b"".join([chunk async for chunk in self.content()])
        if kind == tarfile.GNUTYPE_LONGNAME:
            return {"path": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        if kind == tarfile.GNUTYPE_LONGLINK:
            return {"linkpath": data.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        return _pax(data) if kind == tarfile.XHDTYPE else {}

    async def _skip_rest(self) -> None:
        async for _ in self.content():
            pass
        if self._padding:
            await self._exactly(self._padding)
            self._padding = 0

    async def _drain(self) -> None:
        """Read what comes behind the end (padding), so that whoever sends it isn't left waiting."""
        self._buffer = b""
        async for _ in self._chunks:
            pass

    async def _more(self) -> None:
        chunk = await anext(self._chunks, b"")
        if not chunk:
            raise InvalidArgument("the archive ends in the middle: invalid argument")
        self._buffer += chunk

    async def _exactly(self, size: int, *, at_end_ok: bool = False) -> bytes:
        while len(self._buffer) < size:
            if at_end_ok and not self._buffer:
                chunk = await anext(self._chunks, b"")
                if not chunk:
                    return b""
                self._buffer = chunk
            else:
                await self._more()
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data


async def decompressed(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same stream without gzip or zstd around it, told by its first bytes. Raises InvalidArgument for a bad one."""
    first = b""
    while len(first) < len(_ZSTD):
        chunk = await anext(chunks, b"")
        if not chunk:
            break
        first += chunk
    if first.startswith(_GZIP):
        unpack = _gunzip
    elif first.startswith(_ZSTD):
        unpack = _unzstd
    else:
        yield first
        async for chunk in chunks:
            yield chunk
        return
    try:
        async for chunk in unpack(first, chunks):
            yield chunk
    except (zlib.error, zstandard.ZstdError) as error:
        raise InvalidArgument(f"the archive's compression is damaged: {error}: invalid argument") from error


async def _gunzip(first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """gzip's members one after the other, at most a window of output at a time."""
    state = zlib.decompressobj(31)
    data = first
    while data:
        if state.eof:
            state = zlib.decompressobj(31)
        yield state.decompress(data, OUTPUT)
        data = state.unused_data if state.eof else state.unconsumed_tail
        if not data:
            data = await anext(chunks, b"")
    if not state.eof:
        raise InvalidArgument("the archive's compression ends in the middle: invalid argument")


async def _unzstd(first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    state = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj(read_across_frames=True)
    yield state.decompress(first)
    async for chunk in chunks:
        # in small pieces: each may become large
        for at in range(0, len(chunk), PIECE):
            yield state.decompress(chunk[at : at + PIECE])


def _clean(name: str) -> str:
    while name.startswith("./"):
        name = name[2:]
    return name.strip("/")


def _pax(data: bytes) -> dict[str, str]:
    """The records of a pax header: `LENGTH KEY=VALUE\\n` (POSIX pax)."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at] != 0:
        length, space, _ = data[at:].partition(b" ")
        if not space or not length.isdigit() or int(length) <= len(length) + 1:
            raise InvalidArgument("an extended header of the archive is damaged: invalid argument")
        record = data[at + len(length) + 1 : at + int(length) - 1]
        key, _, value = record.partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += int(length)
    return records


class ArchiveWriter:
    """Writes a tar archive by a function that takes bytes; the same members give the same bytes."""

    def __init__(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._write = write

    async def folder(self, name: str) -> None:
        """A folder."""
        header = tarfile.TarInfo(name + "/")
        header.type, header.mode = tarfile.DIRTYPE, 0o755
        await self._write(header.tobuf(tarfile.PAX_FORMAT))

    async def file(self, name: str, data: bytes) -> None:
        """A small file."""

        async def once() -> AsyncIterator[bytes]:
            yield data

        await self.stream(name, len(data), once())

    async def stream(self, name: str, size: int, chunks: AsyncIterator[bytes]) -> None:
        """A file of a known size."""
        header = tarfile.TarInfo(name)
        header.size, header.mode = size, 0o444
        await self._write(header.tobuf(tarfile.PAX_FORMAT))
        async for chunk in chunks:
            await self._write(chunk)
        if size % BLOCK:
            await self._write(bytes(-size % BLOCK))

    async def end(self) -> None:
        """The end of the archive."""
        await self._write(bytes(2 * BLOCK))
