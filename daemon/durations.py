"""Durations as Go writes them, for the daemon's configuration: see wherry.core.durations."""

from wherry.core.durations import parse_duration

__all__ = ["parse_duration"]
