"""Pulling images: with cold caches beside containerd, memory meanwhile, and again when all is there."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bench import measure
from bench.daemons import Daemon, Lab, program
from bench.images import BIG, SMALL, Layer, write_layout

ROUNDS = 3
AGAIN = 11


def publish(lab: Lab, name: str, layers: tuple[Layer, ...]) -> str:
    """Make an image and have it in the lab's registry; its reference."""
    layout = lab.folder / name
    write_layout(layers, layout)
    return lab.publish(layout, name)


def pull(daemon: Daemon, image: str) -> list[str]:
    """The command that pulls, each daemon by its own client."""
    if daemon.kind == "wherry":
        return [program("wherry"), "--address", daemon.address, "pull", "--plain-http", image]
    return [program("ctr"), "-a", daemon.address, "images", "pull", "--plain-http", image]


def cold(daemon: Daemon, image: str) -> float:
    """Seconds to pull and unpack what isn't there, with nothing in the page cache."""
    daemon.ctr("images", "rm", "--sync", image)
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    return _timed(pull(daemon, image))


def again(daemon: Daemon, image: str) -> float:
    """Milliseconds to pull what is there: the median."""
    return statistics.median(_timed(pull(daemon, image)) for _ in range(AGAIN)) * 1000


def cold_by_turns(daemons: Sequence[Daemon], image: str, rounds: int = ROUNDS) -> list[float]:
    """Milliseconds of each daemon's cold pull: medians."""
    times: list[list[float]] = [[] for _ in daemons]
    for _ in range(rounds):
        for daemon, found in zip(daemons, times, strict=True):
            found.append(cold(daemon, image) * 1000)
    return [statistics.median(found) for found in times]


def peak(daemon: Daemon, image: str) -> float:
    """MB of PSS that the daemon and its helpers have together at most while they pull and unpack."""
    done = threading.Event()
    found = [0]

    def watch() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError):  # a helper that ended between two looks
                assert daemon.process is not None
                found[0] = max(found[0], sum(map(measure.pss, measure.descendants(daemon.process.pid))))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        cold(daemon, image)
    finally:
        done.set()
        watcher.join()
    return found[0] / 1000


def _timed(command: list[str]) -> float:
    begun = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(command)}: {done.stderr.strip()}")
    return time.monotonic() - begun


__all__ = ["BIG", "SMALL", "again", "cold_by_turns", "peak", "publish"]
