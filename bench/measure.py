"""What is measured: wall time of commands, containers a second, memory, and the time until a killed daemon serves."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.api import Api
from bench.daemons import Daemon, program

RUNS = 25
WARM_UPS = 3


def by_turns(commands: Sequence[Callable[[], Sequence[str]]], runs: int = RUNS) -> list[float]:
    """Median wall times in milliseconds of commands that are run in turn, so that a noisy machine hurts all alike.

    Each entry makes a fresh command line. A command that fails ends the measurement with its message.
    """
    times: list[list[float]] = [[] for _ in commands]
    for index in range(-WARM_UPS, runs):
        for at, make in enumerate(commands):
            command = make()
            begun = time.perf_counter()
            done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True)
            if index >= 0:
                times[at].append((time.perf_counter() - begun) * 1000)
            if done.returncode:
                raise SystemExit(f"bench: {' '.join(command)}: {done.stderr.strip()}")
    return [statistics.median(row) for row in times]


def run_true(daemon: Daemon, image: str, client: str) -> Callable[[], Sequence[str]]:
    """Makes command lines of `CLIENT run --rm IMAGE NAME true`, each with a new name."""
    flag = "-a" if client == "ctr" else "--address"
    count = iter(range(1_000_000))
    words = [
        program(client),
        flag,
        daemon.address,
        *(["containers"] if client == "wherry" else []),
        "run",
        "--rm",
        image,
    ]
    return lambda: [*words, f"{client}-{os.getpid()}-{next(count)}", "true"]


def rates_by_turns(daemons: Sequence[Daemon], image: str, at_once: int, rounds: int = 3) -> list[float]:
    """Median of `rate` for each daemon, measured in turn."""
    found: list[list[float]] = [[] for _ in daemons]
    for _ in range(rounds):
        for row, daemon in zip(found, daemons, strict=True):
            row.append(asyncio.run(rate(daemon, image, at_once)))
    return [statistics.median(row) for row in found]


async def rate(daemon: Daemon, image: str, at_once: int, seconds: float = 3.0) -> float:
    """Containers a second over the gRPC API: prepared, created, run to their end and removed, `at_once` at a time."""
    async with Api(daemon, image) as api:
        names = (f"rate{at_once}-{time.monotonic_ns()}-{number}" for number in range(1_000_000))
        for _ in range(WARM_UPS):
            await api.run_to_end(next(names))
        finished = 0
        begun = time.perf_counter()

        async def work() -> None:
            nonlocal finished
            while time.perf_counter() - begun < seconds:
                await api.run_to_end(next(names))
                finished += 1

        await asyncio.gather(*(work() for _ in range(at_once)))
        return finished / (time.perf_counter() - begun)


def pss(pid: int) -> int:
    """Proportional set size of a process in kB; 0 for one that is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def parent(pid: int) -> int:
    """The pid of a process's parent."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("PPid:"):
            return int(line.split()[1])
    return 0


def descendants(pid: int) -> set[int]:
    """A process and what it started and still holds."""
    found = {pid}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found |= descendants(int(child))
    return found


def memory(daemon: Daemon) -> tuple[int, int]:
    """Median PSS in kB of the processes that serve a container, and of daemon, helpers and shims together.

    The containers' own processes don't count; a shim is the parent of a container's init.
    """
    shims = {parent(pid) for pid in daemon.tasks().values()}
    assert daemon.process is not None
    everything = descendants(daemon.process.pid) | shims
    sizes = {pid: pss(pid) for pid in everything}
    return int(statistics.median(sizes[pid] for pid in shims)), sum(sizes.values())


def fill(daemon: Daemon, image: str, count: int) -> None:
    """Have `count` containers that sleep, and let them settle."""
    for number in range(len(daemon.tasks()), count):
        daemon.ctr("run", "-d", image, f"sleep-{os.getpid()}-{number}", "sleep", "100000")
    time.sleep(1)


def restart(daemon: Daemon) -> float:
    """Seconds from SIGKILL on the daemon until the next one has answered with all the running tasks."""
    before = daemon.tasks()
    begun = time.monotonic()
    daemon.kill()
    daemon.start()
    while daemon.tasks() != before:
        if time.monotonic() - begun > 30:
            raise SystemExit(f"bench: {daemon.kind} lost tasks: {sorted(before.items() - daemon.tasks().items())}")
    return time.monotonic() - begun
