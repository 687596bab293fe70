"""`events`: statistics as runc prints them, one JSON object a line, and notice of OOM kills."""

from __future__ import annotations

import json
import select
import sys
import time

from wherry.runtime import lifecycle, state
from wherry.runtime.errors import INVALID, PRECONDITION, ContainerError
from wherry.runtime.events_reading import reading

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
        _print("stats", container_id, reading(cgroup, found.rdt_class))
        return 0
    seconds = _seconds(interval)
    watch = cgroup.watch_oom()
    last = 0.0
    try:
        while found.alive():
            if time.monotonic() - last >= seconds:
                _print("stats", container_id, reading(cgroup, found.rdt_class))
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
