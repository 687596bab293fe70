"""PAX extended headers: records of `length key=value` that refine the next member (POSIX.1-2017, pax(1))."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wherry.core.errors import InvalidArgument

if TYPE_CHECKING:
    from wherry.snapshotter.tar import Member

XATTR = b"SCHILY.xattr."
_NUMBER_LIMIT = 1 << 63


def parse(data: bytes) -> dict[bytes, bytes]:
    """The records by key, the last of a kind counts. InvalidArgument.

    The pieces of a sparse file in format 0.0 come as repeated pairs of offset and numbytes; they are returned as the
    one `GNU.sparse.map` of format 0.1.
    """
    records: dict[bytes, bytes] = {}
    pieces: list[bytes] = []
    at = 0
    while at < len(data):
        blank = data.find(b" ", at, at + 20)
        digits = data[at:blank]
        if blank < 0 or not digits.isdigit():
            if not data[at:].strip(b"\0"):
                break  # some writers count the padding in
            raise _bad("a record without a length")
        end = at + int(digits)
        if end > len(data) or end < blank + 3 or data[end - 1] != 10:
            raise _bad("a record whose length is wrong")
        key, equals, value = data[blank + 1 : end - 1].partition(b"=")
        if not equals or not key:
            raise _bad("a record without a key")
        if key in {b"GNU.sparse.offset", b"GNU.sparse.numbytes"}:
            pieces.append(value)
        else:
            records[key] = value
        at = end
    if pieces:
        records[b"GNU.sparse.map"] = b",".join(pieces)
    return records


def _bad(what: str) -> InvalidArgument:
    return InvalidArgument(f"archive/tar: invalid tar header: a PAX header has {what}: invalid argument")


def merge(member: Member, records: dict[bytes, bytes]) -> None:
    """Put the records into the member; an empty value takes the header's field as it is. ValueError."""
    for key, value in records.items():
        if key.startswith(XATTR):
            _attribute(member, key[len(XATTR) :], value)
        elif not value:
            continue
        elif key == b"path":
            member.name = value
        elif key == b"linkpath":
            member.link = value
        elif key == b"size":
            member.size = member.stored = integer(value)
        elif key == b"uid":
            member.uid = integer(value)
        elif key == b"gid":
            member.gid = integer(value)
        elif key == b"mtime":
            member.mtime = nanoseconds(value)
        elif key == b"atime":
            member.atime = nanoseconds(value)


def _attribute(member: Member, name: bytes, value: bytes) -> None:
    if not name or b"\0" in name:
        raise ValueError("an extended attribute without a name")
    if member.xattrs is None:
        member.xattrs = {}
    member.xattrs[name.decode("utf-8", "surrogateescape")] = value


def integer(value: bytes) -> int:
    """A decimal number of a record. ValueError."""
    if not value.isdigit() or len(value) > 19 or int(value) >= _NUMBER_LIMIT:
        raise ValueError(f"{value[:40]!r} is not a number")
    return int(value)


def nanoseconds(value: bytes) -> int:
    """Seconds with a fraction, as nanoseconds; digits beyond are cut off, as Go does. ValueError."""
    seconds, _, fraction = value.partition(b".")
    negative = seconds.startswith(b"-")
    whole = seconds[1:] if negative else seconds
    if not whole.isdigit() or len(whole) > 18 or not (fraction.isdigit() or not fraction):
        raise ValueError(f"{value[:40]!r} is not a time")
    total = int(whole) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return -total if negative else total
