"""What a container is doing, put together from its record, its task, and what the daemon noted of its last run."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from wherry.core.errors import NotFound
from wherry.core.labels import HEALTH, LAST_RUN, RESTART_COUNT, RESTART_POLICY, RESTART_STATUS
from wherry.core.tuples import NamedTuple

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.containers import Container
    from wherry.client.tasks import Process


class State(NamedTuple):
    """`status` is docker's: `created`, `running`, `paused`, `restarting`, `exited` or `dead`.

    Times are seconds since the epoch, 0.0 where unknown. `health` is "" without a health check, else `starting`,
    `healthy` or `unhealthy`.
    """

    status: str
    pid: int = 0
    exit_code: int = 0
    started_at: float = 0.0
    finished_at: float = 0.0
    oom: bool = False
    error: str = ""
    health: str = ""
    restarts: int = 0

    @property
    def running(self) -> bool:
        """Whether it has processes."""
        return self.status in {"running", "paused"}


def label_json(container: Container, label: str) -> dict[str, Any]:
    """A label that holds a JSON object; {} where it doesn't."""
    text = container.labels.get(label)
    if not text:
        return {}
    import json

    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def state_of(container: Container, task: Process | None) -> State:
    """The state of a container whose task this is (None without one)."""
    last = label_json(container, LAST_RUN)
    restarts = container.labels.get(RESTART_COUNT, "")
    values: dict[str, Any] = {
        "restarts": int(restarts) if restarts.isdigit() else 0,
        "exit_code": int(last.get("code") or 0),
        "started_at": float(last.get("started") or 0.0),
        "finished_at": float(last.get("finished") or 0.0),
        "oom": bool(last.get("oom")),
        "error": str(last.get("error") or ""),
    }
    if task is not None and task.status in {"RUNNING", "PAUSED", "PAUSING"}:
        status = "running" if task.status == "RUNNING" else "paused"
        health = str(label_json(container, HEALTH).get("Status") or "")
        values |= {"started_at": started(task.pid), "exit_code": 0, "oom": False, "error": "", "health": health}
        return State(status, task.pid, **values)
    if task is not None and task.status == "UNKNOWN":
        return State("dead", task.pid, **values)
    if task is not None and task.status == "STOPPED":
        values |= {"exit_code": task.exit_status, "finished_at": task.exited_at or values["finished_at"]}
    elif not last:
        return State("created", **values)
    return State("restarting" if _will_restart(container) else "exited", **values)


def _will_restart(container: Container) -> bool:
    policy = container.labels.get(RESTART_POLICY, "no")
    return policy not in {"", "no"} and container.labels.get(RESTART_STATUS) == "running"


def started(pid: int) -> float:
    """When a process of this host began; 0.0 where it can't be seen (another host, or gone)."""
    if pid <= 0:
        return 0.0
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0.0
    # both count from the same moment, also while the host sleeps
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


async def inspect_state(client: Client, container: Container) -> State:
    """The state of one container; asks for its task."""
    try:
        task = await client.tasks.get(container.id)
    except NotFound:
        return state_of(container, None)
    return state_of(container, task)


# up to so many hours, docker counts in these
_UNITS = (
    (36, 1, "hours"),
    (24 * 14, 24, "days"),
    (24 * 60, 24 * 7, "weeks"),
    (24 * 730, 24 * 30, "months"),
    (10**9, 24 * 365, "years"),
)


def ago(at: float, now: float = 0.0) -> str:
    """How long ago as docker says it: `3 minutes`, `About an hour`, `Less than a second`."""
    left = max(0.0, (now or time.time()) - at)
    seconds, minutes, hours = int(left), int(left) // 60, int(left / 3600 + 0.5)
    if seconds < 60:
        return "Less than a second" if seconds < 1 else "1 second" if seconds == 1 else f"{seconds} seconds"
    if minutes < 60:
        return "About a minute" if minutes == 1 else f"{minutes} minutes"
    if hours == 1:
        return "About an hour"
    length, unit = next((length, unit) for most, length, unit in _UNITS if hours < most)
    return f"{hours // length} {unit}"


def describe(state: State) -> str:
    """A state as `ps` shows it: `Up 3 minutes (healthy)`, `Exited (1) 2 hours ago`, `Created`."""
    if state.status in {"running", "paused"}:
        text = f"Up {ago(state.started_at)}" if state.started_at else "Up"
        notes = [state.health] if state.health else []
        if state.health == "starting":
            notes = ["health: starting"]
        notes += ["Paused"] if state.status == "paused" else []
        return " ".join([text, *(f"({note})" for note in notes)])
    since = f" {ago(state.finished_at)} ago" if state.finished_at else ""
    if state.status == "exited":
        return f"Exited ({state.exit_code}){since}{' (out of memory)' if state.oom else ''}"
    if state.status == "restarting":
        return f"Restarting ({state.exit_code}){since}"
    return state.status.capitalize()
