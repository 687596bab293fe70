"""A pod's SELinux label: what its configuration says, the rest by default, with categories that no other pod has."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from wherry.core.errors import ResourceExhausted
from wherry.proto import cri_pb2 as cri

_DEFAULTS = ("system_u", "system_r", "container_t")
# pairs that are drawn before it is said that there are none left
_DRAWS = 10_000


def label(options: cri.SELinuxOption, taken: Iterable[str], categories: int) -> str:
    """USER:ROLE:TYPE:LEVEL. `taken` are the labels of the other pods, `categories` how many there are to draw of.

    Raises ResourceExhausted where no pair is left.
    """
    given = (options.user, options.role, options.type)
    level = options.level or _level({":".join(each.split(":")[3:]) for each in taken}, categories)
    return ":".join([*(mine or default for mine, default in zip(given, _DEFAULTS, strict=True)), level])


def _level(taken: set[str], categories: int) -> str:
    """Two categories of the range, which are nobody else's."""
    for _ in range(_DRAWS):
        low, high = sorted((secrets.randbelow(categories), secrets.randbelow(categories)))
        level = f"s0:c{low},c{high}"
        if low != high and level not in taken:
            return level
    raise ResourceExhausted(f"no pair of {categories} SELinux categories is left: resource exhausted")
