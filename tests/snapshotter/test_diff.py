"""Layers computed by the real worker: applied again they give the same tree."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import zstandard

from tests.snapshotter.archives import GZIP, PLAIN, ZSTD
from tests.snapshotter.test_apply import sample
from tests.snapshotter.trees import look, mounted, output_of
from wherry.core.errors import FailedPrecondition, ResourceExhausted, Unimplemented
from wherry.linux.mounts import Mount
from wherry.snapshotter.applier import Applier
from wherry.snapshotter.native import NativeSnapshotter
from wherry.snapshotter.overlayfs import OverlaySnapshotter


def change(tree: Path) -> None:
    """Of everything that sample() makes something is changed."""
    (tree / "etc" / "passwd").write_text("changed, and with it its other name")
    (tree / "empty").unlink()
    shutil.rmtree(tree / "sticky")
    (tree / "sticky").write_text("a file now")
    shutil.rmtree(tree / "shared")
    (tree / "shared").mkdir()
    (tree / "shared" / "new").write_text("new")
    (tree / "ümlaut").rename(tree / "moved")
    os.chmod(tree / "setuid", 0o755)
    os.setxattr(tree / "ping", "user.colour", b"red")
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "c").write_text("c")
    os.link(tree / "a" / "b" / "c", tree / "a" / "d")
    (tree / "relative").unlink()
    (tree / "relative").symlink_to("elsewhere")
    os.utime(tree / "zero", ns=(0, 77))


async def test_the_difference_applied_gives_the_same_tree(
    applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path
) -> None:
    native = NativeSnapshotter(str(tmp_path / "native"))
    for snapshotter in (overlay, native):
        with mounted(snapshotter.prepare("k"), tmp_path / "m") as tree:
            sample(tree)
        snapshotter.commit("base", "k")
        with mounted(snapshotter.prepare("changed", "base"), tmp_path / "m") as tree:
            change(tree)
            expected = look(tree)
        lower = snapshotter.view("lower", "base")
        out = tmp_path / "layer"
        diffed = await applier.diff(lower, snapshotter.mounts("changed"), ZSTD, str(out))
        data = out.read_bytes()
        plain = zstandard.ZstdDecompressor().stream_reader(data).read()
        assert diffed.diff_id == f"sha256:{hashlib.sha256(plain).hexdigest()}"
        assert (diffed.digest, diffed.size) == (f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))
        applied = await applier.apply(snapshotter.prepare("again", "base"), str(out), ZSTD)
        assert applied.digest == diffed.diff_id
        with mounted(snapshotter.mounts("again"), tmp_path / "m") as tree:
            assert look(tree) == expected
        assert len(plain) < 200_000, "what didn't change must not be in the layer"
    native.close()


async def test_gnu_tar_reads_what_we_write(applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path) -> None:
    with mounted(overlay.prepare("k"), tmp_path / "m") as tree:
        sample(tree)
        expected = look(tree)
    out = tmp_path / "layer"
    await applier.diff([], overlay.mounts("k"), GZIP, str(out))
    (tmp_path / "extracted").mkdir()
    options = ["--xattrs", "--xattrs-include=*", "-p", "--numeric-owner"]
    assert output_of("tar", *options, "-C", tmp_path / "extracted", "-xzf", out) == b""
    assert look(tmp_path / "extracted") == expected


async def test_whiteouts_and_opaque_directories_are_written(
    applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path
) -> None:
    with mounted(overlay.prepare("k"), tmp_path / "m") as tree:
        (tree / "d").mkdir()
        (tree / "d" / "old").write_text("1")
        (tree / "gone").write_text("1")
    overlay.commit("base", "k")
    with mounted(overlay.prepare("k", "base"), tmp_path / "m") as tree:
        shutil.rmtree(tree / "d")
        (tree / "d").mkdir()
        (tree / "d" / "new").write_text("2")
        (tree / "gone").unlink()
    out = tmp_path / "layer"
    await applier.diff(overlay.view("v", "base"), overlay.mounts("k"), PLAIN, str(out), source_date_epoch=1_000_000)
    with tarfile.open(out) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == [".wh.gone", "d", "d/.wh..wh..opq", "d/new"]
    assert {member.mtime for member in members} == {1_000_000}


async def test_the_same_tree_gives_the_same_layer(
    applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path
) -> None:
    with mounted(overlay.prepare("k"), tmp_path / "m") as tree:
        sample(tree)
    digests = set()
    for number in range(2):
        out = tmp_path / f"layer{number}"
        digests.add(await applier.diff([], overlay.mounts("k"), GZIP, str(out), source_date_epoch=1))
    assert len(digests) == 1
    assert gzip.decompress(out.read_bytes())


async def test_no_difference_is_an_empty_layer(applier: Applier, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        sample(tmp_path / name)
    mounts = [[Mount("bind", str(tmp_path / name), options=("rw", "rbind"))] for name in ("a", "b")]
    diffed = await applier.diff(mounts[0], mounts[1], PLAIN, str(tmp_path / "layer"))
    assert diffed.size == 1024


async def test_what_cannot_be_computed(applier: Applier, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_bytes(os.urandom(3 << 20))
    mounts = [Mount("bind", str(tmp_path / "a"), options=("rw", "rbind"))]
    with pytest.raises(Unimplemented, match="unsupported diff media type"):
        await applier.diff([], mounts, "application/json", str(tmp_path / "out"))
    missing = [Mount("bind", str(tmp_path / "missing"), options=("rbind",))]
    for lower in ([], mounts):
        with pytest.raises(FailedPrecondition, match="missing"):
            await applier.diff(lower, missing, PLAIN, str(tmp_path / "out"))
    with (
        mounted([Mount("tmpfs", "tmpfs", options=("size=1m",))], tmp_path / "small") as small,
        pytest.raises(ResourceExhausted, match="No space left"),
    ):
        await applier.diff([], mounts, PLAIN, str(small / "out"))


async def test_the_layer_of_a_user_namespaces_container_has_the_images_owners(
    applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path
) -> None:
    with mounted(overlay.prepare("k"), tmp_path / "m") as tree:
        (tree / "d").mkdir()
        (tree / "old").write_text("o")
    overlay.commit("base", "k")
    labels = {f"containerd.io/snapshot/{kind}mapping": "0:100000:65536" for kind in ("uid", "gid")}
    with mounted(overlay.prepare("k", "base", labels), tmp_path / "m") as tree:
        for name, owner in (("d/new", 100000), ("user", 101000), ("old", 100005)):
            (tree / name).write_text(name)
            os.chown(tree / name, owner, owner)
    await applier.diff(overlay.view("v", "base"), overlay.mounts("k"), PLAIN, str(tmp_path / "layer"))
    # the same by walking: from nothing to all of it
    await applier.diff(overlay.prepare("empty"), overlay.mounts("k"), PLAIN, str(tmp_path / "all"))
    with tarfile.open(tmp_path / "all") as archive:
        assert {member.name: member.uid for member in archive} == {"d": 0, "d/new": 0, "old": 5, "user": 1000}
    await applier.apply(overlay.prepare("plain", "base"), str(tmp_path / "layer"), PLAIN)
    with mounted(overlay.mounts("plain"), tmp_path / "m") as tree:
        stats = {name: (tree / name).stat() for name in ("d", "d/new", "user", "old")}
    found = {name: (status.st_uid, status.st_gid) for name, status in stats.items()}
    assert found == {"d": (0, 0), "d/new": (0, 0), "user": (1000, 1000), "old": (5, 5)}
