"""Layers as other engines write them: what skopeo recompresses, what podman imports and commits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.peers import need
from tests.snapshotter.archives import Archive
from tests.snapshotter.test_against_containerd import image
from tests.snapshotter.test_apply import sample
from tests.snapshotter.trees import look, mounted, output_of
from wherry.snapshotter.applier import Applier
from wherry.snapshotter.overlayfs import OverlaySnapshotter


def layers(layout: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """The blobs of an OCI layout's one image with their media types, and its diff IDs."""

    def blob(descriptor: dict[str, Any]) -> Path:
        return layout / "blobs" / str(descriptor["digest"]).replace(":", "/")

    (entry,) = json.loads((layout / "index.json").read_text())["manifests"]
    manifest = json.loads(blob(entry).read_text())
    config = json.loads(blob(manifest["config"]).read_text())
    return [(blob(layer), layer["mediaType"]) for layer in manifest["layers"]], config["rootfs"]["diff_ids"]


async def apply(applier: Applier, overlay: OverlaySnapshotter, layout: Path) -> str:
    """All layers of the image, each on the one below; returns the name of the top."""
    parent = ""
    blobs, diff_ids = layers(layout)
    for number, ((path, media_type), diff_id) in enumerate(zip(blobs, diff_ids, strict=True)):
        mounts = overlay.prepare("k", parent)
        await applier.apply(mounts, str(path), media_type, expected=diff_id)
        parent = f"{layout.name}{number}"
        overlay.commit(parent, "k", parent=f"{layout.name}{number - 1}" if number else "")
    return parent


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
async def test_skopeos(applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path, compression: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    sample(source)
    first = output_of("tar", "--format=posix", "--xattrs", "--xattrs-include=*", "-C", source, "-c", ".")
    second = Archive().file(".wh.big", b"").file("etc/new", b"n").plain
    image(tmp_path / "image.tar", [gzip.compress(layer, 1) for layer in (first, second)])
    layout = tmp_path / "layout"
    options = ["--insecure-policy", "copy", "--quiet", f"--dest-compress-format={compression}"]
    output_of(need("skopeo"), *options, f"oci-archive:{tmp_path}/image.tar", f"oci:{layout}:latest")
    assert all(compression in media_type for _, media_type in layers(layout)[0])
    top = await apply(applier, overlay, layout)
    expected = look(source)
    del expected["big"]
    with mounted(overlay.view("v", top), tmp_path / "v") as tree:
        found = look(tree)
        assert (tree / "etc" / "new").read_text() == "n"
    del found["etc/new"]
    assert found == expected


async def test_podmans(applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path) -> None:
    """A tree imported by podman, and what it commits of a container whose files were changed."""
    source = tmp_path / "source"
    source.mkdir()
    sample(source)
    archive = tmp_path / "source.tar"
    archive.write_bytes(output_of("tar", "--format=posix", "--xattrs", "--xattrs-include=*", "-C", source, "-c", "."))
    # short paths: podman limits the length of its run folder's
    podman = [need("podman"), "--root", f"{tmp_path}/g", "--runroot", f"{tmp_path}/r", "--storage-driver", "vfs"]
    output_of(*podman, "import", "--quiet", str(archive), "localhost/base:latest")
    name = output_of(*podman, "create", "--network=none", "localhost/base:latest", "/none").decode().strip()
    (tmp_path / "added").write_text("added")
    output_of(*podman, "cp", str(tmp_path / "added"), f"{name}:/etc/deep/added")
    output_of(*podman, "commit", "--quiet", name, "localhost/top:latest")
    layout = tmp_path / "layout"
    output_of(*podman, "save", "--quiet", "--format=oci-dir", "-o", str(layout), "localhost/top:latest")
    top = await apply(applier, overlay, layout)
    expected = look(source, times=False)
    with mounted(overlay.view("v", top), tmp_path / "v") as tree:
        found = look(tree, times=False)
        assert (tree / "etc" / "deep" / "added").read_text() == "added"
    assert {name: value for name, value in found.items() if name in expected} == expected
