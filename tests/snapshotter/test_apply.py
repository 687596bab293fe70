"""Layers applied by the real worker: to what tree, and what is refused."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import random
import signal
import stat
import tarfile
from pathlib import Path

import pytest
import zstandard

from tests.snapshotter.archives import DOCKER, GZIP, PLAIN, ZSTD, Archive
from tests.snapshotter.trees import look, mounted, output_of
from wherry.core.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable, Unimplemented, WherryError
from wherry.linux.mounts import Mount
from wherry.snapshotter.applier import Applied, Applier
from wherry.snapshotter.limits import Limits
from wherry.snapshotter.native import NativeSnapshotter
from wherry.snapshotter.overlayfs import OverlaySnapshotter


async def put(
    applier: Applier,
    snapshotter: OverlaySnapshotter | NativeSnapshotter,
    name: str,
    parent: str,
    data: bytes,
    media_type: str = PLAIN,
) -> Applied:
    """Apply the archive on `parent` and commit it as `name`."""
    blob = Path(snapshotter.root) / f"blob-{name}"
    blob.write_bytes(data)
    applied = await applier.apply(snapshotter.prepare(f"key-{name}", parent), str(blob), media_type)
    snapshotter.commit(name, f"key-{name}")
    return applied


XATTR = "SCHILY.xattr.user.kept"


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def bind(directory: Path) -> list[Mount]:
    directory.mkdir(exist_ok=True)
    return [Mount("bind", str(directory), options=("rw", "rbind"))]


async def unpack(applier: Applier, tmp_path: Path, data: bytes, media_type: str = PLAIN) -> Path:
    """Apply the archive to an empty directory and return it."""
    (tmp_path / "blob").write_bytes(data)
    await applier.apply(bind(tmp_path / "tree"), str(tmp_path / "blob"), media_type)
    return tmp_path / "tree"


def sample(where: Path) -> None:
    """A tree with one of everything."""
    (where / "etc" / "deep" / "deeper").mkdir(parents=True)
    (where / "etc" / "passwd").write_text("root")
    (where / "empty").write_text("")
    (where / "big").write_bytes(random.Random(1).randbytes(3 << 20))
    (where / ("long" * 60)).write_text("a long name")
    long = where / ("directory" * 12) / ("name" * 30)
    long.parent.mkdir()
    long.write_text("a long path")
    (where / "ümlaut").write_text("u")
    (where / os.fsdecode(b"latin-\xe9")).write_text("e")
    os.symlink("etc/passwd", where / "relative")
    os.symlink("/" + "very/" * 30 + "far", where / "absolute")
    os.link(where / "etc" / "passwd", where / "etc" / "hard")
    os.link(where / "absolute", where / "hard-to-a-symlink", follow_symlinks=False)
    os.mkfifo(where / "fifo", 0o640)
    os.mknod(where / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    os.mknod(where / "loop", stat.S_IFBLK | 0o660, os.makedev(7, 300))
    (where / "setuid").write_text("s")
    os.chown(where / "setuid", 1000, 3_000_000)
    os.chmod(where / "setuid", 0o6755)
    (where / "ping").write_text("p")
    os.setxattr(where / "ping", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    os.setxattr(where / "ping", "user.colour", b"blue\0green\n")
    os.setxattr(where / "etc" / "deep", "user.on", b"directory")
    (where / "shared").mkdir()
    os.chown(where / "shared", 7, 8)
    os.chmod(where / "shared", 0o3775)
    (where / "shared" / "inherits").write_text("not")
    os.chown(where / "shared" / "inherits", 9, 10)
    (where / "sticky").mkdir()
    os.chmod(where / "sticky", 0o1777)
    with (where / "sparse").open("wb") as file:
        for place in range(40):
            file.seek(place << 20)
            file.write(b"piece")
        file.truncate(50 << 20)
    for number, (directory, _, files) in enumerate(os.walk(where, topdown=False)):
        for name in [*files, ""]:
            path = os.path.join(directory, name)
            os.utime(path, ns=(0, 1_500_000_000_123_456_000 + number), follow_symlinks=False)


GNU_TAR = {
    "pax": ["--format=posix", "--xattrs", "--xattrs-include=*"],
    "pax-sparse-1.0": ["--format=posix", "--xattrs", "--xattrs-include=*", "-S"],
    "pax-sparse-0.1": ["--format=posix", "--xattrs", "--xattrs-include=*", "-S", "--sparse-version=0.1"],
    "pax-sparse-0.0": ["--format=posix", "--xattrs", "--xattrs-include=*", "-S", "--sparse-version=0.0"],
    "gnu": ["--format=gnu"],
    "gnu-sparse": ["--format=gnu", "-S"],
    "oldgnu-sparse": ["--format=oldgnu", "-S"],
}


@pytest.mark.parametrize("form", GNU_TAR)
async def test_trees_archived_by_gnu_tar_come_out_the_same(applier: Applier, tmp_path: Path, form: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    sample(source)
    options = GNU_TAR[form]
    data = output_of("tar", *options, "-C", source, "-c", ".")
    tree = await unpack(applier, tmp_path, data)
    times = "posix" in options[0]
    expected, found = look(source, times=times), look(tree, times=times)
    if not times:  # this format has neither attributes nor nanoseconds
        expected = {name: value[:6] for name, value in expected.items()}
        found = {name: value[:6] for name, value in found.items()}
    assert found == expected
    if "-S" in options:
        assert (tree / "sparse").stat().st_blocks < 4000
        assert int((tree / "sparse").stat().st_mtime) == 1_500_000_000


@pytest.mark.parametrize("form", ["v7", "ustar"])
async def test_old_formats(applier: Applier, tmp_path: Path, form: str) -> None:
    """What they can say: no long names, no large ids, V7 no devices and directories by their names alone."""
    source = tmp_path / "source"
    (source / "d" / "deeper").mkdir(parents=True)
    (source / "d" / os.fsdecode(b"latin-\xe9")).write_text("e")
    (source / ("n" * 90)).write_bytes(random.Random(5).randbytes(70_000))
    os.symlink("d/deeper", source / "link")
    os.link(source / ("n" * 90), source / "hard")
    os.chmod(source / "hard", 0o4711)
    os.chown(source / "d", 1000, 2000)
    if form == "ustar":
        os.mkfifo(source / "fifo")
        os.mknod(source / "zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        (source / "d" / "deeper" / ("p" * 99)).write_text("by its prefix")
    for path in sorted(source.rglob("*"), reverse=True):
        os.utime(path, (0, 1_500_000_000), follow_symlinks=False)
    tree = await unpack(applier, tmp_path, output_of("tar", f"--format={form}", "-C", source, "-c", "."))
    assert look(tree) == look(source)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
async def test_pythons_archives(applier: Applier, tmp_path: Path, form: int) -> None:
    archive = Archive(form).dir("d/", mode=0o700, owner=(3, 4)).file("d/" + "n" * 90, b"text", mode=0o4711)
    archive.file("prefix" * 12 + "/" + "name" * 20, b"split")
    archive.add("symlink", "s", to="t" * 90).add("link", "h", to="d/" + "n" * 90, mode=0o4711)
    tree = await unpack(applier, tmp_path, archive.plain)
    assert (tree / "d" / ("n" * 90)).read_bytes() == b"text"
    assert (tree / ("prefix" * 12) / ("name" * 20)).read_bytes() == b"split"
    assert (tree / "h").stat().st_nlink == 2
    assert oct((tree / "h").stat().st_mode) == oct(0o104711)
    assert ((tree / "d").stat().st_uid, (tree / "d").stat().st_gid) == (3, 4)
    assert (tree / "s").readlink() == Path("t" * 90)


@pytest.mark.parametrize("media_type", [PLAIN, GZIP, ZSTD, DOCKER])
async def test_what_is_answered(applier: Applier, tmp_path: Path, media_type: str) -> None:
    plain = Archive().file("a", random.Random(2).randbytes(1 << 20)).file("b", bytes(9 << 20)).plain
    data = plain
    if media_type in {GZIP, DOCKER}:
        data = gzip.compress(plain[: 1 << 20]) + gzip.compress(plain[1 << 20 :]) + bytes(100)
    elif media_type == ZSTD:
        data = zstandard.compress(plain[: 1 << 20]) + zstandard.compress(plain[1 << 20 :])
    (tmp_path / "blob").write_bytes(data)
    told: list[int] = []
    applied = await applier.apply(
        bind(tmp_path / "tree"), str(tmp_path / "blob"), media_type, progress=told.append, sync_fs=True
    )
    assert applied == Applied(digest(plain), len(plain), PLAIN, 2)
    assert told == sorted(told)
    assert told[-1] == len(plain)
    assert len(told) > 2


async def test_the_digest_is_that_of_all_bytes_even_behind_the_end(applier: Applier, tmp_path: Path) -> None:
    data = Archive().file("a").plain + b"more" * 100_000
    (tmp_path / "blob").write_bytes(gzip.compress(data))
    applied = await applier.apply(bind(tmp_path / "tree"), str(tmp_path / "blob"), GZIP)
    assert (applied.digest, applied.size) == (digest(data), len(data))


async def test_a_pipe_is_applied_while_it_is_filled(applier: Applier, tmp_path: Path) -> None:
    data = Archive().file("first", b"1").file("second", bytes(1 << 20)).plain
    receiving, sending = os.pipe()
    os.set_blocking(receiving, False)  # as asyncio's are
    task = asyncio.create_task(applier.apply(bind(tmp_path / "tree"), receiving, PLAIN))
    with os.fdopen(sending, "wb") as pipe:
        pipe.write(data[:10])
        pipe.flush()
        await asyncio.sleep(0.2)
        await asyncio.to_thread(pipe.write, data[10:])
    applied = await task
    os.close(receiving)
    assert applied.digest == digest(data)
    assert (tmp_path / "tree" / "first").read_bytes() == b"1"


async def test_later_entries_replace_earlier_ones(applier: Applier, tmp_path: Path) -> None:
    archive = Archive().file("f", b"1").file("f", b"2").dir("f").file("f/below", b"3")
    archive.dir("d", mode=0o700).file("d/kept", b"k").dir("d", mode=0o711, mtime=5)
    archive.dir("e").file("e/x").add("symlink", "e", to="d").file("e/through", b"t")
    archive.file("g").add("symlink", "g", to="x").file("g", b"file again")
    archive.dir("t", mtime=1).file("t/new").dir("u", mtime=2).add("symlink", "u", to="t", mtime=3)
    tree = await unpack(applier, tmp_path, archive.plain)
    assert (tree / "f" / "below").read_bytes() == b"3"
    assert oct((tree / "d").stat().st_mode & 0o777) == "0o711"
    assert sorted(os.listdir(tree / "d")) == ["kept", "through"]
    assert (tree / "g").read_bytes() == b"file again"
    assert ((tree / "t").stat().st_mtime, (tree / "u").lstat().st_mtime) == (1, 3)


async def test_missing_parents_are_made_and_links_to_them_followed(applier: Applier, tmp_path: Path) -> None:
    archive = Archive().file("a/b/c").add("symlink", "lib", to="usr/lib").file("lib/x", b"x")
    archive.add("symlink", "abs", to="/opt/there").file("abs/y", b"y")
    tree = await unpack(applier, tmp_path, archive.plain)
    assert (tree / "a" / "b" / "c").exists()
    assert (tree / "usr" / "lib" / "x").read_bytes() == b"x"
    assert (tree / "opt" / "there" / "y").read_bytes() == b"y"


async def test_thousands_of_directories(applier: Applier, tmp_path: Path) -> None:
    archive = Archive()
    for number in range(700):
        archive.file(f"d{number % 350}/f{number}", b"%d" % number)
    archive.add("link", "d1/link", to="d200/f200")
    tree = await unpack(applier, tmp_path, archive.plain)
    assert sum(len(files) for _, _, files in os.walk(tree)) == 701
    assert (tree / "d1" / "link").read_bytes() == b"200"


# whiteouts


@pytest.fixture(params=["overlay", "native"])
def either(request: pytest.FixtureRequest, tmp_path: Path, overlay: OverlaySnapshotter) -> object:
    return overlay if request.param == "overlay" else NativeSnapshotter(str(tmp_path / "native"))


BASE = (
    Archive().dir("d", mode=0o750, owner=(1, 2)).file("d/one").file("d/two").dir("d/sub").file("d/sub/x")
    .dir("e").file("e/y").file("f").plain
)  # fmt: skip

WHITEOUTS: dict[str, tuple[Archive, list[str]]] = {
    "a file": (Archive().file("d/.wh.one", b""), ["d", "d/sub", "d/sub/x", "d/two", "e", "e/y", "f"]),
    "a directory": (Archive().file(".wh.d", b""), ["e", "e/y", "f"]),
    "nothing there": (
        Archive().file("d/.wh.none", b"").file("none/.wh.none", b""),
        ["d", "d/one", "d/sub", "d/sub/x", "d/two", "e", "e/y", "f"],
    ),
    "opaque first": (Archive().dir("d").file("d/.wh..wh..opq", b"").file("d/new"), ["d", "d/new", "e", "e/y", "f"]),
    "opaque last": (Archive().dir("d").file("d/new").file("d/.wh..wh..opq", b""), ["d", "d/new", "e", "e/y", "f"]),
    "a directory, then one of the same name": (
        Archive().file(".wh.d", b"").dir("d").file("d/new"),
        ["d", "d/new", "e", "e/y", "f"],
    ),
    "one of the same name, then its whiteout": (
        Archive().dir("d").file("d/new").file(".wh.d", b""),
        ["d", "d/new", "e", "e/y", "f"],
    ),
    "a file, then one of the same name": (
        Archive().file(".wh.f", b"").file("f", b"new"),
        ["d", "d/one", "d/sub", "d/sub/x", "d/two", "e", "e/y", "f"],
    ),
    "a directory that a later name implies": (
        Archive().file(".wh.d", b"").file("d/new"),
        ["d", "d/new", "e", "e/y", "f"],
    ),
    "the whole root": (Archive().file(".wh..wh..opq", b"").file("new"), ["new"]),
    "records of aufs": (
        Archive().dir(".wh..wh.plnk").file(".wh..wh.plnk/1.2").file(".wh..wh.aufs", b"").file(".wh.d", b""),
        ["e", "e/y", "f"],
    ),
}


@pytest.mark.parametrize("case", WHITEOUTS)
async def test_whiteouts(
    applier: Applier, either: OverlaySnapshotter | NativeSnapshotter, tmp_path: Path, case: str
) -> None:
    archive, expected = WHITEOUTS[case]
    await put(applier, either, "base", "", BASE)
    await put(applier, either, "top", "base", archive.plain)
    with mounted(either.view("v", "top"), tmp_path / "v") as tree:
        found = look(tree)
    # where nothing is to be hidden an implementation may or may not leave an empty directory
    assert [name for name in sorted(found) if name != "none"] == expected


async def test_a_directory_that_a_layer_only_implies_looks_like_the_one_below(
    applier: Applier, either: OverlaySnapshotter | NativeSnapshotter, tmp_path: Path
) -> None:
    await put(applier, either, "base", "", BASE)
    await put(applier, either, "top", "base", Archive().file("d/sub/new").plain)
    with mounted(either.view("v", "top"), tmp_path / "v") as tree:
        status = (tree / "d").stat()
        assert (oct(status.st_mode & 0o7777), status.st_uid, status.st_gid) == ("0o750", 1, 2)
        assert sorted(os.listdir(tree / "d")) == ["one", "sub", "two"]


async def test_layers_may_be_applied_side_by_side_and_set_on_each_other_later(
    applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path
) -> None:
    top = Archive().file("d/.wh.one", b"").file("d/new").file(".wh.e", b"").plain
    for name, data in (("base", BASE), ("top", top)):
        (tmp_path / name).write_bytes(data)
    await asyncio.gather(
        *(
            applier.apply(overlay.prepare(f"k{name}"), str(tmp_path / name), PLAIN, overlay=True)
            for name in ("top", "base")
        )
    )
    overlay.commit("base", "kbase")
    overlay.commit("top", "ktop", parent="base")
    with mounted(overlay.view("v", "top"), tmp_path / "v") as tree:
        assert sorted(look(tree)) == ["d", "d/new", "d/sub", "d/sub/x", "d/two", "f"]
        status = (tree / "d").stat()
        assert (oct(status.st_mode & 0o7777), status.st_uid, status.st_gid) == ("0o750", 1, 2)


async def test_a_hard_link_may_lead_to_a_file_of_a_layer_below(
    applier: Applier, either: OverlaySnapshotter | NativeSnapshotter, tmp_path: Path
) -> None:
    base = Archive().dir("d", mode=0o750).file("d/one", b"data", mode=0o4755, owner=(1, 2), pax={XATTR: "1"})
    await put(applier, either, "base", "", base.add("symlink", "s", to="d/one").plain)
    top = Archive().add("link", "h", to="d/one", mode=0o4755, owner=(1, 2)).add("link", "s2", to="/s")
    await put(applier, either, "top", "base", top.plain)
    with mounted(either.view("v", "top"), tmp_path / "v") as tree:
        found = look(tree)
        assert (tree / "h").read_bytes() == b"data"
        assert oct((tree / "d").stat().st_mode) == oct(0o40750)
    assert found["h"][:5] == found["d/one"][:5]
    assert found["h"][6] == (("user.kept", b"1"),)
    assert found["h"][5] == found["d/one"][5] != ""
    assert found["s2"][4] == "d/one"


async def test_mounts_that_are_no_layers_of_ours_are_mounted(applier: Applier, tmp_path: Path) -> None:
    """An overlay whose options we don't know is mounted and written through: the kernel makes the whiteouts."""
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "old").write_text("old")
    (tmp_path / "lower" / "kept").write_text("kept")
    options = tuple(f"{key}={tmp_path}/{name}" for key, name in
                    (("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")))  # fmt: skip
    mounts = [Mount("overlay", "overlay", options=("metacopy=off", *options))]
    (tmp_path / "blob").write_bytes(Archive().file(".wh.old", b"").file("new").plain)
    await applier.apply(mounts, str(tmp_path / "blob"), PLAIN)
    with mounted(mounts, tmp_path / "m") as tree:
        assert sorted(os.listdir(tree)) == ["kept", "new"]


async def test_applying_twice_to_one_snapshot(applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path) -> None:
    await put(applier, overlay, "base", "", BASE)
    mounts = overlay.prepare("k", "base")
    for number, archive in enumerate(
        (
            Archive().dir("d").file("d/one", b"changed").file("g/h"),
            Archive().file("d/.wh.one", b"").file("g/.wh.h", b"").file("g/i"),
        )
    ):
        (tmp_path / f"{number}").write_bytes(archive.plain)
        await applier.apply(mounts, str(tmp_path / f"{number}"), PLAIN)
    with mounted(mounts, tmp_path / "v") as tree:
        assert sorted(look(tree)) == ["d", "d/sub", "d/sub/x", "d/two", "e", "e/y", "f", "g", "g/i"]


# attacks


async def test_nothing_is_written_outside(applier: Applier, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (tmp_path / "tree").mkdir()
    before = look(tmp_path, ignore=["tree", "blob"])
    there = str(outside)
    archive = Archive().file("../up", b"u").file("../../../../../../../../tmp/far", b"f").file("/absolute", b"a")
    archive.add("symlink", "out", to=there).file("out/planted", b"p").file("out/.wh.secret", b"")
    archive.add("symlink", "dots", to="../outside").file("dots/planted", b"p").file("dots/.wh..wh..opq", b"")
    archive.add("symlink", "a", to=".").add("symlink", "a/b", to="../..").file("a/b/c", b"c")
    archive.add("symlink", "file", to=there + "/secret").file("file", b"over")
    archive.dir("out2").add("symlink", "out2", to=there).dir("out2", mode=0o777)
    tree = await unpack(applier, tmp_path, archive.plain)
    assert {name: value for name, value in look(tmp_path).items() if name in before} == before
    assert (tree / "up").read_bytes() == b"u"
    assert (tree / "tmp" / "far").read_bytes() == b"f"
    assert (tree / "absolute").read_bytes() == b"a"
    assert (outside / "secret").read_text() == "secret"


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (Archive().add("link", "h", to="/etc/passwd"), "points to '/etc/passwd', which isn't there"),
        (Archive().add("link", "h", to="../../../../../../etc/passwd"), "which isn't there"),
        (Archive().add("symlink", "s", to="/etc").add("link", "h", to="s/passwd"), "which isn't there"),
        (Archive().add("link", "h", to="h"), "points to 'h'"),
        (Archive().file(".wh...", b""), "invalid whiteout"),
        (Archive().file("d/.wh..", b""), "invalid whiteout"),
        (Archive().file(".wh.", b""), "invalid whiteout"),
        (Archive().file("f").file("f/below"), "'f' is needed as a directory"),
        (Archive().file("n" * 256), "File name too long"),
        (Archive().add("symlink", "a", to="b").add("symlink", "b", to="a").file("a/x"), "symbolic links"),
    ],
)
async def test_refused_entries(applier: Applier, tmp_path: Path, archive: Archive, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message.replace("'", ".")):
        await unpack(applier, tmp_path, archive.plain)


async def test_overlays_own_attributes_are_not_taken_from_an_archive(
    applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path
) -> None:
    await put(applier, overlay, "base", "", BASE)
    pax = {"SCHILY.xattr.trusted.overlay.opaque": "y", XATTR: "1"}
    await put(applier, overlay, "top", "base", Archive().dir("d", pax=pax).plain)
    with mounted(overlay.view("v", "top"), tmp_path / "v") as tree:
        assert sorted(os.listdir(tree / "d")) == ["one", "sub", "two"]
        assert os.getxattr(tree / "d", "user.kept") == b"1"


# damage

GOOD = Archive().file("a", random.Random(3).randbytes(200_000)).dir("d").file("d/b", b"text" * 1000).plain

CHECKED = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD)


@pytest.mark.parametrize(
    ("data", "media_type", "message"),
    [
        (b"this is no archive " * 100, PLAIN, "invalid tar header"),
        (b"this is no archive " * 100, GZIP, "invalid tar header"),
        (gzip.compress(b"this is no archive " * 100), GZIP, "invalid tar header"),
        (b"short", PLAIN, "cut short"),
        (GOOD[:100], PLAIN, "cut short"),
        (GOOD[:100_000], PLAIN, "cut short"),
        (gzip.compress(GOOD)[:-5], GZIP, "cut short"),
        (gzip.compress(GOOD)[:100_000], GZIP, "cut short"),
        (gzip.compress(GOOD)[:-8] + b"\0\0\0\0\0\0\0\0", GZIP, "gzip: invalid stream"),
        (gzip.compress(GOOD)[:5000] + b"garbage" + gzip.compress(GOOD)[5007:], GZIP, "."),
        (gzip.compress(GOOD) + b"garbage at the end of it", GZIP, "gzip: invalid stream"),
        (zstandard.compress(GOOD)[:-3], ZSTD, "cut short"),
        (zstandard.compress(GOOD)[:100_000], ZSTD, "cut short"),
        (CHECKED[:5000] + b"garbage" + CHECKED[5007:], ZSTD, "zstd: invalid stream"),
        (zstandard.compress(GOOD) + b"garbage", ZSTD, "zstd: invalid stream"),
        (gzip.compress(GOOD), PLAIN, "invalid tar header"),
        (GOOD[:156] + b"9" + GOOD[157:], PLAIN, "checksum"),
    ],
)
async def test_damaged_layers(applier: Applier, tmp_path: Path, data: bytes, media_type: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        await unpack(applier, tmp_path, data, media_type)


async def test_an_unknown_kind_of_entry_is_named(applier: Applier, tmp_path: Path) -> None:
    header = bytearray(GOOD[:512])
    header[156] = ord("Z")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(InvalidArgument, match=r"unhandled tar header type 90 for .a.: invalid argument"):
        await unpack(applier, tmp_path, bytes(header) + GOOD[512:])


async def test_a_wrong_diff_id_is_told(applier: Applier, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(GOOD)
    with pytest.raises(InvalidArgument, match=f"wrong diff id calculated on extraction {digest(GOOD)}"):
        await applier.apply(bind(tmp_path / "tree"), str(tmp_path / "blob"), PLAIN, expected=digest(b"other"))
    (tmp_path / "other").mkdir()
    await applier.apply(bind(tmp_path / "other"), str(tmp_path / "blob"), PLAIN, expected=digest(GOOD))


def _many(count: int) -> Archive:
    archive = Archive()
    for number in range(count):
        archive.file(f"f{number}", b"")
    return archive


@pytest.mark.parametrize(
    ("limits", "archive", "message"),
    [
        (
            Limits(layer_bytes=1 << 20),
            Archive().file("zeros", bytes(50 << 20)),
            "limit of 1048576 that limits.layer_bytes",
        ),
        (
            Limits(layer_entries=100),
            _many(150),
            "limit of 100 that limits.layer_entries",
        ),
    ],
)
async def test_a_bomb_meets_the_limit(tmp_path: Path, limits: Limits, archive: Archive, message: str) -> None:
    applier = Applier(limits=limits)
    try:
        (tmp_path / "blob").write_bytes(archive.gzipped)
        with pytest.raises(ResourceExhausted, match=message):
            await applier.apply(bind(tmp_path / "tree"), str(tmp_path / "blob"), GZIP)
    finally:
        await applier.close()
    assert sum(path.stat().st_size for path in (tmp_path / "tree").iterdir()) <= 1 << 20
    assert len(os.listdir(tmp_path / "tree")) <= 100


async def test_media_types_that_nobody_reads(applier: Applier, tmp_path: Path) -> None:
    for media_type in ("application/json", "application/vnd.oci.image.layer.v1.tar+encrypted"):
        with pytest.raises(Unimplemented, match="no processor for media-type"):
            await unpack(applier, tmp_path, GOOD, media_type)


async def test_a_missing_layer_and_missing_mounts(applier: Applier, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        await applier.apply(bind(tmp_path / "tree"), str(tmp_path / "none"), PLAIN)
    (tmp_path / "blob").write_bytes(GOOD)
    for mounts in ([], [Mount("bind", str(tmp_path / "missing"), options=("rbind",))], [Mount("nofs", "x")]):
        with pytest.raises(WherryError, match=r"mount|No such file"):
            await applier.apply(mounts, str(tmp_path / "blob"), PLAIN)
    (tmp_path / "ro").mkdir()
    read_only = [Mount("bind", str(tmp_path / "ro"), options=("ro", "rbind"))]
    with pytest.raises(WherryError, match="Read-only file system"):
        await applier.apply(read_only, str(tmp_path / "blob"), PLAIN)


@pytest.mark.parametrize("size", ["1m", "200k"])
async def test_a_full_disk(applier: Applier, tmp_path: Path, size: str) -> None:
    with mounted([Mount("tmpfs", "tmpfs", options=(f"size={size}",))], tmp_path / "small") as small:
        archive = Archive().file("small", b"x" * 100_000).file("large", b"x" * (3 << 20))
        (tmp_path / "blob").write_bytes(archive.plain)
        with pytest.raises(ResourceExhausted, match="No space left on device"):
            await applier.apply(bind(small / "tree"), str(tmp_path / "blob"), PLAIN)


# the worker's life


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def _hanging(applier: Applier, tmp_path: Path) -> tuple[asyncio.Task[Applied], int, int]:
    """An apply that waits for its source, with the pipe's writing end and the process that does it."""
    receiving, sending = os.pipe()
    task = asyncio.create_task(applier.apply(bind(tmp_path / "tree"), receiving, PLAIN))
    for _ in range(200):
        await asyncio.sleep(0.01)
        workers = [pid for pid in children_of(os.getpid()) if "snapshotter.worker" in _command(pid)]
        if workers and (found := children_of(workers[-1])):
            os.close(receiving)
            return task, sending, found[0]
    raise AssertionError("no worker came")


def state(pid: int) -> tuple[str, int]:
    """A process's state, `Z` when there is none, and its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0
    return fields[0], int(fields[1])


async def gone(pid: int) -> bool:
    """Whether the process ends soon; one that only waits to be reaped has ended."""
    for _ in range(200):
        if state(pid)[0] == "Z":
            return True
        await asyncio.sleep(0.01)
    return False


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


async def test_cancelling_ends_the_process(applier: Applier, tmp_path: Path) -> None:
    task, sending, pid = await _hanging(applier, tmp_path)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert state(pid)[0] == "Z"
    os.close(sending)
    await unpack(applier, tmp_path, GOOD)


async def test_a_killed_process_is_reported_and_the_next_layer_works(applier: Applier, tmp_path: Path) -> None:
    task, sending, pid = await _hanging(applier, tmp_path)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(Unavailable, match="killed by signal 9"):
        await task
    os.close(sending)
    await unpack(applier, tmp_path, GOOD)


async def test_a_killed_worker_takes_its_children_along(applier: Applier, tmp_path: Path) -> None:
    task, sending, pid = await _hanging(applier, tmp_path)
    os.kill(state(pid)[1], signal.SIGKILL)
    with pytest.raises(Unavailable, match="was killed"):
        await task
    os.close(sending)
    await unpack(applier, tmp_path, GOOD)
    assert await gone(pid)


async def test_nothing_outlives_the_applier(tmp_path: Path) -> None:
    applier = Applier()
    task, sending, pid = await _hanging(applier, tmp_path)
    await applier.close()
    with pytest.raises(Unavailable):
        await task
    os.close(sending)
    assert await gone(pid)
    await unpack(applier, tmp_path, GOOD)
    await applier.close()


async def test_the_process_has_no_way_out(applier: Applier, tmp_path: Path) -> None:
    """Its root is the layer's, and the only descriptors beside the layer and the answer are pipes."""
    task, sending, pid = await _hanging(applier, tmp_path)
    for _ in range(100):
        if os.readlink(f"/proc/{pid}/root") == str(tmp_path / "tree"):
            break
        await asyncio.sleep(0.01)
    assert os.readlink(f"/proc/{pid}/root") == str(tmp_path / "tree")
    assert os.readlink(f"/proc/{pid}/cwd") == str(tmp_path / "tree")
    for fd in os.listdir(f"/proc/{pid}/fd"):
        target = os.readlink(f"/proc/{pid}/fd/{fd}")
        assert target.startswith("pipe:") or int(fd) < 3, target
    os.close(sending)
    assert (await task).entries == 0
