"""Writing tar archives: ustar headers, PAX records for what doesn't fit them (POSIX.1-2017, pax(1))."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from wherry.snapshotter.pax import XATTR
from wherry.snapshotter.tar import BLOCK, DIRECTORY

_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12s")
_ID_LIMIT = 1 << 21
_SIZE_LIMIT = 1 << 33
_SECOND = 1_000_000_000


class TarWriter:
    """Writes members through `write`, in the order of the calls; `close` writes the end."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write

    def member(
        self,
        name: bytes,
        kind: bytes,
        *,
        mode: int = 0,
        uid: int = 0,
        gid: int = 0,
        size: int = 0,
        mtime: int = 0,
        link: bytes = b"",
        device: tuple[int, int] = (0, 0),
        xattrs: Mapping[str, bytes] | None = None,
    ) -> None:
        """The header of a member; for a regular file `size` bytes and `padding(size)` zeros must follow.

        `mtime` is in nanoseconds, `kind` one of `tar.REGULAR` and its like.
        """
        if kind == DIRECTORY:
            name += b"/"
        records: dict[bytes, bytes] = {}
        short_name = self._fit(name, b"path", records)
        short_link = self._fit(link, b"linkpath", records)
        seconds, rest = divmod(mtime, _SECOND)
        if rest or not 0 <= seconds < _SIZE_LIMIT:
            records[b"mtime"] = _decimal(mtime)
            seconds = min(max(seconds, 0), _SIZE_LIMIT - 1)
        for key, value, limit in ((b"uid", uid, _ID_LIMIT), (b"gid", gid, _ID_LIMIT), (b"size", size, _SIZE_LIMIT)):
            if value >= limit:
                records[key] = b"%d" % value
        for attribute, content in sorted((xattrs or {}).items()):
            records[XATTR + attribute.encode("utf-8", "surrogateescape")] = content
        if records:
            self._extended(records)
        numbers = (
            mode,
            uid if uid < _ID_LIMIT else 0,
            gid if gid < _ID_LIMIT else 0,
            size if size < _SIZE_LIMIT else 0,
            seconds,
        )
        self._header(short_name, kind, numbers, link=short_link, device=device)

    def data(self, piece: bytes) -> None:
        """Some of a regular file's bytes."""
        self._write(piece)

    def close(self) -> None:
        self._write(bytes(2 * BLOCK))

    def _fit(self, text: bytes, key: bytes, records: dict[bytes, bytes]) -> bytes:
        if len(text) <= 100 and text.isascii():
            return text
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            if len(text) <= 100:
                return text  # not text at all: readers take the field's bytes as they are
            records[b"hdrcharset"] = b"BINARY"
        records[key] = text
        return text[:100]

    def _extended(self, records: dict[bytes, bytes]) -> None:
        # the character set must be known before the names are read
        lines = [_record(key, records[key]) for key in sorted(records, key=lambda key: (key != b"hdrcharset", key))]
        body = b"".join(lines)
        self._header(b"PaxHeaders.0/x", b"x", (0o644, 0, 0, len(body), 0))
        self._write(body + padding(len(body)))

    def _header(
        self,
        name: bytes,
        kind: bytes,
        numbers: tuple[int, int, int, int, int],
        *,
        link: bytes = b"",
        device: tuple[int, int] = (0, 0),
    ) -> None:
        mode, uid, gid, size, seconds = numbers
        fields = [
            name, b"%07o\0" % mode, b"%07o\0" % uid, b"%07o\0" % gid, b"%011o\0" % size, b"%011o\0" % seconds,
            b" " * 8, kind, link, b"ustar\0", b"00", b"", b"", b"%07o\0" % device[0], b"%07o\0" % device[1], b"", b"",
        ]  # fmt: skip
        fields[6] = b"%06o\0 " % sum(_HEADER.pack(*fields))
        self._write(_HEADER.pack(*fields))


def padding(size: int) -> bytes:
    """The zeros that fill up the last block of `size` bytes."""
    return bytes(-size % BLOCK)


def _record(key: bytes, value: bytes) -> bytes:
    body = b" %s=%s\n" % (key, value)
    length = len(body)
    while length != len(body) + len(b"%d" % length):
        length = len(body) + len(b"%d" % length)
    return b"%d%s" % (length, body)


def _decimal(nanoseconds: int) -> bytes:
    sign = "-" if nanoseconds < 0 else ""
    seconds, rest = divmod(abs(nanoseconds), _SECOND)
    return f"{sign}{seconds}.{rest:09d}".rstrip("0").rstrip(".").encode()
