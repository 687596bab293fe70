"""Archives of images that skopeo, podman and docker read, and theirs; images converted and committed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests import busybox
from tests.cli.conftest import Wherry
from tests.containerd import Containerd
from tests.peers import need
from tests.runtime.callers.docker import Dockerd
from tests.wherryd import BUSYBOX, Wherryd

SECOND = "docker.io/library/second:v2"


def output(*command: str, stdin: bytes = b"") -> bytes:
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=90)
    assert done.returncode == 0, f"{command}: {done.stderr.decode()}"
    return done.stdout


@pytest.fixture
def podman() -> Iterator[Callable[..., bytes]]:
    """podman with storage of its own, in short folders: it limits the length of its run folder's path."""
    with tempfile.TemporaryDirectory(prefix="pm-", dir="/tmp") as folder:
        base = [need("podman"), "--root", f"{folder}/g", "--runroot", f"{folder}/r", "--storage-driver", "vfs"]
        yield lambda *args: output(*base, *args)


@pytest.fixture
def second(wherry: Wherry) -> Iterator[str]:
    """A second image: busybox with what a container changed in it."""
    wherry.run("run", "-d", "--name", "changed", BUSYBOX, "sh", "-c",
               "rm /etc/group; mkdir -p /srv/deep; echo hi > /srv/deep/file; chmod 4750 /srv/deep/file; "
               "ln -s file /srv/deep/link; ln /srv/deep/file /srv/deep/hard; chown 7:8 /srv/deep; touch -d @1000 /srv; "
               "sleep 100")  # fmt: skip
    try:
        for _ in range(200):
            if wherry.run("exec", "changed", "stat", "-c", "%Y", "/srv", code=None).stdout.strip() == "1000":
                break
        instructions = ["-c", 'CMD ["cat", "/srv/deep/file"]', "-c", "ENV A=b C='d e'", "-c", "LABEL made=here"]
        made = wherry.run("images", "commit", "-a", "me", "-m", "a change", *instructions, "changed", SECOND)
        assert made.stdout.startswith("sha256:")
        # it runs on
        assert wherry.run("exec", "changed", "echo", "on").stdout == "on\n"
        yield SECOND
    finally:
        wherry.run("rm", "-f", "changed", code=None)
        wherry.run("images", "rm", "--sync", SECOND, code=None)


def tree(archive: bytes) -> dict[str, tuple[Any, ...]]:
    """What a tar of a file system says of each file below srv and etc."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {
            m.name.strip("./"): (
                b"0" if m.islnk() else m.type,
                m.mode & 0o7777,
                m.uid,
                m.gid,
                int(m.mtime) if m.isfile() else 0,
                m.linkname if m.issym() else "",
            )
            for m in tar
            if m.name.strip("./").startswith(("srv", "etc"))
        }


# -- commit


def test_what_was_committed_runs_here_and_elsewhere(
    wherry: Wherry, second: str, podman: Callable[..., bytes], tmp_path: Path
) -> None:
    assert wherry.run("run", "--rm", second, code=None).stdout == "hi\n"
    here = wherry.run("run", "--rm", second, "tar", "-c", "-f", "-", "-C", "/", "srv", "etc", code=0)
    assert "srv/deep/file" in here.stdout
    archive = str(tmp_path / "second.tar")
    wherry.run("images", "export", archive, second)
    shown = json.loads(wherry.run("images", "inspect", second).stdout)
    config = shown["Images"][0]["Config"]
    assert config["config"]["Env"][-2:] == ["A=b", "C=d e"]
    assert config["config"]["Labels"] == {"made": "here"}
    assert (config["author"], config["history"][-1]["comment"]) == ("me", "a change")
    # podman's tree of it is containerd's
    podman("load", "-q", "-i", archive)
    name = podman("create", "--network=none", second).decode().strip()
    theirs = tree(podman("export", name))
    assert theirs["srv/deep/file"][1] == 0o4750
    assert theirs["srv/deep"][2:4] == (7, 8)
    assert "etc/group" not in theirs
    assert theirs["etc/passwd"][0] == b"0"
    containerd = Containerd()
    try:
        containerd.start()
        ctr = [need("ctr"), "-a", containerd.address]
        output(*ctr, "images", "import", archive)
        folder = tmp_path / "m"
        folder.mkdir()
        output(*ctr, "images", "mount", second, str(folder))
        try:
            made = output("tar", "-c", "-C", str(folder), "srv", "etc")
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    finally:
        containerd.close()
    ours = tmp_path / "ours"
    ours.mkdir()
    wherry.run("images", "mount", second, str(ours))
    try:
        mine = output("tar", "-c", "-C", str(ours), "srv", "etc")
    finally:
        wherry.run("images", "unmount", "--rm", str(ours))
    assert tree(made) == tree(mine) == theirs


def test_instructions_that_are_none(wherry: Wherry) -> None:
    done = wherry.run("images", "commit", "-c", "RUN ls", "nobody", "x:y", code=1)
    assert "RUN ls" in done.stderr
    assert "no such container" in wherry.run("images", "commit", "nobody", "x:y", code=1).stderr


# -- export, read by others


def test_skopeo_reads_what_we_write(wherry: Wherry, second: str, tmp_path: Path) -> None:
    skopeo, archive = need("skopeo"), tmp_path / "both.tar"
    wherry.run("images", "export", str(archive), BUSYBOX, second)
    # the same image gives the same bytes, to a pipe as to a file
    assert output(*wherry.command("images", "export", "-", BUSYBOX, second)) == archive.read_bytes()
    for name in (BUSYBOX, second):
        found = json.loads(output(skopeo, "inspect", f"docker-archive:{archive}:{name}"))
        assert found["Architecture"]
        tag = name.rpartition(":")[2]
        assert json.loads(output(skopeo, "inspect", f"oci-archive:{archive}:{tag}"))["Digest"].startswith("sha256:")
    output(skopeo, "copy", f"oci-archive:{archive}:v2", f"dir:{tmp_path}/dir")


def test_podman_loads_what_we_write(wherry: Wherry, second: str, podman: Callable[..., bytes], tmp_path: Path) -> None:
    archive = tmp_path / "both.tar"
    wherry.run("images", "export", str(archive), BUSYBOX, second)
    podman("load", "-q", "-i", str(archive))
    names = podman("images", "--format", "{{.Repository}}:{{.Tag}}").decode().split()
    assert set(names) == {BUSYBOX, second}


# -- import, written by others


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
@pytest.mark.parametrize("pack", [None, gzip.compress, zstandard.compress], ids=["plain", "gzip", "zstd"])
def test_we_read_what_skopeo_writes(
    wherry: Wherry, tmp_path: Path, kind: str, pack: Callable[[bytes], bytes] | None
) -> None:
    source, name = tmp_path / "busybox.tar", "registry.example/team/skopeos:v3"
    busybox.write_archive(source)
    output(need("skopeo"), "copy", f"oci-archive:{source}:test", f"{kind}:{tmp_path}/x.tar:{name}")
    data = (tmp_path / "x.tar").read_bytes()
    done = output(*wherry.command("images", "import", "-"), stdin=pack(data) if pack else data).decode()
    try:
        assert done.startswith(f"{name} (sha256:")
        assert wherry.run("run", "--rm", name, "echo", "read").stdout == "read\n"
    finally:
        wherry.run("images", "rm", "--sync", name)


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive"])
def test_we_read_what_podman_saves(wherry: Wherry, podman: Callable[..., bytes], tmp_path: Path, kind: str) -> None:
    source, archive = tmp_path / "busybox.tar", tmp_path / "podmans.tar"
    busybox.write_archive(source)
    podman("load", "-q", "-i", str(source))
    first = podman("images", "-q").decode().split()[0]
    names = ["registry.example/a:1", "registry.example/b:2"]
    for name in names:
        podman("tag", first, name)
    several = ["-m", *names] if kind == "docker-archive" else names[:1]
    podman("save", "-q", "--format", kind, "-o", str(archive), *several)
    done = wherry.run("images", "import", str(archive)).stdout
    found = [line.split()[0] for line in done.splitlines()]
    try:
        assert found == (names if kind == "docker-archive" else names[:1])
        assert wherry.run("run", "--rm", names[0], "echo", "read").stdout == "read\n"
    finally:
        wherry.run("images", "rm", "--sync", *found)


def test_what_docker_saved_before_it_knew_oci(wherry: Wherry, tmp_path: Path) -> None:
    """Layers by the ids of images, the second a link to the first, as docker 1.10 to 24 wrote them."""
    layer = busybox.layer()
    diff_id = f"sha256:{hashlib.sha256(layer).hexdigest()}"
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["sh"], "Env": ["PATH=/bin"]},
                         "rootfs": {"type": "layers", "diff_ids": [diff_id, diff_id]}}).encode()  # fmt: skip
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": name, "RepoTags": ["old:1"], "Layers": ["a/layer.tar", "b/layer.tar"]}]
    archive = tmp_path / "old.tar"
    with tarfile.open(archive, "w") as tar:
        for path, data in {"a/VERSION": b"1.0", "a/json": b"{}", "a/layer.tar": layer, name: config,
                           "manifest.json": json.dumps(manifest).encode(), "repositories": b"{}"}.items():  # fmt: skip
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("b/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../a/layer.tar"
        tar.addfile(link)
    try:
        assert wherry.run("images", "import", str(archive)).stdout.startswith("docker.io/library/old:1 ")
        assert wherry.run("run", "--rm", "old:1", "echo", "read").stdout == "read\n"
    finally:
        wherry.run("images", "rm", "--sync", "docker.io/library/old:1", code=None)


@pytest.mark.parametrize(
    "bad", [b"", b"x" * 5000, b"\x28\xb5\x2f\xfd" + b"x" * 600, b"\x1f\x8b" + b"x" * 600, "cut", "digest", "lacks"]
)
def test_archives_that_are_none(wherry: Wherry, tmp_path: Path, bad: bytes | str) -> None:
    source = tmp_path / "busybox.tar"
    busybox.write_archive(source)
    data = source.read_bytes()
    if bad == "cut":
        data = data[: len(data) // 2]
    elif bad == "digest":
        busybox.write_archive(source, layers=[os.urandom(20_000)])
        data = source.read_bytes()
        at = data.index(b"\x1f\x8b")
        data = data[: at + 5000] + b"oops" + data[at + 5004 :]
    elif bad == "lacks":
        made = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar, tarfile.open(fileobj=made, mode="w") as out:
            for member in tar:
                if member.name == "index.json":
                    index = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
                    index["manifests"][0]["digest"] = f"sha256:{'0' * 64}"
                    text = json.dumps(index).encode()
                    member.size = len(text)
                    out.addfile(member, io.BytesIO(text))
        data = made.getvalue()
    elif isinstance(bad, bytes):
        data = bad
    done = subprocess.run(wherry.command("images", "import", "-"), input=data, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"archive" in done.stderr or b"digest" in done.stderr, done.stderr
    assert b"Traceback" not in done.stderr
    assert wherry.run("images", "ls", "-q").stdout.split() == [BUSYBOX]


# -- convert


@pytest.mark.parametrize("options", [["--zstd"], ["--compression", "none"], ["--compression", "gzip", "--level", "1"]])
def test_converted_images_are_the_same_to_all(
    wherry: Wherry, daemon: Wherryd, podman: Callable[..., bytes], tmp_path: Path, options: list[str]
) -> None:
    name, archive = "registry.example/converted:z", tmp_path / "z.tar"
    # docker's types first, by way of skopeo
    source, dockers = tmp_path / "busybox.tar", "registry.example/dockers:1"
    busybox.write_archive(source)
    output(need("skopeo"), "copy", f"oci-archive:{source}:test", f"docker-archive:{tmp_path}/d.tar:{dockers}")
    wherry.run("images", "import", str(tmp_path / "d.tar"))
    try:
        wherry.run("images", "convert", *options, dockers, name)
        shown = json.loads(wherry.run("images", "inspect", name).stdout)
        manifest = shown["Images"][0]["Manifest"]
        oci = "gzip" not in options
        assert ("oci" in manifest["mediaType"]) == oci
        assert manifest["layers"][0]["mediaType"].endswith(
            {"--zstd": "+zstd"}.get(options[0], ".gzip" if not oci else ".tar")
        )
        wherry.run("images", "export", str(archive), name)
        wherry.run("images", "rm", "--sync", name)
        wherry.run("images", "import", str(archive))
        assert wherry.run("run", "--rm", name, "echo", "same").stdout == "same\n"
        if oci:
            output(need("skopeo"), "copy", f"oci-archive:{archive}:z", f"dir:{tmp_path}/dir")
            podman("load", "-q", "-i", str(archive))
            assert name in podman("images", "--format", "{{.Repository}}:{{.Tag}}").decode()
    finally:
        wherry.run("images", "rm", "--sync", name, dockers, code=None)


def test_platforms_that_are_not_here(wherry: Wherry) -> None:
    done = wherry.run("images", "convert", "--platform", "linux/riscv64", "--oci", BUSYBOX, "x:y", code=None)
    # a manifest by itself has no platform to choose by
    assert done.returncode == 0
    wherry.run("images", "rm", "docker.io/library/x:y", code=None)


def test_dockers_archives_in_both_directions(wherry: Wherry, second: str, tmp_path: Path) -> None:
    need("docker")
    archive, saved = tmp_path / "both.tar", tmp_path / "saved.tar"
    wherry.run("images", "export", str(archive), BUSYBOX, second)
    daemon = Dockerd({})
    try:
        docker = [need("docker"), "-H", daemon.host]
        assert output(*docker, "load", "-i", str(archive)).decode().count("Loaded image") == 2
        output(*docker, "tag", second, "registry.example/dockers:1")
        output(*docker, "save", "-o", str(saved), "registry.example/dockers:1", BUSYBOX)
    finally:
        daemon.close()
    names = [line.split()[0] for line in wherry.run("images", "import", str(saved)).stdout.splitlines()]
    assert set(names) == {"registry.example/dockers:1", BUSYBOX}
    assert wherry.run("run", "--rm", "registry.example/dockers:1").stdout == "hi\n"
    wherry.run("images", "rm", "registry.example/dockers:1")
