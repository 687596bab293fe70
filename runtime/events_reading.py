"""Counters as `runc events --stats` prints them (its `types/events.go`): times in nanoseconds, sizes in bytes.

runc leaves most zeros out; so does this, because scripts compare. A limit of none is the kernel's own number for it.
"""

from __future__ import annotations

import os

from wherry.linux.cgroups.files import key_values, number, read_or_empty
from wherry.runtime import rdt
from wherry.runtime.settings import numbers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_USEC = 1000
_CPUSET = (
    "cpu_exclusive",
    "mem_hardwall",
    "mem_exclusive",
    "memory_migrate",
    "memory_spread_page",
    "memory_spread_slab",
    "memory_pressure",
    "sched_load_balance",
    "sched_relax_domain_level",
)
_BLKIO = {  # containerd's name → runc's
    "io_service_bytes_recursive": "ioServiceBytesRecursive",
    "io_serviced_recursive": "ioServicedRecursive",
    "io_queued_recursive": "ioQueueRecursive",
    "io_service_time_recursive": "ioServiceTimeRecursive",
    "io_wait_time_recursive": "ioWaitTimeRecursive",
    "io_merged_recursive": "ioMergedRecursive",
    "io_time_recursive": "ioTimeRecursive",
    "sectors_recursive": "sectorsRecursive",
}
_NO_LIMIT = 2**64 - 1


def reading(cgroup: Any, rdt_class: str = "") -> dict[str, Any]:
    """One reading of a `wherry.linux.cgroups` object, and of the container's directory in resctrl."""
    stats = cgroup.stats()
    found = _v1(stats.values, cgroup.paths) if stats.version == 1 else _v2(stats.values, cgroup.paths[""])
    return {**found, "intel_rdt": rdt.statistics(rdt_class), "network_interfaces": None}


def _some(**values: Any) -> dict[str, Any]:
    """Without what is zero or empty."""
    return {key: value for key, value in values.items() if value}


def _v1(values: dict[str, Any], paths: dict[str, str]) -> dict[str, Any]:
    cpu, memory = values.get("cpu") or {}, values.get("memory") or {}
    usage, throttling = cpu.get("usage") or {}, cpu.get("throttling") or {}
    kernel, user = _per_cpu(paths.get("cpuacct", ""))
    return {
        "cpu": {
            "usage": {
                **_some(total=usage.get("total"), percpu=list(usage.get("per_cpu") or ())),
                **_some(percpu_kernel=kernel, percpu_user=user),
                "kernel": usage.get("kernel", 0),
                "user": usage.get("user", 0),
            },
            "throttling": _some(
                periods=throttling.get("periods"),
                throttledPeriods=throttling.get("throttled_periods"),
                throttledTime=throttling.get("throttled_time"),
            ),
        },
        "cpuset": _cpuset(paths.get("cpuset", "")),
        "memory": {
            **_some(cache=memory.get("cache")),
            "usage": _entry(memory.get("usage")),
            "swap": _entry(memory.get("swap")),
            "kernel": _entry(memory.get("kernel")),
            "kernelTCP": _entry(memory.get("kernel_tcp")),
            **_some(raw=dict(key_values(read_or_empty(f"{paths.get('memory', '')}/memory.stat")))),
        },
        "pids": _pids(values),
        "blkio": {
            _BLKIO[name]: [_blkio_entry(item) for item in items]
            for name, items in (values.get("blkio") or {}).items()
            if name in _BLKIO and items
        },
        "hugetlb": {
            item["pagesize"]: {**_some(usage=item["usage"], max=item["max"]), "failcnt": item["failcnt"]}
            for item in values.get("hugetlb") or ()
            if item["usage"] or item["max"] or item["failcnt"]
        },
    }


def _per_cpu(folder: str) -> tuple[list[int], list[int]]:
    """(kernel, user) of each CPU from cpuacct.usage_all: lines `cpu user system` below a head."""
    rows = [line.split() for line in read_or_empty(f"{folder}/cpuacct.usage_all").splitlines()[1:]]
    return [int(row[2]) for row in rows], [int(row[1]) for row in rows]


def _cpuset(folder: str) -> dict[str, Any]:
    if not os.path.isdir(folder):
        return {}
    found: dict[str, Any] = {name: number(read_or_empty(f"{folder}/cpuset.{name}").strip() or "0") for name in _CPUSET}
    for name in ("cpus", "mems"):
        found.update(_some(**{name: sorted(numbers(read_or_empty(f"{folder}/cpuset.{name}").strip()))}))
    return found


def _entry(values: dict[str, Any] | None) -> dict[str, int]:
    found = values or {}
    zero = {"limit": found.get("limit", 0), "failcnt": found.get("failcnt", 0)}
    return {**zero, **_some(usage=found.get("usage"), max=found.get("max"))}


def _pids(values: dict[str, Any]) -> dict[str, int]:
    pids = values.get("pids") or {}
    limit = pids.get("limit") or 0
    return _some(current=pids.get("current"), limit=0 if limit == _NO_LIMIT else limit)


def _blkio_entry(item: dict[str, Any]) -> dict[str, Any]:
    return _some(major=item.get("major"), minor=item.get("minor"), op=item.get("op"), value=item.get("value"))


def _v2(values: dict[str, Any], folder: str) -> dict[str, Any]:
    cpu, memory = values.get("cpu") or {}, values.get("memory") or {}
    usage = {"limit": memory.get("usage_limit"), "usage": memory.get("usage"), "max": memory.get("max_usage")}
    swap = {"limit": memory.get("swap_limit"), "usage": memory.get("swap_usage")}
    return {
        "cpu": {
            "usage": {
                **_some(total=cpu.get("usage_usec", 0) * _USEC),
                "kernel": cpu.get("system_usec", 0) * _USEC,
                "user": cpu.get("user_usec", 0) * _USEC,
            },
            "throttling": _some(
                periods=cpu.get("nr_periods"),
                throttledPeriods=cpu.get("nr_throttled"),
                throttledTime=cpu.get("throttled_usec", 0) * _USEC,
            ),
        },
        "cpuset": {},
        "memory": {
            **_some(cache=memory.get("file")),
            "usage": _entry({key: value for key, value in usage.items() if value is not None}),
            "swap": _entry({key: value for key, value in swap.items() if value is not None}),
            "kernel": _entry(None),
            "kernelTCP": _entry(None),
            **_some(raw=dict(key_values(read_or_empty(f"{folder}/memory.stat")))),
        },
        "pids": _pids(values),
        "blkio": _some(ioServiceBytesRecursive=_io_stat(folder, bytes_=True), ioServicedRecursive=_io_stat(folder)),
        "hugetlb": {
            item["pagesize"]: {**_some(usage=item["current"]), "failcnt": item["failcnt"]}
            for item in values.get("hugetlb") or ()
            if item["current"] or item["failcnt"]
        },
    }


def _io_stat(folder: str, *, bytes_: bool = False) -> list[dict[str, Any]]:
    """io.stat, `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`, as entries with an `op`."""
    wanted = {"rbytes": "Read", "wbytes": "Write"} if bytes_ else {"rios": "Read", "wios": "Write"}
    found = []
    for line in read_or_empty(f"{folder}/io.stat").splitlines():
        device, *fields = line.split()
        major, _, minor = device.partition(":")
        for field in fields:
            name, _, text = field.partition("=")
            if name in wanted:
                found.append(
                    _blkio_entry({"major": int(major), "minor": int(minor), "op": wanted[name], "value": int(text)})
                )
    return found
