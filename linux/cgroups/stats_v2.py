"""Counters of a v2 cgroup in the shape of `io.containerd.cgroups.v2.Metrics`."""

from __future__ import annotations

from wherry.linux.cgroups.files import UNLIMITED, key_values, number, read_or_empty
from wherry.linux.cgroups.stats_v1 import page_sizes, rdma

TYPE_CHECKING = False  # typing alone would cost as much as a container's cgroups; type checkers know the name
if TYPE_CHECKING:
    from typing import Any

_CPU = frozenset(
    {
        *("usage_usec", "user_usec", "system_usec"),
        *("nr_periods", "nr_throttled", "throttled_usec", "nr_bursts", "burst_usec"),
    }
)
_MEMORY = frozenset(
    {
        *("anon", "file", "kernel_stack", "slab", "sock", "shmem", "anon_thp", "unevictable"),
        *("file_mapped", "file_dirty", "file_writeback", "slab_reclaimable", "slab_unreclaimable"),
        *("inactive_anon", "active_anon", "inactive_file", "active_file"),
        *("pgfault", "pgmajfault", "pgrefill", "pgscan", "pgsteal", "pgactivate", "pgdeactivate"),
        *("pglazyfree", "pglazyfreed", "thp_fault_alloc", "thp_collapse_alloc"),
        *("workingset_refault", "workingset_activate", "workingset_nodereclaim"),
    }
)
#: Since 5.9 some counters are kept by kind of page; the message has their sum.
_SPLIT = ("workingset_refault", "workingset_activate")
_EVENTS = frozenset(["low", "high", "max", "oom", "oom_kill", "oom_group_kill"])
_IO = frozenset(["rbytes", "wbytes", "rios", "wios"])


def collect(directory: str) -> dict[str, Any]:
    """Read what the cgroup's controllers count."""
    found: dict[str, Any] = {}
    current = read_or_empty(f"{directory}/pids.current")
    if current:
        found["pids"] = {"current": number(current), "limit": number(read_or_empty(f"{directory}/pids.max"))}
    found["cpu"] = {key: value for key, value in key_values(read_or_empty(f"{directory}/cpu.stat")) if key in _CPU}
    _pressure(directory, "cpu", found["cpu"])
    if memory := _memory(directory):
        found["memory"] = memory
        events = key_values(read_or_empty(f"{directory}/memory.events"))
        found["memory_events"] = {key: value for key, value in events if key in _EVENTS}
    if values := rdma(directory):
        found["rdma"] = values
    if io := _io(directory):
        found["io"] = io
    if hugetlb := _hugetlb(directory):
        found["hugetlb"] = hugetlb
    return found


def _memory(directory: str) -> dict[str, Any]:
    usage = read_or_empty(f"{directory}/memory.current")
    if not usage:
        return {}
    stat = dict(key_values(read_or_empty(f"{directory}/memory.stat")))
    found: dict[str, Any] = {key: value for key, value in stat.items() if key in _MEMORY}
    for name in _SPLIT:
        if name not in stat:
            found[name] = stat.get(f"{name}_anon", 0) + stat.get(f"{name}_file", 0)
    found["usage"] = number(usage)
    for field, name in (
        ("usage_limit", "memory.max"),
        ("max_usage", "memory.peak"),
        ("swap_usage", "memory.swap.current"),
        ("swap_limit", "memory.swap.max"),
        ("swap_max_usage", "memory.swap.peak"),
    ):
        text = read_or_empty(f"{directory}/{name}")
        if text:
            found[field] = number(text, UNLIMITED)
    _pressure(directory, "memory", found)
    return found


def _io(directory: str) -> dict[str, Any]:
    entries: list[dict[str, int]] = []
    for line in read_or_empty(f"{directory}/io.stat").splitlines():
        device, *pairs = line.split()
        major, _, minor = device.partition(":")
        if not (major.isdecimal() and minor.isdecimal()):
            continue
        values = (pair.split("=", 1) for pair in pairs if "=" in pair)
        counters = {key: int(value) for key, value in values if key in _IO and value.isdecimal()}
        entries.append({"major": int(major), "minor": int(minor), **counters})
    found: dict[str, Any] = {"usage": entries} if entries else {}
    _pressure(directory, "io", found)
    return found


def _pressure(directory: str, name: str, into: dict[str, Any]) -> None:
    """Lines `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` (Documentation/accounting/psi.rst)."""
    psi: dict[str, dict[str, float | int]] = {}
    for line in read_or_empty(f"{directory}/{name}.pressure").splitlines():
        kind, *pairs = line.split()
        values = dict(pair.split("=", 1) for pair in pairs)
        psi[kind] = {key: int(value) if key == "total" else float(value) for key, value in values.items()}
    if psi:
        into["psi"] = psi


def _hugetlb(directory: str) -> list[dict[str, Any]]:
    return [
        {
            "pagesize": size,
            "current": number(read_or_empty(f"{directory}/hugetlb.{size}.current")),
            "max": number(read_or_empty(f"{directory}/hugetlb.{size}.max")),
            "failcnt": dict(key_values(read_or_empty(f"{directory}/hugetlb.{size}.events"))).get("max", 0),
        }
        for size in page_sizes(directory, "max")
    ]
