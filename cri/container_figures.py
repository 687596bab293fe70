"""What a cgroup counts, in the same figures whatever its version: for the CRI's stats and metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from wherry.core import typeurl
from wherry.proto import cgroups_v1_pb2, cgroups_v2_pb2
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as Packed

# what the kernel calls no limit: v1 the highest multiple of the page size that fits, v2 all ones
_UNLIMITED = 1 << 62
_USEC = 1000


class Disk(NamedTuple):
    """What a device was asked for: bytes and operations."""

    device: str
    read_bytes: int
    write_bytes: int
    reads: int
    writes: int


class Figures(NamedTuple):
    """Bytes, nanoseconds, counts; 0 where the kernel doesn't tell. `limit` 0: none. `swap` is swap alone."""

    cpu: int = 0
    cpu_user: int = 0
    cpu_system: int = 0
    periods: int = 0
    throttled_periods: int = 0
    throttled: int = 0
    memory: int = 0
    limit: int = 0
    max_memory: int = 0
    failures: int = 0
    working_set: int = 0
    rss: int = 0
    cache: int = 0
    mapped_file: int = 0
    active_file: int = 0
    inactive_file: int = 0
    kernel: int = 0
    faults: int = 0
    major_faults: int = 0
    swap: int = 0
    swap_limit: int = 0
    processes: int = 0
    disks: tuple[Disk, ...] = ()
    cpu_pressure: cri.PsiStats | None = None
    memory_pressure: cri.PsiStats | None = None
    io_pressure: cri.PsiStats | None = None

    @property
    def available(self) -> int:
        """What the limit leaves, 0 without one."""
        return max(0, self.limit - self.working_set) if self.limit else 0

    @property
    def swap_available(self) -> int:
        """What the limit of swap leaves, 0 without one."""
        return max(0, self.swap_limit - self.swap) if self.swap_limit else 0


def unpack(packed: Packed) -> Figures:
    """From a task's metrics. Raises InvalidArgument for those of something that is no cgroup."""
    if packed.type_url.endswith("cgroups.v1.Metrics"):
        return first(typeurl.unpack_as(packed, cgroups_v1_pb2.Metrics))
    return second(typeurl.unpack_as(packed, cgroups_v2_pb2.Metrics))


def first(metrics: cgroups_v1_pb2.Metrics) -> Figures:
    """From version 1; the figures with those of the cgroups below."""
    cpu, memory = metrics.cpu, metrics.memory
    usage, limit = memory.usage.usage, _limit(memory.usage.limit)
    both = _limit(memory.swap.limit)
    return Figures(
        cpu=cpu.usage.total,
        cpu_user=cpu.usage.user,
        cpu_system=cpu.usage.kernel,
        periods=cpu.throttling.periods,
        throttled_periods=cpu.throttling.throttled_periods,
        throttled=cpu.throttling.throttled_time,
        memory=usage,
        limit=limit,
        max_memory=memory.usage.max,
        failures=memory.usage.failcnt,
        working_set=max(0, usage - memory.total_inactive_file),
        rss=memory.total_rss,
        cache=memory.total_cache,
        mapped_file=memory.total_mapped_file,
        active_file=memory.total_active_file,
        inactive_file=memory.total_inactive_file,
        kernel=memory.kernel.usage,
        faults=memory.total_pg_fault,
        major_faults=memory.total_pg_maj_fault,
        # version 1 counts memory and swap together
        swap=max(0, memory.swap.usage - usage) if memory.swap.usage else 0,
        swap_limit=max(0, both - limit) if both and limit else 0,
        processes=metrics.pids.current,
        disks=_disks(metrics.blkio),
    )


def _disks(blkio: cgroups_v1_pb2.BlkIOStat) -> tuple[Disk, ...]:
    found: dict[str, list[int]] = {}
    for column, entries in ((0, blkio.io_service_bytes_recursive), (2, blkio.io_serviced_recursive)):
        for entry in entries:
            kind = entry.op.lower()
            if kind in {"read", "write"}:
                row = found.setdefault(f"{entry.major}:{entry.minor}", [0, 0, 0, 0])
                row[column + (kind == "write")] += entry.value
    return tuple(Disk(device, *row) for device, row in found.items())


def second(metrics: cgroups_v2_pb2.Metrics) -> Figures:
    """From version 2."""
    cpu, memory = metrics.cpu, metrics.memory
    return Figures(
        cpu=cpu.usage_usec * _USEC,
        cpu_user=cpu.user_usec * _USEC,
        cpu_system=cpu.system_usec * _USEC,
        periods=cpu.nr_periods,
        throttled_periods=cpu.nr_throttled,
        throttled=cpu.throttled_usec * _USEC,
        memory=memory.usage,
        limit=_limit(memory.usage_limit),
        max_memory=memory.max_usage,
        failures=metrics.memory_events.max,
        working_set=max(0, memory.usage - memory.inactive_file),
        rss=memory.anon,
        cache=memory.file,
        mapped_file=memory.file_mapped,
        active_file=memory.active_file,
        inactive_file=memory.inactive_file,
        kernel=memory.kernel_stack + memory.slab,
        faults=memory.pgfault,
        major_faults=memory.pgmajfault,
        swap=memory.swap_usage,
        swap_limit=_limit(memory.swap_limit),
        processes=metrics.pids.current,
        disks=tuple(
            Disk(f"{entry.major}:{entry.minor}", entry.rbytes, entry.wbytes, entry.rios, entry.wios)
            for entry in metrics.io.usage
        ),
        cpu_pressure=_pressure(cpu.psi) if cpu.HasField("psi") else None,
        memory_pressure=_pressure(memory.psi) if memory.HasField("psi") else None,
        io_pressure=_pressure(metrics.io.psi) if metrics.io.HasField("psi") else None,
    )


def _limit(value: int) -> int:
    return 0 if value >= _UNLIMITED else value


def _pressure(stats: cgroups_v2_pb2.PSIStats) -> cri.PsiStats:
    some, full = (
        cri.PsiData(Total=part.total, Avg10=part.avg10, Avg60=part.avg60, Avg300=part.avg300)
        for part in (stats.some, stats.full)
    )
    return cri.PsiStats(Some=some, Full=full)
