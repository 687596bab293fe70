"""What `ctr` of containerd 2 does by the transfer service, option by option."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.containerd import Containerd
from tests.daemon.test_transfer_ctr import LAYERS, Ctr
from tests.daemon.transfer_rig import make_image, make_index, publish
from tests.registry.certificates import Authority
from tests.registry.conftest import PASSWORD, USER, locked_registry, registry, running_registry
from tests.sid import need_sid
from tests.wherryd import Wherryd
from wherry.core.platforms import host, parse

__all__ = ["locked_registry", "registry"]
OTHER = parse("linux/s390x") if host().architecture != "s390x" else parse("linux/amd64")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Wherryd]:
    made = Wherryd()
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def ctr(daemon: Wherryd) -> Iterator[Ctr]:
    made = Ctr(need_sid(), daemon)
    yield made
    for name in made.images():
        made("images", "rm", "--sync", name)
    assert made("content", "ls", "-q") == ""
    assert len(made("leases", "ls").splitlines()) == 1


@pytest.fixture(scope="module")
def index(registry: str) -> str:
    """An image for two platforms in a registry."""
    name = f"{registry}/ctr2/two:v1"
    asyncio.run(publish(make_index([make_image(LAYERS), make_image(LAYERS[:1], OTHER)]), name))
    return name


def blobs(ctr: Ctr) -> int:
    return len(ctr("content", "ls", "-q").split())


def test_platforms(ctr: Ctr, index: str) -> None:
    ctr("images", "pull", "--plain-http", "--skip-metadata", index)
    # the index; manifest, configuration and two layers
    assert blobs(ctr) == 5
    ctr("images", "pull", "--plain-http", index)
    assert blobs(ctr) == 7
    ctr("images", "pull", "--plain-http", "--platform", str(OTHER), "--label", "a=b", index)
    assert blobs(ctr) == 7
    assert "a=b" in ctr("images", "ls")
    ctr("images", "pull", "--plain-http", "--all-platforms", index)
    absent = ctr("images", "pull", "--plain-http", "--platform", "linux/riscv64", index, fails=True)
    assert "not found" in absent


def test_what_the_progress_says(ctr: Ctr, index: str) -> None:
    out = ctr("images", "pull", "--plain-http", index)
    assert "pulling from OCI Registry" in out or "Pulling from OCI Registry" in out
    assert "layer (" in out or "layer-sha256" in out or "fetching image content" in out


def test_the_requests_are_shown(ctr: Ctr, index: str) -> None:
    command = [*ctr._command, "images", "pull", "--plain-http", "--http-dump", index]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert f"HEAD http://{index.partition('/')[0]}/v2/ctr2/two/manifests/v1" in done.stdout + done.stderr


def test_users_and_certificates(ctr: Ctr, locked_registry: str, index: str, tmp_path: Path) -> None:
    name = f"{locked_registry}/ctr2/mine:v1"
    ctr("images", "pull", "--plain-http", index)
    ctr("images", "push", "--plain-http", "--user", f"{USER}:{PASSWORD}", "--platform", str(OTHER), name, index)
    ctr("images", "pull", "--plain-http", "--user", f"{USER}:{PASSWORD}", "--platform", str(OTHER), name)
    ctr("images", "pull", "--plain-http", "--user", f"{USER}:wrong", name, fails=True)
    authority = Authority(tmp_path)
    cert, key = authority.issue("server", "IP:127.0.0.1")
    http = f', tls: {{certificate: "{cert}", key: "{key}"}}'
    with running_registry(tmp_path, http=http) as address:
        folder = tmp_path / "hosts" / "team.example"
        folder.mkdir(parents=True)
        (folder / "hosts.toml").write_text(f'server = "https://{address}"\nca = "{authority.cert}"\n')
        hosts = ["--hosts-dir", str(tmp_path / "hosts")]
        ctr("images", "push", *hosts, "team.example/a/b:v1", index)
        ctr("images", "pull", *hosts, "team.example/a/b:v1")


def archive_of(ctr: Ctr, *args: str) -> bytes:
    return subprocess.run([*ctr._command, "images", "export", *args], capture_output=True, check=True).stdout


def test_archives(ctr: Ctr, index: str, tmp_path: Path) -> None:
    ctr("images", "pull", "--plain-http", "--all-platforms", index)
    ctr("images", "tag", index, "registry.example/second:v2")
    whole = archive_of(ctr, "--all-platforms", "-", index, "registry.example/second:v2")
    part = archive_of(ctr, "--platform", str(OTHER), "--skip-manifest-json", "-", index)
    for data, has, count in ((whole, True, 7), (part, False, 4)):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            names = tar.getnames()
        assert ("manifest.json" in names) == has
        assert len([name for name in names if name.startswith("blobs/sha256/")]) == count
    for name in ctr.images():
        ctr("images", "rm", "--sync", name)
    load(ctr, whole, "--all-platforms", "--index-name", "registry.example/all:1")
    found = ctr.images()
    assert set(found) == {index, "registry.example/second:v2", "registry.example/all:1"}
    for name in found:
        ctr("images", "rm", "--sync", name)
    load(ctr, whole, "--no-unpack", "--base-name", "registry.example/second")
    assert ctr.images() == ["registry.example/second:v2"]
    assert "sha256" not in ctr("snapshots", "ls")


def load(ctr: Ctr, data: bytes, *args: str) -> None:
    done = subprocess.run([*ctr._command, "images", "import", *args, "-"], input=data, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_layers_of_dockers_archives_are_compressed(ctr: Ctr, docker_archive: Callable[[], bytes]) -> None:
    for options, count in (((), 0), (("--compress-blobs",), 1)):
        load(ctr, docker_archive(), *options)
        digest = ctr("images", "ls").splitlines()[1].split()[2]
        manifest = json.loads(ctr("content", "get", digest))
        assert [layer["mediaType"].endswith("gzip") for layer in manifest["layers"]].count(True) == count
        ctr("images", "rm", "--sync", "docker.io/library/packed:1")


@pytest.fixture
def docker_archive() -> Callable[[], bytes]:
    """What docker saved before it knew OCI, of one plain layer."""

    def make() -> bytes:
        image = make_image(LAYERS[:1])
        config = next(data for d, data in image.blobs.values() if "config" in d.media_type)
        manifest = [{"Config": "c.json", "RepoTags": ["packed:1"], "Layers": ["a/layer.tar"]}]
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as tar:
            for name, data in {"c.json": config, "a/layer.tar": LAYERS[0],
                               "manifest.json": json.dumps(manifest).encode()}.items():  # fmt: skip
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return made.getvalue()

    return make


@pytest.fixture(scope="module")
def containerd() -> Iterator[Containerd]:
    """sid's own, to compare with."""
    made = Containerd(need_sid("containerd"))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    "options",
    [
        ["--digests"],
        ["--digests", "--base-name", "registry.example/second"],
        ["--digests", "--skip-digest-for-named"],
        ["--base-name", "registry.example/second"],
        [],
    ],
    ids=" ".join,
)
def test_names_of_an_import_are_containerds(ctr: Ctr, containerd: Containerd, index: str, options: list[str]) -> None:
    ctr("images", "pull", "--plain-http", "--all-platforms", index)
    ctr("images", "tag", index, "registry.example/second:v2")
    archive = archive_of(ctr, "--all-platforms", "-", "registry.example/second:v2")
    for name in ctr.images():
        ctr("images", "rm", "--sync", name)
    load(ctr, archive, "--no-unpack", *options)
    theirs = [containerd.ctr, "-a", containerd.address, "images"]
    subprocess.run([*theirs, "import", "--no-unpack", *options, "-"], input=archive, check=True, timeout=60)
    listed = subprocess.run([*theirs, "ls", "-q"], capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        subprocess.run([*theirs, "rm", "--sync", name], check=True, capture_output=True)
    assert sorted(ctr.images()) == sorted(listed)
