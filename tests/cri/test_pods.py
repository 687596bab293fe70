"""Pods as a kubelet makes and ends them; what Debian's containerd does with the same calls is the reference."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cri.kubelet import ContainerdLab, WherryLab, refused, shims_in
from wherry.proto import cri_pb2 as cri

UNKNOWN = "f" * 64


def namespaces_of(pid: int | str) -> dict[str, str]:
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in ("net", "ipc", "uts", "pid", "user")}


def test_a_pods_life(each_lab: WherryLab | ContainerdLab) -> None:
    """Run, status, list, stop, remove; Stop and Remove again are fine."""
    lab = each_lab
    config = lab.pod_config(
        "life", host_network=True, labels={"app": "a", "tier": "b"}, annotations={"note": "an annotation"}
    )
    pod = lab.run_pod(config)
    assert len(pod) == 64
    status = lab.status(pod).status
    assert (status.id, status.state) == (pod, cri.SANDBOX_READY)
    assert status.metadata == config.metadata
    assert dict(status.labels) == {"app": "a", "tier": "b"}
    assert dict(status.annotations) == {"note": "an annotation"}
    assert status.linux.namespaces.options.network == cri.NODE
    assert status.network.ip == ""
    assert status.created_at > 1_600_000_000 * 10**9
    (listed,) = lab.kubelet.ListPodSandbox().items
    assert (listed.id, listed.state, listed.created_at) == (pod, cri.SANDBOX_READY, status.created_at)
    for _ in range(2):
        lab.kubelet.StopPodSandbox(pod_sandbox_id=pod)
    assert lab.status(pod).status.state == cri.SANDBOX_NOTREADY
    for _ in range(2):
        lab.kubelet.RemovePodSandbox(pod_sandbox_id=pod)
    error = refused(lab.status, pod)
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert "an error occurred when try to find sandbox" in error.details()
    assert not lab.kubelet.ListPodSandbox().items


def test_what_is_not_there(each_lab: WherryLab | ContainerdLab) -> None:
    """Ending what isn't there is done already (containerd says so since 2.0); asking for it is an error."""
    if each_lab.name == "wherryd":
        each_lab.kubelet.StopPodSandbox(pod_sandbox_id=UNKNOWN)
    each_lab.kubelet.RemovePodSandbox(pod_sandbox_id=UNKNOWN)
    assert refused(each_lab.status, UNKNOWN).code() == grpc.StatusCode.NOT_FOUND


def test_lists_are_filtered(each_lab: WherryLab | ContainerdLab) -> None:
    """By id and by the beginning of one, by state, by labels."""
    lab = each_lab
    one = lab.run_pod(labels={"app": "a", "x": "1"})
    two = lab.run_pod(labels={"app": "a", "x": "2"})
    lab.kubelet.StopPodSandbox(pod_sandbox_id=two)

    def found(**chosen: Any) -> set[str]:
        return {item.id for item in lab.kubelet.ListPodSandbox(filter=cri.PodSandboxFilter(**chosen)).items}

    try:
        assert found() == {one, two}
        assert found(id=one) == {one}
        assert found(id=one[:12]) == {one}
        assert found(id=UNKNOWN) == set()
        assert found(label_selector={"app": "a"}) == {one, two}
        assert found(label_selector={"app": "a", "x": "2"}) == {two}
        assert found(state=cri.PodSandboxStateValue(state=cri.SANDBOX_READY)) == {one}
        assert found(state=cri.PodSandboxStateValue(state=cri.SANDBOX_NOTREADY), label_selector={"x": "1"}) == set()
        assert lab.status(one[:12]).status.id == one
    finally:
        lab.remove_pods()


def test_a_name_is_there_once(each_lab: WherryLab | ContainerdLab) -> None:
    """Name, namespace, uid and attempt together; the next attempt is another pod."""
    lab = each_lab
    pod = lab.run_pod(lab.pod_config("twice", host_network=True))
    try:
        error = refused(lab.run_pod, lab.pod_config("twice", host_network=True))
        assert 'name "twice_default_uid-twice_0" is reserved for' in error.details()
        assert pod in error.details()
        if lab.name == "wherryd":  # containerd answers UNKNOWN
            assert error.code() == grpc.StatusCode.ALREADY_EXISTS
        assert lab.run_pod(lab.pod_config("twice", host_network=True, attempt=1)) != pod
    finally:
        lab.remove_pods()
    lab.run_pod(lab.pod_config("twice", host_network=True))  # a removed pod's name is free
    lab.remove_pods()


def test_wrong_requests(lab: WherryLab) -> None:
    """Each is refused with what is wrong, before anything is made."""
    cases: list[tuple[Any, str, str]] = [
        (cri.PodSandboxConfig(), "", "metadata"),
        (lab.pod_config(host_network=True), "nonesuch", 'no runtime for "nonesuch" is configured'),
    ]
    config = lab.pod_config(host_network=True)
    config.linux.sysctls["net.ipv4.ip_forward"] = "1"
    cases.append((config, "", "net.ipv4.ip_forward"))
    config = lab.pod_config(host_network=True)
    config.linux.sysctls["vm.swappiness"] = "1"
    cases.append((config, "", "vm.swappiness"))
    for config, handler, text in cases:
        error = refused(lab.run_pod, config, handler=handler)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        assert text in error.details()
    assert not lab.kubelet.ListPodSandbox().items
    assert lab.daemon.settle() == []


def test_without_a_network_pods_are_refused(lab: WherryLab) -> None:
    """No configuration of CNI: the condition says so, a pod of its own network is refused, one of the host's runs."""
    conditions = {each.type: each for each in lab.kubelet.Status().status.conditions}
    assert conditions["RuntimeReady"].status
    assert not conditions["NetworkReady"].status
    assert conditions["NetworkReady"].reason == "NetworkPluginNotReady"
    assert "cni plugin not initialized" in conditions["NetworkReady"].message
    assert str(lab.folder / "cni") in conditions["NetworkReady"].message
    error = refused(lab.run_pod, lab.pod_config())
    assert "cni plugin not initialized" in error.details()
    assert not lab.kubelet.ListPodSandbox().items


def test_nothing_is_left_of_pods(lab: WherryLab) -> None:
    """Neither processes nor mounts nor files."""
    config = lab.pod_config("tidy", host_network=True)
    config.linux.security_context.namespace_options.pid = cri.POD
    pod = lab.run_pod(config)
    assert lab.daemon.mounts()
    lab.kubelet.RemovePodSandbox(pod_sandbox_id=pod)  # it is stopped by that
    assert lab.daemon.settle() == []
    for folder in ("pods", "netns"):
        assert not list((lab.daemon.state / "cri" / folder).glob("*"))


def test_files_of_a_pod(lab: WherryLab) -> None:
    """hostname, resolv.conf as the DNS settings say, memory to share."""
    dns = cri.DNSConfig(servers=["10.9.8.7", "::53"], searches=["a.example", "b.example"], options=["ndots:5"])
    pod = lab.run_pod(lab.pod_config("files", host_network=True, dns_config=dns))
    folder = lab.daemon.state / "cri" / "pods" / pod
    assert (folder / "resolv.conf").read_text() == (
        "search a.example b.example\nnameserver 10.9.8.7\nnameserver ::53\noptions ndots:5\n"
    )
    assert (folder / "hostname").read_text() == f"{os.uname().nodename}\n"
    assert os.statvfs(folder / "shm").f_blocks * os.statvfs(folder / "shm").f_frsize == 64 << 20
    lab.remove_pods()
    pod = lab.run_pod()
    assert (lab.daemon.state / "cri/pods" / pod / "resolv.conf").read_text() == Path("/etc/resolv.conf").read_text()
    lab.remove_pods()


def test_a_pod_whose_shim_dies_is_not_ready(lab: WherryLab) -> None:
    """It is said, and it can be removed."""
    config = lab.pod_config(host_network=True)
    config.linux.security_context.namespace_options.pid = cri.POD
    pod = lab.run_pod(config)
    bundle = lab.daemon.state / "tasks/k8s.io" / pod
    shims = shims_in(lab, bundle)
    assert shims
    for each in shims:
        os.kill(each, 9)
    lab.until(lambda: lab.status(pod).status.state == cri.SANDBOX_NOTREADY, "the pod isn't ready")
    lab.kubelet.RemovePodSandbox(pod_sandbox_id=pod)
    assert lab.daemon.settle() == []


def test_many_at_once(lab: WherryLab) -> None:
    """Pods made, and ended, by many callers at the same time."""
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(lab.run_pod())) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 12
    assert {item.id for item in lab.kubelet.ListPodSandbox().items} == set(made)
    streamed = [pod.id for part in lab.kubelet.StreamPodSandboxes() for pod in part.pod_sandboxes]
    assert sorted(streamed) == sorted(made)
    threads = [
        threading.Thread(target=lambda pod=pod: lab.kubelet.RemovePodSandbox(pod_sandbox_id=pod))
        for pod in [*made, *made]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not lab.kubelet.ListPodSandbox().items
    assert lab.daemon.settle() == []


def test_resources_of_a_pod_are_noted(lab: WherryLab) -> None:
    """UpdatePodSandboxResources: the verbose status has them, also after a restart."""
    pod = lab.run_pod()
    wanted = cri.LinuxContainerResources(cpu_shares=512, memory_limit_in_bytes=64 << 20)
    lab.kubelet.UpdatePodSandboxResources(pod_sandbox_id=pod, resources=wanted)
    lab.restart()
    assert lab.info(pod)["config"]["linux"]["resources"] == {
        "cpu_shares": "512",
        "memory_limit_in_bytes": str(64 << 20),
    }
    error = refused(lab.kubelet.UpdatePodSandboxResources, pod_sandbox_id=UNKNOWN, resources=wanted)
    assert error.code() == grpc.StatusCode.NOT_FOUND
    lab.remove_pods()


@pytest.mark.parametrize("kind", ["ipc", "pid"])
def test_namespaces_of_a_pod(lab: WherryLab, kind: str) -> None:
    """What containers will join is the pod's own, or the host's where it says so."""
    config = lab.pod_config(host_network=True)
    options = config.linux.security_context.namespace_options
    setattr(options, kind, cri.POD)
    info = lab.info(lab.run_pod(config))
    path = info["namespaces"][kind]
    assert os.stat(path).st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino
    assert (info["pid"] > 0) == (kind == "pid")
    assert "network" not in info["namespaces"]
    config = lab.pod_config(host_network=True)
    setattr(config.linux.security_context.namespace_options, kind, cri.NODE)
    assert kind not in lab.info(lab.run_pod(config))["namespaces"]
    lab.remove_pods()
