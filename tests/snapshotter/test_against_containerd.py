"""The same image unpacked by us and by Debian's containerd: the same tree, file by file; ours applied by it, too."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.peers import need
from tests.snapshotter.archives import GZIP, PLAIN, Archive
from tests.snapshotter.test_apply import sample
from tests.snapshotter.trees import look, mounted, output_of
from wherry.linux.mounts import Mount
from wherry.snapshotter.applier import Applier
from wherry.snapshotter.overlayfs import OverlaySnapshotter

CONFIG = """
version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.internal.v1.opt"]
"""


class Containerd:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = str(directory / "c.sock")

    def ctr(self, *arguments: str) -> str:
        return output_of(need("ctr"), "-a", self.address, *arguments).decode()

    def snapshot(self, kind: str, key: str, parent: str) -> list[Mount]:
        """The mounts of a new snapshot (`view` or `prepare`). A collection that an import set off may take it away
        before its label protects it: then it is made again."""
        for _ in range(20):
            try:
                self.ctr("snapshots", kind, key, parent)
                self.ctr("snapshots", "label", key, "containerd.io/gc.root=test")
                words = self.ctr("snapshots", "mounts", "/nowhere", key).split()
                break
            except subprocess.CalledProcessError as error:
                assert b"not found" in error.stderr, error.stderr  # noqa: PT017 - the others are not of interest
        else:
            pytest.fail("containerd keeps no snapshot")
        kind, source = words[words.index("-t") + 1], words[words.index("-t") + 2]
        return [Mount(kind, source, options=tuple(words[words.index("-o") + 1].split(",")))]


@pytest.fixture
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    binary = need("containerd")
    directory = tmp_path_factory.mktemp("ctd")
    (directory / "config.toml").write_text(CONFIG)
    peer = Containerd(directory)
    command = [binary, "-c", str(directory / "config.toml"), "-a", peer.address]
    command += ["--root", str(directory / "root"), "--state", str(directory / "state")]
    with (directory / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            for _ in range(200):
                if Path(peer.address).exists():
                    break
                time.sleep(0.05)
            yield peer
        finally:
            process.terminate()


def image(where: Path, layers: Sequence[bytes]) -> list[str]:
    """An OCI archive of the gzipped layers, named `test:latest`; returns the chain IDs of the layers."""
    blobs: dict[str, bytes] = {}

    def put(data: bytes) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        blobs[name] = data
        return {"digest": f"sha256:{name}", "size": len(data)}

    diff_ids = ["sha256:" + hashlib.sha256(gzip.decompress(layer)).hexdigest() for layer in layers]
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **put(json.dumps(config).encode())},
        "layers": [{"mediaType": GZIP, **put(layer)} for layer in layers],
    }
    kind = "application/vnd.oci.image.manifest.v1+json"
    entry = {"mediaType": kind, **put(json.dumps(manifest).encode())}
    entry["annotations"] = {"io.containerd.image.name": "test:latest", "org.opencontainers.image.ref.name": "latest"}
    files = {f"blobs/sha256/{name}": data for name, data in blobs.items()}
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    files["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    with tarfile.open(where, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    chain = [diff_ids[0]]
    for diff_id in diff_ids[1:]:
        chain.append("sha256:" + hashlib.sha256(f"{chain[-1]} {diff_id}".encode()).hexdigest())
    return chain


@contextmanager
def both(
    containerd: Containerd, overlay: OverlaySnapshotter, tmp_path: Path, chain: Sequence[str]
) -> Iterator[tuple[Path, Path]]:
    """The top of the image in both, mounted."""
    with (
        mounted(containerd.snapshot("view", "look", chain[-1]), tmp_path / "theirs") as theirs,
        mounted(overlay.view("look", f"ours{len(chain) - 1}"), tmp_path / "ours") as ours,
    ):
        yield theirs, ours


async def unpack(applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path, layers: Sequence[bytes]) -> None:
    """Our way of doing it fastest: all layers at once, set on each other at their commits."""

    async def one(number: int, layer: bytes) -> None:
        (tmp_path / f"layer{number}").write_bytes(layer)
        mounts = overlay.prepare(f"key{number}")
        await applier.apply(mounts, str(tmp_path / f"layer{number}"), GZIP, overlay=number > 0)

    await asyncio.gather(*(one(number, layer) for number, layer in enumerate(layers)))
    for number in range(len(layers)):
        overlay.commit(f"ours{number}", f"key{number}", parent=f"ours{number - 1}" if number else "")


async def test_an_image_with_everything(
    applier: Applier, overlay: OverlaySnapshotter, containerd: Containerd, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    sample(source)
    # containerd takes `user.` and `security.` attributes and capabilities from PAX records
    first = output_of("tar", "--format=posix", "--xattrs", "--xattrs-include=*", "-C", source, "-c", ".")
    second = (
        Archive().dir("etc", mode=0o711, owner=(5, 5)).file("etc/.wh.passwd", b"").file("etc/new", b"n")
        .file(".wh.empty", b"").dir("shared", mode=0o2770).file("shared/.wh..wh..opq", b"").file("shared/other")
        .add("symlink", "big", to="relative").file("sticky", b"now a file").add("char", "null", device=(1, 3))
        .file("zero", b"no device any more", mode=0o4711, owner=(12, 13))
    ).plain  # fmt: skip
    third = Archive().file("etc/deep/deeper/down", b"below").file(".wh.fifo", b"").file("etc/.wh.hard", b"").plain
    layers = [gzip.compress(layer, 1, mtime=0) for layer in (first, second, third)]
    chain = image(tmp_path / "image.tar", layers)
    containerd.ctr("images", "import", str(tmp_path / "image.tar"))
    await unpack(applier, overlay, tmp_path, layers)
    with both(containerd, overlay, tmp_path, chain) as (theirs, ours):
        # a directory that a layer only implies has the time of the unpacking in containerd; ours keeps the one below
        implied = {"etc", "etc/deep", "etc/deep/deeper"}
        expected, found = look(theirs), look(ours)
        assert {n: v for n, v in found.items() if n not in implied} == {
            n: v for n, v in expected.items() if n not in implied
        }
        assert "empty" not in found
        for name in implied:
            assert found[name][:3] == expected[name][:3]


async def test_containerd_applies_what_we_compute(
    applier: Applier, overlay: OverlaySnapshotter, containerd: Containerd, tmp_path: Path
) -> None:
    with mounted(overlay.prepare("k"), tmp_path / "m") as tree:
        sample(tree)
    overlay.commit("ours0", "k")
    with mounted(overlay.prepare("k", "ours0"), tmp_path / "m") as tree:
        (tree / "big").unlink()
        (tree / "etc" / "passwd").write_text("changed")
        (tree / "etc" / "deep" / "deeper").rmdir()
        (tree / "sticky").rmdir()
        (tree / "sticky").mkdir()
        (tree / "sticky" / "new").write_text("n")
        (tree / "ümlaut").rename(tree / "etc" / "renamed")
    overlay.commit("ours1", "k")
    layers = []
    for number in range(2):
        lower = overlay.view(f"v{number - 1}", f"ours{number - 1}") if number else []
        upper = overlay.view(f"w{number}", f"ours{number}")
        diffed = await applier.diff(lower, upper, GZIP, str(tmp_path / f"d{number}"))
        data = (tmp_path / f"d{number}").read_bytes()
        assert (diffed.digest, diffed.size) == (f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))
        assert diffed.diff_id == f"sha256:{hashlib.sha256(gzip.decompress(data)).hexdigest()}"
        layers.append(data)
    chain = image(tmp_path / "image.tar", layers)
    containerd.ctr("images", "import", str(tmp_path / "image.tar"))
    with both(containerd, overlay, tmp_path, chain) as (theirs, ours):
        assert look(theirs) == look(ours)


async def test_we_apply_what_containerd_computes(
    applier: Applier, overlay: OverlaySnapshotter, containerd: Containerd, tmp_path: Path
) -> None:
    base = gzip.compress(Archive().dir("d").file("d/one").file("d/two").file("f").plain)
    chain = image(tmp_path / "image.tar", [base])
    containerd.ctr("images", "import", str(tmp_path / "image.tar"))
    with mounted(containerd.snapshot("prepare", "work", chain[0]), tmp_path / "m") as tree:
        (tree / "d" / "one").unlink()
        (tree / "d" / "three").write_text("3")
        (tree / "f").chmod(0o600)
        expected = look(tree, times=False)
    data = output_of(need("ctr"), "-a", containerd.address, "snapshots", "diff", "work")
    (tmp_path / "base").write_bytes(base)
    (tmp_path / "top").write_bytes(data)
    await applier.apply(overlay.prepare("k"), str(tmp_path / "base"), GZIP)
    overlay.commit("base", "k")
    media_type = GZIP if data[:2] == b"\x1f\x8b" else PLAIN
    await applier.apply(overlay.prepare("k", "base"), str(tmp_path / "top"), media_type)
    with mounted(overlay.mounts("k"), tmp_path / "m") as tree:
        assert look(tree, times=False) == expected
