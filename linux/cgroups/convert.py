"""Values of the specification, which speaks v1, turned into those of v2; the rules are runc's and crun's."""

from __future__ import annotations

TYPE_CHECKING = False  # typing alone would cost as much as a container's cgroups; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


_MAX_SHARES = 262144
_MAX_WEIGHT = 10000


def cpu_weight(shares: int) -> int:
    """`cpu.weight` (1…10000) for `cpu.shares` (2…262144); 0 stays 0, which means: not set.

    The curve that runc (1.4) and crun (1.23) use goes through (2, 1), (1024, 100) and (262144, 10000), so that the
    default of one is the default of the other. Older ones drew a line, on which the default lost by 2.5.
    """
    if shares == 0:
        return 0
    if shares <= 2:
        return 1
    if shares >= _MAX_SHARES:
        return _MAX_WEIGHT
    import math  # noqa: PLC0415 - a shared object, and most containers have no CPU shares

    log = math.log2(shares)
    exponent = (log * log + 125 * log) / 612.0 - 7.0 / 34.0
    return math.ceil(math.pow(10, exponent))


def io_weight(weight: int) -> int:
    """`io.weight` (1…10000) for `blkio.weight` (10…1000); 0 stays 0."""
    return 0 if weight == 0 else 1 + (weight - 10) * 9999 // 990


def swap_max(memory_swap: int, memory: int) -> int | None:
    """`memory.swap.max` (bytes, -1 for max) for the spec's memory+swap limit; None means: leave it.

    Raises ValueError for a swap limit without or below the memory limit.
    """
    if memory == -1 and memory_swap == 0:
        return -1  # as on v1, where lifting the memory limit lifts memory+swap too
    if memory_swap == 0:
        return None
    if memory_swap == -1:
        return -1
    if memory in {0, -1}:
        msg = "unable to set swap limit without memory limit"
        raise ValueError(msg)
    if memory < 0:
        msg = f"invalid memory value: {memory}"
        raise ValueError(msg)
    if memory_swap < memory:
        msg = "memory+swap limit should be >= memory limit"
        raise ValueError(msg)
    return memory_swap - memory


def limit(value: int) -> str:
    """A v2 limit: negative is "max"."""
    return "max" if value < 0 else str(value)


def integer(section: Mapping[str, Any], key: str, where: str) -> int:
    """A number of the spec, 0 if it is absent or null. Raises ValueError if it is something else."""
    value = section.get(key)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        msg = f"linux.resources.{where}.{key}: {value!r} is not a whole number"
        raise ValueError(msg)
    return value


def section(resources: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of `linux.resources`, empty if it is absent or null."""
    value = resources.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        msg = f"linux.resources.{key} is not an object"
        raise ValueError(msg)
    return value


def items(holder: Mapping[str, Any], key: str, where: str) -> list[Mapping[str, Any]]:
    """A list of objects, empty if it is absent or null."""
    value = holder.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        msg = f"linux.resources.{where} is not a list of objects"
        raise ValueError(msg)
    return value
