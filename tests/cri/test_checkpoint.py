"""Checkpoints over the CRI: the archive, and containers that are made from it, as `crictl` and a kubelet name it.

criu itself works in the VM (`tests/vm/test_cri.py` runs this file there; Debian's can't read this kernel's vdso); here
a runtime stands in for it that writes and reads the folders, so that all the rest is the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cri.guest import GuestLab
from tests.cri.kubelet import closing, refused
from tests.cri.worker import stop
from tests.daemon.test_checkpoint import RUNTIME, kernel
from tests.peers import need
from wherry.cri import container_restore
from wherry.proto import cri_pb2 as cri

REAL = kernel() < (6, 2)
HANDLER = """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    BinaryName = "{}"
"""
# /count is one of its own files; `old` was there before it
COUNT = (
    "rm -f /etc/old; echo kept >/etc/new; i=$(cat /count 2>/dev/null || echo 0);"
    "while :; do i=$((i+1)); echo $i >/count; echo $i; sleep 0.1; done"
)


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest) -> Iterator[GuestLab]:
    """A node whose runtime can write checkpoints on this kernel."""
    if REAL:
        need("criu")
        yield request.getfixturevalue("guest")
        return
    with tempfile.TemporaryDirectory(prefix="wherry-cri-restore-") as folder:
        runtime = Path(folder) / "runtime"
        # the shim of a pod isn't in the container's bundle
        found = """$(RUNC --root "$2" state "$id" | sed -n 's/.*"rootfs": "\\(.*\\)".*/\\1/p')"""
        runtime.write_text(RUNTIME.replace("$PWD/rootfs", found).replace("RUNC", need("runc")))
        runtime.chmod(0o755)
        yield from closing(GuestLab(HANDLER.format(runtime)))


def count(lab: GuestLab, container: str) -> int:
    # the file is empty for a moment each time
    return int(lab.until(lambda: lab.exec(container, "cat", "/count"), "it has counted", 60))


def new_pod(lab: GuestLab) -> tuple[str, Any]:
    """A pod, and its configuration."""
    config = lab.pod_config(host_network=True)
    if REAL:
        config.linux.cgroup_parent = f"wherrytest-{config.metadata.uid.replace('-', '_')}.slice"
    return lab.run_pod(config), config


@pytest.fixture(scope="module")
def archive(lab: GuestLab) -> tuple[Path, int]:
    """A checkpoint, and how far the container had come when it was asked for; it ran on, and is gone."""
    pod, config = new_pod(lab)
    made = lab.container_config("counter", ["sh", "-c", COUNT])
    made.annotations.update({"io.kubernetes.container.hash": "old", "own": "kept"})
    made.labels["io.kubernetes.container.name"] = "counter"
    container = lab.run(pod, made, config)
    lab.until(lambda: " F 3\n" in (lab.logs / config.metadata.name / "counter.log").read_text(), "it counts", 60)
    before = count(lab, container)
    path = lab.folder / "archive.tar"
    request = cri.CheckpointContainerRequest(container_id=container, location=str(path))
    lab.kubelet.CheckpointContainer(request, timeout=180)
    assert lab.container_status(container).state == cri.CONTAINER_RUNNING
    after = count(lab, container)
    lab.until(lambda: count(lab, container) > after, "it runs on", 60)
    assert not list((lab.folder / "root" / "cri" / "checkpoints").iterdir())
    lab.remove_pods()
    return path, before


def test_the_archive(archive: tuple[Path, int]) -> None:
    """What checkpointctl, CRI-O and containerd read of it, in the types that they read."""
    path, _ = archive
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as tar:
        names = set(tar.getnames())
        documents = {name: json.load(_file(tar, f"{name}.dump")) for name in ("spec", "config", "status")}
        log = _file(tar, "container.log").read().decode()
        with tarfile.open(fileobj=_file(tar, "rootfs-diff.tar")) as layer:
            changed = set(layer.getnames())
    assert {"checkpoint/inventory.img", "rootfs-diff.tar"} <= names, names
    assert not REAL or {"dump.log", "stats-dump"} <= names
    assert {"count", "etc/new"} <= changed
    assert documents["spec"]["process"]["args"] == ["sh", "-c", COUNT]
    told = documents["config"]
    assert told["rootfsImageName"].endswith("busybox:test")
    assert told["createdTime"] < told["checkpointedTime"]  # RFC 3339, of one zone
    status = documents["status"]
    assert status["metadata"]["name"] == "counter"
    assert status["state"] == cri.CONTAINER_RUNNING
    assert isinstance(status["created_at"], int)
    assert status["annotations"]["own"] == "kept"
    assert " stdout F 3\n" in log


def _file(tar: tarfile.TarFile, name: str) -> Any:
    found = tar.extractfile(name)
    assert found is not None
    return found


def restored(lab: GuestLab, image: str, before: int) -> None:
    """A container of that image, in another pod, goes on where the checkpointed one was."""
    pod, config = new_pod(lab)
    made = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name="counter"),
        image=cri.ImageSpec(image=image, user_specified_image=image),
        log_path="counter.log",
    )
    made.annotations["io.kubernetes.container.hash"] = "new"
    container = lab.create(pod, made, config)
    folder = lab.folder / "root" / "cri" / "containers" / container / "restore"
    assert (folder / "checkpoint" / "inventory.img").exists()
    if not REAL:
        lab.restart()  # what is to be restored is not forgotten by a daemon that is killed
    lab.kubelet.StartContainer(cri.StartContainerRequest(container_id=container), timeout=180)
    assert not folder.exists()
    status = lab.container_status(container)
    assert status.state == cri.CONTAINER_RUNNING
    now = count(lab, container)
    assert before <= now < before + 1000
    lab.until(lambda: count(lab, container) > now, "it counts on", 60)
    assert lab.exec(container, "cat", "/etc/new") == "kept\n"
    assert status.image.image.endswith("busybox:test")
    assert {
        "restored": "true",
        "checkpointImage": image,
        "own": "kept",
        "io.kubernetes.container.hash": "new",
    }.items() <= (dict(status.annotations).items())
    assert status.labels["io.kubernetes.container.name"] == "counter"
    # its log has what it said before, and what it says now
    wanted = f" stdout F {count(lab, container)}\n"
    lab.until(lambda: wanted in Path(status.log_path).read_text(), "its log goes on", 60)
    assert " stdout F 1\n" in Path(status.log_path).read_text()
    stop(lab, container, 0)
    assert lab.exited(container).exit_code == 137
    lab.remove_pods()


def test_from_the_archives_path(lab: GuestLab, archive: tuple[Path, int]) -> None:
    restored(lab, str(archive[0]), archive[1])


def test_from_an_image(lab: GuestLab, archive: tuple[Path, int]) -> None:
    """As buildah makes it for a kubelet: the archive's files as a layer, and an annotation."""
    name = "example.org/checkpoints/counter:1"
    layout = lab.folder / "image.tar"
    write_image(layout, archive[0].read_bytes(), name, {"io.kubernetes.cri-o.annotations.checkpoint.name": "counter"})
    lab.import_archive(layout)
    restored(lab, name, archive[1])
    lab.kubelet.RemoveImage(image=cri.ImageSpec(image=name))


def write_image(target: Path, layer: bytes, name: str, annotations: dict[str, str]) -> None:
    """An OCI layout with an image of one layer."""
    blobs: dict[str, bytes] = {}

    def put(kind: str, data: bytes, **more: Any) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {
            "mediaType": f"application/vnd.oci.image.{kind}",
            "digest": f"sha256:{digest}",
            "size": len(data),
            **more,
        }

    def document(kind: str, value: dict[str, Any], **more: Any) -> dict[str, Any]:
        return put(kind, json.dumps(value).encode(), **more)

    layers = [put("layer.v1.tar", layer)]
    rootfs = {"type": "layers", "diff_ids": [layers[0]["digest"]]}
    config = document("config.v1+json", {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs})
    manifest = document(
        "manifest.v1+json",
        {"schemaVersion": 2, "config": config, "layers": layers, "annotations": annotations},
        annotations={"io.containerd.image.name": name},
    )
    index = json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode()
    with tarfile.open(target, "w") as tar:
        for path, data in {**blobs, "index.json": index, "oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_no_checkpoint(lab: GuestLab, archive: tuple[Path, int]) -> None:
    pod, config = new_pod(lab)
    damaged = lab.folder / "damaged.tar"

    def asked(image: Path) -> grpc.RpcError:
        made = cri.ContainerConfig(metadata=cri.ContainerMetadata(name="x"), image=cri.ImageSpec(image=str(image)))
        request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=made, sandbox_config=config)
        return refused(lab.kubelet.CreateContainer, request)  # type: ignore[no-any-return]

    error = asked(lab.folder / "none.tar")
    assert (error.code(), f"checkpoint archive {lab.folder}/none.tar: not found" in str(error.details())) == (
        grpc.StatusCode.NOT_FOUND, True,
    )  # fmt: skip
    damaged.write_bytes(b"x" * 2000)
    assert asked(damaged).code() == grpc.StatusCode.INVALID_ARGUMENT
    for change, words in (
        (lambda name, data: None if name.startswith("checkpoint/") else data, "it has no folder checkpoint"),
        (lambda name, data: b"[]" if name == "spec.dump" else data, "spec.dump is no JSON object"),
        (
            lambda name, data: _elsewhere(data) if name in {"config.dump", "status.dump"} else data,
            "failed to pull checkpoint base image",
        ),
        (lambda name, data: _mounted(data) if name == "spec.dump" else data, "had mounts at /host/data"),
    ):
        rewritten(archive[0], damaged, change)
        assert words in str(asked(damaged).details()), words
    assert not list((lab.folder / "root" / "cri" / "containers").iterdir())
    assert not lab.kubelet.ListContainers().containers
    lab.remove_pods()


def _elsewhere(data: bytes) -> bytes:
    name = "127.0.0.1:1/no/such:1"
    names: dict[str, Any] = dict.fromkeys(("rootfsImageRef", "rootfsImageName", "rootfsImage"), name)
    return json.dumps(json.loads(data) | names | {"image": {"image": name}}).encode()


def _mounted(data: bytes) -> bytes:
    spec = json.loads(data)
    spec["mounts"].append({"destination": "/host/data", "type": "bind", "source": "/tmp", "options": ["rbind"]})
    return json.dumps(spec).encode()


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """An archive with other contents; None leaves a file out."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            found = old.extractfile(member) if member.isreg() else None
            data = change(member.name, found.read()) if found else None
            if data is not None:
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))


def test_links_in_an_archive_lead_nowhere(lab: GuestLab, archive: tuple[Path, int], tmp_path: Path) -> None:
    """Names that leave the folder, links and devices aren't unpacked."""
    evil = tmp_path / "evil.tar"
    with tarfile.open(evil, "w") as tar:
        for name in ("../out", "/etc/out", "checkpoint/../../out", "checkpoint/below/out", "other"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
        link = tarfile.TarInfo("checkpoint")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
        member = tarfile.TarInfo("checkpoint/pages-1.img")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    folder = tmp_path / "folder"
    folder.mkdir()
    with evil.open("rb") as source:
        container_restore._extract(source, str(folder))
    assert [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))] == [
        "checkpoint", "checkpoint/pages-1.img",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"evil.tar", "folder"}
