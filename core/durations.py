"""Durations as Go writes them ("1h30m", "100ms"), which is how containerd's configuration has them."""

from __future__ import annotations

import re

from wherry.core.errors import InvalidArgument

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")


def parse_duration(text: str) -> float:
    """The seconds of a duration; "0" needs no unit. Raises InvalidArgument (syntax of Go's time.ParseDuration)."""
    if text == "0":
        return 0.0
    sign, rest = (-1, text[1:]) if text.startswith("-") else (1, text.removeprefix("+"))
    if not rest or _PART.sub("", rest):
        raise InvalidArgument(f'"{text}" is no duration such as "1.5s" or "100ms"')
    return sign * sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(rest))
