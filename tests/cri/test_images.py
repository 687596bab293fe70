"""The ImageService against real registries; what containerd 1.6 does as well, its CRI is asked the same."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests import busybox
from tests.cri.kubelet import NAMESPACE, ContainerdLab, Kubelet, Lab, WherryLab
from tests.peers import need
from tests.registry.conftest import HASH, PASSWORD, USER, running_registry
from wherry.core.errors import InvalidArgument
from wherry.cri.image_mirrors import config_path
from wherry.cri.settings import Registry
from wherry.daemon.config import load
from wherry.proto import cri_pb2 as cri
from wherry.registry.hosts import hosts_for

Status = grpc.StatusCode


def publish(folder: Path, reference: str, *, user: str = "", **settings: object) -> None:
    """An image with one file and its own configuration, in a registry."""
    archive = folder / f"{hashlib.sha256(reference.encode()).hexdigest()[:12]}.tar"
    busybox.write_archive(archive, **settings)  # type: ignore[arg-type]
    command = [need("skopeo"), "copy", "-q", "--dest-tls-verify=false", *(["--dest-creds", user] if user else [])]
    subprocess.run([*command, f"oci-archive:{archive}", f"docker://{reference}"], check=True, timeout=60)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry for everybody, with `app:1`, `app:2` (another image), and `named:1` (its user has a name)."""
    folder = tmp_path_factory.mktemp("registry")
    with running_registry(folder) as address:
        publish(folder, f"{address}/team/app:1", User="1000:50", Labels={"v": "1"})
        publish(folder, f"{address}/team/app:2", User="1000:50", Labels={"v": "2"})
        publish(folder, f"{address}/team/named:1", User="nobody")
        yield address


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry for USER alone, with `secret:1`."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "htpasswd").write_text(f"{USER}:{HASH}\n")
    with running_registry(folder, f'auth: {{htpasswd: {{realm: r, path: "{folder}/htpasswd"}}}}\n') as address:
        publish(folder, f"{address}/team/secret:1", user=f"{USER}:{PASSWORD}")
        yield address


@pytest.fixture
def client(each_lab: Lab) -> Iterator[Kubelet]:
    """A kubelet of each; images that a test pulled go at its end."""
    yield each_lab.kubelet
    remove_pulled(each_lab.kubelet)


def ctr(lab: Lab, *args: str) -> str:
    """What Debian's ctr says about the namespace of the CRI."""
    command = [need("ctr"), "--address", lab.address, "--namespace", NAMESPACE, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def refused(*codes: grpc.StatusCode) -> Iterator[list[str]]:
    """The block is refused with one of the codes; the message comes into the list."""
    said: list[str] = []
    with pytest.raises(grpc.RpcError) as failure:
        yield said
    error: Any = failure.value
    assert error.code() in codes, f"{error.code()}: {error.details()}"
    said.append(str(error.details()))


def remove_pulled(kubelet: Kubelet) -> None:
    for image in kubelet.ListImages().images:
        if any(name.startswith("127.0.0.1:") for name in [*image.repo_tags, *image.repo_digests]):
            kubelet.RemoveImage(image=cri.ImageSpec(image=image.id))


def pull(kubelet: Kubelet, name: str, auth: cri.AuthConfig | None = None, **more: object) -> str:
    return str(kubelet.PullImage(image=cri.ImageSpec(image=name), auth=auth, **more).image_ref)


def status(kubelet: Kubelet, name: str) -> cri.Image | None:
    answer = kubelet.ImageStatus(image=cri.ImageSpec(image=name))
    return answer.image if answer.HasField("image") else None


def test_a_pull_answers_with_the_id_and_the_image_has_containerds_names(
    client: Kubelet, each_lab: Lab, registry: str
) -> None:
    name = f"{registry}/team/app:1"
    assert status(client, name) is None
    identity = pull(client, name)
    image = status(client, name)
    assert image is not None
    assert image.id == identity
    assert identity.startswith("sha256:")
    assert list(image.repo_tags) == [name]
    assert len(image.repo_digests) == 1
    assert image.repo_digests[0].startswith(f"{registry}/team/app@sha256:")
    assert (image.uid.value, image.username) == (1000, "")
    assert image.size > 100_000
    # by each of its names, its id, and the beginning of its id
    for spelling in (identity, identity[7:], identity[7:19], image.repo_digests[0]):
        found = status(client, spelling)
        assert found is not None, spelling
        assert found.id == identity, spelling
    # and the other API sees the same names
    listed = ctr(each_lab, "images", "ls", "-q").split()
    assert {name, identity, image.repo_digests[0]} <= set(listed)


def test_both_say_the_same_of_an_image(registry: str) -> None:
    """Every field of the status and the verbose information are those of containerd."""
    found = []
    for made in (WherryLab, ContainerdLab):
        with contextlib.closing(made()) as node:
            kubelet = node.kubelet
            for name in (f"{registry}/team/app:1", f"{registry}/team/named:1"):
                pull(kubelet, name)
                answer = kubelet.ImageStatus(image=cri.ImageSpec(image=name), verbose=True)
                answer.image.pinned = False
                info = json.loads(answer.info["info"])
                info["imageSpec"] = {key: info["imageSpec"][key] for key in ("architecture", "config", "os", "rootfs")}
                found.append((node.name, name, str(answer.image), info))
            remove_pulled(kubelet)
    ours = [entry[1:] for entry in found if entry[0] == "wherryd"]
    theirs = [entry[1:] for entry in found if entry[0] == "containerd"]
    assert ours == theirs


def test_a_users_name_is_told(client: Kubelet, registry: str) -> None:
    pull(client, f"{registry}/team/named:1")
    image = status(client, f"{registry}/team/named:1")
    assert image is not None
    assert image.username == "nobody"
    assert not image.HasField("uid")


def test_a_pull_by_digest_has_no_tag(client: Kubelet, registry: str) -> None:
    pull(client, f"{registry}/team/app:1")
    image = status(client, f"{registry}/team/app:1")
    assert image is not None
    by_digest = image.repo_digests[0]
    client.RemoveImage(image=cri.ImageSpec(image=image.id))
    assert pull(client, by_digest) == image.id
    found = status(client, by_digest)
    assert found is not None
    assert list(found.repo_digests) == [by_digest]
    assert not found.repo_tags
    # with a tag as well the digest counts
    repository, _, digest = by_digest.partition("@")
    assert pull(client, f"{repository}:whatever@{digest}") == image.id


def test_a_tag_that_moves_leaves_the_old_image(client: Kubelet, registry: str, tmp_path: Path) -> None:
    name = f"{registry}/team/moving:latest"
    publish(tmp_path, name, Labels={"v": "old"})
    old = pull(client, name)
    publish(tmp_path, name, Labels={"v": "new"})
    new = pull(client, name)
    assert old != new
    kept, current = status(client, old), status(client, name)
    assert kept is not None
    assert not kept.repo_tags
    assert len(kept.repo_digests) == 1
    assert current is not None
    assert current.id == new
    assert list(current.repo_tags) == [name]


def test_removing_takes_every_name_and_repeats_are_fine(client: Kubelet, each_lab: Lab, registry: str) -> None:
    identity = pull(client, f"{registry}/team/app:1")
    client.RemoveImage(image=cri.ImageSpec(image=identity))
    assert status(client, identity) is None
    left = ctr(each_lab, "images", "ls", "-q")
    assert identity not in left
    assert registry not in left
    client.RemoveImage(image=cri.ImageSpec(image=identity))
    client.RemoveImage(image=cri.ImageSpec(image=f"{registry}/team/never:seen"))


def test_what_other_clients_pull_is_an_image_of_the_node(client: Kubelet, each_lab: Lab, registry: str) -> None:
    name = f"{registry}/team/app:2"
    ctr(each_lab, "images", "pull", "--plain-http", name)

    def there() -> cri.Image | None:
        return next((image for image in client.ListImages().images if name in image.repo_tags), None)

    end = time.monotonic() + 30
    while (image := there()) is None and time.monotonic() < end:
        time.sleep(0.1)
    assert image is not None
    assert image.id in ctr(each_lab, "images", "ls", "-q")
    ctr(each_lab, "images", "rm", name)
    end = time.monotonic() + 30
    while name in (tags := list(image.repo_tags)) and time.monotonic() < end:
        image = status(client, image.id) or image
        time.sleep(0.05)
    assert not tags


def test_credentials_of_the_request(client: Kubelet, locked: str) -> None:
    name = f"{locked}/team/secret:1"
    pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    for wrong in (None, cri.AuthConfig(), cri.AuthConfig(username=USER, password="wrong")):
        with pytest.raises(grpc.RpcError) as failure:
            pull(client, name, wrong)
        assert name in str(failure.value.details())
        assert "wrong" not in str(failure.value.details()).replace("went wrong", "")
    for right in (
        cri.AuthConfig(username=USER, password=PASSWORD),
        cri.AuthConfig(auth=pair),
        cri.AuthConfig(username=USER, password=PASSWORD, server_address=f"http://{locked}/v1/"),
    ):
        identity = pull(client, name, right)
        client.RemoveImage(image=cri.ImageSpec(image=identity))
    # somebody else's password isn't shown to this registry
    with pytest.raises(grpc.RpcError):
        pull(client, name, cri.AuthConfig(username=USER, password=PASSWORD, server_address="https://other.example"))


def test_errors_have_codes_that_kubelet_understands(client: Kubelet, registry: str) -> None:
    with refused(Status.NOT_FOUND) as said:
        pull(client, f"{registry}/team/app:never")
    assert f'failed to pull and unpack image "{registry}/team/app:never"' in said[0]
    with refused(Status.INVALID_ARGUMENT, Status.UNKNOWN) as said:
        pull(client, "Not A Name")
    assert "Not A Name" in said[0]


# -- wherry alone


@pytest.fixture
def ours(lab: WherryLab) -> Iterator[Kubelet]:
    """A kubelet of ours."""
    yield lab.kubelet
    remove_pulled(lab.kubelet)


def test_codes_of_our_own(ours: Kubelet, locked: str) -> None:
    with refused(Status.UNAUTHENTICATED, Status.PERMISSION_DENIED):
        pull(ours, f"{locked}/team/secret:1")
    with refused(Status.INVALID_ARGUMENT) as said:
        pull(ours, f"{locked}/team/secret:1", cri.AuthConfig(auth="!!"))
    assert "!!" not in said[0]
    with refused(Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED) as said, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        pull(ours, f"127.0.0.1:{nobody.getsockname()[1]}/team/app:1")
    assert "refused" in said[0] or "connect" in said[0].lower()


def test_a_registry_token_is_sent_as_it_is(ours: Kubelet) -> None:
    """No flow of tokens: who has one shows it."""
    seen: list[str] = []
    with (
        _answering(
            seen,
            b'HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer realm="http://127.0.0.1:1/t"\r\n'
            b"Content-Length: 0\r\nConnection: close\r\n\r\n",
        ) as address,
        pytest.raises(grpc.RpcError),
    ):
        pull(ours, f"{address}/team/app:1", cri.AuthConfig(registry_token="tok.en"))
    assert any("Authorization: Bearer tok.en" in head for head in seen), seen


def test_an_identity_token_is_a_refresh_token(ours: Kubelet) -> None:
    """It goes to the token server by POST, and nowhere else."""
    seen: list[str] = []
    with _answering(seen, b"") as address:
        host = address
        answer = (
            f'HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer realm="http://{host}/token",service="s"\r\n'
            "Content-Length: 0\r\nConnection: close\r\n\r\n"
        )
        _ANSWERS[address] = answer.encode()
        with pytest.raises(grpc.RpcError):
            pull(ours, f"{address}/team/app:1", cri.AuthConfig(identity_token="refresh-me"))
    posts = [head for head in seen if head.startswith("POST /token")]
    assert posts
    assert all("refresh-me" in head for head in posts)
    assert not any("refresh-me" in head for head in seen if not head.startswith("POST"))


def test_wherrys_own_listing_shows_what_was_pulled(ours: Kubelet, lab: WherryLab, registry: str) -> None:
    identity = pull(ours, f"{registry}/team/app:1")
    done = ctr(lab, "images", "ls")
    line = next(line for line in done.splitlines() if line.startswith(f"{registry}/team/app:1 "))
    assert "io.cri-containerd.image=managed" in line
    # unpacked: a container of it starts by the other API
    name = f"{registry}/team/app:1"
    assert ctr(lab, "run", "--rm", name, f"x{identity[7:15]}", "echo", "runs") == "runs\n"


def wherry(lab: Lab, *args: str) -> str:
    command = [sys.executable, "-m", "wherry.cli", "--address", lab.address, "-n", NAMESPACE, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_for_people_an_image_is_one_line(ours: Kubelet, lab: WherryLab, registry: str, tmp_path: Path) -> None:
    """`wherry images`: the id and the name by digest are shown where there is no tag; and pruning goes by images."""
    name = f"{registry}/team/shown:1"
    publish(tmp_path, name, Labels={"v": "old"})
    old = pull(ours, name)

    def lines() -> list[list[str]]:
        return [line.split()[:3] for line in wherry(lab, "images").splitlines() if "team/shown" in line]

    assert lines() == [[f"{registry}/team/shown", "1", old[7:19]]]
    publish(tmp_path, name, Labels={"v": "new"})
    new = pull(ours, name)
    assert sorted(lines()) == sorted(
        [[f"{registry}/team/shown", "1", new[7:19]], [f"{registry}/team/shown", "<none>", old[7:19]]]
    )
    wherry(lab, "image", "prune", "-f")
    assert status(ours, old) is None
    kept = status(ours, new)
    assert kept is not None
    assert list(kept.repo_tags) == [name]
    assert len(kept.repo_digests) == 1


def test_the_list_can_be_filtered_and_streamed(ours: Kubelet, registry: str) -> None:
    identity = pull(ours, f"{registry}/team/app:1")
    chosen = cri.ImageFilter(image=cri.ImageSpec(image=f"{registry}/team/app:1"))
    assert [image.id for image in ours.ListImages(filter=chosen).images] == [identity]
    none = cri.ImageFilter(image=cri.ImageSpec(image="docker.io/library/never:1"))
    assert not ours.ListImages(filter=none).images
    streamed = [image.id for part in ours.StreamImages() for image in part.images]
    assert sorted(streamed) == sorted(image.id for image in ours.ListImages().images)


def test_the_file_systems_of_images_are_told(ours: Kubelet, lab: WherryLab, registry: str) -> None:
    pull(ours, f"{registry}/team/app:1")
    info = ours.ImageFsInfo()
    assert [entry.fs_id.mountpoint for entry in info.image_filesystems] == [f"{lab.daemon.root}/snapshotter/overlayfs"]
    assert info.image_filesystems[0].used_bytes.value > 500_000
    assert info.image_filesystems[0].inodes_used.value > 10
    assert abs(info.image_filesystems[0].timestamp - time.time_ns()) < 60 * 10**9
    assert len(info.container_filesystems) == 1


def test_collection_spares_what_was_pulled(ours: Kubelet, lab: WherryLab, registry: str) -> None:
    identity = pull(ours, f"{registry}/team/app:1")
    # the tag goes by the other API, and everything unreferenced with it
    ctr(lab, "images", "rm", "--sync", f"{registry}/team/app:1")
    image = status(ours, identity)
    assert image is not None
    assert not image.repo_tags
    config = lab.pod_config(host_network=True)
    container = lab.container_config("main", ["echo", "there"])
    container.image.image = identity
    assert lab.exited(lab.run(lab.run_pod(config), container, config)).exit_code == 0


@pytest.fixture(scope="module")
def configured(registry: str, locked: str) -> Iterator[WherryLab]:
    """A node with what the configuration says about images; each of its tests has names of its own."""
    table = 'plugins."io.containerd.grpc.v1.cri"'
    settings = f"""
[{table}.pinned_images]
keep = "{registry}/team/app:1"
[{table}.registry.configs."{locked}".auth]
username = "{USER}"
password = "{PASSWORD}"
[{table}.registry.mirrors."cluster.example"]
endpoint = ["http://127.0.0.1:1", "http://{registry}"]
[plugins."io.containerd.cri.v1.images"]
image_pull_progress_timeout = "3s"
max_concurrent_downloads = 7
"""
    with contextlib.closing(WherryLab(settings, image=False)) as lab:
        yield lab


def test_pinned_images_are_told_as_such(configured: WherryLab, registry: str) -> None:
    kubelet = configured.kubelet
    pull(kubelet, f"{registry}/team/app:1")
    pull(kubelet, f"{registry}/team/app:2")

    def pinned(name: str) -> bool:
        return any(image.pinned for image in kubelet.ListImages().images if name in image.repo_tags)

    assert pinned(f"{registry}/team/app:1")
    assert not pinned(f"{registry}/team/app:2")
    # a person's label does the same, as with containerd
    ctr(configured, "images", "label", f"{registry}/team/app:2", "io.cri-containerd.pinned=pinned")
    assert pinned(f"{registry}/team/app:2")


@pytest.mark.parametrize("silent", ["at once", "in a layer"])
def test_a_registry_that_stalls_is_given_up(configured: WherryLab, registry: str, silent: str, tmp_path: Path) -> None:
    """After `image_pull_progress_timeout`, with the message that says what didn't come; the node stays well."""
    # an image that the node has no part of
    name = f"stalling{len(silent)}:1"
    publish(tmp_path, f"{registry}/team/{name}", layers=[busybox.layer(), tar_of(silent)])
    with _stalling(registry, after_blobs=silent == "in a layer") as address:
        began = time.monotonic()
        with refused(Status.DEADLINE_EXCEEDED) as said:
            pull(configured.kubelet, f"{address}/team/{name}")
        assert 2.5 < time.monotonic() - began < 60
        assert "no progress for 3 s" in said[0]
        assert "image_pull_progress_timeout" in said[0]
        assert ("layer" in said[0]) == (silent == "in a layer"), said[0]
        # others aren't in its way
        assert pull(configured.kubelet, f"{registry}/team/named:1").startswith("sha256:")


def tar_of(text: str) -> bytes:
    """A layer that is larger than what a stalling registry gives, and compresses badly."""
    data = b"".join(hashlib.sha256(f"{text}{number}".encode()).digest() for number in range(10_000))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        item = tarfile.TarInfo("noise")
        item.size = len(data)
        archive.addfile(item, io.BytesIO(data))
    return buffer.getvalue()


def test_a_pull_that_a_crash_interrupted_can_be_repeated(registry: str) -> None:
    with contextlib.closing(WherryLab(image=False)) as node:
        with _stalling(registry, after_blobs=True) as address:
            threading.Timer(1.5, os.kill, (node.daemon.pid, signal.SIGKILL)).start()
            with refused(Status.UNAVAILABLE):
                pull(node.kubelet, f"{address}/team/app:1")
            node.restart()
        again = Kubelet(node.address)
        assert status(again, f"{address}/team/app:1") is None
        assert pull(again, f"{registry}/team/app:1").startswith("sha256:")
        again.close()


def test_many_pulls_of_one_image_are_one(ours: Kubelet, registry: str) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(pull(ours, f"{registry}/team/app:1"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 6
    assert len(set(found)) == 1


def test_config_path_is_heeded(registry: str, tmp_path: Path) -> None:
    hosts = tmp_path / "certs.d" / "cluster.example"
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(f'server = "https://cluster.example"\n[host."http://{registry}"]\n')
    settings = f'[plugins."io.containerd.grpc.v1.cri".registry]\nconfig_path = "{tmp_path}/certs.d"\n'
    with contextlib.closing(WherryLab(settings, image=False)) as node:
        pull(node.kubelet, "cluster.example/team/app:1")
        image = status(node.kubelet, "cluster.example/team/app:1")
        assert image is not None
        assert list(image.repo_tags) == ["cluster.example/team/app:1"]


def test_mirrors_in_the_older_way(configured: WherryLab) -> None:
    """`[registry.mirrors]`, in their order; the one that nobody answers at is passed over."""
    pull(configured.kubelet, "cluster.example/team/app:1")
    image = status(configured.kubelet, "cluster.example/team/app:1")
    assert image is not None
    assert "cluster.example/team/app:1" in image.repo_tags


def test_both_ways_of_naming_mirrors_are_refused(tmp_path: Path) -> None:
    registry = Registry(config_path="/etc/certs.d", mirrors={"a.example": {"endpoint": ["https://b.example"]}})
    with pytest.raises(InvalidArgument, match="config_path"):
        config_path(registry, str(tmp_path / "made"))
    with pytest.raises(InvalidArgument, match="no address"):
        config_path(Registry(mirrors={"a.example": {"endpoint": ["b.example"]}}), str(tmp_path / "made"))
    with pytest.raises(InvalidArgument, match="not a host"):
        config_path(Registry(mirrors={"../a": {"endpoint": ["https://b.example"]}}), str(tmp_path / "made"))


def test_mirrors_and_certificates_become_files_of_hosts(tmp_path: Path) -> None:
    """What is written is what `hosts.toml` means: order, certificates by host, a path as the whole root, `*`."""
    tls = {"ca_file": "/ca.pem", "cert_file": "/c.pem", "key_file": "/k.pem", "insecure_skip_verify": True}
    registry = Registry(
        mirrors={
            "a.example": {"endpoint": ["https://b.example", "http://c.example:5000/proxy/v2"]},
            "*": {"endpoint": ["https://all.example"]},
        },
        configs={"b.example": {"tls": tls}, "plain.example": {"tls": {"insecure_skip_verify": True}}},
    )
    folder = config_path(registry, str(tmp_path / "made"))
    found = hosts_for("a.example", config_dir=folder)
    assert [host.root for host in found] == [
        "https://b.example/v2",
        "http://c.example:5000/proxy/v2",
        "https://a.example/v2",
    ]
    assert (found[0].ca, found[0].client, found[0].skip_verify) == (("/ca.pem",), (("/c.pem", "/k.pem"),), True)
    assert not found[2].ca
    assert [host.skip_verify for host in hosts_for("plain.example", config_dir=folder)] == [True]
    assert [host.netloc for host in hosts_for("else.example", config_dir=folder)] == ["all.example", "else.example"]


def test_downloads_at_once_are_those_of_the_cri(configured: WherryLab) -> None:
    """One limit for the daemon: where only the CRI's table has one, it is that."""
    config = load(str(configured.daemon.config))
    assert config.transfers().max_concurrent_downloads == 7
    assert config.cri_settings().max_concurrent_downloads == 7


def test_the_configurations_own_credentials(configured: WherryLab, locked: str) -> None:
    assert pull(configured.kubelet, f"{locked}/team/secret:1").startswith("sha256:")


# -- registries that misbehave

_ANSWERS: dict[str, bytes] = {}


@contextlib.contextmanager
def _answering(seen: list[str], answer: bytes) -> Iterator[str]:
    """A server that answers everything alike, and remembers what was asked (head and body)."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        _ANSWERS[address] = answer

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.settimeout(2)
                        with contextlib.suppress(OSError):
                            data = connection.recv(65536)
                            with contextlib.suppress(TimeoutError):
                                if data.startswith(b"POST") and not data.partition(b"\r\n\r\n")[2]:
                                    data += connection.recv(65536)
                            seen.append(data.decode(errors="replace"))
                            connection.sendall(_ANSWERS[address])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield address
        finally:
            server.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _stalling(registry: str, *, after_blobs: bool) -> Iterator[str]:
    """A door in front of a registry that takes connections and says nothing; or nothing more in a layer's middle."""
    ready = threading.Event()
    done: list[asyncio.AbstractEventLoop] = []
    address: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError), contextlib.closing(writer):
            if not after_blobs:
                await reader.read()
                return
            upstream, up = await asyncio.open_connection(*registry.split(":"))
            with contextlib.closing(up):
                while True:
                    head = await reader.read(1)
                    if head == b"\x16":
                        return  # TLS, which isn't spoken here
                    head += await reader.readuntil(b"\r\n\r\n")
                    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"host:")]
                    lines.insert(1, f"Host: {registry}".encode())
                    up.write(b"\r\n".join(lines))
                    answer = await upstream.readuntil(b"\r\n\r\n")
                    length = next(
                        (
                            int(line.split(b":")[1])
                            for line in answer.split(b"\r\n")
                            if line.lower().startswith(b"content-l")
                        ),
                        0,
                    )
                    body = b"" if head.startswith(b"HEAD") else await upstream.readexactly(length)
                    large = len(body) > 100_000
                    writer.write(answer + (body[:50_000] if large else body))
                    await writer.drain()
                    if large:
                        await reader.read()
                        return

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        address.append(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        done.append(asyncio.get_running_loop())
        ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await server.serve_forever()

    def main() -> None:
        with contextlib.suppress(RuntimeError):
            asyncio.run(run())

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield address[0]
    finally:
        loop = done[0]
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])
        thread.join(10)
