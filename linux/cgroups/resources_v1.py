"""`linux.resources` of the OCI runtime specification written to the files of v1 cgroups."""

from __future__ import annotations

import errno
import os

from wherry.linux.cgroups.convert import integer, items, section
from wherry.linux.cgroups.files import read, read_or_empty, try_write, write
from wherry.linux.cgroups.resources_v2 import check_memory, device_number, hugepage_size, rdma_line

TYPE_CHECKING = False  # typing alone would cost as much as a container's cgroups; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_THROTTLES = (
    ("throttleReadBpsDevice", "blkio.throttle.read_bps_device"),
    ("throttleWriteBpsDevice", "blkio.throttle.write_bps_device"),
    ("throttleReadIOPSDevice", "blkio.throttle.read_iops_device"),
    ("throttleWriteIOPSDevice", "blkio.throttle.write_iops_device"),
)


def apply(paths: Mapping[str, str], resources: Mapping[str, Any]) -> None:
    """Write everything but the device rules. `paths`: controller → directory.

    Raises ValueError where a limit asks for a controller that this host doesn't have.
    """
    cpu = section(resources, "cpu")
    if cpu.get("cpus") or cpu.get("mems"):
        _cpuset(_directory(paths, "cpuset"), cpu)
    if memory := section(resources, "memory"):
        _memory(_directory(paths, "memory"), memory)
    if cpu:
        _cpu(paths, cpu)
    if value := integer(section(resources, "pids"), "limit", "pids"):
        write(f"{_directory(paths, 'pids')}/pids.max", "max" if value < 0 else str(value))
    if block := section(resources, "blockIO"):
        _blkio(_directory(paths, "blkio"), block)
    for index, entry in enumerate(items(resources, "hugepageLimits", "hugepageLimits")):
        size, value = hugepage_size(index, entry), integer(entry, "limit", "hugepageLimits")
        directory = _directory(paths, "hugetlb")
        write(f"{directory}/hugetlb.{size}.limit_in_bytes", str(value))
        try_write(f"{directory}/hugetlb.{size}.rsvd.limit_in_bytes", str(value))  # accounted since 5.7
    _network(paths, section(resources, "network"))
    for device, rdma in section(resources, "rdma").items():
        write(f"{_directory(paths, 'rdma')}/rdma.max", rdma_line(device, rdma))
    if section(resources, "unified"):
        msg = "linux.resources.unified needs cgroup v2, and this host runs containers on v1"
        raise ValueError(msg)


def _directory(paths: Mapping[str, str], controller: str) -> str:
    directory = paths.get(controller)
    if directory is None:
        msg = f"cannot set {controller} limit: container could not join or create cgroup (no {controller} controller)"
        raise ValueError(msg)
    return directory


def _memory(directory: str, memory: Mapping[str, Any]) -> None:
    maximum, swap = integer(memory, "limit", "memory"), integer(memory, "swap", "memory")
    if memory.get("checkBeforeUpdate"):
        check_memory(f"{directory}/memory.usage_in_bytes", maximum)
    _memory_limits(directory, maximum, swap)
    # memory.kmem.limit_in_bytes is gone from kernels since 5.16 and ignored, as runc does
    if reservation := integer(memory, "reservation", "memory"):
        write(f"{directory}/memory.soft_limit_in_bytes", str(reservation))
    if tcp := integer(memory, "kernelTCP", "memory"):
        write(f"{directory}/memory.kmem.tcp.limit_in_bytes", str(tcp))
    if memory.get("disableOOMKiller"):
        write(f"{directory}/memory.oom_control", "1")
    if (swappiness := memory.get("swappiness")) is not None:
        if not isinstance(swappiness, int) or not 0 <= swappiness <= 100:
            msg = f"invalid memory swappiness value: {swappiness} (valid range is 0-100)"
            raise ValueError(msg)
        write(f"{directory}/memory.swappiness", str(swappiness))


def _memory_limits(directory: str, maximum: int, swap: int) -> None:
    memsw = f"{directory}/memory.memsw.limit_in_bytes"
    if maximum == -1 and swap == 0 and os.path.exists(memsw):
        swap = -1  # lifting the limit lifts memory+swap, which could else stay below it
    if maximum and swap:
        # memory <= memory+swap must hold after each write: which goes first depends on the present limit
        present = int(read(f"{directory}/memory.limit_in_bytes"))
        if swap == -1 or present < swap:
            _limit(memsw, swap)
            _limit(f"{directory}/memory.limit_in_bytes", maximum)
        else:
            _limit(f"{directory}/memory.limit_in_bytes", maximum)
            _limit(memsw, swap)
    elif maximum:
        _limit(f"{directory}/memory.limit_in_bytes", maximum)
    elif swap:
        _limit(memsw, swap)


def _limit(path: str, value: int) -> None:
    try:
        write(path, str(value))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        directory = os.path.dirname(path)
        usage, peak = (
            read_or_empty(f"{directory}/memory.{name}_in_bytes").strip() or "unknown" for name in ("usage", "max_usage")
        )
        msg = f"unable to set memory limit to {value} (current usage: {usage}, peak usage: {peak})"
        raise OSError(errno.EBUSY, msg, path) from error


def _cpu(paths: Mapping[str, str], cpu: Mapping[str, Any]) -> None:
    values = {
        key: integer(cpu, key, "cpu") for key in ("shares", "quota", "period", "realtimePeriod", "realtimeRuntime")
    }
    if not any(values.values()) and cpu.get("burst") is None and cpu.get("idle") is None:
        return
    directory = _directory(paths, "cpu")
    if values["shares"]:
        _shares(directory, values["shares"])
    if values["realtimePeriod"]:
        write(f"{directory}/cpu.rt_period_us", str(values["realtimePeriod"]))
    if values["realtimeRuntime"]:
        write(f"{directory}/cpu.rt_runtime_us", str(values["realtimeRuntime"]))
    burst = cpu.get("burst")
    if burst is not None:
        # above the present quota it is refused: again below, when the new one is set
        try_write(f"{directory}/cpu.cfs_burst_us", str(burst))
    _quota(directory, values["quota"], values["period"])
    if burst is not None:
        write(f"{directory}/cpu.cfs_burst_us", str(burst))
    if (idle := cpu.get("idle")) is not None:
        write(f"{directory}/cpu.idle", str(idle))


def _quota(directory: str, quota: int, period: int) -> None:
    period_file, late_period = f"{directory}/cpu.cfs_period_us", False
    if period:
        try:
            write(period_file, str(period))
        except OSError as error:
            # the old quota may not fit the new period: quota first then
            if error.errno != errno.EINVAL or not quota:
                raise
            late_period = True
    if quota:
        write(f"{directory}/cpu.cfs_quota_us", str(quota))
    if late_period:
        write(period_file, str(period))


def _shares(directory: str, shares: int) -> None:
    write(f"{directory}/cpu.shares", str(shares))
    # the kernel clips silently; runc refuses, so that nobody believes in what isn't there
    got = int(read(f"{directory}/cpu.shares"))
    if shares > got:
        msg = f"the maximum allowed cpu-shares is {got}"
        raise ValueError(msg)
    if shares < got:
        msg = f"the minimum allowed cpu-shares is {got}"
        raise ValueError(msg)


def _cpuset(directory: str, cpu: Mapping[str, Any]) -> None:
    for key in ("cpus", "mems"):
        if value := cpu.get(key):
            write(f"{directory}/cpuset.{key}", str(value))


def _blkio(directory: str, block: Mapping[str, Any]) -> None:
    bfq = os.path.exists(f"{directory}/blkio.bfq.weight")
    prefix = "blkio.bfq." if bfq else "blkio."
    if weight := integer(block, "weight", "blockIO"):
        write(f"{directory}/{prefix}weight", str(weight))
    if leaf := integer(block, "leafWeight", "blockIO"):
        write(f"{directory}/blkio.leaf_weight", str(leaf))
    for entry in items(block, "weightDevice", "blockIO.weightDevice"):
        if weight := integer(entry, "weight", "blockIO.weightDevice"):
            write(f"{directory}/{prefix}weight_device", f"{device_number(entry)} {weight}")
        if leaf := integer(entry, "leafWeight", "blockIO.weightDevice"):
            write(f"{directory}/blkio.leaf_weight_device", f"{device_number(entry)} {leaf}")
    for key, name in _THROTTLES:
        for entry in items(block, key, f"blockIO.{key}"):
            write(f"{directory}/{name}", f"{device_number(entry)} {integer(entry, 'rate', f'blockIO.{key}')}")


def _network(paths: Mapping[str, str], network: Mapping[str, Any]) -> None:
    if class_id := integer(network, "classID", "network"):
        write(f"{_directory(paths, 'net_cls')}/net_cls.classid", str(class_id))
    for entry in items(network, "priorities", "network.priorities"):
        write(f"{_directory(paths, 'net_prio')}/net_prio.ifpriomap", f"{entry.get('name')} {entry.get('priority')}")
