"""What running containers use, as docker's `stats` shows it: two samples of their cgroups and what lies between."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from wherry.client.usage import usage
from wherry.core import typeurl
from wherry.core.tuples import NamedTuple
from wherry.proto import cgroups_v1_pb2, cgroups_v2_pb2

if TYPE_CHECKING:
    from wherry.client.tasks import Metrics


class Sample(NamedTuple):
    """One moment. Bytes; `cpu` in seconds so far; `memory` without the page cache that would be given up first."""

    at: float
    cpu: float
    memory: int
    limit: int
    processes: int
    read: int
    written: int
    received: int
    sent: int


class Figures(NamedTuple):
    """What a container uses. `cpu` is in percent of one CPU, `memory_share` in percent of its limit."""

    sample: Sample
    cpu: float
    memory_share: float


def sample(metrics: Metrics, pid: int = 0) -> Sample:
    """A sample of `tasks.metrics`; with the container's pid also its network's, where this host can see it."""
    basic = usage(metrics.data)
    cache, read, written = _detail(metrics)
    received, sent = network(pid) if pid else (0, 0)
    return Sample(
        metrics.at,
        basic.cpu,
        max(0, basic.memory - cache),
        basic.memory_limit or host_memory(),
        basic.processes,
        read,
        written,
        received,
        sent,
    )


def between(first: Sample | None, second: Sample) -> Figures:
    """What was used between two samples; without a first one, no CPU time."""
    cpu = 0.0
    if first is not None and second.at > first.at:
        cpu = max(0.0, second.cpu - first.cpu) / (second.at - first.at) * 100
    return Figures(second, cpu, second.memory / second.limit * 100 if second.limit else 0.0)


def _detail(metrics: Metrics) -> tuple[int, int, int]:
    """Page cache that is given up first, bytes read from devices and written to them."""
    if metrics.data.type_url.endswith("cgroups.v1.Metrics"):
        old = typeurl.unpack_as(metrics.data, cgroups_v1_pb2.Metrics)
        entries = old.blkio.io_service_bytes_recursive
        read = sum(entry.value for entry in entries if entry.op.lower() == "read")
        written = sum(entry.value for entry in entries if entry.op.lower() == "write")
        return old.memory.total_inactive_file, read, written
    new = typeurl.unpack_as(metrics.data, cgroups_v2_pb2.Metrics)
    read, written = sum(entry.rbytes for entry in new.io.usage), sum(entry.wbytes for entry in new.io.usage)
    return new.memory.inactive_file, read, written


def network(pid: int) -> tuple[int, int]:
    """Bytes that a process' network namespace received and sent, without its loopback; zeros where it can't be seen."""
    received = sent = 0
    try:
        with open(f"/proc/{pid}/net/dev", encoding="ascii", errors="replace") as file:
            lines = file.readlines()[2:]
    except OSError:
        return 0, 0
    for line in lines:
        name, _, rest = line.partition(":")
        fields = rest.split()
        if name.strip() != "lo" and len(fields) > 8:
            received, sent = received + int(fields[0]), sent + int(fields[8])
    return received, sent


def host_memory() -> int:
    """Bytes of memory of this host."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def by_container(found: list[Metrics]) -> Mapping[str, Metrics]:
    """Samples by the container's id."""
    return {item.id: item for item in found}
