"""Layers that want to do harm: they get out of nothing, leave nothing half-made and cost no more than they may."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.snapshotter.archives import GZIP, PLAIN, ZSTD, Archive
from tests.snapshotter.suite import layer, write
from tests.snapshotter.test_apply import bind, unpack
from tests.snapshotter.trees import look, mounted
from wherry.core.errors import InvalidArgument, ResourceExhausted, WherryError
from wherry.linux.mounts import Mount
from wherry.snapshotter import pax, tar
from wherry.snapshotter.applier import Applier
from wherry.snapshotter.limits import Limits
from wherry.snapshotter.native import NativeSnapshotter
from wherry.snapshotter.overlayfs import OverlaySnapshotter
from wherry.snapshotter.tar import TarReader

# names and deep trees


async def test_names_of_255_bytes_and_paths_up_to_the_kernels_limit(applier: Applier, tmp_path: Path) -> None:
    name = "n" * 255
    path = "/".join([name] * 15)  # 3839 bytes
    tree = await unpack(applier, tmp_path, Archive().file(f"{path}/{name}", b"deep").file("ü" * 127 + "x", b"u").plain)
    here = os.open(tree, os.O_RDONLY)
    try:
        for _ in range(15):
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
            os.close(here)
            here = below
        assert os.listdir(here) == [name]
    finally:
        os.close(here)
    assert (tree / ("ü" * 127 + "x")).read_bytes() == b"u"


@pytest.mark.parametrize("name", ["n" * 256, "d/" * 2100 + "f", "/".join(["n" * 255] * 18)])
async def test_names_that_are_too_long_are_refused(applier: Applier, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="File name too long"):
        await unpack(applier, tmp_path, Archive().file(name).plain)


@pytest.mark.parametrize("kind", [OverlaySnapshotter, NativeSnapshotter])
async def test_a_deep_tree_is_measured_and_removed(
    applier: Applier, tmp_path: Path, kind: type[OverlaySnapshotter | NativeSnapshotter]
) -> None:
    """An archive's path may be 4095 bytes long below the layer's root, so it is longer from the host's; what a
    container makes step by step may be deeper still."""
    snapshotter = kind(str(tmp_path / "root"), sync_remove=True)
    (tmp_path / "blob").write_bytes(Archive().file("d/" * 2040 + "file", b"x").plain)
    mounts = snapshotter.prepare("k")
    await applier.apply(mounts, str(tmp_path / "blob"), PLAIN)
    snapshotter.commit("deep", "k")
    assert snapshotter.usage("deep").inodes == 2042
    with mounted(snapshotter.prepare("k"), tmp_path / "m") as tree:
        here = os.open(tree, os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("directory", dir_fd=here)
            below = os.open("directory", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
    assert snapshotter.usage("k").inodes == 1501
    for key in ("k", "deep"):
        snapshotter.remove(key)
    assert os.listdir(tmp_path / "root" / "snapshots") == []
    snapshotter.close()


def test_hundreds_of_layers(overlay: OverlaySnapshotter, tmp_path: Path) -> None:
    """More than one page of mount options holds."""
    for number in range(300):
        overlay.prepare(f"k{number}", f"l{number - 1}" if number else "")
        overlay.commit(f"l{number}", f"k{number}")
    layer(overlay, tmp_path / "m", "top", "l299", write("a", "1"))
    with mounted(overlay.view("v", "top"), tmp_path / "v") as tree:
        assert os.listdir(tree) == ["a"]


# entries that come twice, and links


async def test_entries_that_come_twice(applier: Applier, tmp_path: Path) -> None:
    """The last one counts, of whatever kind the ones before were; links keep what they led to."""
    archive = Archive()
    kinds = ["file", "dir", "symlink", "fifo", "char", "file", "symlink", "dir", "file"]
    for number, kind in enumerate(kinds):
        archive.add(kind, "same", b"x" * number if kind == "file" else b"", to="target", device=(1, 3))
    archive.file("first", b"1").add("link", "hard", to="first").file("first", b"2").dir("hard").file("hard", b"3")
    archive.dir("full").file("full/a").file("full/b").add("symlink", "full", to="same")
    tree = await unpack(applier, tmp_path, archive.plain)
    found = look(tree)
    assert sorted(found) == ["first", "full", "hard", "same"]
    assert (tree / "same").read_bytes() == b"x" * 8
    assert ((tree / "first").read_bytes(), (tree / "hard").read_bytes()) == (b"2", b"3")
    assert os.readlink(tree / "full") == "same"


async def test_files_written_through_links(applier: Applier, tmp_path: Path) -> None:
    """Links of each kind towards the outside, then files under their names: what they are is inside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("untouched")
    before = look(outside)
    archive = Archive()
    for number, target in enumerate((f"{outside}", "../../outside", "/proc/self/root", "/proc/1/root", "/", "..")):
        archive.add("symlink", f"s{number}", to=target).file(f"s{number}/planted", b"p").file(f"s{number}/f", b"over")
        archive.add("symlink", f"t{number}", to=f"s{number}/deeper/still").file(f"t{number}/planted", b"p")
        archive.file(f"s{number}/.wh.f", b"").file(f"s{number}/.wh..wh..opq", b"")
    tree = await unpack(applier, tmp_path, archive.plain)
    assert look(outside) == before
    assert (tree / "planted").read_bytes() == b"p"
    assert "planted" not in os.listdir("/")


# devices


def test_devices_are_left_out_where_they_can_not_be_made(tmp_path: Path) -> None:
    """In a user namespace; all else is there, FIFOs and whiteouts, too."""
    archive = Archive().add("char", "null", device=(1, 3)).add("fifo", "pipe").file("file", b"f")
    blob = tmp_path / "blob"
    blob.write_bytes(archive.dir("d").file("d/.wh.gone", b"").plain)
    (tmp_path / "tree").mkdir()
    script = (
        "import asyncio, sys\n"
        "from wherry.linux.mounts import Mount\n"
        "from wherry.snapshotter.applier import Applier\n"
        "async def main():\n"
        "    applier = Applier()\n"
        "    mounts = [Mount('bind', sys.argv[2], options=('rw', 'rbind'))]\n"
        "    await applier.apply(mounts, sys.argv[1], 'application/vnd.oci.image.layer.v1.tar', overlay=True)\n"
        "    await applier.close()\n"
        "asyncio.run(main())\n"
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", script]
    subprocess.run([*command, str(blob), str(tmp_path / "tree")], check=True)
    assert sorted(os.listdir(tmp_path / "tree")) == ["d", "file", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "tree" / "pipe").stat().st_mode)


# bombs


BOUNDED = Limits(layer_bytes=64 << 20, layer_entries=5_000)


def _zeros(compression: str, size: int) -> bytes:
    """A file of `size` zeros in a tar, compressed to next to nothing."""
    info = tarfile.TarInfo("zeros")
    info.size = size
    piece = bytes(1 << 20)
    if compression == "gzip":
        # members of gzip may follow each other
        one = gzip.compress(piece, 9, mtime=0)
        return gzip.compress(info.tobuf(), 9, mtime=0) + one * (size >> 20)
    compressor = zstandard.ZstdCompressor(level=19).compressobj()
    data = compressor.compress(info.tobuf())
    return data + b"".join(compressor.compress(piece) for _ in range(size >> 20)) + compressor.flush()


async def _apply(limits: Limits, tmp_path: Path, data: bytes, media_type: str) -> int:
    """Apply under the limits; the peak of the child's memory in KiB is written down by the kernel, and returned."""
    applier = Applier(limits=limits)
    (tmp_path / "blob").write_bytes(data)
    try:
        task = asyncio.create_task(applier.apply(bind(tmp_path / "tree"), str(tmp_path / "blob"), media_type))
        peak = 0
        while not task.done():
            await asyncio.sleep(0.005)
            peak = max(peak, _peak())
        await task
    finally:
        await applier.close()
        (tmp_path / "peak").write_text(str(peak))
    return peak


def _peak() -> int:
    """KiB that the largest child of this process's layer worker has had."""
    found = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                status = dict(
                    line.split(":", 1) for line in Path(f"/proc/{entry}/status").read_text().splitlines() if ":" in line
                )
            except OSError:
                continue
            if status["Name"].strip() == "wherry-layers" and "VmHWM" in status and _is_ours(int(status["PPid"])):
                found = max(found, int(status["VmHWM"].split()[0]))
    return found


def _is_ours(pid: int) -> bool:
    try:
        return f"\nPPid:\t{os.getpid()}\n" in Path(f"/proc/{pid}/status").read_text() or pid == os.getpid()
    except OSError:
        return False


@pytest.mark.parametrize(("compression", "media_type"), [("gzip", GZIP), ("zstd", ZSTD)])
async def test_a_bomb_of_bytes(tmp_path: Path, compression: str, media_type: str) -> None:
    data = _zeros(compression, 2 << 30)
    assert len(data) < 3 << 20
    with pytest.raises(ResourceExhausted, match=r"limit of 67108864 that limits.layer_bytes in the configuration sets"):
        await _apply(BOUNDED, tmp_path, data, media_type)
    assert (tmp_path / "tree" / "zeros").stat().st_size <= 64 << 20
    assert int((tmp_path / "peak").read_text()) < 100 << 10


async def test_a_bomb_of_entries(tmp_path: Path) -> None:
    directory = tarfile.TarInfo("d")
    directory.type = tarfile.DIRTYPE
    data = b"".join(_named(directory, f"{number}") for number in range(6_000))
    with pytest.raises(ResourceExhausted, match=r"limit of 5000 that limits.layer_entries in the configuration sets"):
        await _apply(BOUNDED, tmp_path, gzip.compress(data, 1), GZIP)
    assert int((tmp_path / "peak").read_text()) < 100 << 10


def _named(info: tarfile.TarInfo, name: str) -> bytes:
    info.name = name
    return info.tobuf(tarfile.USTAR_FORMAT)


async def test_a_sparse_file_takes_no_disk_and_no_more_than_the_file_system_has(
    applier: Applier, tmp_path: Path
) -> None:
    """Holes are made, not written: 8 TiB of nothing cost nothing, 2^62 bytes are refused."""
    for number, (size, good) in enumerate(((8 << 40, True), (1 << 62, False))):
        folder = tmp_path / str(number)
        folder.mkdir()
        records = {
            "GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "holes",
            "GNU.sparse.size": str(size), "GNU.sparse.map": f"{size - 1},1",
        }  # fmt: skip
        archive = Archive().file("x", b"e", pax=records)
        if not good:
            with pytest.raises(WherryError, match=r"File too large|holes"):
                await unpack(applier, folder, archive.plain)
            continue
        tree = await unpack(applier, folder, archive.plain)
        status = (tree / "holes").stat()
        assert (status.st_size, status.st_blocks < 1000) == (size, True)


async def test_a_window_that_is_too_large_is_refused(applier: Applier, tmp_path: Path) -> None:
    """zstd's windows of up to 128 MiB are taken; one of 2 GiB is memory that the archive would choose."""
    params = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=params).compressobj()
    data = compressor.compress(Archive().file("a", bytes(1 << 20)).plain) + compressor.flush()
    with pytest.raises(InvalidArgument, match="zstd: invalid stream"):
        await unpack(applier, tmp_path, data, ZSTD)


def test_memory_has_an_end(tmp_path: Path) -> None:
    """What an archive makes its process remember ends at the limit, in words: here of 24 MiB, and folders' times."""
    directory = tarfile.TarInfo("d")
    directory.type = tarfile.DIRTYPE
    long = "n" * 140 + "/"
    blob = tmp_path / "blob"
    blob.write_bytes(gzip.compress(b"".join(_named(directory, f"{long}{number}") for number in range(60_000)), 1))
    script = (
        "import json, os, sys\n"
        "from wherry.snapshotter import limits, worker\n"
        "worker.MEMORY = 24 << 20\n"
        "message = {'op': 'apply', 'mounts': [['bind', sys.argv[2], '', ['rw', 'rbind']]], 'compressed': True,\n"
        "  'expected': None, 'layer_bytes': 0, 'layer_entries': 0, 'progress': False, 'sync': False, 'overlay': None,\n"
        "  'follow': -1}\n"
        "worker.preload()\n"
        "if os.fork() == 0:\n"
        "    worker._run_child(message, os.open(sys.argv[1], os.O_RDONLY), 1, os.getppid())\n"
        "os.wait()\n"
    )
    with mounted([Mount("tmpfs", "tmpfs")], tmp_path / "tree"):  # so many folders take their time on a disk
        command = [sys.executable, "-c", script, str(blob), str(tmp_path / "tree")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert '"error": [8, "the layer needs more memory than its process gets' in done.stdout, done.stdout + done.stderr


# the reader, fuzzed

_FIELDS = {"name": (0, 100), "mode": (100, 8), "uid": (108, 8), "size": (124, 12), "mtime": (136, 12), "type": (156, 1)}


def members(data: bytes, size: int) -> int:
    """Read the archive to its end in chunks of that size; how many members there are."""
    pieces = iter([data[at : at + size] for at in range(0, len(data), size)])
    reader = TarReader(lambda: next(pieces, b""))
    count = 0
    for member in reader:
        count += 1
        assert member.size >= 0
        assert b"\0" not in member.name
        while reader.read(4096):
            pass
    return count


def block(fields: dict[str, bytes]) -> bytes:
    header = bytearray(512)
    header[257:265] = b"ustar\x0000"
    header[0] = ord("n")
    for name, value in fields.items():
        start, length = _FIELDS[name]
        header[start : start + length] = value[:length].ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


_NUMBERS = st.one_of(
    st.integers(0, 1 << 33).map(lambda number: b"%o" % number),
    st.binary(min_size=1, max_size=12),
    st.binary(min_size=11, max_size=11).map(lambda tail: b"\x80" + tail),
    st.binary(min_size=11, max_size=11).map(lambda tail: b"\xff" + tail),
)
_HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.binary(max_size=100),
        "mode": _NUMBERS,
        "uid": _NUMBERS,
        "size": _NUMBERS,
        "mtime": _NUMBERS,
        "type": st.sampled_from([b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"x", b"g", b"L", b"K", b"S", b"\0", b"Z"]),
    },
).map(block)
_RECORDS = st.lists(
    st.tuples(
        st.sampled_from([b"path", b"size", b"mtime", b"SCHILY.xattr.a", b"GNU.sparse.map", b"GNU.sparse.major", b"x"]),
        st.one_of(st.binary(max_size=20), st.integers().map(lambda n: b"%d" % n), st.just(b"1,2,3,4")),
    )
).map(lambda pairs: b"".join(b"%d %s=%s\n" % (len(key) + len(value) + 4, key, value) for key, value in pairs))
_PIECES = st.lists(st.one_of(_HEADERS, _HEADERS, _RECORDS, st.binary(max_size=600), st.just(bytes(512))), max_size=12)
_FUZZ = settings(
    max_examples=500, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@_FUZZ
@given(_PIECES, st.sampled_from([1, 511, 512, 4096, 1 << 20]))
def test_the_reader_of_archives_reads_or_refuses(pieces: list[bytes], size: int) -> None:
    """Whatever comes: members, or an error in words; the size of the chunks makes no difference."""
    data = b"".join(pieces)
    outcomes = []
    for chunk in (size, len(data) + 1):
        try:
            outcomes.append(str(members(data, chunk)))
        except InvalidArgument as error:
            outcomes.append(error.message)
    assert outcomes[0] == outcomes[1]


@_FUZZ
@given(st.one_of(st.binary(max_size=200), _RECORDS))
def test_pax_records_are_read_or_refused(data: bytes) -> None:
    member = tar.Member()
    member.xattrs, member.name = None, b"n"
    with contextlib.suppress(InvalidArgument, ValueError):  # a ValueError becomes an InvalidArgument with the place
        pax.merge(member, pax.parse(data))


@settings(parent=_FUZZ, max_examples=25)
@example(data=[block({"uid": b"\x81"})], cut=0, media_type=PLAIN)  # an owner beyond 32 bits
@given(data=_PIECES, cut=st.integers(0, 4000), media_type=st.sampled_from([PLAIN, GZIP, ZSTD]))
def test_an_applier_says_what_is_wrong_and_stays(data: list[bytes], cut: int, media_type: str) -> None:
    """Garbage through the whole way, in one process for all: it is refused or applied, and nothing stands outside."""
    asyncio.run(_apply_garbage(b"".join(data), cut, media_type))


async def _apply_garbage(archive: bytes, cut: int, media_type: str) -> None:
    import tempfile  # noqa: PLC0415 - hypothesis has no fixtures for each example

    compressed = {PLAIN: archive, GZIP: gzip.compress(archive, 1), ZSTD: zstandard.compress(archive)}[media_type]
    with tempfile.TemporaryDirectory(prefix="wherry-fuzz-") as folder:
        where = Path(folder)
        applier = Applier()
        try:
            await unpack(applier, where, compressed[: len(compressed) - cut % 40], media_type)
        except (InvalidArgument, ResourceExhausted):
            pass
        finally:
            await applier.close()
        assert set(os.listdir(folder)) <= {"blob", "tree"}
