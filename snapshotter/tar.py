"""Reading tar archives: ustar, PAX, GNU, star and old V7 headers, sparse files; names are bytes.

Written for speed where layers spend their time: one header, one small file. A header that lies in the current chunk is
taken apart by one `struct` call, numbers that repeat (modes, owners, times) are looked up, and the checksum is that of
adler32, whose lower half is a sum of bytes.

Formats: POSIX.1-2017 pax(1), "ustar Interchange Format" and "pax Interchange Format"; GNU tar's manual, "Basic Tar
Format" and "Storing Sparse Files".
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator

from wherry.core.errors import InvalidArgument
from wherry.snapshotter import pax

BLOCK = 512
MAX_SPECIAL = 1 << 20
"""Bytes of one PAX header or GNU long name; they are held in memory. Go's archive/tar has the same limit."""
MAX_EXTENTS = 1 << 20
"""Pieces of a sparse file."""

REGULAR, LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"

_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12s")
_PADDING = (b"\0", b" ")
_ZEROS = bytes(BLOCK)
_SPACES_SUM = 8 * 32
_MEMO_LIMIT = 4096
_NO_ID = (1 << 32) - 1
"""The id that chown(2) takes for "leave it"."""
_DEVICES = 1 << 20
"""More than the kernel has of majors, as many as it has of minors (MINORBITS)."""


class Member:
    """One entry of an archive.

    name and link are as written (bytes); type is one of the constants above; times are nanoseconds since the epoch;
    size is that of the file, `stored` what the archive holds of it; xattrs by name; extents are (offset, length) of the
    pieces of a sparse file that are stored, None for a file that is whole.
    """

    __slots__ = (
        "atime", "extents", "gid", "link", "major", "minor", "mode", "mtime", "name", "size", "stored", "type", "uid",
        "xattrs",
    )  # fmt: skip
    name: bytes
    link: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    size: int
    stored: int
    mtime: int
    atime: int
    major: int
    minor: int
    xattrs: dict[str, bytes] | None
    extents: list[tuple[int, int]] | None


class TarReader:
    """The members of the archive whose chunks `get` returns (b"" at the end).

    Iterate; after each member its data may be taken with `copy_to` or `read`, what isn't taken is passed over. Raises
    InvalidArgument, with the place, for what is no tar or ends too early.
    """

    def __init__(self, get: Callable[[], bytes]) -> None:
        self._get = get
        self._chunk = b""
        self._view = memoryview(b"")
        self._at = 0
        self._end = 0
        self._before = 0  # bytes of the archive before the current chunk
        self._left = 0  # bytes of the current member's data that weren't taken
        self._pad = 0
        self._memo: dict[bytes, int] = {}
        self._globals: dict[bytes, bytes] = {}

    @property
    def position(self) -> int:
        """Bytes of the archive taken so far."""
        return self._before + self._at

    # bytes

    def _next_chunk(self) -> bool:
        self._before += self._end
        self._chunk = self._get()
        self._view = memoryview(self._chunk)
        self._at = 0
        self._end = len(self._chunk)
        return self._end > 0

    def _take(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the archive's end."""
        pieces = []
        while size:
            if self._at == self._end and not self._next_chunk():
                break
            piece = self._chunk[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _pass_over(self, size: int) -> None:
        while size:
            if self._at == self._end and not self._next_chunk():
                raise self._cut()
            step = min(size, self._end - self._at)
            self._at += step
            size -= step

    def _cut(self) -> InvalidArgument:
        return InvalidArgument(f"the archive is cut short at byte {self.position}: unexpected EOF: invalid argument")

    def _bad(self, what: str) -> InvalidArgument:
        return InvalidArgument(
            f"archive/tar: invalid tar header: {what} (in the header that ends at byte {self.position}):"
            " invalid argument"
        )

    def drain(self) -> None:
        """Take what follows the archive's end, so that the stream's digest is that of all of it."""
        self._at = self._end
        while self._next_chunk():
            self._at = self._end

    # a member's data

    def copy_to(self, fd: int) -> None:
        """Write the current member's stored data to `fd`, where it stands. OSError from writing."""
        left = self._left
        while left:
            at = self._at
            room = self._end - at
            if not room:
                if not self._next_chunk():
                    raise self._cut()
                continue
            room = min(room, left)
            written = os.write(fd, self._view[at : at + room])
            self._at = at + written
            left -= written
            self._left = left

    def read(self, size: int) -> bytes:
        """The next `size` bytes of the current member's stored data."""
        data = self._take(min(size, self._left))
        self._left -= len(data)
        return data

    # members

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            yield member

    def _header(self) -> bytes | None:
        """The next header block; None at the end of the archive (two blocks of zeros, or no more bytes)."""
        skip = self._left + self._pad
        self._left = self._pad = 0
        at = self._at + skip
        end = at + BLOCK
        if end <= self._end:
            self._at = end
            block = self._chunk[at:end]
        else:
            self._pass_over(skip)
            block = self._take(BLOCK)
            if not block:
                return None
            if len(block) < BLOCK:
                raise self._cut()
        if block == _ZEROS:
            second = self._take(BLOCK)
            if second and second != _ZEROS:
                raise self._bad("a block of zeros is followed by something else")
            return None
        return block

    def _next(self) -> Member | None:
        records: dict[bytes, bytes] = {}
        long_name = long_link = None
        while (block := self._header()) is not None:
            member = self._parse(block)
            kind = member.type
            if kind in {b"x", b"X"}:
                records = pax.parse(self._special(member))
            elif kind == b"g":
                self._special(member)  # containerd ignores them too
            elif kind == b"L":
                long_name = self._special(member).partition(b"\0")[0]
            elif kind == b"K":
                long_link = self._special(member).partition(b"\0")[0]
            else:
                if long_name is not None:
                    member.name = long_name
                if long_link is not None:
                    member.link = long_link
                return self._finished(member, block, records)
        if records or long_name is not None or long_link is not None:
            raise self._cut()
        return None

    def _special(self, member: Member) -> bytes:
        if member.stored > MAX_SPECIAL:
            raise self._bad(f"an extended header of {member.stored} bytes, the limit is {MAX_SPECIAL}")
        self._begin(member.stored)
        data = self.read(member.stored)
        if len(data) < member.stored:
            raise self._cut()
        return data

    def _begin(self, stored: int) -> None:
        self._left = stored
        self._pad = -stored % BLOCK

    def _parse(self, block: bytes) -> Member:
        (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, version, _, _, major, minor, prefix, tail) = (
            _HEADER.unpack(block)
        )
        number = self._number
        expected = number(checksum)
        # the sum of all bytes, with blanks in place of the checksum; adler32 begins at 1 and is modulo 65521
        total = zlib.adler32(block[156:], zlib.adler32(block[:148])) & 0xFFFF
        if total != (expected - _SPACES_SUM + 1) % 65521 and not _signed_matches(block, expected):
            raise self._bad("the checksum is wrong")
        member = Member()
        member.name = name.partition(b"\0")[0]
        member.link = link.partition(b"\0")[0] if link[0] else b""
        member.mode = number(mode)
        member.uid = number(uid)
        member.gid = number(gid)
        member.size = member.stored = number(size)
        member.atime = 0
        member.mtime = number(mtime) * 1_000_000_000
        member.type = kind
        member.major = member.minor = 0
        member.xattrs = member.extents = None
        if magic == b"ustar\0":
            if prefix[0]:
                prefix = prefix.partition(b"\0")[0] if tail[8:] != b"tar\0" else prefix[:131].partition(b"\0")[0]
                member.name = prefix + b"/" + member.name
            if kind in {CHARACTER, BLOCK_DEVICE}:
                member.major, member.minor = number(major), number(minor)
        elif magic == b"ustar " and version == b" \0" and kind in {CHARACTER, BLOCK_DEVICE}:
            member.major, member.minor = number(major), number(minor)
        return member

    def _number(self, field: bytes) -> int:
        memo = self._memo
        value = memo.get(field)
        if value is None:
            try:
                value = parse_number(field)
            except ValueError as error:
                raise self._bad(str(error)) from None
            if len(memo) > _MEMO_LIMIT:
                memo.clear()
            memo[field] = value
        return value

    def _finished(self, member: Member, block: bytes, records: dict[bytes, bytes]) -> Member:
        if records:
            try:
                pax.merge(member, records)
            except ValueError as error:
                raise self._bad(str(error)) from None
        kind = member.type
        if kind in {b"\0", b"7"}:
            # old archives mark a directory by its name only
            kind = member.type = DIRECTORY if member.name.endswith(b"/") else REGULAR
        elif kind == REGULAR and member.name.endswith(b"/"):
            kind = member.type = DIRECTORY
        if kind == b"S" or (records and kind == REGULAR and any(key.startswith(b"GNU.sparse.") for key in records)):
            self._sparse(member, block, records)
        elif kind != REGULAR:
            # links and directories may state a size, but no data follows (pax(1), on `size` and `typeflag`)
            member.size = 0
            if kind in {LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO}:
                member.stored = 0
            self._begin(member.stored)
        else:
            member.size = member.stored
            self._begin(member.stored)
        if member.stored < 0:
            raise self._bad("a negative size")
        if not (0 <= member.uid < _NO_ID and 0 <= member.gid < _NO_ID):
            raise self._bad(f"an owner that no file has, {member.uid}:{member.gid}")
        if not (0 <= member.major < _DEVICES and 0 <= member.minor < _DEVICES):
            raise self._bad(f"a device that there can't be, {member.major}:{member.minor}")
        if b"\0" in member.name or b"\0" in member.link:
            raise self._bad("a name with a zero byte")
        return member

    # sparse files

    def _sparse(self, member: Member, block: bytes, records: dict[bytes, bytes]) -> None:
        try:
            if member.type == b"S":
                member.extents = self._old_extents(block)
                member.size = parse_number(block[483:495])
                self._begin(member.stored)
                member.type = REGULAR
            else:
                self._begin(member.stored)
                if records.get(b"GNU.sparse.major") == b"1":
                    member.extents = self._extents_in_data()
                    member.stored = self._left
                else:
                    numbers = [pax.integer(n) for n in records.get(b"GNU.sparse.map", b"").split(b",") if n]
                    member.extents = _pairs(numbers)
                size = records.get(b"GNU.sparse.realsize", records.get(b"GNU.sparse.size"))
                member.size = pax.integer(size) if size is not None else member.stored
                member.name = records.get(b"GNU.sparse.name", member.name)
        except ValueError as error:
            raise self._bad(str(error)) from None
        self._check_extents(member)

    def _old_extents(self, block: bytes) -> list[tuple[int, int]]:
        numbers: list[int] = []
        fields, more = block[386:482], block[482]
        while True:
            for at in range(0, len(fields), 24):
                if fields[at] == 0 and not fields[at : at + 24].strip(b"\0"):
                    break
                numbers += parse_number(fields[at : at + 12]), parse_number(fields[at + 12 : at + 24])
            if not more:
                return _pairs(numbers)
            if len(numbers) > 2 * MAX_EXTENTS:
                raise ValueError("a sparse file of too many pieces")
            extension = self._take(BLOCK)
            if len(extension) < BLOCK:
                raise self._cut()
            fields, more = extension[:504], extension[504]

    def _extents_in_data(self) -> list[tuple[int, int]]:
        """PAX format 1.0: decimal lines at the start of the data, padded to a block."""
        data = b""
        wanted = 1
        lines: list[bytes] = []
        while len(lines) < wanted:
            piece = self.read(BLOCK)
            if len(piece) < BLOCK or len(data) > MAX_SPECIAL:
                raise ValueError("the map of a sparse file is damaged")
            data += piece
            lines = data.split(b"\n")[:-1]
            if lines and wanted == 1:
                wanted = 1 + 2 * pax.integer(lines[0])
        return _pairs([pax.integer(line) for line in lines[1:wanted]])

    def _check_extents(self, member: Member) -> None:
        end = total = 0
        for offset, length in member.extents or ():
            if offset < end or length < 0:
                raise self._bad("the pieces of a sparse file overlap or aren't in order")
            end = offset + length
            total += length
        if end > member.size or total != member.stored:
            raise self._bad("the pieces of a sparse file don't fit its size")


def _pairs(numbers: list[int]) -> list[tuple[int, int]]:
    if len(numbers) % 2:
        raise ValueError("the map of a sparse file has an odd count of numbers")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def parse_number(field: bytes) -> int:
    """A number of a header: octal text, or GNU's base 256 when the first bit is set. ValueError."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big")
        bits = 8 * len(field)
        # the mark is the first bit; where the second is set too the number is negative
        value = value - (1 << bits) if field[0] & 0x40 else value & ((1 << (bits - 1)) - 1)
        if not -(1 << 63) <= value < 1 << 63:
            raise ValueError("a number is too large")
        return value
    digits = field.strip(b" \0").partition(b"\0")[0]
    if not digits:
        return 0
    if not digits.isdigit():
        raise ValueError(f"{digits!r} is not an octal number")
    return int(digits, 8)


def _signed_matches(block: bytes, expected: int) -> bool:
    """Some old archivers summed signed bytes."""
    total = sum(block[:148]) + _SPACES_SUM + sum(block[156:])
    high = sum(byte > 127 for byte in block[:148]) + sum(byte > 127 for byte in block[156:])
    return total - 256 * high == expected
