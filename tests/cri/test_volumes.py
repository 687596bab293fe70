"""What containers of a pod share and bring along: namespaces, users, volumes of images."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests import busybox
from tests.cri.kubelet import NAMESPACE, WherryLab, refused
from tests.cri.test_containers import Lab, Pod, linux
from tests.peers import need
from wherry.proto import cri_pb2 as cri

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes containers: run as root")


def ctr(lab: Any, *args: str) -> str:
    command = [need("ctr"), "--address", lab.address, "--namespace", NAMESPACE, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def image(lab: Any, name: str, **settings: Any) -> str:
    """An image of busybox with other settings, in k8s.io."""
    full = f"docker.io/library/{name}:test"
    archive = lab.folder / f"{name}.tar"
    busybox.write_archive(archive, name=full, **settings)
    ctr(lab, "images", "import", str(archive))
    return full


@pytest.fixture(scope="module")
def each_pod(each_lab: Lab) -> Pod:
    config = each_lab.pod_config(host_network=True)
    return Pod(each_lab.run_pod(config), config, each_lab)


@pytest.fixture(scope="module")
def pod(lab: WherryLab) -> Pod:
    config = lab.pod_config(host_network=True)
    return Pod(lab.run_pod(config), config, lab)


def of_image(pod: Pod, name: str, full: str, *command: str, **more: Any) -> str:
    config = pod.lab.container_config(name, list(command), **more)
    config.image.image = full
    return str(pod.lab.run(pod.id, config, pod.config))


def test_volumes_that_an_image_declares(each_pod: Pod) -> None:
    lab = each_pod.lab
    full = image(lab, "volumes", Volumes={"/etc": {}, "/new": {}, "/tmp": {}})
    mounts = [cri.Mount(container_path="/tmp", host_path=str(lab.folder))]
    container = of_image(each_pod, "volumes", full, "sleep", "1000", mounts=mounts)
    # what the image has there is there, and can be written
    assert "nobody" in lab.exec(container, "cat", "/etc/passwd")
    places = lab.exec(container, "sh", "-c", "touch /etc/x /new/y; grep -E ' /(etc|new) ' /proc/mounts | wc -l")
    assert places.strip() == "2"
    assert "volumes.tar" in lab.exec(container, "ls", "/tmp")
    lab.kubelet.RemoveContainer(container_id=container)
    if lab.name == "wherryd":
        assert not list((lab.folder / "root" / "cri" / "containers").glob("*"))


def test_what_an_image_says(each_pod: Pod) -> None:
    full = image(
        each_pod.lab,
        "says",
        Entrypoint=["/bin/sh", "-c"],
        Cmd=["exit 3"],
        Env=["PATH=/bin", "FROM=image"],
        WorkingDir="/home",
        User="nobody",
        StopSignal="SIGUSR2",
    )
    container = of_image(each_pod, "says", full)
    assert each_pod.lab.exited(container).exit_code == 3
    each_pod.lab.kubelet.RemoveContainer(container_id=container)
    config = each_pod.lab.container_config(
        "args", [], args=["trap 'exit 8' USR2; cd /tmp; touch r; while :; do sleep 0.1; done"]
    )
    config.image.image = full
    container = each_pod.lab.run(each_pod.id, config, each_pod.config)
    each_pod.lab.until(lambda: "r" in each_pod.lab.exec(container, "ls", "/tmp"), "it runs")
    assert each_pod.lab.exec(container, "sh", "-c", "id -u; pwd; echo $FROM").split() == ["65534", "/home", "image"]
    if each_pod.lab.name == "wherryd":
        assert each_pod.lab.container_status(container).stop_signal == cri.SIGUSR2
        assert each_pod.lab.container_status(container).user.linux.uid == 65534
    each_pod.lab.kubelet.StopContainer(cri.StopContainerRequest(container_id=container, timeout=20))
    assert each_pod.lab.container_status(container).exit_code == 8
    each_pod.lab.kubelet.RemoveContainer(container_id=container)


def test_image_volumes(pod: Pod) -> None:
    mounts = [
        cri.Mount(container_path="/data", image=cri.ImageSpec(image=busybox.NAME)),
        cri.Mount(container_path="/conf", image=cri.ImageSpec(image=busybox.NAME), image_sub_path="etc"),
    ]
    container = pod.run("image-volume", "sleep", "1000", mounts=mounts)
    command = "ls /data/bin/busybox; ls /conf/passwd; touch /data/x 2>/dev/null || echo read-only"
    assert pod.lab.exec(container, "sh", "-c", command).split() == ["/data/bin/busybox", "/conf/passwd", "read-only"]
    # the kubelet sees what it asked for, not where that lies on the host
    assert not pod.lab.container_status(container).mounts[0].host_path
    pod.lab.kubelet.RemoveContainer(container_id=container)
    mounts[1].image_sub_path = "no/such"
    assert refused(pod.create, "image-volume", "true", mounts=mounts).code() == grpc.StatusCode.NOT_FOUND


def test_a_shared_pid_namespace(each_lab: Lab) -> None:
    options = cri.NamespaceOption(pid=cri.POD, network=cri.NODE)
    config = each_lab.pod_config(host_network=True)
    config.linux.security_context.namespace_options.pid = cri.POD
    pod = Pod(each_lab.run_pod(config), config, each_lab)
    pod.run("first", "sleep", "12321", linux=linux(namespace_options=options))
    second = pod.run("second", "sleep", "1000", linux=linux(namespace_options=options))
    assert "sleep 12321" in each_lab.exec(second, "ps")
    each_lab.kubelet.StopContainer(cri.StopContainerRequest(container_id=second, timeout=0))
    assert each_lab.container_status(second).exit_code == 137
    each_lab.kubelet.StopPodSandbox(pod_sandbox_id=pod.id)
    each_lab.kubelet.RemovePodSandbox(pod_sandbox_id=pod.id)


def test_the_pods_files(each_lab: Lab) -> None:
    dns = cri.DNSConfig(servers=["192.0.2.1"], searches=["a.test"], options=["ndots:5"])
    config = each_lab.pod_config(host_network=True, dns_config=dns)
    pod = Pod(each_lab.run_pod(config), config, each_lab)
    container = pod.run("files", "sleep", "1000")
    text = each_lab.exec(container, "cat", "/etc/resolv.conf")
    assert text.split() == ["search", "a.test", "nameserver", "192.0.2.1", "options", "ndots:5"]
    assert each_lab.exec(container, "cat", "/etc/hostname").strip()
    assert "localhost" in each_lab.exec(container, "cat", "/etc/hosts")
    each_lab.exec(container, "sh", "-c", "echo shared > /dev/shm/x")
    other = pod.run("other", "sleep", "1000")
    assert each_lab.exec(other, "cat", "/dev/shm/x").strip() == "shared"
    each_lab.kubelet.StopPodSandbox(pod_sandbox_id=pod.id)
    each_lab.kubelet.RemovePodSandbox(pod_sandbox_id=pod.id)


def test_what_was_half_made_is_taken_back(pod: Pod) -> None:
    container = pod.create("half", "true")
    ctr(pod.lab, "snapshots", "rm", container)
    pod.lab.restart()
    assert refused(pod.lab.container_status, container).code() == grpc.StatusCode.NOT_FOUND
    assert pod.create("half", "true") != container


def test_a_checkpoint_that_fails_leaves_nothing(pod: Pod, tmp_path: Path) -> None:
    container = pod.run("frozen", "sleep", "1000")
    kubelet = pod.lab.kubelet
    request = cri.CheckpointContainerRequest(container_id=container, location="relative")
    assert refused(kubelet.CheckpointContainer, request).code() == grpc.StatusCode.INVALID_ARGUMENT
    request.location = str(tmp_path / "archive.tar")
    try:
        kubelet.CheckpointContainer(request)
        words = ""
    except grpc.RpcError as error:
        words = str(error.details())
    if words:
        # Debian's criu can't dump on this kernel, or isn't there: its words are in the answer
        assert "criu" in words.lower()
        assert not list(tmp_path.iterdir())
    else:
        names = subprocess.run(["tar", "tf", request.location], capture_output=True, text=True, check=True).stdout
        assert {"spec.dump", "config.dump", "rootfs-diff.tar", "checkpoint/"} <= set(names.split())
    assert pod.lab.container_status(container).state == cri.CONTAINER_RUNNING
    assert not list((pod.lab.folder / "root" / "cri" / "checkpoints").glob("*"))
    pod.lab.kubelet.RemoveContainer(container_id=container)
