"""`events`: statistics as runc prints them, one JSON object a line, and notice of OOM kills."""

from __future__ import annotations

import json
import select
import sys
import time

from wherry.runtime import lifecycle, state
from wherry.runtime.errors import INVALID, PRECONDITION, ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def run(root: str, container_id: str, *, once: bool, interval: str) -> int:
    """Print until the container has stopped; with `once` one reading."""
    found = state.load(root, container_id)
    if found.status() == state.STOPPED:
        raise ContainerError(f"container with id {container_id} is not running", PRECONDITION)
    cgroup = lifecycle.cgroup_of(root, container_id)
    if once:
        _print("stats", container_id, reading(cgroup))
        return 0
    seconds = _seconds(interval)
    watch = cgroup.watch_oom()
    last = 0.0
    try:
        while found.alive():
            if time.monotonic() - last >= seconds:
                _print("stats", container_id, reading(cgroup))
                last = time.monotonic()
            wait = min(seconds, 1.0)
            watched = [watch] if watch and not watch.gone else []
            if watched:
                if select.select(watched, [], [], wait)[0] and watch and watch.read():
                    _print("oom", container_id, None)
            else:
                time.sleep(wait)
    finally:
        if watch:
            watch.close()
    return 0


def _seconds(text: str) -> float:
    for unit in ("ms", "s", "m", "h"):
        number = text.removesuffix(unit)
        if number != text:
            try:
                value = float(number) * _UNITS[unit]
            except ValueError:
                continue
            if value > 0:
                return value
    raise ContainerError("duration interval must be greater than 0", INVALID)


def _print(kind: str, container_id: str, data: Any) -> None:
    event = {"type": kind, "id": container_id}
    if data is not None:
        event["data"] = data
    sys.stdout.write(json.dumps(event, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def reading(cgroup: Any) -> dict[str, Any]:
    """The counters in runc's shape (its `types/events.go`): cpu in nanoseconds, memory in bytes."""
    stats = cgroup.stats()
    values = stats.values
    return _from_v1(values) if stats.version == 1 else _from_v2(values)


def _from_v1(values: dict[str, Any]) -> dict[str, Any]:
    cpu = values.get("cpu") or {}
    memory = values.get("memory") or {}
    pids = values.get("pids") or {}
    usage = cpu.get("usage") or {}
    return {
        "cpu": {
            "usage": {
                "total": usage.get("total", 0),
                "percpu": list(usage.get("per_cpu") or []),
                "kernel": usage.get("kernel", 0),
                "user": usage.get("user", 0),
            },
            "throttling": {
                "periods": (cpu.get("throttling") or {}).get("periods", 0),
                "throttledPeriods": (cpu.get("throttling") or {}).get("throttled_periods", 0),
                "throttledTime": (cpu.get("throttling") or {}).get("throttled_time", 0),
            },
        },
        "memory": {
            "cache": memory.get("cache", 0),
            "usage": _entry(memory.get("usage")),
            "swap": _entry(memory.get("swap")),
            "kernel": _entry(memory.get("kernel")),
            "kernelTCP": _entry(memory.get("kernel_tcp")),
        },
        "pids": {"current": pids.get("current", 0), "limit": pids.get("limit", 0)},
        "blkio": {},
        "hugetlb": {},
        "network_interfaces": None,
    }


def _entry(values: dict[str, Any] | None) -> dict[str, int]:
    found = values or {}
    return {
        "limit": found.get("limit", 0),
        "usage": found.get("usage", 0),
        "max": found.get("max", 0),
        "failcnt": found.get("failcnt", 0),
    }


def _from_v2(values: dict[str, Any]) -> dict[str, Any]:
    cpu = values.get("cpu") or {}
    memory = values.get("memory") or {}
    pids = values.get("pids") or {}
    limits = {"limit": memory.get("usage_limit", 0), "usage": memory.get("usage", 0), "max": memory.get("max_usage", 0)}
    swap = {"limit": memory.get("swap_limit", 0), "usage": memory.get("swap_usage", 0), "max": 0, "failcnt": 0}
    return {
        "cpu": {
            "usage": {
                "total": cpu.get("usage_usec", 0) * 1000,
                "kernel": cpu.get("system_usec", 0) * 1000,
                "user": cpu.get("user_usec", 0) * 1000,
            },
            "throttling": {
                "periods": cpu.get("nr_periods", 0),
                "throttledPeriods": cpu.get("nr_throttled", 0),
                "throttledTime": cpu.get("throttled_usec", 0) * 1000,
            },
        },
        "memory": {"cache": memory.get("file", 0), "usage": {**limits, "failcnt": 0}, "swap": swap},
        "pids": {"current": pids.get("current", 0), "limit": pids.get("limit", 0)},
        "blkio": {},
        "hugetlb": {},
        "network_interfaces": None,
    }
