"""Layers as other engines write them: what skopeo recompresses, what podman, docker, buildah and umoci make."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.peers import need
from tests.runtime.callers.docker import Dockerd
from tests.snapshotter.archives import PLAIN, Archive
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


def archived(source: Path, where: Path) -> Path:
    """The sample tree, and an archive of it."""
    source.mkdir()
    sample(source)
    where.write_bytes(output_of("tar", "--format=posix", "--xattrs", "--xattrs-include=*", "-C", source, "-c", "."))
    return where


async def test_buildahs(applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path) -> None:
    """A tree made in a container from nothing and committed, then changed and committed upon that."""
    buildah = [need("buildah"), "--root", f"{tmp_path}/g", "--runroot", f"{tmp_path}/r", "--storage-driver", "vfs"]
    layout = tmp_path / "layout"

    def begin(base: str) -> tuple[str, Path]:
        name = output_of(*buildah, "from", base).decode().strip()
        return name, Path(output_of(*buildah, "mount", name).decode().strip())

    name, root = begin("scratch")
    sample(root)
    output_of(*buildah, "commit", "--quiet", "--rm", name, "localhost/base:latest")
    name, root = begin("localhost/base:latest")
    (root / "big").unlink()
    shutil.rmtree(root / "shared")
    (root / "etc" / "deep" / "added").write_text("added")
    expected = look(root)
    output_of(*buildah, "commit", "--quiet", "--rm", "--format", "oci", name, f"oci:{layout}:latest")
    top = await apply(applier, overlay, layout)
    with mounted(overlay.view("v", top), tmp_path / "v") as tree:
        found = look(tree)
    # it writes whole seconds, and makes hard links to symbolic links into links of their own
    loose = {"absolute", "hard-to-a-symlink"}
    assert set(found) == set(expected)
    assert {n: _whole(v) for n, v in found.items() if n not in loose} == {
        n: _whole(v) for n, v in expected.items() if n not in loose
    }


async def test_umocis(applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path) -> None:
    """Two layers, which it computes by comparing manifests of the trees."""
    umoci, layout, bundle = need("umoci"), tmp_path / "layout", tmp_path / "bundle"
    image_name = f"{layout}:latest"
    output_of(umoci, "init", "--layout", str(layout))
    output_of(umoci, "new", "--image", image_name)
    output_of(umoci, "unpack", "--image", image_name, str(bundle))
    sample(bundle / "rootfs")
    output_of(umoci, "repack", "--refresh-bundle", "--image", image_name, str(bundle))
    shutil.rmtree(bundle / "rootfs" / "etc" / "deep")
    (bundle / "rootfs" / "big").unlink()
    (bundle / "rootfs" / "etc" / "new").write_text("n")
    for path in ("etc/new", "etc"):  # it rounds times to seconds
        os.utime(bundle / "rootfs" / path, ns=(0, 1_600_000_000_000_000_000))
    output_of(umoci, "repack", "--image", image_name, str(bundle))
    top = await apply(applier, overlay, layout)
    expected = {path: _whole(value) for path, value in look(bundle / "rootfs").items()}
    with mounted(overlay.view("v", top), tmp_path / "v") as tree:
        found = {path: _whole(value) for path, value in look(tree).items()}
    assert found == expected


def _whole(value: tuple[object, ...]) -> tuple[object, ...]:
    """With the time in seconds."""
    assert isinstance(value[3], int)
    return (*value[:3], value[3] // 1_000_000_000, *value[4:])


async def test_dockers(applier: Applier, overlay: OverlaySnapshotter, tmp_path: Path) -> None:
    """A tree imported by dockerd, and what it commits of a container, as `docker save` writes them."""
    archive = archived(tmp_path / "source", tmp_path / "source.tar")
    daemon = Dockerd({})
    try:
        docker = [need("docker"), "-H", daemon.host]
        output_of(*docker, "import", str(archive), "base:latest")
        name = output_of(*docker, "create", "--network=none", "base:latest", "/none").decode().strip()
        (tmp_path / "added").write_text("added")
        output_of(*docker, "cp", str(tmp_path / "added"), f"{name}:/etc/deep/added")
        output_of(*docker, "commit", name, "top:latest")
        output_of(*docker, "save", "-o", f"{tmp_path}/saved.tar", "top:latest")
    finally:
        daemon.close()
    parent = ""
    with tarfile.open(tmp_path / "saved.tar") as saved:
        (described,) = json.load(saved.extractfile("manifest.json"))  # type: ignore[arg-type]
        for number, member in enumerate(described["Layers"]):
            saved.extract(member, tmp_path / "saved", filter="data")
            mounts = overlay.prepare("k", parent)
            await applier.apply(mounts, str(tmp_path / "saved" / member), PLAIN)
            parent = f"layer{number}"
            overlay.commit(parent, "k")
    assert parent == "layer1"
    expected = look(tmp_path / "source", times=False)
    with mounted(overlay.view("v", parent), tmp_path / "v") as tree:
        found = look(tree, times=False)
        assert (tree / "etc" / "deep" / "added").read_text() == "added"
    # docker keeps of the attributes capabilities alone
    assert {path: value[:6] for path, value in found.items() if path in expected} == {
        path: value[:6] for path, value in expected.items()
    }
    assert found["ping"][6][0][0] == "security.capability"  # type: ignore[index]
