"""Faults that a node must live through: each call answers in time, with a code and a text that help an operator."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cri.kubelet import Kubelet, WherryLab, refused
from tests.cri.worker import Spec, Worker, probe, stop
from wherry.proto import cri_pb2 as cri

Status = grpc.StatusCode
# a daemon's start alone takes ten seconds where the machine has ten times its work
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="makes containers: run as root"),
    pytest.mark.timeout(600),
]
SLEEP = ("sleep", "1000")
STUBBORN = ("sh", "-c", "trap '' TERM; echo up; while true; do sleep 0.1; done")


@pytest.fixture
def own() -> Iterator[WherryLab]:
    """A node for one test, which may do anything to it."""
    with contextlib.closing(WherryLab()) as lab:
        yield lab


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call took."""
    began = time.monotonic()
    call()
    return time.monotonic() - began


# -- containers that don't do as they are told


def test_a_container_that_ignores_sigterm_is_killed_after_its_grace_period(lab: WherryLab) -> None:
    worker = Worker(lab, "stubborn", [Spec("main", STUBBORN)], grace=2)
    worker.settle()
    lab.until((worker.logs / "main" / "0.log").exists, "it is up")
    lab.until(lambda: "up" in (worker.logs / "main" / "0.log").read_text(), "it is up")
    took = timed(worker.kill)
    assert 2 <= took < 30
    status = worker.status("main")
    assert (status.exit_code, status.reason) == (137, "Error")
    worker.delete()


def test_a_stop_that_is_given_up_can_be_repeated(lab: WherryLab) -> None:
    """The kubelet's deadline ends in the grace period; the next one finds the container as it is."""
    worker = Worker(lab, "impatient", [Spec("main", STUBBORN)])
    worker.settle()
    container = worker.status("main").id
    request = cri.StopContainerRequest(container_id=container, timeout=60)
    late = refused(lab.kubelet.StopContainer, request, timeout=1)
    assert late.code() is Status.DEADLINE_EXCEEDED
    assert worker.status("main").state == cri.CONTAINER_RUNNING
    # a shorter grace period by another request counts from then on
    assert timed(lambda: stop(lab, container, 1)) < 30
    assert worker.status("main").state == cri.CONTAINER_EXITED
    worker.delete()


def test_a_paused_container_is_stopped_all_the_same(lab: WherryLab) -> None:
    """Somebody froze it by the other API."""
    worker = Worker(lab, "frozen", [Spec("main", SLEEP)])
    worker.settle()
    container = worker.status("main").id
    lab.daemon.ctr("task", "pause", container, namespace="k8s.io")
    assert timed(lambda: stop(lab, container, 1)) < 30
    assert worker.status("main").state == cri.CONTAINER_EXITED
    worker.delete()


# -- disks


@pytest.fixture
def small_disk(lab: WherryLab) -> Iterator[Path]:
    """A file system of 256 kB, full but for a little."""
    folder = lab.folder / "small"
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False)


def test_a_full_disk_under_the_logs_stops_no_container(lab: WherryLab, small_disk: Path) -> None:
    """Lines are lost, and nothing else: the container runs and can be asked; with room again, its log goes on."""
    config = lab.pod_config("fulllog", host_network=True)
    config.log_directory = str(small_disk)
    pod = lab.run_pod(config)
    say = "i=0; while true; do echo $i $(printf %0500d 0); i=$((i+1)); [ $((i%200)) = 0 ] && sleep 0.05; done"
    container = lab.run(pod, lab.container_config("loud", ["sh", "-c", say]), config)
    log = small_disk / "loud.log"
    room = os.statvfs(small_disk)
    lab.until(lambda: os.statvfs(small_disk).f_bavail == 0, "the disk is full")
    assert room.f_bavail >= 0
    time.sleep(0.5)
    assert lab.container_status(container).state == cri.CONTAINER_RUNNING
    assert lab.exec(container, "echo", "well") == "well\n"
    # kubelet rotates: the old file is compressed away, and there is room
    log.unlink()
    lab.kubelet.ReopenContainerLog(container_id=container)
    lab.until(lambda: log.exists() and len(log.read_text().splitlines()) > 20, "the log goes on")
    whole = log.read_text().splitlines()[1:-1]
    assert all(line.split(" ", 3)[1] == "stdout" for line in whole[:10])
    stop(lab, container, 0)
    assert lab.container_status(container).state == cri.CONTAINER_EXITED
    lab.remove_pods()


def test_a_log_folder_that_is_not_there(lab: WherryLab) -> None:
    """It is made, or the container isn't started and the error names it: none runs without its log."""
    config = lab.pod_config("nolog", host_network=True)
    config.log_directory = str(lab.folder / "no-such" / "folder")
    pod = lab.run_pod(config)
    refusal = ""
    try:
        lab.run(pod, lab.container_config("main", list(SLEEP)), config)
    except grpc.RpcError as error:
        refusal = str(error.details())
    assert "no-such" in refusal or (lab.folder / "no-such" / "folder" / "main.log").exists()
    lab.remove_pods()


# -- networks


def test_without_cni_the_status_says_why_and_pods_are_refused(own: WherryLab) -> None:
    conditions = {item.type: item for item in own.kubelet.Status().status.conditions}
    assert conditions["RuntimeReady"].status
    assert not conditions["NetworkReady"].status
    assert conditions["NetworkReady"].reason == "NetworkPluginNotReady"
    assert str(own.folder / "cni") in conditions["NetworkReady"].message or "cni" in conditions["NetworkReady"].message
    config = own.pod_config("offline")
    error = refused(own.kubelet.RunPodSandbox, config=config)
    assert error.code() in (Status.UNAVAILABLE, Status.FAILED_PRECONDITION, Status.UNKNOWN)
    assert "cni" in str(error.details()).lower()
    # the host's network needs none of it: a control plane's own pods run
    pod = own.run_pod(own.pod_config("static", host_network=True))
    assert own.status(pod).status.state == cri.SANDBOX_READY
    # with a configuration the same pod is made
    own.conflist()
    made = own.run_pod(config)
    assert own.status(made).status.network.ip.startswith(own.subnet)


def test_a_plugin_that_is_slow_is_waited_for_and_one_that_hangs_is_not(own: WherryLab) -> None:
    """kubelet's deadline ends a hanging plugin; what was begun is undone, and the name is free again."""
    plugin = own.folder / "slow"
    wait = f'if [ "$CNI_COMMAND" = ADD ]; then sleep "$(cat {own.folder}/pause)"; fi'
    plugin.write_text(f"#!/bin/sh\n{wait}\nexec /usr/lib/cni/bridge\n")
    plugin.chmod(0o755)
    (own.folder / "pause").write_text("1")
    own.conflist()
    conflist = own.folder / "cni" / "10-pods.conflist"
    # a plugin's type is its file's name, in a folder of plugins
    text = conflist.read_text().replace('"type": "bridge"', '"type": "slow"')
    bin_dir = own.folder / "bin"
    bin_dir.mkdir()
    for each in Path("/usr/lib/cni").iterdir():
        (bin_dir / each.name).symlink_to(each)
    plugin.rename(bin_dir / "slow")
    own.daemon.config.write_text(own.daemon.config.read_text().replace("/usr/lib/cni", str(bin_dir)))
    conflist.write_text(text)
    own.restart()
    kubelet = Kubelet(own.address)
    own.kubelet = kubelet
    config = own.pod_config("slowly")
    assert timed(lambda: own.run_pod(config)) >= 1
    own.remove_pods()
    (own.folder / "pause").write_text("300")
    hung = own.pod_config("hung")
    error = refused(kubelet.RunPodSandbox, config=hung, timeout=3)
    assert error.code() is Status.DEADLINE_EXCEEDED
    (own.folder / "pause").write_text("0")
    # the next one succeeds as soon as the first one is undone
    assert own.until(lambda: _tried(own, hung), "the pod is made by a repeat")
    states = [item.state for item in kubelet.ListPodSandbox().items]
    assert states.count(cri.SANDBOX_READY) == 1


def _tried(lab: WherryLab, config: Any) -> str:
    with contextlib.suppress(grpc.RpcError):
        return lab.run_pod(config)
    return ""


# -- shims


def shims_of(lab: WherryLab, pod: str) -> list[int]:
    """The pids of the shims that serve a pod, by their command lines."""
    found = []
    for pid in lab.daemon.processes():
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            if pod[:64] in line and "shim" in line:
                found.append(pid)
    return found


def test_a_stopped_shim_delays_nobody_and_is_told_of_in_time(own: WherryLab) -> None:
    """SIGSTOP: its own pod's calls end at their deadlines, all others are quick as ever; with SIGCONT all is well."""
    sick = Worker(own, "sick", [Spec("main", SLEEP)])
    well = Worker(own, "well", [Spec("main", SLEEP)])
    sick.settle()
    well.settle()
    shims = shims_of(own, sick.sandboxes()[0].id)
    assert shims
    container = sick.status("main").id
    for pid in shims:
        os.kill(pid, signal.SIGSTOP)
    try:
        # what is known without asking the shim
        assert timed(own.kubelet.ListPodSandbox) < 25
        assert timed(own.kubelet.ListContainers) < 25
        assert timed(lambda: own.container_status(container)) < 30
        began = time.monotonic()
        error = refused(
            own.kubelet.ExecSync, cri.ExecSyncRequest(container_id=container, cmd=["true"], timeout=1), timeout=60
        )
        assert time.monotonic() - began < 45
        assert error.code() in (Status.DEADLINE_EXCEEDED, Status.UNAVAILABLE)
        # others
        assert timed(lambda: probe(own, well.status("main").id, ["true"], 60)) < 25
        new = Worker(own, "new", [Spec("main", SLEEP)])
        assert timed(new.settle) < 60
        new.delete()
        stats = own.kubelet.ListContainerStats(timeout=45).stats
        assert well.status("main").id in {item.attributes.id for item in stats}
    finally:
        for pid in shims:
            os.kill(pid, signal.SIGCONT)
    assert probe(own, container, ["true"], 60).exit_code == 0
    sick.delete()
    well.delete()


@pytest.fixture
def hasty() -> Iterator[WherryLab]:
    """A node that gives up on a shim sooner, and nothing else."""
    more = '[timeouts]\n"io.wherry.timeout.task.call" = "4s"\n"io.wherry.timeout.task.create" = "6s"'
    with contextlib.closing(WherryLab(more)) as lab:
        yield lab


def test_every_call_to_a_stopped_shim_is_answered(hasty: WherryLab) -> None:
    """Within its own limit, with what an operator needs; what can be known without the shim is answered as ever."""
    lab, kubelet = hasty, hasty.kubelet
    pods = [_pod_of_two(lab, f"sick-{number}") for number in range(3)]
    (pod, main, made), (_, other, _), (third, last, _) = pods
    shims = [pid for name, _, _ in pods for pid in shims_of(lab, name)]
    assert len(shims) >= 3
    config = lab.pod_config("sick-0")
    known: dict[str, Callable[[], Any]] = {
        "PodSandboxStatus": lambda: kubelet.PodSandboxStatus(pod_sandbox_id=pod, verbose=True),
        "ListPodSandbox": kubelet.ListPodSandbox,
        "ContainerStatus": lambda: kubelet.ContainerStatus(container_id=main, verbose=True),
        "ListContainers": kubelet.ListContainers,
        "CreateContainer": lambda: lab.create(pod, lab.container_config("new", ["true"]), config),
        "Exec": lambda: kubelet.Exec(container_id=main, cmd=["true"], stdout=True),
        "Attach": lambda: kubelet.Attach(container_id=main, stdout=True),
        "PortForward": lambda: kubelet.PortForward(pod_sandbox_id=pod, port=[80]),
        "ContainerStats": lambda: kubelet.ContainerStats(container_id=main),
        "ListContainerStats": kubelet.ListContainerStats,
        "PodSandboxStats": lambda: kubelet.PodSandboxStats(pod_sandbox_id=pod),
        "ListPodSandboxStats": kubelet.ListPodSandboxStats,
        "ListPodSandboxMetrics": kubelet.ListPodSandboxMetrics,
        "Status": kubelet.Status,
    }
    stopping = cri.StopContainerRequest(container_id=main, timeout=1)
    wanted = cri.LinuxContainerResources(cpu_shares=500)
    silent: dict[str, Callable[[], Any]] = {
        "StartContainer": lambda: kubelet.StartContainer(container_id=made),
        "StopContainer": lambda: kubelet.StopContainer(stopping),
        "UpdateContainerResources": lambda: kubelet.UpdateContainerResources(container_id=other, linux=wanted),
        "ExecSync": lambda: kubelet.ExecSync(container_id=main, cmd=["true"]),
        "ReopenContainerLog": lambda: kubelet.ReopenContainerLog(container_id=other),
        "RemoveContainer": lambda: kubelet.RemoveContainer(container_id=last),
        "StopPodSandbox": lambda: kubelet.StopPodSandbox(pod_sandbox_id=third),
        "RemovePodSandbox": lambda: kubelet.RemovePodSandbox(pod_sandbox_id=third),
    }
    errors: dict[str, Any] = {}
    threads = [threading.Thread(target=_note, args=(errors, *item)) for item in {**known, **silent}.items()]
    for pid in shims:
        os.kill(pid, signal.SIGSTOP)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for pid in shims:
            os.kill(pid, signal.SIGCONT)
    assert {name for name, error in errors.items() if error} == set(silent), errors
    for name in silent:
        assert errors[name].code() is Status.DEADLINE_EXCEEDED, errors[name]
        assert "shim of" in errors[name].details(), errors[name]
    lab.remove_pods()
    assert lab.daemon.settle(30) == []


def _pod_of_two(lab: WherryLab, name: str) -> tuple[str, str, str]:
    """A pod, a container of it that runs, one that is made."""
    config = lab.pod_config(name, host_network=True)
    pod = lab.run_pod(config)
    main = lab.run(pod, lab.container_config("main", list(SLEEP)), config)
    return pod, main, lab.create(pod, lab.container_config("made", list(SLEEP)), config)


def _note(errors: dict[str, Any], name: str, call: Callable[[], Any]) -> None:
    errors[name] = None
    try:
        call()
    except grpc.RpcError as error:
        errors[name] = error


def test_a_shim_that_is_killed_ends_its_pod_and_the_next_one_is_made(own: WherryLab) -> None:
    worker = Worker(own, "orphaned", [Spec("main", SLEEP)])
    worker.settle()
    for pid in shims_of(own, worker.sandboxes()[0].id):
        os.kill(pid, signal.SIGKILL)
    own.until(lambda: worker.status("main").state == cri.CONTAINER_EXITED, "the end is told")
    assert worker.status("main").exit_code == 137
    own.until(lambda: worker.sandboxes()[0].state == cri.SANDBOX_NOTREADY, "the pod isn't ready")
    worker.settle()
    assert [item.metadata.attempt for item in worker.sandboxes()] == [1, 0]
    assert worker.status("main").state == cri.CONTAINER_RUNNING
    worker.delete()
    assert own.daemon.settle() == []


# -- the daemon dies


def test_the_daemon_is_killed_between_each_of_the_calls(own: WherryLab) -> None:
    """One pod's life, and SIGKILL after every call of it: what the call answered holds in the next daemon."""
    own.conflist()
    config = own.pod_config("survivor", host_network=False)
    kubelet = own.kubelet
    pod = own.run_pod(config)
    before = own.status(pod).status
    own.restart()
    after = own.status(pod).status
    assert after == before
    assert after.network.ip.startswith(own.subnet)
    assert refused(kubelet.RunPodSandbox, config=config).code() is Status.ALREADY_EXISTS
    say = "i=0; while true; do echo $i; i=$((i+1)); sleep 0.01; done"
    made = own.container_config("main", ["sh", "-c", say])
    container = own.create(pod, made, config)
    own.restart()
    assert own.container_status(container).state == cri.CONTAINER_CREATED
    assert refused(own.create, pod, made, config).code() is Status.ALREADY_EXISTS
    kubelet.StartContainer(container_id=container)
    own.restart()
    running = own.container_status(container)
    assert running.state == cri.CONTAINER_RUNNING
    assert running.started_at > 0
    assert own.exec(container, "echo", "there") == "there\n"
    log = own.logs / "survivor" / "main.log"
    length = len(log.read_text())
    own.daemon.kill()
    own.until(lambda: len(log.read_text()) > length, "the log goes on without a daemon")
    own.daemon.start()
    log.rename(log.with_name("main.log.1"))
    kubelet.ReopenContainerLog(container_id=container)
    own.restart()
    own.until(lambda: log.exists() and log.stat().st_size > 0, "the log goes on in the new file")
    stop(own, container, 0)
    ended = own.container_status(container)
    own.restart()
    assert own.container_status(container) == ended
    assert ended.exit_code == 137
    files = (log.with_name("main.log.1"), log)
    numbers = [int(line.split(" ", 3)[3]) for path in files for line in path.read_text().splitlines()]
    assert numbers == list(range(len(numbers)))
    kubelet.RemoveContainer(container_id=container)
    own.restart()
    assert not kubelet.ListContainers().containers
    kubelet.StopPodSandbox(pod_sandbox_id=pod)
    own.restart()
    assert own.status(pod).status.state == cri.SANDBOX_NOTREADY
    kubelet.RemovePodSandbox(pod_sandbox_id=pod)
    own.restart()
    assert not kubelet.ListPodSandbox().items
    assert own.daemon.settle() == []


def test_a_container_ends_while_no_daemon_is_there(own: WherryLab) -> None:
    worker = Worker(own, "unseen", [Spec("main", ["sh", "-c", "sleep 1; echo bye; exit 4"], "Never")])
    worker.sync()
    container = worker.status("main").id
    own.daemon.kill()
    log = worker.logs / "main" / "0.log"
    own.until(lambda: log.exists() and "bye" in log.read_text(), "it has ended")
    own.daemon.start()
    ended = own.exited(container)
    assert (ended.exit_code, ended.reason) == (4, "Error")
    assert ended.started_at <= ended.finished_at < time.time_ns()
    worker.delete()


@pytest.mark.parametrize("outlives", [False, True], ids=["on a tmpfs", "on a disk"])
def test_the_host_is_rebooted(own: WherryLab, outlives: bool) -> None:
    """Every process, mount and interface is gone, and the state with them, or not: kubelet makes its pods anew."""
    own.conflist()
    workers = [
        Worker(own, "worker", [Spec("main", SLEEP)], host_network=False),
        Worker(own, "static", [Spec("main", SLEEP)], [Spec("init", ["true"])]),
    ]
    for worker in workers:
        worker.settle()
    leases = own.folder / "ipam" / "pods"
    first = own.status(workers[0].sandboxes()[0].id).status.network.ip
    assert (leases / first).exists()
    _reboot(own, outlives=outlives)
    for worker in workers:
        own.until(lambda worker=worker: worker.sandboxes()[0].state == cri.SANDBOX_NOTREADY, "nothing is ready")  # type: ignore[misc]
        status = own.until(
            lambda worker=worker: (one := worker.status("main")).state == cri.CONTAINER_EXITED and one,  # type: ignore[misc]
            "nothing runs",
        )
        assert status.exit_code != 0
        assert status.finished_at
        worker.settle()
        assert [(item.metadata.attempt, item.state) for item in worker.sandboxes()] == [
            (1, cri.SANDBOX_READY),
            (0, cri.SANDBOX_NOTREADY),
        ]
        assert worker.status("main").state == cri.CONTAINER_RUNNING
        assert worker.status("main").metadata.attempt == 1
        worker.delete()
    assert not [path.name for path in leases.iterdir() if path.name[0].isdigit()]
    assert own.daemon.settle() == []


def _reboot(lab: WherryLab, *, outlives: bool) -> None:
    daemon = lab.daemon
    daemon.lose_power()
    subprocess.run(["ip", "link", "del", lab.bridge], capture_output=True, check=False)
    if outlives:
        (daemon.state / "boot_id").write_text("another boot\n")
    else:
        shutil.rmtree(daemon.state)
    daemon.start()


@pytest.mark.parametrize("seed", range(2))
def test_the_daemon_is_killed_in_the_middle_of_calls(own: WherryLab, seed: int) -> None:
    """At any moment; a kubelet that goes on as ever ends with the pod that it wants, and with nothing else."""
    own.conflist()
    chance = random.Random(seed)
    workers = [
        Worker(own, f"storm-{number}", [Spec("main", SLEEP), Spec("side", SLEEP)], host_network=number % 2 == 0)
        for number in range(3)
    ]
    for _ in range(4):
        threads = [threading.Thread(target=_go_on, args=[worker]) for worker in workers]
        for thread in threads:
            thread.start()
        time.sleep(chance.uniform(0, 0.25))
        own.daemon.restart()
        for thread in threads:  # a call that was made meanwhile waits for the next daemon
            thread.join()
    for worker in workers:
        _insist(worker.settle)
        running = [item for item in worker.statuses() if item.state == cri.CONTAINER_RUNNING]
        assert sorted(item.metadata.name for item in running) == ["main", "side"]
        for item in running:
            assert probe(own, item.id, ["true"], 60).exit_code == 0
        ready = [item for item in worker.sandboxes() if item.state == cri.SANDBOX_READY]
        assert len(ready) == 1
        _insist(worker.delete)
    assert own.daemon.settle(30) == []


def _go_on(worker: Worker) -> None:
    """A few rounds of a kubelet whose node goes away."""
    with contextlib.suppress(grpc.RpcError, AssertionError):
        worker.settle()
        worker.delete()


def _insist(act: Callable[[], None], seconds: float = 120) -> None:
    """As kubelet: again, whatever was wrong."""
    end = time.monotonic() + seconds
    while True:
        try:
            act()
            return
        except grpc.RpcError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
