"""What containers and pods use: the CRI's stats, from which a kubelet evicts and scales.

A container's figures come from its task, those of a pod from its cgroup where the kubelet gave it one, else they are
the sum of its containers'. One shim that doesn't answer leaves out its own containers and delays nobody for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from wherry.core.errors import NotFound, WherryError
from wherry.cri import container_metrics, interfaces
from wherry.cri.batches import batches
from wherry.cri.container_figures import Figures, first, second, unpack
from wherry.cri.records import READY, Member, Pod, chosen_by
from wherry.linux import cgroups
from wherry.linux.cgroups.systemd import slice_path
from wherry.proto import cgroups_v1_pb2, cgroups_v2_pb2
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from wherry.client.snapshots import Usage
    from wherry.cri.interfaces import Interface
    from wherry.cri.node import Node

# seconds that an answer waits for what has to be counted on a disk: the first time, and where there is a count already
_COUNTING, _RECOUNTING = 5.0, 0.5
# the interface that Kubernetes shows as the pod's
_DEFAULT_INTERFACE = "eth0"


class Stats:
    """The figures of one node. What is kept between calls: the last reading of each processor counter, disk usage."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._cpu: dict[str, tuple[int, int, int]] = {}
        self._disk: dict[str, tuple[float, Usage]] = {}
        self._counting: dict[str, asyncio.Task[None]] = {}

    def forget(self, identity: str) -> None:
        """A container or pod is gone."""
        self._cpu.pop(identity, None)
        self._disk.pop(identity, None)

    # -- containers

    async def container_stats(self, request: cri.ContainerStatsRequest) -> cri.ContainerStatsResponse:
        """Of one; without processor and memory where it doesn't run. Raises NotFound."""
        member = self._node.records.member(request.container_id)
        return cri.ContainerStatsResponse(stats=(await self._of_members([member]))[0])

    async def list_container_stats(self, request: cri.ListContainerStatsRequest) -> cri.ListContainerStatsResponse:
        """Of all that run and that the filter lets through."""
        chosen = request.filter
        found = self._node.records.find_members(
            cri.ContainerFilter(
                id=chosen.id, pod_sandbox_id=chosen.pod_sandbox_id, label_selector=chosen.label_selector
            )
        )
        running = [member for member in found if member.state == cri.CONTAINER_RUNNING]
        return cri.ListContainerStatsResponse(stats=await self._of_members(running))

    async def stream_container_stats(
        self, request: cri.StreamContainerStatsRequest
    ) -> AsyncIterator[cri.StreamContainerStatsResponse]:
        """The same, some at a time."""
        listed = await self.list_container_stats(cri.ListContainerStatsRequest(filter=request.filter))
        for some in batches(listed.stats):
            yield cri.StreamContainerStatsResponse(container_stats=some)

    async def _of_members(self, members: Sequence[Member]) -> list[cri.ContainerStats]:
        return await self._all(members, await self.figures(members))

    async def _all(self, members: Sequence[Member], figures: Mapping[str, Figures]) -> list[cri.ContainerStats]:
        disks = await asyncio.gather(*map(self._usage, members))
        return [
            self._stats(member, figures.get(member.id), usage) for member, usage in zip(members, disks, strict=True)
        ]

    async def figures(self, members: Iterable[Member]) -> Mapping[str, Figures]:
        """What the tasks of containers say; those that don't run or answer are left out."""
        asked = [member.id for member in members if member.state == cri.CONTAINER_RUNNING]
        if not asked:
            return {}
        try:
            answers = await self._node.client.tasks.metrics(asked)
        except NotFound:
            return {}
        return {item.id: unpack(item.data) for item in answers if item.data.type_url}

    def _stats(self, member: Member, figures: Figures | None, disk: Usage | None) -> cri.ContainerStats:
        config, now = member.config, time.time_ns()
        found = cri.ContainerStats(
            attributes=cri.ContainerAttributes(
                id=member.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
            )
        )
        if figures is not None:
            found.cpu.CopyFrom(self._cpu_usage(member.id, figures, now, member.facts.started_at))
            found.memory.CopyFrom(_memory(figures, now))
            found.swap.CopyFrom(_swap(figures, now))
            if figures.io_pressure is not None:
                found.io.CopyFrom(cri.IoUsage(timestamp=now, psi=figures.io_pressure))
        layer = found.writable_layer
        layer.timestamp = now
        layer.fs_id.mountpoint = self._node.host.snapshots.get(member.facts.snapshotter, "")
        if disk is not None:
            layer.used_bytes.value, layer.inodes_used.value = disk.size, disk.inodes
        return found

    def _cpu_usage(self, identity: str, figures: Figures, now: int, since: int) -> cri.CpuUsage:
        """With the rate since the last look, that of its whole life at the first one."""
        before, at, rate = self._cpu.get(identity, (0, since, 0))
        if now > at and figures.cpu >= before:
            rate = (figures.cpu - before) * 1_000_000_000 // (now - at)
        self._cpu[identity] = figures.cpu, now, rate
        return cri.CpuUsage(
            timestamp=now,
            usage_core_nano_seconds=cri.UInt64Value(value=figures.cpu),
            usage_nano_cores=cri.UInt64Value(value=rate),
            psi=figures.cpu_pressure,
        )

    async def _usage(self, member: Member) -> Usage | None:
        """What its writable layer holds; as it was some seconds ago, or not at all where counting takes long."""
        age, kept = self._disk.get(member.id, (0.0, None))
        now = time.monotonic()
        if kept is not None and now - age < self._node.settings.stats_collect_period:
            return kept
        counting = self._counting.get(member.id)
        if counting is None:
            counting = self._counting[member.id] = asyncio.get_running_loop().create_task(self._count(member))
            counting.add_done_callback(lambda _: self._counting.pop(member.id, None))
        await asyncio.wait([counting], timeout=_COUNTING if kept is None else _RECOUNTING)
        return self._disk.get(member.id, (0.0, None))[1]

    async def _count(self, member: Member) -> None:
        """Count what is on the disk; a large tree on a slow one takes its time, and is counted once at a time."""
        facts = member.facts
        try:
            found = await self._node.client.snapshots(facts.snapshotter).usage(facts.snapshot)
        except WherryError:
            return  # as it was, then
        if member.id in self._node.records.members:
            self._disk[member.id] = time.monotonic(), found

    # -- pods

    async def pod_sandbox_stats(self, request: cri.PodSandboxStatsRequest) -> cri.PodSandboxStatsResponse:
        """Of one. Raises NotFound."""
        pod = self._node.records.pod(request.pod_sandbox_id)
        return cri.PodSandboxStatsResponse(stats=await self._of_pod(pod))

    async def list_pod_sandbox_stats(self, request: cri.ListPodSandboxStatsRequest) -> cri.ListPodSandboxStatsResponse:
        """Of those that are ready and that the filter lets through."""
        records, chosen = self._node.records, request.filter
        pods = [
            pod
            for pod in records.find_pods(cri.PodSandboxFilter(id=chosen.id))
            if pod.facts.state == READY and chosen_by(chosen.label_selector, pod.config.labels)
        ]
        return cri.ListPodSandboxStatsResponse(stats=await asyncio.gather(*map(self._of_pod, pods)))

    async def stream_pod_sandbox_stats(
        self, request: cri.StreamPodSandboxStatsRequest
    ) -> AsyncIterator[cri.StreamPodSandboxStatsResponse]:
        """The same, some at a time."""
        listed = await self.list_pod_sandbox_stats(cri.ListPodSandboxStatsRequest(filter=request.filter))
        for some in batches(listed.stats):
            yield cri.StreamPodSandboxStatsResponse(pod_sandbox_stats=some)

    async def _of_pod(self, pod: Pod) -> cri.PodSandboxStats:
        config, now = pod.config, time.time_ns()
        members = self._node.records.members_of(pod.id)
        running = [member for member in members if member.state == cri.CONTAINER_RUNNING]
        each, whole, network = await asyncio.gather(
            self.figures(running), asyncio.to_thread(of_cgroup, pod.facts.cgroup), self.network(pod)
        )
        containers = await self._all(running, each)
        found = cri.PodSandboxStats(
            attributes=cri.PodSandboxAttributes(
                id=pod.id, metadata=config.metadata, labels=config.labels, annotations=config.annotations
            )
        )
        linux = found.linux
        linux.containers.extend(containers)
        figures = whole or _sum(each)
        linux.cpu.CopyFrom(self._cpu_usage(pod.id, figures, now, pod.facts.created_at))
        linux.memory.CopyFrom(_memory(figures, now))
        linux.process.timestamp, linux.process.process_count.value = now, figures.processes
        if figures.io_pressure is not None:
            linux.io.CopyFrom(cri.IoUsage(timestamp=now, psi=figures.io_pressure))
        if network:
            _network(linux.network, network, now)
        return found

    async def network(self, pod: Pod) -> list[Interface]:
        """The interfaces of a pod; none where it uses the host's."""
        return await interfaces.read(pod.facts.netns) if pod.facts.netns else []

    # -- metrics

    async def list_metric_descriptors(
        self, _request: cri.ListMetricDescriptorsRequest
    ) -> cri.ListMetricDescriptorsResponse:
        """What there is."""
        return cri.ListMetricDescriptorsResponse(descriptors=container_metrics.descriptors())

    async def list_pod_sandbox_metrics(
        self, _request: cri.ListPodSandboxMetricsRequest
    ) -> cri.ListPodSandboxMetricsResponse:
        """Of the pods that are ready, and of their containers that run."""
        pods = [pod for pod in self._node.records.pods.values() if pod.facts.state == READY]
        return cri.ListPodSandboxMetricsResponse(pod_metrics=await asyncio.gather(*map(self._metrics, pods)))

    async def stream_pod_sandbox_metrics(
        self, _request: cri.StreamPodSandboxMetricsRequest
    ) -> AsyncIterator[cri.StreamPodSandboxMetricsResponse]:
        """The same, some at a time."""
        listed = await self.list_pod_sandbox_metrics(cri.ListPodSandboxMetricsRequest())
        for some in batches(listed.pod_metrics):
            yield cri.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=some)

    async def _metrics(self, pod: Pod) -> cri.PodSandboxMetrics:
        now = time.time_ns()
        members = [m for m in self._node.records.members_of(pod.id) if m.state == cri.CONTAINER_RUNNING]
        figures, network = await asyncio.gather(self.figures(members), self.network(pod))
        disks = await asyncio.gather(*map(self._usage, members))
        return cri.PodSandboxMetrics(
            pod_sandbox_id=pod.id,
            metrics=container_metrics.of_pod(pod, network, now),
            container_metrics=[
                cri.ContainerMetrics(
                    container_id=member.id,
                    metrics=container_metrics.of_member(pod, member, figures[member.id], disk, now),
                )
                for member, disk in zip(members, disks, strict=True)
                if member.id in figures
            ],
        )


def of_cgroup(parent: str) -> Figures | None:
    """What a pod's cgroup counts, None where the kubelet gave it none. Reads files of the kernel."""
    if not parent.strip("/"):
        return None
    base = parent.rstrip("/").rpartition("/")[2]
    path = slice_path(base) if base.endswith(".slice") else "/" + parent.strip("/")
    with contextlib.suppress(OSError, ValueError, WherryError):
        stats = cgroups.plan(path, "").stats()
        if not stats.values.get("cpu") and not stats.values.get("memory"):
            return None
        if stats.version == 1:
            return first(cgroups_v1_pb2.Metrics(**stats.values))
        return second(cgroups_v2_pb2.Metrics(**stats.values))
    return None


def _sum(figures: Mapping[str, Figures]) -> Figures:
    """The counters of several together; limits and pressures have no sum."""
    counted = ("cpu", "memory", "working_set", "rss", "faults", "major_faults", "processes", "swap")
    return Figures(**{name: sum(getattr(item, name) for item in figures.values()) for name in counted})


def _memory(figures: Figures, now: int) -> cri.MemoryUsage:
    return cri.MemoryUsage(
        timestamp=now,
        working_set_bytes=cri.UInt64Value(value=figures.working_set),
        available_bytes=cri.UInt64Value(value=figures.available),
        usage_bytes=cri.UInt64Value(value=figures.memory),
        rss_bytes=cri.UInt64Value(value=figures.rss),
        page_faults=cri.UInt64Value(value=figures.faults),
        major_page_faults=cri.UInt64Value(value=figures.major_faults),
        psi=figures.memory_pressure,
    )


def _swap(figures: Figures, now: int) -> cri.SwapUsage:
    return cri.SwapUsage(
        timestamp=now,
        swap_available_bytes=cri.UInt64Value(value=figures.swap_available),
        swap_usage_bytes=cri.UInt64Value(value=figures.swap),
    )


def _network(into: cri.NetworkUsage, found: Sequence[Interface], now: int) -> None:
    into.timestamp = now
    for item in found:
        usage = cri.NetworkInterfaceUsage(
            name=item.name,
            rx_bytes=cri.UInt64Value(value=item.rx_bytes),
            rx_errors=cri.UInt64Value(value=item.rx_errors),
            tx_bytes=cri.UInt64Value(value=item.tx_bytes),
            tx_errors=cri.UInt64Value(value=item.tx_errors),
        )
        if item.name == _DEFAULT_INTERFACE:
            into.default_interface.CopyFrom(usage)
        else:
            into.interfaces.append(usage)
