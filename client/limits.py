"""Limits of a container as docker's options name them, and their place in the specification.

Sizes are bytes, times microseconds, `None` or 0 means not asked for.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wherry.core.errors import InvalidArgument
from wherry.core.tuples import NamedTuple

# the period of the CFS quota that `--cpus` is made of: the kernel's default
CPU_PERIOD = 100_000
# what systemd gives to services, and docker to containers without limits of their own
NOFILE = (1024, 524288)
_RLIMITS = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
]


class Limits(NamedTuple):
    """What a container may use. `memory_swap` counts memory and swap together, -1 is no limit; `pids` -1 too."""

    memory: int = 0
    memory_swap: int = 0
    memory_reservation: int = 0
    memory_swappiness: int = -1
    oom_kill_disable: bool = False
    cpus: float = 0.0
    cpu_shares: int = 0
    cpu_quota: int = 0
    cpu_period: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    pids: int = 0
    blkio_weight: int = 0
    read_bps: Sequence[str] = ()
    write_bps: Sequence[str] = ()
    read_iops: Sequence[str] = ()
    write_iops: Sequence[str] = ()


def resources(limits: Limits) -> dict[str, Any]:
    """`linux.resources` with what is asked for and nothing else; raises InvalidArgument."""
    parts = {"memory": _memory(limits), "cpu": _cpu(limits), "blockIO": _block(limits)}
    found: dict[str, Any] = {name: part for name, part in parts.items() if part}
    if limits.pids:
        found["pids"] = {"limit": limits.pids}
    return found


def _memory(limits: Limits) -> dict[str, Any]:
    memory: dict[str, Any] = {}
    if limits.memory:
        if limits.memory < 6 << 20:
            raise InvalidArgument(f"a memory limit of {limits.memory} bytes is too small: 6m is the least")
        memory["limit"] = limits.memory
    if limits.memory_swap:
        if not limits.memory:
            raise InvalidArgument("--memory-swap counts memory and swap together and needs --memory")
        if 0 < limits.memory_swap < limits.memory:
            raise InvalidArgument("--memory-swap counts memory and swap together: it can't be less than --memory")
        memory["swap"] = limits.memory_swap
    elif limits.memory and counts_swap():
        # docker's default: as much swap as memory
        memory["swap"] = 2 * limits.memory
    if limits.memory_reservation:
        memory["reservation"] = limits.memory_reservation
    if limits.memory_swappiness >= 0:
        memory["swappiness"] = limits.memory_swappiness
    if limits.oom_kill_disable:
        memory["disableOOMKiller"] = True
    return memory


def counts_swap() -> bool:
    """Whether the host's memory controller limits swap."""
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        return os.path.exists("/proc/swaps")
    return os.path.exists("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes")


def _cpu(limits: Limits) -> dict[str, Any]:
    cpu: dict[str, Any] = {}
    if limits.cpu_shares:
        cpu["shares"] = limits.cpu_shares
    if limits.cpus:
        if limits.cpu_quota or limits.cpu_period:
            raise InvalidArgument("--cpus and --cpu-quota or --cpu-period say the same thing: use one of them")
        if not 0 < limits.cpus <= (os.cpu_count() or 1):
            raise InvalidArgument(f"--cpus is from 0.01 to {os.cpu_count()}, what this host has")
        cpu["quota"], cpu["period"] = max(1000, int(limits.cpus * CPU_PERIOD)), CPU_PERIOD
    if limits.cpu_quota:
        cpu["quota"] = limits.cpu_quota
    if limits.cpu_period:
        cpu["period"] = limits.cpu_period
    if limits.cpuset_cpus:
        cpu["cpus"] = limits.cpuset_cpus
    if limits.cpuset_mems:
        cpu["mems"] = limits.cpuset_mems
    return cpu


def _block(limits: Limits) -> dict[str, Any]:
    block: dict[str, Any] = {}
    if limits.blkio_weight:
        if not 10 <= limits.blkio_weight <= 1000:
            raise InvalidArgument("--blkio-weight is from 10 to 1000")
        block["weight"] = limits.blkio_weight
    for name, items in (
        ("throttleReadBpsDevice", limits.read_bps),
        ("throttleWriteBpsDevice", limits.write_bps),
        ("throttleReadIOPSDevice", limits.read_iops),
        ("throttleWriteIOPSDevice", limits.write_iops),
    ):
        if items:
            block[name] = [_throttle(item) for item in items]
    return block


def _throttle(text: str) -> dict[str, Any]:
    path, colon, rate = text.rpartition(":")
    if not colon or not path:
        raise InvalidArgument(f"invalid rate {text!r}: expected DEVICE:RATE, as in /dev/sda:1m")
    try:
        info = os.stat(path)
    except OSError as error:
        raise InvalidArgument(f"device {path}: {error.strerror}") from error
    return {"major": os.major(info.st_rdev), "minor": os.minor(info.st_rdev), "rate": size(rate)}


_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def size(text: str) -> int:
    """Bytes from a number with an optional unit of 1024 (`512m`, `2g`); raises InvalidArgument."""
    plain = text.strip().lower().removesuffix("ib") if text.strip().lower().endswith("ib") else text.strip().lower()
    if len(plain) > 1 and plain[-1] == "b" and plain[-2] in "kmgt":
        plain = plain[:-1]
    unit = plain[-1] if plain and plain[-1] in _UNITS else ""
    try:
        return int(float(plain.removesuffix(unit)) * _UNITS[unit])
    except ValueError:
        raise InvalidArgument(f"{text!r} is no size (512m, 2g)") from None


def rlimits(items: Iterable[str]) -> list[dict[str, Any]]:
    """`process.rlimits` from `NAME=SOFT[:HARD]`, -1 for no limit; open files have a default. Raises InvalidArgument."""
    # no more than we have ourselves: raising it takes a capability that a daemon in a container lacks
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    hard = NOFILE[1] if most == resource.RLIM_INFINITY else min(NOFILE[1], most)
    found: dict[str, tuple[int, int]] = {"nofile": (min(NOFILE[0], hard), hard)}
    for item in items:
        name, equals, value = item.partition("=")
        soft, _, upper = value.partition(":")
        if not equals or name not in _RLIMITS:
            raise InvalidArgument(
                f"invalid ulimit {item!r}: expected NAME=SOFT[:HARD], with NAME of {', '.join(_RLIMITS)}"
            )
        try:
            first, second = int(soft), int(upper or soft)
        except ValueError:
            raise InvalidArgument(f"invalid ulimit {item!r}: {value!r} is no number, or two with a colon") from None
        if second != -1 and (first > second or first == -1):
            raise InvalidArgument(f"invalid ulimit {item!r}: the soft limit must not be more than the hard one")
        found[name] = (first, second)
    infinity = (1 << 64) - 1
    return [
        {
            "type": f"RLIMIT_{name.upper()}",
            "soft": infinity if soft < 0 else soft,
            "hard": infinity if hard < 0 else hard,
        }
        for name, (soft, hard) in found.items()
    ]


def pairs(items: Iterable[str], what: str) -> Mapping[str, str]:
    """`KEY=VALUE` items as a dictionary; raises InvalidArgument."""
    found: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InvalidArgument(f"invalid {what} {item!r}: expected KEY=VALUE")
        found[key] = value
    return found
