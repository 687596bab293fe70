"""`wherryd` is killed at each step of a pod's life; a kubelet goes on as it does, and nothing is lost or left."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cri.kubelet import CNI_BIN, WherryLab, closing
from tests.peers import missing
from wherry.proto import cri_pb2 as cri

if not os.path.exists(f"{CNI_BIN}/bridge"):
    missing("CNI's plugins are missing: apt-get install containernetworking-plugins")

pytestmark = pytest.mark.timeout(400)
POINTS = (
    "cri.pod.recorded",
    "cri.pod.running",
    "cri.pod.made",
    "cri.pod.ready",
    "cri.pod.ended",
    "cri.pod.detached",
    "cri.pod.emptied",
    "cri.pod.forgotten",
)


@pytest.fixture(scope="module")
def fail(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this file says is where the daemon dies."""
    return tmp_path_factory.mktemp("cri") / "fail"


@pytest.fixture(scope="module")
def armed(fail: Path) -> Iterator[WherryLab]:
    yield from closing(WherryLab(image=False, env={"WHERRY_FAIL_FILE": str(fail)}))


def test_the_places_are_all_that_there_are() -> None:
    sources = Path(__file__).parents[2] / "cri"
    found = {name for file in sources.glob("pod*.py") for name in re.findall(r'reach\("(.+?)"\)', file.read_text())}
    assert found == set(POINTS)


class Kubelet:
    """Has a pod that is ready, and brings it away, however often it has to ask; `deaths` counts daemons."""

    def __init__(self, lab: WherryLab, name: str) -> None:
        self.lab, self.name = lab, name
        self.deaths = 0
        self.attempt = 0
        self.seen = ""

    def live(self) -> None:
        """Until the pod was ready and has been removed."""
        end = time.monotonic() + 200
        while time.monotonic() < end:
            try:
                if not self._step():
                    return
            except grpc.RpcError as error:
                process = self.lab.daemon.process
                # a call that was under way when the daemon died, or waits for the next one
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                if process is None or process.poll() is not None:
                    self.deaths += 1
                    self.lab.restart()
            time.sleep(0.05)
        raise AssertionError("it doesn't end")

    def _step(self) -> bool:
        """A sync: pods that aren't ready are stopped and removed, and one is made, once; False when all is done."""
        kubelet = self.lab.kubelet
        found: list[Any] = list(kubelet.ListPodSandbox(timeout=5.0).items)
        ready = [item for item in found if item.state == cri.SANDBOX_READY]
        for item in found:
            if item.state != cri.SANDBOX_READY:
                kubelet.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=item.id), timeout=20.0)
                kubelet.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=item.id), timeout=20.0)
        if ready:
            status = self.lab.status(ready[0].id).status
            assert status.network.ip.startswith(f"{self.lab.subnet}.")
            self.seen = ready[0].id
            kubelet.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=self.seen), timeout=20.0)
            kubelet.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=self.seen), timeout=20.0)
        elif not self.seen:
            config = self.lab.pod_config(self.name, attempt=self.attempt)
            self.attempt += 1
            kubelet.RunPodSandbox(cri.RunPodSandboxRequest(config=config), timeout=20.0)
        return not self.seen or bool(kubelet.ListPodSandbox(timeout=5.0).items)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(armed: WherryLab, fail: Path, point: str) -> None:
    lab = armed
    lab.conflist()
    fail.write_text(point)
    kubelet = Kubelet(lab, f"pod-{point.rpartition('.')[2]}")
    kubelet.live()
    assert kubelet.deaths == 1
    assert lab.daemon.settle(20) == []
    for folder in ("pods", "netns"):
        assert not list((lab.daemon.state / "cri" / folder).glob("*"))
    assert not [path for path in (lab.folder / "ipam").rglob("*") if path.name.startswith(lab.subnet)]
