"""`python -m bench.cli [--check]`: what a person waits for, beside podman: `ps` and `run -d`."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from bench.daemons import Daemon, Lab, program

RUNS, WARM_UPS = 15, 2
# ratios to podman's time that may not be passed
PS_LIMIT, RUN_LIMIT = 2.0, 1.0


@contextlib.contextmanager
def podman(image: str) -> Iterator[list[str]]:
    """podman on folders of its own, with the image; what it leaves goes."""
    folder = tempfile.mkdtemp(prefix="bench-podman-")
    words = [
        "podman",
        "--root",
        f"{folder}/root",
        "--runroot",
        f"{folder}/run",
        "--cgroup-manager",
        "cgroupfs",
        "--runtime",
        "runc",
    ]
    try:
        subprocess.run([*words, "pull", "-q", "--tls-verify=false", image], check=True, capture_output=True)
        yield words
    finally:
        subprocess.run([*words, "rm", "-f", "-a", "-t", "0"], check=False, capture_output=True)
        subprocess.run([*words, "rmi", "-f", "-a"], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def by_turns(commands: Sequence[Callable[[], list[str]]]) -> list[float]:
    """Median milliseconds of commands that are run in turn."""
    times: list[list[float]] = [[] for _ in commands]
    for index in range(-WARM_UPS, RUNS):
        for row, make in zip(times, commands, strict=True):
            command = make()
            begun = time.perf_counter()
            done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True)
            if index >= 0:
                row.append((time.perf_counter() - begun) * 1000)
            if done.returncode:
                raise SystemExit(f"bench: {' '.join(command)}: {done.stderr.strip()}")
    return [statistics.median(row) for row in times]


def figures(daemon: Daemon, image: str) -> list[tuple[str, float, float, float]]:
    """What, our milliseconds, podman's, and the limit of their ratio."""
    ours = [program("wherry"), "--address", daemon.address]
    subprocess.run([*ours, "pull", "-q", "--plain-http", image], check=True, capture_output=True)
    count = itertools.count()
    with podman(image) as theirs:

        def run_d(words: list[str]) -> Callable[[], list[str]]:
            # no network on both sides: podman's CNI takes longer than all the rest. Limits that every host allows:
            # podman asks for a million open files. And runc, since Debian's crun can't do hybrid cgroups
            flags = ["--net", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
            return lambda: [*words, "run", "-d", "--name", f"bench{next(count)}", *flags, image, "sleep", "100"]

        ps = by_turns([lambda: [*ours, "ps"], lambda: [*theirs, "ps"]])
        run = by_turns([run_d(ours), run_d(theirs)])
        for words in (ours, theirs):
            ids = subprocess.run([*words, "ps", "-aq"], check=True, capture_output=True, text=True).stdout.split()
            subprocess.run([*words, "rm", "-f", *ids], check=False, capture_output=True)
    return [("wherry ps, beside podman", *ps, PS_LIMIT), ("wherry run -d, beside podman", *run, RUN_LIMIT)]  # type: ignore[list-item] # two figures


def main() -> int:
    """Measure, print; with --check exit 1 where a limit is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.cli", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is missed")
    options = parser.parse_args()
    missed = False
    with Lab() as lab:
        for what, ours, theirs, limit in figures(lab.daemons[0], lab.image):
            holds = ours / theirs <= limit
            missed |= not holds
            note = "" if holds else " MISSED"
            print(f"{what}: {ours:.1f} ms, {theirs:.1f} ms, ratio {ours / theirs:.2f} (at most {limit:.1f}){note}")
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
