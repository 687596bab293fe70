"""Sequences of a kubelet's own, on `wherryd` and on Debian's containerd, whose CRI is the reference."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cri.kubelet import ContainerdLab, Kubelet, WherryLab, refused
from tests.cri.worker import Spec, Worker, probe, stop
from wherry.proto import cri_pb2 as cri

Lab = WherryLab | ContainerdLab
Status = grpc.StatusCode
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes containers: run as root")
SLEEP = ("sleep", "1000")


@contextlib.contextmanager
def working(worker: Worker) -> Iterator[Worker]:
    """The pod goes at the end."""
    try:
        yield worker
    finally:
        worker.delete()


def log_of(worker: Worker, name: str, attempt: int = 0) -> str:
    """The text of a container's log, without its times."""
    lines = (worker.logs / name / f"{attempt}.log").read_text().splitlines()
    return "\n".join(line.split(" ", 3)[3] for line in lines)


# -- pods with init containers


def test_init_containers_run_one_after_the_other(each_lab: Lab) -> None:
    """Each has ended well before the next begins; they share a volume with the main container."""
    volume = each_lab.folder / "shared"
    volume.mkdir(exist_ok=True)
    mount = {"mounts": [cri.Mount(container_path="/shared", host_path=str(volume))]}
    say = "echo {0} >> /shared/order"
    worker = Worker(
        each_lab,
        "inits",
        [Spec("main", ["sh", "-c", "cat /shared/order; exec sleep 1000"], fields=mount)],
        [Spec(name, ["sh", "-c", say.format(name)], fields=mount) for name in ("first", "second")],
    )
    with working(worker):
        worker.settle()
        assert (volume / "order").read_text().split() == ["first", "second"]
        each_lab.until(lambda: "second" in log_of(worker, "main"), "the main container has read the volume")
        states = {item.metadata.name: item.state for item in worker.statuses()}
        assert states == {"first": cri.CONTAINER_EXITED, "second": cri.CONTAINER_EXITED, "main": cri.CONTAINER_RUNNING}
        assert {item.reason for item in worker.statuses() if item.metadata.name != "main"} == {"Completed"}
        times = {item.metadata.name: item for item in worker.statuses()}
        assert times["first"].finished_at <= times["second"].created_at
        assert times["second"].finished_at <= times["main"].created_at


def test_an_init_container_that_fails_is_tried_again(each_lab: Lab) -> None:
    volume = each_lab.folder / "tries"
    volume.mkdir(exist_ok=True)
    mount = {"mounts": [cri.Mount(container_path="/tries", host_path=str(volume))]}
    third = "echo x >> /tries/count; test $(wc -l < /tries/count) -ge 3"
    with working(
        Worker(each_lab, "retried", [Spec("main", SLEEP)], [Spec("init", ["sh", "-c", third], fields=mount)])
    ) as worker:
        worker.settle()
        codes = [(item.metadata.attempt, item.exit_code, item.reason) for item in worker.statuses("init")]
        assert codes == [(2, 0, "Completed"), (1, 1, "Error"), (0, 1, "Error")]


# -- restarts


def test_a_container_that_crashes_is_started_again_with_a_new_attempt(each_lab: Lab) -> None:
    """In back-off: each attempt has its own id, status and log; the old ones are collected but the last."""
    with working(Worker(each_lab, "crashing", [Spec("main", ["sh", "-c", "echo try; exit 3"])])) as worker:
        for attempt in range(4):
            worker.sync()
            last = worker.status("main")
            assert last.metadata.attempt == attempt
            ended = each_lab.exited(last.id)
            assert (ended.exit_code, ended.reason) == (3, "Error")
            assert 0 < ended.created_at <= min(ended.started_at, ended.finished_at)
            # containerd notes the start when it is told of it, which may be after the end
            assert each_lab.name == "containerd" or ended.started_at <= ended.finished_at
            assert ended.log_path == str(worker.logs / "main" / f"{attempt}.log")
            worker.collect(keep=1)
            assert [item.metadata.attempt for item in worker.statuses("main")] == [attempt]
        assert len({item.id for item in worker.statuses("main")}) == 1
        assert [log_of(worker, "main", attempt) for attempt in range(4)] == ["try"] * 4
        assert len(worker.sandboxes()) == 1


@pytest.mark.parametrize(("policy", "code", "attempts"), [("Never", 1, 1), ("OnFailure", 1, 3), ("OnFailure", 0, 1)])
def test_restart_policies(each_lab: Lab, policy: str, code: int, attempts: int) -> None:
    worker = Worker(each_lab, f"policy-{policy.lower()}-{code}", [Spec("job", ["sh", "-c", f"exit {code}"], policy)])
    with working(worker):
        for _ in range(3):
            worker.sync()
            each_lab.exited(worker.status("job").id)
        assert len(worker.statuses("job")) == attempts


def test_a_sandbox_that_died_is_replaced(each_lab: Lab) -> None:
    """The new one has the next attempt; containers start anew in it, and count on."""
    with working(Worker(each_lab, "replaced", [Spec("main", SLEEP)])) as worker:
        worker.settle()
        first = worker.sandboxes()[0]
        each_lab.kubelet.StopPodSandbox(pod_sandbox_id=first.id)
        assert worker.sandboxes()[0].state == cri.SANDBOX_NOTREADY
        worker.settle()
        assert [(item.metadata.attempt, item.state) for item in worker.sandboxes()] == [
            (1, cri.SANDBOX_READY),
            (0, cri.SANDBOX_NOTREADY),
        ]
        assert [(item.metadata.attempt, item.state) for item in worker.statuses("main")] == [
            (1, cri.CONTAINER_RUNNING),
            (0, cri.CONTAINER_EXITED),
        ]
        worker.collect()
        assert [item.metadata.attempt for item in worker.sandboxes()] == [1]


# -- probes, hooks, ports


def test_probes_by_exec(each_lab: Lab) -> None:
    """Success, failure with what it says, a timeout with the code that kubelet knows, and no end of them."""
    with working(Worker(each_lab, "probed", [Spec("main", ["sh", "-c", "touch /tmp/up; exec sleep 1000"])])) as worker:
        worker.settle()
        container = worker.status("main").id
        each_lab.until(lambda: probe(each_lab, container, ["cat", "/tmp/up"], 60).exit_code == 0, "it is ready")
        failed = probe(each_lab, container, ["sh", "-c", "echo why; echo not >&2; exit 7"], 60)
        assert (failed.exit_code, failed.stdout, failed.stderr) == (7, b"why\n", b"not\n")
        began = time.monotonic()
        late = refused(probe, each_lab, container, ["sleep", "100"], 1)
        assert code_of(late) in (Status.DEADLINE_EXCEEDED, Status.UNKNOWN)
        if each_lab.name == "wherryd":
            assert code_of(late) is Status.DEADLINE_EXCEEDED
        assert "timed out" in text_of(late) or "timeout" in text_of(late) or "deadline" in text_of(late)
        assert time.monotonic() - began < 60
        # what was late is gone
        each_lab.until(
            lambda: "sleep 100\n" not in each_lab.exec(container, "ps", "-o", "args"), "the probe's process is gone"
        )
        for _ in range(20):
            assert probe(each_lab, container, ["true"], 60).exit_code == 0
        missing = refused(probe, each_lab, container, ["/no/such"], 5)
        assert "/no/such" in text_of(missing)
        assert worker.status("main").state == cri.CONTAINER_RUNNING


def test_a_hook_runs_before_the_container_is_stopped(each_lab: Lab) -> None:
    told = each_lab.folder / "hooked"
    told.mkdir(exist_ok=True)
    mount = {"mounts": [cri.Mount(container_path="/told", host_path=str(told))]}
    command = "trap 'echo term >> /told/all; exit 5' TERM; echo up >> /told/all; while true; do sleep 0.1; done"
    spec = Spec("main", ["sh", "-c", command], pre_stop=["sh", "-c", "echo hook >> /told/all"], fields=mount)
    with working(Worker(each_lab, "hooked", [spec], grace=20)) as worker:
        worker.settle()
        each_lab.until((told / "all").exists, "it is up")
        worker.kill()
        assert (told / "all").read_text().split() == ["up", "hook", "term"]
        ended = worker.status("main")
        assert (ended.exit_code, ended.reason) == (5, "Error")


def test_the_termination_message(each_lab: Lab) -> None:
    """kubelet mounts a file, names it in an annotation, and reads it itself; the status may carry it as well."""
    message = each_lab.folder / "termination"
    message.write_text("")
    fields = {
        "mounts": [cri.Mount(container_path="/dev/termination-log", host_path=str(message))],
        "annotations": {
            "io.kubernetes.container.terminationMessagePath": "/dev/termination-log",
            "io.kubernetes.container.terminationMessagePolicy": "File",
        },
    }
    say = ["sh", "-c", "echo -n gone wrong > /dev/termination-log; exit 1"]
    with working(Worker(each_lab, "told", [Spec("main", say, "Never", fields=fields)])) as worker:
        worker.sync()
        ended = each_lab.exited(worker.status("main").id)
        assert message.read_text() == "gone wrong"
        assert ended.annotations["io.kubernetes.container.terminationMessagePath"] == "/dev/termination-log"


def test_a_port_forward_is_an_address_that_is_used_once(each_lab: Lab) -> None:
    with working(Worker(each_lab, "forwarded", [Spec("main", SLEEP)])) as worker:
        worker.settle()
        pod = worker.sandboxes()[0].id
        urls = {each_lab.kubelet.PortForward(pod_sandbox_id=pod, port=[80]).url for _ in range(3)}
        assert len(urls) == 3
        assert all(re.match(r"http://127\.0\.0\.1:\d+/portforward/[\w-]+$", url) for url in urls), urls
        assert code_of(refused(each_lab.kubelet.PortForward, pod_sandbox_id="none", port=[80])) in (
            Status.NOT_FOUND,
            Status.UNKNOWN,
        )


# -- logs


def test_rotation_loses_no_line(each_lab: Lab) -> None:
    """As kubelet's log manager: rename, ReopenContainerLog; what the container writes is in one file or the other."""
    count = "i=0; while [ $i -lt 4000 ]; do echo line $i; i=$((i+1)); done; sleep 1000"
    with working(Worker(each_lab, "rotated", [Spec("main", ["sh", "-c", count])])) as worker:
        worker.settle()
        container = worker.status("main").id
        log = worker.logs / "main" / "0.log"
        parts: list[Path] = []
        for number in range(5):
            parts.append(log.with_name(f"0.log.{number}"))
            each_lab.until(log.exists, "the log is there")
            log.rename(parts[-1])
            each_lab.kubelet.ReopenContainerLog(container_id=container)
            assert log.exists()
            time.sleep(0.03)

        def lines() -> list[str]:
            text = "".join(part.read_text() for part in [*parts, log])
            return [line.split(" ", 3)[3] for line in text.splitlines()]

        each_lab.until(lambda: len(lines()) >= 4000, "everything is written")
        assert lines() == [f"line {number}" for number in range(4000)]
        # of a container that doesn't run there is nothing to open
        stop(each_lab, container, 0)
        refused(each_lab.kubelet.ReopenContainerLog, container_id=container)


# -- the end of pods


def test_eviction(each_lab: Lab) -> None:
    """No grace, all at once; the pod's remains can be read until kubelet collects them."""
    specs = [
        Spec("polite", ["sh", "-c", "echo here; exec sleep 1000"]),
        Spec("stubborn", ["sh", "-c", "trap '' TERM; echo here; while true; do sleep 0.1; done"]),
    ]
    worker = Worker(each_lab, "evicted", specs)
    worker.settle()
    for spec in specs:
        each_lab.until(lambda name=spec.name: log_of(worker, name) == "here", "it is up")  # type: ignore[misc]
    began = time.monotonic()
    worker.kill(0)
    assert time.monotonic() - began < 60
    assert [item.state for item in worker.sandboxes()] == [cri.SANDBOX_NOTREADY]
    for status in worker.statuses():
        assert (status.state, status.exit_code, status.reason) == (cri.CONTAINER_EXITED, 137, "Error")
        assert log_of(worker, status.metadata.name) == "here"
    worker.delete()
    # logs are kubelet's to remove
    assert (worker.logs / "polite" / "0.log").exists()


def test_static_pods_outlive_their_kubelet(each_lab: Lab) -> None:
    """A kubelet that starts finds them by their labels alone; a changed file is another pod of the same name."""
    old = Worker(each_lab, "static-node", [Spec("main", SLEEP)], uid="0123456789abcdef", source="file")
    old.settle()
    before = {item.id for item in old.statuses()}
    # another kubelet, which knows nothing
    with contextlib.closing(Kubelet(each_lab.address)) as fresh:
        listed = [
            item
            for item in fresh.ListPodSandbox().items
            if item.annotations.get("kubernetes.io/config.source") == "file"
        ]
        assert [item.labels["io.kubernetes.pod.uid"] for item in listed] == ["0123456789abcdef"]
        status = fresh.PodSandboxStatus(pod_sandbox_id=listed[0].id).status
        assert status.metadata.attempt == 0
    old.settle()
    assert {item.id for item in old.statuses()} == before
    new = Worker(each_lab, "static-node", [Spec("main", SLEEP)], uid="fedcba9876543210", source="file")
    with working(new):
        old.delete()
        new.settle()
        assert [item.state for item in new.statuses()] == [cri.CONTAINER_RUNNING]


def test_many_pods_at_once(each_lab: Lab) -> None:
    """A node that boots: kubelet's workers don't wait for each other."""
    workers = [Worker(each_lab, f"boot-{number}", [Spec("main", SLEEP)]) for number in range(8)]
    failed: list[BaseException] = []

    def settle(worker: Worker) -> None:
        try:
            worker.settle()
            worker.delete()
        except (grpc.RpcError, AssertionError) as error:
            failed.append(error)

    threads = [threading.Thread(target=settle, args=[worker]) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


# -- repeats


def test_what_a_kubelet_repeats_does_no_harm(each_lab: Lab) -> None:
    """Every call of the CRI that must be idempotent, after its effect is there."""
    kubelet = each_lab.kubelet
    worker = Worker(each_lab, "repeated", [Spec("main", SLEEP)])
    worker.settle()
    pod, container = worker.sandboxes()[0].id, worker.status("main").id
    for _ in range(2):
        stop(each_lab, container, 1)
    first = worker.status("main")
    stop(each_lab, container, 1)
    assert worker.status("main") == first
    for _ in range(2):
        kubelet.RemoveContainer(container_id=container)
    assert code_of(refused(kubelet.ContainerStatus, container_id=container)) is Status.NOT_FOUND
    for _ in range(3):
        kubelet.StopPodSandbox(pod_sandbox_id=pod)
    assert kubelet.PodSandboxStatus(pod_sandbox_id=pod).status.state == cri.SANDBOX_NOTREADY
    for _ in range(2):
        kubelet.RemovePodSandbox(pod_sandbox_id=pod)
    assert code_of(refused(kubelet.PodSandboxStatus, pod_sandbox_id=pod)) is Status.NOT_FOUND
    if each_lab.name == "containerd":
        return  # 1.6 doesn't take it for granted
    # what was never there
    kubelet.RemoveContainer(container_id="0" * 64)
    kubelet.StopPodSandbox(pod_sandbox_id="0" * 64)
    kubelet.RemovePodSandbox(pod_sandbox_id="0" * 64)


def test_two_requests_for_one_name(lab: WherryLab) -> None:
    """A kubelet that timed out asks again while the first is under way, or done: refused, and the first one holds."""
    worker = Worker(lab, "twice", [Spec("main", SLEEP)])
    with working(worker):
        outcomes: list[Any] = []

        def ask() -> None:
            try:
                outcomes.append(lab.run_pod(worker.config()))
            except grpc.RpcError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made = [item for item in outcomes if isinstance(item, str)]
        errors = [item for item in outcomes if isinstance(item, grpc.RpcError)]
        assert len(made) == 1
        assert {code_of(error) for error in errors} == {Status.ALREADY_EXISTS}
        assert all(made[0] in text_of(error) for error in errors)
        worker.settle()
        assert [item.id for item in worker.sandboxes()] == made


def test_removing_a_pod_that_runs_ends_it(each_lab: Lab) -> None:
    """Without a stop before (the CRI: containers are terminated by force)."""
    worker = Worker(each_lab, "forced", [Spec("main", SLEEP)])
    worker.settle()
    pod = worker.sandboxes()[0].id
    each_lab.kubelet.StopPodSandbox(pod_sandbox_id=pod)
    each_lab.kubelet.RemovePodSandbox(pod_sandbox_id=pod)
    assert not worker.statuses()
    assert not worker.sandboxes()


# -- the node


def test_images_are_collected_when_nobody_uses_them(lab: WherryLab) -> None:
    """Kubelet's image manager asks what is used, by ids; an image in use may lose its names, its containers go on."""
    with working(Worker(lab, "using", [Spec("main", SLEEP)])) as worker:
        worker.settle()
        status = worker.status("main")
        images = {image.id: image for image in lab.kubelet.ListImages().images}
        listed = lab.kubelet.ListContainers(filter=cri.ContainerFilter(id=status.id)).containers[0]
        assert listed.image_id in images
        assert status.image_id in images
        assert status.image_ref in {status.image_id, *images[status.image_id].repo_digests}
        lab.kubelet.RemoveImage(image=cri.ImageSpec(image=status.image_id))
        assert lab.exec(status.id, "echo", "on") == "on\n"
        assert worker.status("main").state == cri.CONTAINER_RUNNING
    lab.import_busybox()
    with working(Worker(lab, "again", [Spec("main", SLEEP)])) as worker:
        worker.settle()


def test_the_evented_pleg_sees_every_step(lab: WherryLab) -> None:
    """GetContainerEvents tells of each change, with the pod's status in it."""
    seen: list[tuple[str, int]] = []
    stream = lab.kubelet.GetContainerEvents(timeout=60)
    reader = threading.Thread(
        target=lambda: seen.extend(_events(stream)),
    )
    reader.start()
    try:
        end = time.monotonic() + 30
        while not seen:  # until the subscription is there
            assert time.monotonic() < end
            lab.run_pod(lab.pod_config(host_network=True))
            lab.remove_pods()
        worker = Worker(lab, "evented", [Spec("main", SLEEP)])
        worker.settle()
        container = worker.status("main").id
        worker.kill(0)
        worker.delete()
        lab.until(lambda: (container, cri.CONTAINER_DELETED_EVENT) in seen, "its end is told")
        time.sleep(0.3)  # for what should not come
    finally:
        stream.cancel()
        reader.join()
    kinds = [kind for id_, kind in seen if id_ == container]
    wanted = [
        cri.CONTAINER_CREATED_EVENT,
        cri.CONTAINER_STARTED_EVENT,
        cri.CONTAINER_STOPPED_EVENT,
        cri.CONTAINER_DELETED_EVENT,
    ]
    assert kinds == wanted


def _events(stream: Any) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(grpc.RpcError):
        for event in stream:
            assert event.pod_sandbox_status.metadata.name
            assert event.created_at
            yield event.container_id, event.container_event_type


def code_of(error: grpc.RpcError) -> Status:
    code: Status = error.code()
    return code


def text_of(error: grpc.RpcError) -> str:
    return str(error.details())
