"""`linux.resources` of the OCI runtime specification written to the files of a v2 cgroup."""

from __future__ import annotations

import errno
import os

from wherry.linux.cgroups.convert import cpu_weight, integer, io_weight, items, limit, section, swap_max
from wherry.linux.cgroups.files import read, read_or_empty, try_write, write

TYPE_CHECKING = False  # typing alone would cost as much as a container's cgroups; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_THROTTLES = (
    ("throttleReadBpsDevice", "rbps"),
    ("throttleWriteBpsDevice", "wbps"),
    ("throttleReadIOPSDevice", "riops"),
    ("throttleWriteIOPSDevice", "wiops"),
)
_DEFAULT_PERIOD = 100000  # microseconds, the kernel's


def apply(directory: str, resources: Mapping[str, Any]) -> None:
    """Write everything but the device rules, in runc's order."""
    if value := integer(section(resources, "pids"), "limit", "pids"):
        write(f"{directory}/pids.max", limit(value))
    if memory := section(resources, "memory"):
        _memory(directory, memory)
    if block := section(resources, "blockIO"):
        _io(directory, block)
    if cpu := section(resources, "cpu"):
        _cpu(directory, cpu)
        _cpuset(directory, cpu)
    for index, entry in enumerate(items(resources, "hugepageLimits", "hugepageLimits")):
        _hugetlb(directory, index, entry)
    for device, entry in section(resources, "rdma").items():
        write(f"{directory}/rdma.max", rdma_line(device, entry))
    _unified(directory, section(resources, "unified"))


def _memory(directory: str, memory: Mapping[str, Any]) -> None:
    maximum = integer(memory, "limit", "memory")
    swap = swap_max(integer(memory, "swap", "memory"), maximum)
    if swap is not None:
        try:
            write(f"{directory}/memory.swap.max", limit(swap))
        except FileNotFoundError:
            # no swap accounting: there is nothing to limit or to switch off
            if swap > 0:
                raise
    if maximum:
        if memory.get("checkBeforeUpdate"):
            check_memory(f"{directory}/memory.current", maximum)
        write(f"{directory}/memory.max", limit(maximum))
    if reservation := integer(memory, "reservation", "memory"):
        write(f"{directory}/memory.low", limit(reservation))


def check_memory(usage_file: str, maximum: int) -> None:
    """`checkBeforeUpdate`: refuse a limit (bytes) below the present usage, which would start the OOM killer."""
    usage = int(read_or_empty(usage_file) or 0)
    if 0 < maximum < usage:
        msg = f"rejecting memory limit {maximum} < usage {usage}"
        raise ValueError(msg)


def _cpu(directory: str, cpu: Mapping[str, Any]) -> None:
    if (idle := cpu.get("idle")) is not None:
        write(f"{directory}/cpu.idle", str(idle))
    weight = cpu_weight(integer(cpu, "shares", "cpu"))
    if weight and not idle:  # the kernel refuses a weight while the cgroup is idle
        write(f"{directory}/cpu.weight", str(weight))
    burst = cpu.get("burst")
    burst_file = f"{directory}/cpu.max.burst"
    late_burst = False
    if burst is not None:
        try:
            write(burst_file, str(burst))
        except OSError as error:
            # a burst above the present quota: once more when the new quota is set
            if error.errno != errno.EINVAL:
                raise
            late_burst = True
    quota, period = integer(cpu, "quota", "cpu"), integer(cpu, "period", "cpu")
    if quota or period:
        write(f"{directory}/cpu.max", f"{quota if quota > 0 else 'max'} {period or _DEFAULT_PERIOD}")
    if late_burst:
        write(burst_file, str(burst))
    if integer(cpu, "realtimeRuntime", "cpu") or integer(cpu, "realtimePeriod", "cpu"):
        msg = "linux.resources.cpu: realtime limits can't be set on cgroup v2"
        raise ValueError(msg)


def _cpuset(directory: str, cpu: Mapping[str, Any]) -> None:
    for key in ("cpus", "mems"):
        if value := cpu.get(key):
            write(f"{directory}/cpuset.{key}", str(value))


def _io(directory: str, block: Mapping[str, Any]) -> None:
    weight = integer(block, "weight", "blockIO")
    bfq = os.path.exists(f"{directory}/io.bfq.weight") if weight or block.get("weightDevice") else False
    if weight:
        # BFQ's own file takes the spec's scale; io.weight has another one
        write(
            f"{directory}/io.bfq.weight" if bfq else f"{directory}/io.weight", str(weight if bfq else io_weight(weight))
        )
    for entry in items(block, "weightDevice", "blockIO.weightDevice"):
        if value := integer(entry, "weight", "blockIO.weightDevice"):
            line = f"{device_number(entry)} {value if bfq else io_weight(value)}"
            write(f"{directory}/io.bfq.weight" if bfq else f"{directory}/io.weight", line)
    for key, name in _THROTTLES:
        for entry in items(block, key, f"blockIO.{key}"):
            rate = integer(entry, "rate", f"blockIO.{key}")
            write(f"{directory}/io.max", f"{device_number(entry)} {name}={rate or 'max'}")


def device_number(entry: Mapping[str, Any]) -> str:
    """MAJOR:MINOR of an entry of blockIO."""
    return f"{integer(entry, 'major', 'blockIO')}:{integer(entry, 'minor', 'blockIO')}"


def rdma_line(device: str, entry: object) -> str:
    """A line of rdma.max, the same on v1 and v2. Raises ValueError where neither limit is given."""
    names = (("hcaHandles", "hca_handle"), ("hcaObjects", "hca_object"))
    if isinstance(entry, dict):
        parts = [f"{name}={entry[key]}" for key, name in names if entry.get(key) is not None]
        if parts:
            return f"{device} {' '.join(parts)}"
    msg = f"linux.resources.rdma[{device}]: neither hcaHandles nor hcaObjects"
    raise ValueError(msg)


def hugepage_size(index: int, entry: Mapping[str, Any]) -> str:
    """The page size of an entry ("2MB"), safe as a part of a file's name."""
    size = entry.get("pageSize")
    if not isinstance(size, str) or not size.isalnum():
        msg = f"linux.resources.hugepageLimits[{index}].pageSize: invalid size {size!r}"
        raise ValueError(msg)
    return size


def _hugetlb(directory: str, index: int, entry: Mapping[str, Any]) -> None:
    size, value = hugepage_size(index, entry), integer(entry, "limit", "hugepageLimits")
    write(f"{directory}/hugetlb.{size}.max", str(value))
    try_write(f"{directory}/hugetlb.{size}.rsvd.max", str(value))  # reservations are accounted since 5.7


def _unified(directory: str, unified: Mapping[str, Any]) -> None:
    for key, value in unified.items():
        if "/" in key:
            msg = f'unified resource "{key}" must be a file name (no slashes)'
            raise ValueError(msg)
        controller, dot, _ = key.partition(".")
        if not dot:
            msg = f'unified resource "{key}" must be in the form CONTROLLER.PARAMETER'
            raise ValueError(msg)
        try:
            for line in str(value).splitlines() or [""]:
                write(f"{directory}/{key}", line)
        except (FileNotFoundError, PermissionError) as error:
            if controller != "cgroup" and controller not in read(f"{directory}/cgroup.controllers").split():
                msg = f'unified resource "{key}" can\'t be set: controller "{controller}" not available'
                raise ValueError(msg) from error
            msg = f'unified resource "{key}" can\'t be set: {error.strerror}'
            raise ValueError(msg) from error
