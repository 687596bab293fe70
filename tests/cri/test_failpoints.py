"""`wherryd` is killed at each step of a container's life; a kubelet goes on as it does, and nothing is lost or left."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cri.kubelet import NAMESPACE, WherryLab, closing, shims_in
from tests.peers import need
from wherry.proto import cri_pb2 as cri

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="makes containers: run as root"),
    pytest.mark.timeout(400),
]
POINTS = (
    "cri.create.recorded",
    "cri.create.prepared",
    "cri.start.created",
    "cri.start.started",
    "cri.start.noted",
    "cri.end.seen",
    "cri.end.noted",
    "cri.end.deleted",
    "cri.remove.stopped",
    "cri.remove.unmounted",
    "cri.remove.forgotten",
)


class Armed(WherryLab):
    """A daemon that dies where the file `fail` says."""

    def __init__(self, fail: Path) -> None:
        super().__init__(env={"WHERRY_FAIL_FILE": str(fail)})
        self.fail = fail


@pytest.fixture(scope="module")
def armed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Armed]:
    yield from closing(Armed(tmp_path_factory.mktemp("cri") / "fail"))


def test_the_places_are_all_that_there_are() -> None:
    sources = Path(__file__).parents[2] / "cri"
    found = {
        name for file in sources.glob("container*.py") for name in re.findall(r'reach\("(.+?)"\)', file.read_text())
    }
    assert found == set(POINTS)


class Kubelet:
    """Brings a container to its end and away, however often it has to ask; `deaths` counts daemons."""

    def __init__(self, lab: WherryLab, pod: str, pod_config: Any, name: str) -> None:
        self.lab, self.pod, self.pod_config, self.name = lab, pod, pod_config, name
        self.deaths = 0
        self.ended: Any = None

    def live(self) -> Any:
        """The container's status at its end, when it has been removed."""
        end = time.monotonic() + 200
        done = threading.Event()
        watching = threading.Thread(target=self._watch, args=(done,))
        watching.start()
        try:
            while time.monotonic() < end:
                try:
                    if not self._step():
                        return self.ended
                except grpc.RpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE:
                        raise  # nothing else may be said than that nobody is there
                time.sleep(0.05)
        finally:
            done.set()
            watching.join()
        raise AssertionError("it doesn't end")

    def _watch(self, done: threading.Event) -> None:
        """Starts a daemon where one has died, as an init does: calls wait for it."""
        while not done.wait(0.02):
            process = self.lab.daemon.process
            if process is not None and process.poll() is not None:
                self.deaths += 1
                self.lab.restart()

    def _step(self) -> bool:
        """What a sync of the pod does; False when all is done."""
        kubelet = self.lab.kubelet
        found = [item for item in kubelet.ListContainers().containers if item.metadata.name == self.name]
        if not found:
            if self.ended is not None:
                return False
            config = self.lab.container_config(self.name, ["sh", "-c", "sleep 0.1; exit 7"])
            self.lab.create(self.pod, config, self.pod_config)
        elif found[0].state == cri.CONTAINER_CREATED:
            kubelet.StartContainer(container_id=found[0].id)
        elif found[0].state == cri.CONTAINER_EXITED:
            self.ended = self.lab.container_status(found[0].id)
            kubelet.RemoveContainer(container_id=found[0].id)
        return True


@pytest.mark.parametrize("point", POINTS)
def test_a_daemon_that_dies(armed: Armed, point: str) -> None:
    config = armed.pod_config(host_network=True)
    pod = armed.run_pod(config)
    armed.fail.write_text(point)
    kubelet = Kubelet(armed, pod, config, point.replace(".", "-"))
    status = kubelet.live()
    assert kubelet.deaths == 1
    assert (status.exit_code, status.reason) == (7, "Error")
    assert status.created_at <= status.started_at <= status.finished_at
    armed.kubelet.StopPodSandbox(pod_sandbox_id=pod)
    armed.kubelet.RemovePodSandbox(pod_sandbox_id=pod)
    assert ctr(armed, "containers", "ls", "-q") == ""
    assert ctr(armed, "tasks", "ls", "-q") == ""
    kinds = {line.split()[-1] for line in ctr(armed, "snapshots", "ls").splitlines()[1:]}
    assert kinds == {"Committed"}


def ctr(lab: WherryLab, *args: str) -> str:
    command = [need("ctr"), "--address", lab.address, "--namespace", NAMESPACE, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_a_start_is_on_record_before_it_is_answered(armed: Armed) -> None:
    """Where the shim is killed with the daemon, nobody else knows any more that the container has run."""
    lab = armed
    config = lab.pod_config("noted", host_network=True)
    pod = lab.run_pod(config)
    container = lab.create(pod, lab.container_config("main", ["sleep", "1000"]), config)
    lab.fail.write_text("cri.start.noted")
    with pytest.raises(grpc.RpcError):
        lab.kubelet.StartContainer(container_id=container)
    lab.daemon.kill()
    for shim in shims_in(lab, lab.daemon.state / "tasks/k8s.io" / pod):
        os.kill(shim, 9)
    lab.daemon.start()
    assert lab.exited(container).exit_code in (137, 255)
    lab.remove_pods()
    assert lab.daemon.settle() == []
