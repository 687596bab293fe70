"""What a process's time and memory are like, where the configuration says it: scheduler, I/O priority, CPU affinity,
memory policy. Loaded only for a configuration that does.
"""

from __future__ import annotations

import os
import struct

from wherry.linux import syscalls as sc
from wherry.runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_ISO": 4,
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
POLICY_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 1,
    "SCHED_FLAG_RECLAIM": 2,
    "SCHED_FLAG_DL_OVERRUN": 4,
    "SCHED_FLAG_KEEP_POLICY": 8,
    "SCHED_FLAG_KEEP_PARAMS": 16,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 32,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 64,
}
MEMORY_MODES = {
    "MPOL_DEFAULT": 0,
    "MPOL_PREFERRED": 1,
    "MPOL_BIND": 2,
    "MPOL_INTERLEAVE": 3,
    "MPOL_LOCAL": 4,
    "MPOL_PREFERRED_MANY": 5,
    "MPOL_WEIGHTED_INTERLEAVE": 6,
}
"""set_mempolicy(2), <linux/mempolicy.h>."""
MEMORY_FLAGS = {"MPOL_F_STATIC_NODES": 1 << 15, "MPOL_F_RELATIVE_NODES": 1 << 14, "MPOL_F_NUMA_BALANCING": 1 << 13}


def numbers(text: str) -> set[int]:
    """`0-2,8` → {0, 1, 2, 8}. ValueError for another form."""
    found: set[int] = set()
    for part in text.split(",") if text else ():
        first, dash, last = part.strip().partition("-")
        low, high = int(first), int(last if dash else first)
        if not 0 <= low <= high < 65536:
            raise ValueError(text)
        found.update(range(low, high + 1))
    return found


def set_scheduling(process: dict[str, Any]) -> None:
    """`process.scheduler` and `process.ioPriority`, for the calling process."""
    priority = process.get("ioPriority")
    if priority:
        sc.ioprio_set(1, 0, IO_CLASSES[priority["class"]] << 13 | (priority.get("priority") or 0))
    wanted = process.get("scheduler")
    if not wanted:
        return
    flags = sum(POLICY_FLAGS[name] for name in wanted.get("flags") or ())
    attr = struct.pack(
        "=IIQiIQQQ", 48, POLICIES[wanted["policy"]], flags, wanted.get("nice") or 0, wanted.get("priority") or 0,
        wanted.get("runtime") or 0, wanted.get("deadline") or 0, wanted.get("period") or 0,
    )  # fmt: skip
    try:
        sc.sched_setattr(0, attr)
    except OSError as error:
        raise ContainerError(f"process.scheduler: error setting scheduler: {(error.strerror or '').lower()}") from None


def set_memory_policy(linux: dict[str, Any]) -> None:
    """`linux.memoryPolicy`: kept over exec, inherited by children."""
    policy = linux["memoryPolicy"]
    mode = MEMORY_MODES[policy["mode"]] | sum(MEMORY_FLAGS[name] for name in policy.get("flags") or ())
    nodes = sum(1 << node for node in numbers(policy.get("nodes") or ""))
    try:
        sc.set_mempolicy(mode, nodes)
    except OSError as error:
        raise ContainerError(f"linux.memoryPolicy: error setting memory policy: {error.strerror}") from None


def set_affinity(process: dict[str, Any], when: str) -> None:
    """`process.execCPUAffinity`; when: `initial`, before the process is in the container's cgroup, or `final`."""
    cpus = numbers((process.get("execCPUAffinity") or {}).get(when) or "")
    if not cpus:
        return
    try:
        os.sched_setaffinity(0, cpus)
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) else error
        raise ContainerError(f"process.execCPUAffinity.{when}: {text}") from None
