"""Image volumes: an image's files in a container, read-only, as long as the pod is there."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tests import busybox
from tests.cri.kubelet import NAMESPACE, WherryLab, refused
from wherry.proto import cri_pb2 as cri

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes containers: run as root")
DATA = "docker.io/library/data:1"


def layer(files: dict[str, str], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, text in files.items():
            item = tarfile.TarInfo(name)
            item.size, item.mode = len(text), 0o644
            tar.addfile(item, io.BytesIO(text.encode()))
        for name, target in (links or {}).items():
            item = tarfile.TarInfo(name)
            item.type, item.linkname = tarfile.SYMTYPE, target
            tar.addfile(item)
    return buffer.getvalue()


def load(lab: WherryLab, name: str, layers: list[bytes]) -> None:
    archive = lab.folder / "data.tar"
    busybox.write_archive(archive, name=name, layers=layers)
    lab.daemon.ctr("images", "import", str(archive), namespace=NAMESPACE)


@pytest.fixture(scope="module")
def data(lab: WherryLab) -> str:
    """An image of two layers, one of which hides a file; with a link that leads out of it."""
    links = {"models/out": "/../../../../../../etc", "models/in": "/models/deep"}
    first = layer({"models/a": "one", "models/deep/b": "two", "models/gone": "x"}, links)
    load(lab, DATA, [first, layer({"models/a": "newer", "models/.wh.gone": ""})])
    return DATA


@pytest.fixture
def pod(lab: WherryLab) -> Iterator[Any]:
    config = lab.pod_config(host_network=True)
    made = lab.run_pod(config)
    yield made, config
    lab.kubelet.StopPodSandbox(pod_sandbox_id=made)
    lab.kubelet.RemovePodSandbox(pod_sandbox_id=made)


def mount(path: str = "/data", image: str = DATA, sub_path: str = "") -> cri.Mount:
    return cri.Mount(container_path=path, image=cri.ImageSpec(image=image), image_sub_path=sub_path, readonly=True)


def volumes(lab: WherryLab) -> list[str]:
    return [target for target in lab.daemon.mounts() if "image-volumes" in target]


def snapshots(lab: WherryLab) -> list[str]:
    lines = lab.daemon.ctr("snapshot", "ls", namespace=NAMESPACE).stdout.splitlines()
    return [line for line in lines if "image-volume" in line]


def test_an_image_is_a_volume(lab: WherryLab, pod: Any, data: str) -> None:
    """Two containers of a pod have one view of it; nobody can write there."""
    made, config = pod
    for name in ("one", "two"):
        container = lab.run(made, lab.container_config(name, ["sleep", "1000"], mounts=[mount()]), config)
        assert lab.exec(container, "cat", "/data/models/a", "/data/models/deep/b") == "newertwo"
        assert lab.exec(container, "ls", "/data/models").split() == ["a", "deep", "in", "out"]
        failed = lab.kubelet.ExecSync(container_id=container, cmd=["sh", "-c", "echo x > /data/new"])
        assert failed.exit_code
        assert b"Read-only" in failed.stderr
    assert len(volumes(lab)) == 1
    # it outlives the image, and the daemon
    lab.kubelet.RemoveImage(image=cri.ImageSpec(image=data))
    lab.restart()
    assert lab.exec(container, "cat", "/data/models/a") == "newer"
    status = lab.container_status(container)
    assert [item.image.image for item in status.mounts if item.container_path == "/data"] == [data]
    load(lab, DATA, [layer({"models/a": "one"}), layer({"models/a": "newer"})])


def test_a_part_of_an_image(lab: WherryLab, pod: Any) -> None:
    load(lab, DATA, [layer({"models/a": "one", "models/deep/b": "two"}, {"out": "/../../etc", "in": "/models/deep"})])
    made, config = pod
    for name, sub_path in (("deep", "models/deep"), ("linked", "in")):
        container = lab.run(
            made, lab.container_config(name, ["sleep", "1000"], mounts=[mount(sub_path=sub_path)]), config
        )
        assert lab.exec(container, "cat", "/data/b") == "two"
    for name, sub_path in (("none", "models/nothing"), ("up", "../.."), ("root", "/etc"), ("out", "out")):
        wrong = lab.container_config(name, ["true"], mounts=[mount(sub_path=sub_path)])
        error = refused(lab.create, made, wrong, config)
        assert error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT), sub_path
        assert sub_path in error.details()


def test_an_image_that_is_not_there(lab: WherryLab, pod: Any) -> None:
    made, config = pod
    wrong = lab.container_config("none", ["true"], mounts=[mount(image="docker.io/library/never:1")])
    error = refused(lab.create, made, wrong, config)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "never:1" in error.details()


def test_nothing_is_left_of_a_pods_volumes(data: str) -> None:
    """Also where the daemon was killed meanwhile."""
    with contextlib.closing(WherryLab()) as lab:
        load(lab, DATA, [layer({"a": "one"}), layer({"b": "two"})])
        config = lab.pod_config(host_network=True)
        made = lab.run_pod(config)
        lab.run(made, lab.container_config("main", ["sleep", "1000"], mounts=[mount()]), config)
        assert len(volumes(lab)) == 1
        assert len(snapshots(lab)) == 1
        lab.restart()
        lab.kubelet.StopPodSandbox(pod_sandbox_id=made)
        lab.kubelet.RemovePodSandbox(pod_sandbox_id=made)
        assert volumes(lab) == []
        assert snapshots(lab) == []
