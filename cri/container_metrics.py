"""The metrics of ListPodSandboxMetrics, under the names and with the labels of cAdvisor, whose place they take.

A kubelet with the gate PodAndContainerStatsFromCRI asks for the descriptors once and serves the values at
/metrics/cadvisor. The order of a metric's labels is that of its descriptor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from wherry.cri.container_figures import Figures
from wherry.cri.records import Member, Pod
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from wherry.client.snapshots import Usage
    from wherry.cri.interfaces import Interface

_POD_KEYS = ("id", "namespace", "pod")
_KEYS = ("id", "image", "name", "container", "namespace", "pod")
_SECOND = 1_000_000_000


class Kind(NamedTuple):
    """A metric of one value a container."""

    name: str
    help: str
    counter: bool
    value: Callable[[Figures], int]


class Split(NamedTuple):
    """A metric of several values, each with one more label."""

    name: str
    help: str
    label: str


_CONTAINER = (
    Kind("container_cpu_usage_seconds_total", "Cumulative CPU time consumed, in seconds.", True,
         lambda f: f.cpu // _SECOND),
    Kind("container_cpu_user_seconds_total", "Cumulative CPU time in user mode, in seconds.", True,
         lambda f: f.cpu_user // _SECOND),
    Kind("container_cpu_system_seconds_total", "Cumulative CPU time in the kernel, in seconds.", True,
         lambda f: f.cpu_system // _SECOND),
    Kind("container_cpu_cfs_periods_total", "Periods of the CPU quota that have passed.", True,
         lambda f: f.periods),
    Kind("container_cpu_cfs_throttled_periods_total", "Periods in which the quota was used up.", True,
         lambda f: f.throttled_periods),
    Kind("container_cpu_cfs_throttled_seconds_total", "Time for which the quota held processes back, in seconds.", True,
         lambda f: f.throttled // _SECOND),
    Kind("container_memory_usage_bytes", "Memory in use, all of it.", False, lambda f: f.memory),
    Kind("container_memory_working_set_bytes", "Memory that can't be reclaimed easily.", False,
         lambda f: f.working_set),
    Kind("container_memory_max_usage_bytes", "The most memory that was in use.", False, lambda f: f.max_memory),
    Kind("container_memory_rss", "Anonymous memory.", False, lambda f: f.rss),
    Kind("container_memory_cache", "Memory of the page cache.", False, lambda f: f.cache),
    Kind("container_memory_mapped_file", "Memory of mapped files.", False, lambda f: f.mapped_file),
    Kind("container_memory_total_active_file_bytes", "Page cache that was used lately.", False,
         lambda f: f.active_file),
    Kind("container_memory_total_inactive_file_bytes", "Page cache that was not used lately.", False,
         lambda f: f.inactive_file),
    Kind("container_memory_kernel_usage", "Memory of the kernel.", False, lambda f: f.kernel),
    Kind("container_memory_swap", "Swap in use.", False, lambda f: f.swap),
    Kind("container_memory_failcnt", "How often the memory limit was hit.", True, lambda f: f.failures),
    Kind("container_spec_memory_limit_bytes", "The memory limit, 0 for none.", False, lambda f: f.limit),
    Kind("container_processes", "Processes in the container.", False, lambda f: f.processes),
)  # fmt: skip
_DISKS = (
    (Split("container_fs_reads_bytes_total", "Bytes read from a device.", "device"), "read_bytes"),
    (Split("container_fs_writes_bytes_total", "Bytes written to a device.", "device"), "write_bytes"),
    (Split("container_fs_reads_total", "Reads from a device.", "device"), "reads"),
    (Split("container_fs_writes_total", "Writes to a device.", "device"), "writes"),
)
_FAULTS = Split("container_memory_failures_total", "Page faults.", "failure_type")
_USED = ("container_fs_usage_bytes", "Bytes in the container's writable layer.")
_INODES = ("container_fs_inodes_total", "Inodes in the container's writable layer.")
_STARTED = ("container_start_time_seconds", "When it was started, in seconds since the epoch.")
_NETWORK = (
    (Split("container_network_receive_bytes_total", "Bytes received.", "interface"), "rx_bytes"),
    (Split("container_network_receive_packets_total", "Packets received.", "interface"), "rx_packets"),
    (Split("container_network_receive_packets_dropped_total", "Packets dropped on receipt.", "interface"),
     "rx_dropped"),
    (Split("container_network_receive_errors_total", "Errors on receipt.", "interface"), "rx_errors"),
    (Split("container_network_transmit_bytes_total", "Bytes sent.", "interface"), "tx_bytes"),
    (Split("container_network_transmit_packets_total", "Packets sent.", "interface"), "tx_packets"),
    (Split("container_network_transmit_packets_dropped_total", "Packets dropped on their way out.", "interface"),
     "tx_dropped"),
    (Split("container_network_transmit_errors_total", "Errors on sending.", "interface"), "tx_errors"),
)  # fmt: skip


def descriptors() -> list[cri.MetricDescriptor]:
    """All metrics, with the names of their labels."""
    found = [cri.MetricDescriptor(name=kind.name, help=kind.help, label_keys=_KEYS) for kind in _CONTAINER]
    found += [cri.MetricDescriptor(name=name, help=text, label_keys=_KEYS) for name, text in (_USED, _INODES, _STARTED)]
    splits = [split for split, _ in _DISKS] + [_FAULTS]
    found += [
        cri.MetricDescriptor(name=split.name, help=split.help, label_keys=[*_KEYS, split.label]) for split in splits
    ]
    found += [
        cri.MetricDescriptor(name=split.name, help=split.help, label_keys=[*_POD_KEYS, split.label])
        for split, _ in _NETWORK
    ]
    return found


def of_pod(pod: Pod, network: Iterable[Interface], now: int) -> list[cri.Metric]:
    """What belongs to a pod and none of its containers: its network."""
    metadata = pod.config.metadata
    labels = (pod.id, metadata.namespace, metadata.name)
    return [
        _metric(split.name, True, (*labels, interface.name), getattr(interface, attribute), now)
        for interface in network
        for split, attribute in _NETWORK
    ]


def of_member(pod: Pod, member: Member, figures: Figures, disk: Usage | None, now: int) -> list[cri.Metric]:
    """What belongs to a container."""
    metadata = pod.config.metadata
    labels = (
        member.id,
        member.facts.image,
        member.facts.name,
        member.config.metadata.name,
        metadata.namespace,
        metadata.name,
    )
    found = [_metric(kind.name, kind.counter, labels, kind.value(figures), now) for kind in _CONTAINER]
    found.append(_metric(_STARTED[0], False, labels, member.facts.started_at // _SECOND, now))
    if disk is not None:
        found.append(_metric(_USED[0], False, labels, disk.size, now))
        found.append(_metric(_INODES[0], False, labels, disk.inodes, now))
    for kind, value in (("pgfault", figures.faults), ("pgmajfault", figures.major_faults)):
        found.append(_metric(_FAULTS.name, True, (*labels, kind), value, now))
    found += [
        _metric(split.name, True, (*labels, each.device), getattr(each, attribute), now)
        for each in figures.disks
        for split, attribute in _DISKS
    ]
    return found


def _metric(name: str, counter: bool, labels: Sequence[str], value: int, now: int) -> cri.Metric:
    kind = cri.COUNTER if counter else cri.GAUGE
    return cri.Metric(
        name=name, timestamp=now, metric_type=kind, label_values=labels, value=cri.UInt64Value(value=value)
    )
