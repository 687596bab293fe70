"""How containers end, and what a restarted daemon, a lost shim or a stopped one makes of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar, cast

import grpc
import pytest

from tests.cri.kubelet import WherryLab, refused
from tests.cri.test_containers import Pod
from wherry.core.errors import ResourceExhausted
from wherry.cri import container_ends
from wherry.cri.records import Member, MemberFacts
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from wherry.cri.node import Node

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes containers: run as root")


@pytest.fixture
def pod(lab: WherryLab) -> Iterator[Pod]:
    config = lab.pod_config(host_network=True)
    made = Pod(lab.run_pod(config), config, lab)
    yield made
    lab.kubelet.StopPodSandbox(pod_sandbox_id=made.id)
    lab.kubelet.RemovePodSandbox(pod_sandbox_id=made.id)


def init_of(pod: Pod, container: str) -> int:
    answer = pod.lab.kubelet.ContainerStatus(container_id=container, verbose=True)
    return int(json.loads(answer.info["info"])["pid"])


def shim_of(pod: Pod, container: str) -> int:
    """The shim is init's parent."""
    return int(Path(f"/proc/{init_of(pod, container)}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_killed_daemon_finds_them_again(pod: Pod) -> None:
    running = pod.run("running", "sleep", "1000", labels={"keep": "me"})
    created = pod.create("created", "sleep", "1000")
    ended = pod.run("ended", "sh", "-c", "exit 4")
    pod.lab.exited(ended)
    before = {name: pod.lab.container_status(name) for name in (running, created, ended)}
    pod.lab.restart()
    for name, status in before.items():
        assert pod.lab.container_status(name) == status
    assert pod.lab.exec(running, "echo", "there").strip() == "there"
    pod.lab.kubelet.StartContainer(container_id=created)
    assert refused(pod.create, "running", "true").code() == grpc.StatusCode.ALREADY_EXISTS
    pod.lab.kubelet.StopContainer(cri.StopContainerRequest(container_id=running, timeout=0))
    assert pod.lab.container_status(running).exit_code == 137


def test_an_end_while_the_daemon_is_away(pod: Pod) -> None:
    container = pod.run("away", "sh", "-c", "while ! test -e /go; do sleep 0.05; done; exit 6")
    init = init_of(pod, container)
    root = Path(f"/proc/{init}/root")
    pod.lab.daemon.kill()
    (root / "go").touch()
    pod.lab.until(lambda: not root.exists() or not _runs(init), "the container ends")
    pod.lab.daemon.start()
    status = pod.lab.exited(container)
    assert (status.exit_code, status.reason) == (6, "Error")
    assert status.started_at < status.finished_at <= time.time_ns()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def test_a_killed_shim(pod: Pod) -> None:
    container = pod.run("orphan", "sleep", "1000")
    init = init_of(pod, container)
    os.kill(shim_of(pod, container), signal.SIGKILL)
    status = pod.lab.exited(container)
    assert (status.exit_code, status.reason) == (137, "Error")
    pod.lab.until(lambda: not _runs(init), "its processes are killed")
    pod.lab.kubelet.RemoveContainer(container_id=container)


def test_a_shim_that_is_killed_while_the_daemon_is_away(pod: Pod) -> None:
    container = pod.run("lost", "sleep", "1000")
    shim = shim_of(pod, container)
    pod.lab.daemon.kill()
    os.kill(shim, signal.SIGKILL)
    pod.lab.daemon.start()
    status = pod.lab.exited(container)
    assert status.exit_code in {137, 255}
    assert status.reason in {"Error", "Unknown"}
    pod.lab.kubelet.RemoveContainer(container_id=container)


def test_a_stopped_shim_delays_no_one_for_long(pod: Pod) -> None:
    kubelet = pod.lab.kubelet
    container = pod.run("mute", "sleep", "1000")
    other_config = pod.lab.pod_config(host_network=True)
    other = Pod(pod.lab.run_pod(other_config), other_config, pod.lab)
    beside = other.run("beside", "sleep", "1000")
    shim = shim_of(pod, container)
    os.kill(shim, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        # what is known is said at once
        assert pod.lab.container_status(container).state == cri.CONTAINER_RUNNING
        assert container in {item.id for item in kubelet.ListContainers().containers}
        assert time.monotonic() - begun < 25
        # the others are there, with their figures; this one without
        listed = {item.attributes.id: item for item in kubelet.ListContainerStats(timeout=30).stats}
        assert listed[beside].HasField("cpu")
        assert not listed[container].HasField("cpu")
        request = cri.ExecSyncRequest(container_id=container, cmd=["true"], timeout=2)
        begun = time.monotonic()
        assert refused(kubelet.ExecSync, request).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - begun < 25
        assert other.lab.exec(beside, "echo", "here").strip() == "here"
        # as a kubelet's own deadline ends it
        stopping = cri.StopContainerRequest(container_id=container, timeout=1)
        begun = time.monotonic()
        error = refused(kubelet.StopContainer, stopping, timeout=5.0)
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - begun < 25
    finally:
        os.kill(shim, signal.SIGCONT)
    kubelet.StopContainer(request)
    assert pod.lab.container_status(container).state == cri.CONTAINER_EXITED
    kubelet.StopPodSandbox(pod_sandbox_id=other.id)
    kubelet.RemovePodSandbox(pod_sandbox_id=other.id)


async def test_an_end_that_cannot_be_written_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the task, from which another daemon would learn it, is deleted when the record is written."""
    monkeypatch.setattr(container_ends, "_RETRY", 0.01)
    member = Member("c", cri.ContainerConfig(), MemberFacts(created_at=1, started_at=2))
    happened: list[str] = []
    deleted = asyncio.Event()

    class Records:
        members: ClassVar = {"c": member}
        tries = 0

        async def put_member(self, given: Member) -> None:
            self.tries += 1
            if self.tries < 3:
                raise ResourceExhausted("no space left on device")
            happened.append(f"written {given.facts.exit_code}")

    class Tasks:
        async def delete(self, identity: str) -> None:
            happened.append(f"deleted {identity}")
            deleted.set()

    node = SimpleNamespace(
        records=Records(),
        client=SimpleNamespace(tasks=Tasks()),
        events=SimpleNamespace(tell=lambda identity, kind: happened.append("told")),
        on_close=lambda closer: None,
    )
    ends = container_ends.Ends(cast("Node", node))
    await ends.ended(member, 3, 5)
    assert (member.state, member.facts.exit_code, happened) == (cri.CONTAINER_EXITED, 3, ["told"])
    async with asyncio.timeout(30):
        await deleted.wait()
    assert happened == ["told", "written 3", "deleted c"]
    await ends.close()


def test_many_at_once(pod: Pod) -> None:
    containers = [pod.run(f"many{number}", "sh", "-c", f"exit {number}") for number in range(8)]
    assert [pod.lab.exited(container).exit_code for container in containers] == list(range(8))


def test_a_container_that_ends_at_once_is_noted_after_its_start(pod: Pod) -> None:
    for number in range(5):
        container = pod.run(f"quick{number}", "true")
        status = pod.lab.exited(container)
        assert status.created_at < status.started_at <= status.finished_at
        assert status.reason == "Completed"
