"""What containers and pods use, as a kubelet asks for it."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.cri.kubelet import WherryLab, refused
from tests.cri.test_containers import Lab, Pod
from wherry.cri import container_figures, container_metrics, interfaces
from wherry.cri.container_stats import of_cgroup
from wherry.proto import cgroups_v1_pb2, cgroups_v2_pb2
from wherry.proto import cri_pb2 as cri

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes containers: run as root")


@pytest.fixture(scope="module")
def each_pod(each_lab: Lab) -> Pod:
    config = each_lab.pod_config(host_network=True)
    return Pod(each_lab.run_pod(config), config, each_lab)


@pytest.fixture(scope="module")
def pod(lab: WherryLab) -> Pod:
    """With a network and a cgroup of its own, as a kubelet makes it."""
    lab.conflist()
    parent = f"/wherry-k2-{uuid.uuid4().hex[:8]}"
    config = lab.pod_config(linux=cri.LinuxPodSandboxConfig(cgroup_parent=parent))
    return Pod(lab.run_pod(config), config, lab)


@pytest.fixture(scope="module", autouse=True)
def _parents_go() -> Iterator[None]:
    yield
    for folder in Path("/sys/fs/cgroup").glob("**/wherry-k2-*"):
        if folder.is_dir():
            folder.rmdir()


def test_a_containers_figures(each_pod: Pod) -> None:
    kubelet = each_pod.lab.kubelet
    command = (
        "head -c 4000000 /dev/zero > /big; x=0; while [ $x -lt 60000 ]; do x=$((x+1)); done; touch /ready; sleep 1000"
    )
    container = each_pod.run("busy", "sh", "-c", command, labels={"app": "busy"})
    each_pod.ready(container)
    before = time.time_ns()
    stats = kubelet.ContainerStats(container_id=container).stats
    assert stats.attributes.id == container
    assert stats.attributes.metadata.name == "busy"
    assert stats.attributes.labels["app"] == "busy"
    assert before <= stats.cpu.timestamp <= time.time_ns()
    assert stats.cpu.usage_core_nano_seconds.value > 1_000_000
    assert 0 < stats.memory.working_set_bytes.value <= 1 << 30
    assert stats.writable_layer.fs_id.mountpoint

    def used() -> int:
        return int(kubelet.ContainerStats(container_id=container).stats.writable_layer.used_bytes.value)

    # containerd counts disks every ten seconds
    each_pod.lab.until(lambda: used() >= 4_000_000, "what was written is counted", 30)
    listed = kubelet.ListContainerStats(filter=cri.ContainerStatsFilter(label_selector={"app": "busy"})).stats
    assert [item.attributes.id for item in listed] == [container]
    kubelet.RemoveContainer(container_id=container)


def test_the_rate_of_the_processor(pod: Pod) -> None:
    kubelet = pod.lab.kubelet
    container = pod.run("spin", "sh", "-c", "while :; do :; done")
    kubelet.ContainerStats(container_id=container)
    time.sleep(0.5)
    first = kubelet.ContainerStats(container_id=container).stats
    # one processor at most, and some of it on a machine with other work
    assert 0 < first.cpu.usage_nano_cores.value < 1_500_000_000
    assert first.memory.usage_bytes.value >= first.memory.working_set_bytes.value

    def counted() -> bool:
        memory = kubelet.ContainerStats(container_id=container).stats.memory
        return bool(memory.rss_bytes.value and memory.page_faults.value)

    # the kernel gathers small changes of memory.stat from its processors every two seconds
    pod.lab.until(counted, "memory by kind is counted", 10)
    kubelet.RemoveContainer(container_id=container)


def test_the_limit_leaves_some(pod: Pod) -> None:
    linux = cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(memory_limit_in_bytes=64 << 20))
    container = pod.run("limited", "sleep", "1000", linux=linux)
    memory = pod.lab.kubelet.ContainerStats(container_id=container).stats.memory
    assert memory.available_bytes.value == (64 << 20) - memory.working_set_bytes.value
    pod.lab.kubelet.RemoveContainer(container_id=container)


def test_those_that_do_not_run(pod: Pod) -> None:
    kubelet = pod.lab.kubelet
    container = pod.create("idle", "true")
    stats = kubelet.ContainerStats(container_id=container).stats
    assert stats.attributes.id == container
    assert not stats.HasField("cpu")
    assert container not in {item.attributes.id for item in kubelet.ListContainerStats().stats}
    assert refused(kubelet.ContainerStats, container_id="nobody").code() == grpc.StatusCode.NOT_FOUND
    assert refused(kubelet.PodSandboxStats, pod_sandbox_id="nobody").code() == grpc.StatusCode.NOT_FOUND
    kubelet.RemoveContainer(container_id=container)


def test_a_pods_figures(pod: Pod) -> None:
    kubelet = pod.lab.kubelet
    container = pod.run("member", "sleep", "1000")
    stats = kubelet.PodSandboxStats(pod_sandbox_id=pod.id).stats
    assert stats.attributes.id == pod.id
    assert stats.attributes.metadata.name == pod.config.metadata.name
    assert [item.attributes.id for item in stats.linux.containers] == [container]
    assert stats.linux.cpu.usage_core_nano_seconds.value > 0
    assert stats.linux.memory.working_set_bytes.value > 0
    assert stats.linux.process.process_count.value >= 1
    assert stats.linux.network.default_interface.name == "eth0"
    listed = kubelet.ListPodSandboxStats(filter=cri.PodSandboxStatsFilter(id=pod.id)).stats
    assert [item.attributes.id for item in listed] == [pod.id]
    parts = [item for part in kubelet.StreamPodSandboxStats() for item in part.pod_sandbox_stats]
    assert pod.id in {item.attributes.id for item in parts}
    parts = [item for part in kubelet.StreamContainerStats() for item in part.container_stats]
    assert container in {item.attributes.id for item in parts}
    kubelet.RemoveContainer(container_id=container)


def test_metrics_fit_their_descriptors(pod: Pod) -> None:
    kubelet = pod.lab.kubelet
    container = pod.run("measured", "sleep", "1000")
    descriptors = {item.name: item for item in kubelet.ListMetricDescriptors().descriptors}
    found = next(item for item in kubelet.ListPodSandboxMetrics().pod_metrics if item.pod_sandbox_id == pod.id)
    of_container = next(item for item in found.container_metrics if item.container_id == container)
    for metric in [*found.metrics, *of_container.metrics]:
        # a kubelet drops a metric whose labels aren't those of its descriptor
        assert len(metric.label_values) == len(descriptors[metric.name].label_keys), metric
    values = {metric.name: metric for metric in of_container.metrics}
    labels = dict(
        zip(
            descriptors["container_memory_working_set_bytes"].label_keys,
            values["container_memory_working_set_bytes"].label_values,
            strict=True,
        )
    )
    metadata = pod.config.metadata
    assert labels["container"] == "measured"
    assert (labels["pod"], labels["namespace"], labels["id"]) == (metadata.name, metadata.namespace, container)
    assert values["container_memory_working_set_bytes"].value.value > 0
    assert values["container_processes"].value.value == 1
    names = {metric.name for metric in found.metrics}
    assert {"container_network_receive_bytes_total", "container_network_transmit_errors_total"} <= names
    streamed = [item for part in kubelet.StreamPodSandboxMetrics() for item in part.pod_sandbox_metrics]
    assert pod.id in {item.pod_sandbox_id for item in streamed}
    kubelet.RemoveContainer(container_id=container)


# -- without a daemon


def test_every_metric_is_described_once() -> None:
    names = [item.name for item in container_metrics.descriptors()]
    assert len(names) == len(set(names))
    assert all(item.help.endswith(".") for item in container_metrics.descriptors())


def test_figures_of_version_1() -> None:
    metrics = cgroups_v1_pb2.Metrics()
    metrics.memory.usage.usage, metrics.memory.total_inactive_file = 1000, 300
    metrics.memory.usage.limit, metrics.memory.swap.usage = (1 << 63) - 4096, 1500
    metrics.cpu.usage.total = 7
    for op, value in (("Read", 5), ("Write", 6), ("Total", 11)):
        metrics.blkio.io_service_bytes_recursive.add(op=op, major=8, minor=1, value=value)
    found = container_figures.first(metrics)
    assert (found.working_set, found.swap, found.limit, found.available, found.cpu) == (700, 500, 0, 0, 7)
    assert found.disks == (container_figures.Disk("8:1", 5, 6, 0, 0),)


def test_figures_of_version_2() -> None:
    metrics = cgroups_v2_pb2.Metrics()
    metrics.memory.usage, metrics.memory.inactive_file, metrics.memory.usage_limit = 1000, 1200, 4000
    metrics.cpu.usage_usec = 7
    metrics.cpu.psi.some.total = 9
    found = container_figures.second(metrics)
    assert (found.working_set, found.limit, found.available, found.cpu) == (0, 4000, 4000, 7000)
    assert found.cpu_pressure is not None
    assert found.cpu_pressure.Some.Total == 9


async def test_interfaces_of_a_namespace() -> None:
    assert {item.name for item in await interfaces.read("/proc/self/ns/net")} == set(os.listdir("/sys/class/net")) - {
        "lo",
        "bonding_masters",
    }
    assert await interfaces.read("/no/such") == []


def test_a_cgroup_that_is_not_there() -> None:
    assert of_cgroup("") is None
    assert of_cgroup("/no-such-cgroup") is None
