"""A daemon that is killed anywhere: pods, their addresses and their containers are as they were; what it was making is
reported and can be removed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tests.cri.kubelet import CNI_BIN, WherryLab, closing, shims_in
from tests.peers import missing, need
from wherry.proto import cri_pb2 as cri

if not os.path.exists(f"{CNI_BIN}/bridge"):
    missing("CNI's plugins are missing: apt-get install containernetworking-plugins")

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def fresh() -> Iterator[WherryLab]:
    """A daemon for one test."""
    yield from closing(WherryLab())


def addresses(lab: WherryLab, pod: str) -> set[str]:
    """What a pod's namespace has."""
    netns = lab.info(pod)["namespaces"]["network"]
    done = subprocess.run([need("nsenter"), f"--net={netns}", "ip", "-j", "addr"], capture_output=True, check=True)
    return {each["local"] for link in json.loads(done.stdout) for each in link["addr_info"]}


def test_pods_live_on(fresh: WherryLab) -> None:
    """SIGKILL: status, address, containers, their processes and logs; and they can be ended by the next daemon."""
    lab = fresh
    lab.conflist()
    config = lab.pod_config("lives", labels={"app": "a"}, annotations={"n": "1"})
    config.linux.security_context.namespace_options.pid = cri.POD
    pod = lab.run_pod(config)
    container = lab.run(pod, lab.container_config("main", ["sh", "-c", "echo begun; exec sleep 1000"]), config)
    stopped = lab.run_pod(lab.pod_config("stopped"))
    lab.kubelet.StopPodSandbox(pod_sandbox_id=stopped)
    before, info = lab.status(pod).status, lab.info(pod)
    lab.restart()
    after = lab.status(pod).status
    assert after == before
    assert lab.info(pod)["namespaces"] == info["namespaces"]
    assert before.network.ip in addresses(lab, pod)
    assert lab.container_status(container).state == cri.CONTAINER_RUNNING
    assert "sleep" in lab.exec(container, "ps")
    assert lab.status(stopped).status.state == cri.SANDBOX_NOTREADY
    assert {item.id for item in lab.kubelet.ListPodSandbox().items} == {pod, stopped}
    assert "begun" in (lab.logs / "lives" / "main.log").read_text()
    # the name is still taken
    with pytest.raises(grpc.RpcError, match="is reserved for"):
        lab.run_pod(lab.pod_config("lives"))
    lab.remove_pods()
    assert lab.daemon.settle() == []


def test_without_a_call_pods_are_looked_after(fresh: WherryLab) -> None:
    """A daemon that finds pods looks after them before a kubelet calls."""
    lab = fresh
    config = lab.pod_config("quiet", host_network=True)
    pod = lab.run_pod(config)
    container = lab.run(pod, lab.container_config("main", ["sleep", "1000"]), config)
    pid = json.loads(lab.kubelet.ContainerStatus(container_id=container, verbose=True).info["info"])["pid"]
    lab.daemon.kill()
    os.kill(pid, 9)
    lab.daemon.start()
    status = lab.exited(container)
    assert status.exit_code == 137
    assert lab.status(pod).status.state == cri.SANDBOX_READY


def test_a_shim_that_died_meanwhile(fresh: WherryLab) -> None:
    """The pod isn't ready, its container has ended, all of it can be removed, and the addresses come back."""
    lab = fresh
    lab.conflist()
    config = lab.pod_config("shimless")
    pod = lab.run_pod(config)
    container = lab.run(pod, lab.container_config("main", ["sleep", "1000"]), config)
    lab.daemon.kill()
    bundle = lab.daemon.state / "tasks/k8s.io" / pod
    shims = shims_in(lab, bundle)
    assert shims
    for each in shims:
        os.kill(each, 9)
    lab.daemon.start()
    lab.until(lambda: lab.status(pod).status.state == cri.SANDBOX_NOTREADY, "the pod isn't ready")
    assert lab.exited(container).exit_code in (137, 255)
    lab.kubelet.StopPodSandbox(pod_sandbox_id=pod)
    lab.kubelet.RemovePodSandbox(pod_sandbox_id=pod)
    assert lab.daemon.settle() == []
    assert not [path for path in (lab.folder / "ipam").rglob("*") if path.name.startswith(lab.subnet)]


@pytest.mark.parametrize("moment", ["begun", "cni"])
def test_killed_while_a_pod_is_made(fresh: WherryLab, moment: str) -> None:
    """It is reported as not ready, stopped, removed; nothing is left, the name is free."""
    lab = fresh
    gate = lab.folder / "gate"
    plugin = lab.folder / "stall"
    plugin.write_text(
        f"""#!/bin/sh
cat >/dev/null
if [ "$CNI_COMMAND" = ADD ] && [ -e {gate} ]; then touch {gate}.reached; sleep 1000; fi
echo '{{"cniVersion": "1.0.0", "ips": [{{"address": "10.99.0.9/24"}}]}}'
"""
    )
    plugin.chmod(0o755)
    lab.daemon.stop()
    text = lab.daemon.config.read_text().replace("bin_dir", f'bin_dirs = ["{lab.folder}", "{CNI_BIN}"]\n  bin_dir')
    lab.daemon.config.write_text(text)
    lab.daemon.start()
    lab.conflist([{"type": "stall"}])
    if moment == "cni":
        gate.touch()
    caught: list[Any] = []

    def run() -> None:
        try:
            caught.append(lab.run_pod(lab.pod_config("interrupted")))
        except grpc.RpcError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    if moment == "cni":
        lab.until((lab.folder / "gate.reached").exists, "the plugin runs")
    # its shim may come to be when the next daemon has looked already: such a one ends by itself
    lab.until(lambda: list((lab.daemon.state / "tasks" / "k8s.io").glob("*")), "the pod is begun")
    lab.daemon.kill()
    gate.unlink(missing_ok=True)
    lab.daemon.start()
    thread.join(110)
    items = lab.kubelet.ListPodSandbox().items
    if moment == "cni":
        assert [item.state for item in items] == [cri.SANDBOX_NOTREADY]
        assert isinstance(caught[0], grpc.RpcError)
    lab.remove_pods()
    assert not lab.kubelet.ListPodSandbox().items
    for pid in lab.daemon.processes():  # the plugin that sleeps is nobody's any more
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"/stall" in file.read():
                os.killpg(pid, 9)
    assert lab.daemon.settle() == []
    lab.run_pod(lab.pod_config("interrupted"))


def test_events(fresh: WherryLab) -> None:
    """GetContainerEvents: pods and containers, made, started, stopped, removed, with what they are."""
    lab = fresh
    stream = lab.kubelet.GetContainerEvents(timeout=60)
    seen: list[Any] = []

    thread = threading.Thread(target=lambda: seen.extend(_until_the_end(stream)))
    thread.start()
    try:
        # a subscription has no answer of its own: it is there when the first pod is told
        def told() -> bool:
            lab.run_pod(lab.pod_config(host_network=True))
            return bool(seen)

        lab.until(told, "events come")
        lab.remove_pods()
        config = lab.pod_config("told", host_network=True)
        pod = lab.run_pod(config)
        container = lab.run(pod, lab.container_config("main", ["true"]), config)
        lab.exited(container)
        lab.kubelet.RemoveContainer(container_id=container)
        lab.kubelet.StopPodSandbox(pod_sandbox_id=pod)
        lab.kubelet.RemovePodSandbox(pod_sandbox_id=pod)

        def of(identity: str) -> list[int]:
            return [event.container_event_type for event in seen if event.container_id == identity]

        made, started, ended, gone = (
            cri.CONTAINER_CREATED_EVENT,
            cri.CONTAINER_STARTED_EVENT,
            cri.CONTAINER_STOPPED_EVENT,
            cri.CONTAINER_DELETED_EVENT,
        )
        lab.until(lambda: gone in of(pod), "the pod's end is told")
        assert of(pod) == [made, started, ended, gone]
        assert of(container) == [made, started, ended, gone]
        first = next(event for event in seen if event.container_id == pod)
        assert first.pod_sandbox_status.id == pod
        assert first.created_at
        end = next(event for event in seen if event.container_id == container and event.container_event_type == ended)
        assert end.containers_statuses[0].state == cri.CONTAINER_EXITED
    finally:
        stream.cancel()
        thread.join(10)


def _until_the_end(stream: Any) -> Iterator[Any]:
    """Each event as it comes."""
    try:
        yield from stream
    except grpc.RpcError:
        return
