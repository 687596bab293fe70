"""`wherry trace`: what it shows of a start, in order, and that the command goes through unharmed."""

from __future__ import annotations

import re

from tests.cli.conftest import Wherry
from tests.wherryd import BUSYBOX


def test_a_start_in_order(wherry: Wherry) -> None:
    done = wherry.run(
        "trace", "run", "--rm", "--net", "none", "--memory", "64m", BUSYBOX, "sh", "-c", "echo out; exit 3", code=3
    )
    assert done.stdout == "out\n"
    lines = done.stderr.splitlines()
    wanted = [
        r"clone3?\(.*\) = \d+",
        r"cgroup .*memory",
        r"mount .*mount",
        "pivot_root",
        "seccomp",
        "becomes the container's program",
    ]
    places = [next((at for at, line in enumerate(lines) if re.search(pattern, line)), -1) for pattern in wanted]
    assert -1 not in places, f"{wanted[places.index(-1)]} isn't in:\n{done.stderr}"
    assert places[0] < places[3] < places[4] < places[5]
    times = [float(line.split()[0]) for line in lines if " ms " in line]
    assert times
    assert lines[-1].count("mount") == 1


def test_a_start_right_after_another_one_begins_with_a_new_shim(wherry: Wherry) -> None:
    """A shim in reserve would not be seen: nobody watches it."""
    wherry.run("run", "--rm", "--net", "none", BUSYBOX, "true")
    done = wherry.run("trace", "run", "--rm", "--net", "none", BUSYBOX, "true")
    assert "becomes the container's program" in done.stderr
    assert re.search(r"clone3?\(.*\) = \d+", done.stderr)


def test_what_is_asked_for(wherry: Wherry) -> None:
    done = wherry.run("trace", "-k", "cgroup", "run", "--rm", "--net", "none", BUSYBOX, "true")
    assert {line.split()[4] for line in done.stderr.splitlines() if " ms " in line} == {"cgroup"}
    assert "expected a command to watch" in wherry.run("trace", "ps", code=1).stderr
    assert "unknown kind" in wherry.run("trace", "-k", "x", "run", BUSYBOX, "true", code=1).stderr
    wherry.run("run", "--rm", "--net", "none", BUSYBOX, "true")
