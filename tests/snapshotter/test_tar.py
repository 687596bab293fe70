"""The tar reader by itself: header by header, and with damage of all kinds."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable

import pytest

from tests.snapshotter.archives import Archive
from wherry.core.errors import InvalidArgument
from wherry.snapshotter import pax, tar
from wherry.snapshotter.tar import Member, TarReader
from wherry.snapshotter.tarwrite import TarWriter, padding


def chunks(data: bytes, size: int) -> Callable[[], bytes]:
    pieces = iter([data[at : at + size] for at in range(0, len(data), size)])
    return lambda: next(pieces, b"")


def members(data: bytes, size: int = 1 << 20) -> list[tuple[Member, bytes]]:
    reader = TarReader(chunks(data, size))
    return [(member, reader.read(member.stored)) for member in reader]


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 1000, 1 << 20])
def test_chunks_may_end_anywhere(size: int) -> None:
    archive = Archive().file("a", b"1" * 700).dir("d").file("n" * 150, b"2").file("e", b"").file("z", b"3" * 512)
    found = [(member.name, data) for member, data in members(archive.plain, size)]
    assert found == [(b"a", b"1" * 700), (b"d/", b""), (b"n" * 150, b"2"), (b"e", b""), (b"z", b"3" * 512)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_fields_are_read_as_python_writes_them(form: int) -> None:
    archive = Archive(form).file("d/" + "x" * 99, b"12", mode=0o4750, owner=(1000, 2000), mtime=1234567890)
    archive.add("char", "c", device=(4, 5)).add("link", "l", to="d/" + "x" * 98)
    (first, data), (second, _), (third, _) = members(archive.plain)
    assert (first.name, first.mode, first.uid, first.gid, first.mtime, first.size, data) == (
        b"d/" + b"x" * 99, 0o4750, 1000, 2000, 1234567890 * 10**9, 2, b"12"
    )  # fmt: skip
    assert (second.type, second.major, second.minor) == (tar.CHARACTER, 4, 5)
    assert (third.type, third.link) == (tar.LINK, b"d/" + b"x" * 98)


def test_numbers_too_large_for_octal_digits() -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        archive = Archive(form).file("a", owner=(0o10000000, 3_000_000_000), mtime=2**40)
        ((member, _),) = members(archive.plain)
        assert (member.uid, member.gid, member.mtime) == (0o10000000, 3_000_000_000, 2**40 * 10**9)
    ((member, _),) = members(Archive(tarfile.GNU_FORMAT).file("a", mtime=-5).plain)
    assert member.mtime == -5 * 10**9


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        (b"1", 10**9),
        (b"1.5", 1_500_000_000),
        (b"1.123456789123", 1_123_456_789),
        (b"-1.5", -1_500_000_000),
        (b"0.000000001", 1),
        (b"1700000000.999999999", 1_700_000_000_999_999_999),
    ],
)
def test_times_keep_their_nanoseconds(text: bytes, nanoseconds: int) -> None:
    assert pax.nanoseconds(text) == nanoseconds


@pytest.mark.parametrize("text", [b"", b"x", b"1.x", b"--1", b"1e5", b"\xb2", b"9" * 40])
def test_what_is_no_time(text: bytes) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        pax.nanoseconds(text)


@pytest.mark.parametrize(
    "records",
    [b"x", b"5 a=", b"99 a=b\n", b"6 a=b\nrest", b"4 a\n", b"5 =b\n", b"-1 a=b\n", b"6 a=bb", b" a=b\n", b"3 \n"],
)
def test_damaged_pax_records(records: bytes) -> None:
    with pytest.raises(InvalidArgument, match="invalid tar header: a PAX header has"):
        pax.parse(records)


def test_extended_headers_are_bounded() -> None:
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
        info = tarfile.TarInfo("x")
        info.type = kind
        info.size = 2 << 20
        data = info.tobuf(tarfile.USTAR_FORMAT) + bytes(3 << 20)
        with pytest.raises(InvalidArgument, match="the limit is 1048576"):
            members(data)


def test_what_is_written_is_read_back() -> None:
    out = io.BytesIO()
    writer = TarWriter(out.write)
    xattrs = {"user.a": b"\0\xff=\n", "security.capability": bytes(20)}
    name, link = b"n\xc3\xbc" * 60, b"l" * 300
    writer.member(
        name, tar.REGULAR, mode=0o6711, uid=2**30, gid=2**31, size=3, mtime=1_600_000_000_000_000_001, xattrs=xattrs
    )
    writer.data(b"abc" + padding(3))
    writer.member(b"latin-\xe9" * 20, tar.SYMLINK, link=link, mtime=-1)
    writer.member(b"d", tar.DIRECTORY, mode=0o1777)
    writer.close()
    (first, data), (second, _), (third, _) = members(out.getvalue())
    assert (first.name, first.mode, first.uid, first.gid, first.mtime, data) == (
        name, 0o6711, 2**30, 2**31, 1_600_000_000_000_000_001, b"abc"
    )  # fmt: skip
    assert first.xattrs == xattrs
    assert (second.name, second.link, second.mtime) == (b"latin-\xe9" * 20, link, -1)
    assert (third.name, third.mode) == (b"d/", 0o1777)


def _varied(form: int) -> bytes:
    archive = Archive(form).file("a", b"1" * 600).dir("d").add("symlink", "s", to="t" * 120).file("n" * 200, b"xyz")
    return archive.file("p", pax={"SCHILY.xattr.user.x": "y", "GNU.sparse.map": "0,1"}).plain


def test_no_damage_is_anything_but_an_invalid_argument() -> None:
    """Bytes changed, cut, doubled, moved: 4,000 archives, each read to its end or refused in words."""
    chance = random.Random(4)
    whole = [_varied(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[1:]]
    refused = 0
    for _ in range(4000):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            match chance.randrange(5):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    del data[at:]
                case 2:
                    data[at : at + 512] = data[: chance.randrange(512)]
                case 3:
                    field = min(at - at % 512 + chance.choice([100, 124, 136, 156, 345, 482]), len(data) - 1)
                    data[field] = chance.choice(b"0129LKxgS\xff\0 ")
                case _:
                    data[at:at] = data[at - at % 512 :][:512]
            if not data:
                break
            _mend_checksums(data)
        try:
            for member, _ in members(bytes(data), chance.choice([512, 4096])):
                assert member.size >= 0
        except InvalidArgument:
            refused += 1
    assert refused > 500


def _mend_checksums(data: bytearray) -> None:
    """Half of the damage should get past the checksum."""
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar" and at % 1024:
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
