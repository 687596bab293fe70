"""Counters of v1 cgroups in the shape of `io.containerd.cgroups.v1.Metrics`."""

from __future__ import annotations

import os

from wherry.linux.cgroups.files import key_values, number, read_or_empty

TYPE_CHECKING = False  # typing alone would cost as much as a container's cgroups; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

_MEMORY_FIELDS = (
    *("cache", "rss", "rss_huge", "mapped_file", "dirty", "writeback", "unevictable"),
    *("inactive_anon", "active_anon", "inactive_file", "active_file"),
)
#: Key of memory.stat → field; the "total_" keys count those below too.
_MEMORY = {
    **{prefix + name: prefix + name for prefix in ("", "total_") for name in _MEMORY_FIELDS},
    **{
        f"{prefix}{name}": f"{prefix}{field}"
        for prefix in ("", "total_")
        for name, field in (
            ("pgpgin", "pg_pg_in"),
            ("pgpgout", "pg_pg_out"),
            ("pgfault", "pg_fault"),
            ("pgmajfault", "pg_maj_fault"),
        )
    },
    "hierarchical_memory_limit": "hierarchical_memory_limit",
    "hierarchical_memsw_limit": "hierarchical_swap_limit",
}
_NANOSECONDS = 10**9


def collect(paths: Mapping[str, str]) -> dict[str, Any]:
    """Read what the present controllers count. `paths`: controller → directory."""
    readers: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
        ("hugetlb", "hugetlb", _hugetlb),
        ("pids", "pids", _pids),
        ("memory", "memory", _memory),
        ("memory_oom_control", "memory", _oom_control),
        ("blkio", "blkio", _blkio),
        ("rdma", "rdma", rdma),
    )
    found = {field: value for field, name, reader in readers if name in paths and (value := reader(paths[name]))}
    if cpu := _cpu(paths):
        found["cpu"] = cpu
    return found


def _hugetlb(directory: str) -> list[dict[str, Any]]:
    sizes = page_sizes(directory, "limit_in_bytes")
    return [
        {
            "pagesize": size,
            "usage": number(read_or_empty(f"{directory}/hugetlb.{size}.usage_in_bytes")),
            "max": number(read_or_empty(f"{directory}/hugetlb.{size}.max_usage_in_bytes")),
            "failcnt": number(read_or_empty(f"{directory}/hugetlb.{size}.failcnt")),
        }
        for size in sizes
    ]


def page_sizes(directory: str, file: str) -> list[str]:
    """The sizes of huge pages ("2MB") that the cgroup has a file `hugetlb.SIZE.FILE` for."""
    try:
        names = [name.split(".", 2) for name in os.listdir(directory) if name.startswith("hugetlb.")]
    except FileNotFoundError:
        return []
    return sorted(parts[1] for parts in names if parts[2:] == [file])


def _pids(directory: str) -> dict[str, int]:
    limit = read_or_empty(f"{directory}/pids.max").strip()
    # "max" is 0 in v1's message, unlike v2's
    return {
        "current": number(read_or_empty(f"{directory}/pids.current")),
        "limit": 0 if limit == "max" else number(limit),
    }


def _cpu(paths: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if accounting := paths.get("cpuacct"):
        ticks = os.sysconf("SC_CLK_TCK")
        times = dict(key_values(read_or_empty(f"{accounting}/cpuacct.stat")))
        found["usage"] = {
            "total": number(read_or_empty(f"{accounting}/cpuacct.usage")),
            "user": times.get("user", 0) * _NANOSECONDS // ticks,
            "kernel": times.get("system", 0) * _NANOSECONDS // ticks,
            "per_cpu": [int(value) for value in read_or_empty(f"{accounting}/cpuacct.usage_percpu").split()],
        }
    if cpu := paths.get("cpu"):
        stat = dict(key_values(read_or_empty(f"{cpu}/cpu.stat")))
        found["throttling"] = {
            "periods": stat.get("nr_periods", 0),
            "throttled_periods": stat.get("nr_throttled", 0),
            "throttled_time": stat.get("throttled_time", 0),
        }
    return found


def _memory(directory: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        _MEMORY[key]: value for key, value in key_values(read_or_empty(f"{directory}/memory.stat")) if key in _MEMORY
    }
    for field, name in (("usage", ""), ("swap", ".memsw"), ("kernel", ".kmem"), ("kernel_tcp", ".kmem.tcp")):
        usage = read_or_empty(f"{directory}/memory{name}.usage_in_bytes")
        if usage:
            found[field] = {
                "usage": number(usage),
                "max": number(read_or_empty(f"{directory}/memory{name}.max_usage_in_bytes")),
                "failcnt": number(read_or_empty(f"{directory}/memory{name}.failcnt")),
                "limit": number(read_or_empty(f"{directory}/memory{name}.limit_in_bytes")),
            }
    return found


def _oom_control(directory: str) -> dict[str, int]:
    return dict(key_values(read_or_empty(f"{directory}/memory.oom_control")))


def _blkio(directory: str) -> dict[str, list[dict[str, Any]]]:
    fields = {
        "io_service_bytes_recursive": ("bfq.io_service_bytes_recursive", "throttle.io_service_bytes_recursive"),
        "io_serviced_recursive": ("bfq.io_serviced_recursive", "throttle.io_serviced_recursive"),
        "io_queued_recursive": ("bfq.io_queued_recursive",),
        "io_service_time_recursive": ("bfq.io_service_time_recursive",),
        "io_wait_time_recursive": ("bfq.io_wait_time_recursive",),
        "io_merged_recursive": ("bfq.io_merged_recursive",),
        "io_time_recursive": ("bfq.time_recursive",),
        "sectors_recursive": ("bfq.sectors_recursive",),
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for field, names in fields.items():
        for name in names:
            entries = _blkio_entries(read_or_empty(f"{directory}/blkio.{name}"))
            if entries:
                found[field] = entries
                break
    return found


def _blkio_entries(text: str) -> list[dict[str, Any]]:
    """Lines `MAJOR:MINOR [OP] VALUE`; the last one, `Total VALUE`, has no device."""
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        parts = line.split()
        major, colon, minor = parts[0].partition(":") if parts else ("", "", "")
        if not colon or len(parts) < 2:
            continue
        found.append(
            {
                "op": parts[1] if len(parts) == 3 else "",
                "device": _device_name(parts[0]),
                "major": int(major),
                "minor": int(minor),
                "value": int(parts[-1]),
            }
        )
    return found


def _device_name(numbers: str) -> str:
    """The path of a block device; sysfs links its numbers to its name."""
    try:
        return f"/dev/{os.path.basename(os.readlink(f'/sys/dev/block/{numbers}'))}"
    except OSError:
        return ""  # the device was unplugged, its counters stay


def rdma(directory: str) -> dict[str, list[dict[str, Any]]]:
    """rdma.current and rdma.max, the same on v1 and v2: lines `DEVICE hca_handle=N hca_object=N`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for field, name in (("current", "rdma.current"), ("limit", "rdma.max")):
        entries: list[dict[str, Any]] = []
        for line in read_or_empty(f"{directory}/{name}").splitlines():
            device, *pairs = line.split()
            values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            # the fields have 32 bits; "max" fills them
            handles, objects = (min(number(values.get(key, "")), 2**32 - 1) for key in ("hca_handle", "hca_object"))
            entries.append({"device": device, "hca_handles": handles, "hca_objects": objects})
        if entries:
            found[field] = entries
    return found
