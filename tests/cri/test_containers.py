"""Containers of pods: their life, their figures of status, commands in them. On `wherryd`, and on containerd's CRI."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest

from tests.cri.kubelet import ContainerdLab, WherryLab, closing, refused
from tests.peers import need
from wherry.cri.exec_sync import LIMIT
from wherry.proto import cri_pb2 as cri

Lab = WherryLab | ContainerdLab
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes containers: run as root")


class Pod(NamedTuple):
    """A pod on the host's network, and its configuration, which goes with every container."""

    id: str
    config: Any
    lab: Any

    def run(self, name: str, *command: str, **more: Any) -> str:
        return str(self.lab.run(self.id, self.lab.container_config(name, list(command), **more), self.config))

    def ready(self, container: str) -> None:
        """Waits until its command has made the file /ready."""
        request = cri.ExecSyncRequest(container_id=container, cmd=["test", "-e", "/ready"])
        self.lab.until(lambda: self.lab.kubelet.ExecSync(request).exit_code == 0, "the container is ready")

    def create(self, name: str, *command: str, **more: Any) -> str:
        return str(self.lab.create(self.id, self.lab.container_config(name, list(command), **more), self.config))


@pytest.fixture(scope="module")
def each_pod(each_lab: Lab) -> Pod:
    config = each_lab.pod_config(host_network=True)
    return Pod(each_lab.run_pod(config), config, each_lab)


@pytest.fixture
def pod(lab: WherryLab) -> Iterator[Pod]:
    config = lab.pod_config(host_network=True)
    made = Pod(lab.run_pod(config), config, lab)
    yield made
    lab.kubelet.StopPodSandbox(pod_sandbox_id=made.id)
    lab.kubelet.RemovePodSandbox(pod_sandbox_id=made.id)


def linux(**context: Any) -> cri.LinuxContainerConfig:
    return cri.LinuxContainerConfig(security_context=cri.LinuxContainerSecurityContext(**context))


# -- life


def test_a_containers_life(each_pod: Pod) -> None:
    lab, kubelet = each_pod.lab, each_pod.lab.kubelet
    before = time.time_ns()
    container = each_pod.create("life", "sleep", "1000", labels={"a": "b"}, annotations={"c": "d"})
    assert len(container) == 64
    made = lab.container_status(container)
    assert made.state == cri.CONTAINER_CREATED
    assert before <= made.created_at <= time.time_ns()
    assert (made.started_at, made.finished_at, made.exit_code, made.reason) == (0, 0, 0, "")
    assert made.metadata.name == "life"
    assert (dict(made.labels), dict(made.annotations)) == ({"a": "b"}, {"c": "d"})
    assert made.log_path == f"{each_pod.config.log_directory}/life.log"

    kubelet.StartContainer(container_id=container)
    running = lab.container_status(container)
    assert running.state == cri.CONTAINER_RUNNING
    assert made.created_at <= running.started_at <= time.time_ns()
    assert running.image_ref == lab.container_status(container).image_ref != ""

    kubelet.StopContainer(cri.StopContainerRequest(container_id=container, timeout=0))
    ended = lab.container_status(container)
    assert ended.state == cri.CONTAINER_EXITED
    assert (ended.exit_code, ended.reason) == (137, "Error")
    assert running.started_at <= ended.finished_at <= time.time_ns()

    kubelet.RemoveContainer(container_id=container)
    error = refused(kubelet.ContainerStatus, container_id=container)
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert "not found" in error.details()


@pytest.mark.parametrize(("code", "reason"), [(0, "Completed"), (7, "Error")])
def test_the_end_says_how(each_pod: Pod, code: int, reason: str) -> None:
    container = each_pod.run(f"end{code}", "sh", "-c", f"exit {code}")
    ended = each_pod.lab.exited(container)
    assert (ended.exit_code, ended.reason, ended.message) == (code, reason, "")
    each_pod.lab.kubelet.RemoveContainer(container_id=container)


def test_stop_waits_for_the_grace_period(each_pod: Pod) -> None:
    kubelet = each_pod.lab.kubelet
    stubborn = each_pod.run("stubborn", "sh", "-c", "trap '' TERM; touch /ready; while :; do sleep 0.1; done")
    polite = each_pod.run("polite", "sh", "-c", "trap 'exit 3' TERM; touch /ready; while :; do sleep 0.1; done")
    for container in (stubborn, polite):
        each_pod.ready(container)
    begun = time.monotonic()
    kubelet.StopContainer(cri.StopContainerRequest(container_id=stubborn, timeout=1))
    assert time.monotonic() - begun >= 1
    assert each_pod.lab.container_status(stubborn).exit_code == 137
    kubelet.StopContainer(cri.StopContainerRequest(container_id=polite, timeout=20))
    assert each_pod.lab.container_status(polite).exit_code == 3
    for container in (stubborn, polite):
        kubelet.StopContainer(cri.StopContainerRequest(container_id=container, timeout=1))  # again: fine
        kubelet.RemoveContainer(container_id=container)


def test_a_running_container_is_removed_by_force(each_pod: Pod) -> None:
    lab = each_pod.lab
    container = each_pod.run("force", "sleep", "1000")
    lab.kubelet.RemoveContainer(container_id=container)
    lab.kubelet.RemoveContainer(container_id=container)  # again: fine
    assert not lab.kubelet.ListContainers(filter=cri.ContainerFilter(id=container)).containers


def test_what_nobody_knows(pod: Pod) -> None:
    kubelet = pod.lab.kubelet
    kubelet.StopContainer(cri.StopContainerRequest(container_id="nobody", timeout=1))
    kubelet.RemoveContainer(container_id="nobody")
    for call in (kubelet.StartContainer, kubelet.ContainerStatus, kubelet.ContainerStats):
        assert refused(call, container_id="nobody").code() == grpc.StatusCode.NOT_FOUND
    assert refused(kubelet.ExecSync, container_id="nobody", cmd=["true"]).code() == grpc.StatusCode.NOT_FOUND
    error = refused(kubelet.CreateContainer, pod_sandbox_id="nobody", config=pod.lab.container_config("x", ["true"]))
    assert error.code() == grpc.StatusCode.NOT_FOUND


def test_ids_may_be_short(each_pod: Pod) -> None:
    container = each_pod.run("short", "sleep", "1000")
    assert each_pod.lab.container_status(container[:12]).id == container
    each_pod.lab.kubelet.RemoveContainer(container_id=container[:12])


def test_a_container_starts_once(each_pod: Pod) -> None:
    container = each_pod.run("once", "sleep", "1000")
    error = refused(each_pod.lab.kubelet.StartContainer, container_id=container)
    assert "is in CONTAINER_RUNNING state" in error.details()
    each_pod.lab.kubelet.RemoveContainer(container_id=container)


def test_a_name_is_there_once(pod: Pod) -> None:
    container = pod.create("twice", "true")
    error = refused(pod.create, "twice", "true")
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS
    assert f'is reserved for "{container}"' in error.details()
    pod.lab.kubelet.RemoveContainer(container_id=container)
    again = pod.create("twice", "true")
    assert again != container
    config = pod.lab.container_config("twice", ["true"])
    config.metadata.attempt = 1  # a restart, beside what is left of the last one
    assert pod.lab.create(pod.id, config, pod.config)


def test_a_program_that_is_not_there(each_pod: Pod) -> None:
    container = each_pod.create("missing", "/no/such/program")
    error = refused(each_pod.lab.kubelet.StartContainer, container_id=container)
    assert "/no/such/program" in error.details()
    ended = each_pod.lab.container_status(container)
    assert ended.state == cri.CONTAINER_EXITED
    assert (ended.exit_code, ended.reason) == (128, "StartError")
    assert "/no/such/program" in ended.message
    each_pod.lab.kubelet.RemoveContainer(container_id=container)


def test_an_image_that_is_not_there(pod: Pod) -> None:
    config = pod.lab.container_config("x", ["true"])
    config.image.image = "registry.test/none:1"
    error = refused(pod.lab.create, pod.id, config, pod.config)
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert "registry.test/none:1" in error.details()


def test_out_of_memory(each_pod: Pod) -> None:
    config = cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(memory_limit_in_bytes=16 << 20))
    container = each_pod.run("hungry", "sh", "-c", "x=a; while :; do x=$x$x; done", linux=config)
    ended = each_pod.lab.exited(container)
    assert (ended.exit_code, ended.reason) == (137, "OOMKilled")
    each_pod.lab.kubelet.RemoveContainer(container_id=container)


def test_a_runtime_of_somebody_else(runc_lab: WherryLab) -> None:
    """The pod's shim runs Debian's runc for a handler whose options name it."""
    config = runc_lab.pod_config(host_network=True)
    pod = Pod(runc_lab.run_pod(config, handler="other"), config, runc_lab)
    default = cri.SecurityProfile(profile_type=cri.SecurityProfile.RuntimeDefault)
    container = pod.run("runc", "sleep", "1000", linux=linux(seccomp=default, no_new_privs=True))
    assert runc_lab.exec(container, "echo", "here").strip() == "here"
    state = json.loads(Path(f"{_bundle(runc_lab, container)}/runtime.json").read_text())
    assert "runc" in json.dumps(state)
    runc_lab.kubelet.StopContainer(cri.StopContainerRequest(container_id=container, timeout=1))
    assert runc_lab.container_status(container).exit_code in {137, 143}


@pytest.fixture
def runc_lab() -> Iterator[WherryLab]:
    program = need("runc")
    table = 'plugins."io.containerd.grpc.v1.cri".containerd.runtimes.other'
    yield from closing(WherryLab(f'[{table}]\n[{table}.options]\nBinaryName = "{program}"\n'))


def _bundle(lab: WherryLab, container: str) -> str:
    found = list((lab.folder / "state" / "tasks").glob(f"k8s.io/{container}"))
    return str(found[0])


# -- lists


def test_lists_and_filters(each_pod: Pod) -> None:
    kubelet = each_pod.lab.kubelet
    first = each_pod.run("one", "sleep", "1000", labels={"app": "a", "tier": "x"})
    second = each_pod.create("two", "true", labels={"app": "a"})

    def found(**chosen: Any) -> set[str]:
        return {item.id for item in kubelet.ListContainers(filter=cri.ContainerFilter(**chosen)).containers}

    running = cri.ContainerStateValue(state=cri.CONTAINER_RUNNING)
    assert found(label_selector={"app": "a"}) == {first, second}
    assert found(label_selector={"app": "a", "tier": "x"}) == {first}
    assert found(label_selector={"app": "a"}, state=running) == {first}
    assert found(pod_sandbox_id=each_pod.id, label_selector={"app": "a"}) == {first, second}
    assert found(id=first[:13]) == {first}
    assert found(id="nobody") == set()
    item = next(item for item in kubelet.ListContainers().containers if item.id == first)
    assert (item.pod_sandbox_id, item.metadata.name, item.labels["tier"]) == (each_pod.id, "one", "x")
    assert item.image_ref.startswith("sha256:")
    for container in (first, second):
        kubelet.RemoveContainer(container_id=container)


def test_lists_in_parts(pod: Pod) -> None:
    containers = {pod.create(f"part{number}", "true") for number in range(3)}
    found = {item.id for part in pod.lab.kubelet.StreamContainers() for item in part.containers}
    assert containers <= found


def test_verbose_status(each_pod: Pod) -> None:
    container = each_pod.run("verbose", "sleep", "1000")
    answer = each_pod.lab.kubelet.ContainerStatus(container_id=container, verbose=True)
    info = json.loads(answer.info["info"])
    assert info["sandboxID"] == each_pod.id
    assert info["config"]["metadata"]["name"] == "verbose"
    assert info["runtimeSpec"]["process"]["args"] == ["sleep", "1000"]
    assert Path(f"/proc/{info['pid']}/cmdline").read_bytes() == b"sleep\x001000\0"
    assert info["snapshotKey"] == container
    each_pod.lab.kubelet.RemoveContainer(container_id=container)


def test_the_annotations_of_the_specification(each_pod: Pod) -> None:
    container = each_pod.create("marked", "true")
    answer = each_pod.lab.kubelet.ContainerStatus(container_id=container, verbose=True)
    marks = json.loads(answer.info["info"])["runtimeSpec"]["annotations"]
    metadata = each_pod.config.metadata
    for key, value in {
        "container-type": "container",
        "sandbox-id": each_pod.id,
        "sandbox-name": metadata.name,
        "sandbox-namespace": metadata.namespace,
        "container-name": "marked",
    }.items():
        assert marks[f"io.kubernetes.cri.{key}"] == value
    each_pod.lab.kubelet.RemoveContainer(container_id=container)


# -- commands


def test_exec_sync(each_pod: Pod) -> None:
    kubelet = each_pod.lab.kubelet
    container = each_pod.run("exec", "sleep", "1000", envs=[cri.KeyValue(key="A", value="b=c")])
    done = kubelet.ExecSync(container_id=container, cmd=["sh", "-c", "echo out $A; echo err >&2; exit 5"])
    assert (done.stdout, done.stderr, done.exit_code) == (b"out b=c\n", b"err\n", 5)
    error = refused(kubelet.ExecSync, container_id=container, cmd=["/no/such"])
    assert "/no/such" in error.details()
    assert refused(kubelet.ExecSync, container_id=container)
    kubelet.RemoveContainer(container_id=container)


def test_exec_sync_has_an_end(each_pod: Pod) -> None:
    kubelet = each_pod.lab.kubelet
    container = each_pod.run("slow", "sleep", "1000")
    begun = time.monotonic()
    request = cri.ExecSyncRequest(container_id=container, cmd=["sleep", "500"], timeout=1)
    error = refused(kubelet.ExecSync, request)
    # by this code a kubelet knows a probe that took too long
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "timeout 1s exceeded" in error.details()
    assert 1 <= time.monotonic() - begun < 60
    each_pod.lab.until(lambda: "sleep 500" not in each_pod.lab.exec(container, "ps"), "the command is killed")
    kubelet.RemoveContainer(container_id=container)


def test_exec_sync_keeps_what_a_message_holds(each_pod: Pod) -> None:
    container = each_pod.run("loud", "sleep", "1000")
    command = ["sh", "-c", "head -c 100 /dev/zero >&2; sleep 0.2; head -c 20000000 /dev/zero"]
    # as a kubelet's client is set up
    options = [("grpc.max_receive_message_length", 16 << 20), ("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(f"unix:{each_pod.lab.address}", options=options) as channel:
        call = channel.unary_unary(
            "/runtime.v1.RuntimeService/ExecSync",
            cri.ExecSyncRequest.SerializeToString,
            cri.ExecSyncResponse.FromString,
        )
        request = cri.ExecSyncRequest(container_id=container, cmd=command, timeout=60)
        if each_pod.lab.name == "containerd":
            # it keeps 16 MiB and can't send them: its own limit for messages is that
            assert refused(call, request, timeout=60).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        else:
            done = call(request, timeout=60)
            assert (len(done.stdout), len(done.stderr), done.exit_code) == (LIMIT - 100, 100, 0)
    each_pod.lab.kubelet.RemoveContainer(container_id=container)


def test_a_command_that_leaves_something_behind(pod: Pod) -> None:
    container = pod.run("left", "sleep", "1000")
    begun = time.monotonic()
    done = pod.lab.kubelet.ExecSync(container_id=container, cmd=["sh", "-c", "echo here; sleep 300 &"])
    assert (done.stdout, done.exit_code) == (b"here\n", 0)
    assert time.monotonic() - begun < 100


def test_exec_sync_in_what_does_not_run(each_pod: Pod) -> None:
    container = each_pod.create("idle", "true")
    error = refused(each_pod.lab.kubelet.ExecSync, container_id=container, cmd=["true"])
    assert "is in CONTAINER_CREATED state" in error.details()
    each_pod.lab.kubelet.RemoveContainer(container_id=container)
