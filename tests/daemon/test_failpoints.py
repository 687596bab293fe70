"""SIGKILL at marked places: nothing lost, nothing doubled, nothing left. docs/reliability.md has the figures.

Here is a part of them; all, each alone and with a second process, with `WHERRY_FAILPOINTS=all` in the environment,
and in rounds with a table at the end: `python -m tests.failures [ROUNDS]`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.failpoints import ELSEWHERE, POINTS, Point
from tests.failures import Rig

HERE = Path(__file__).resolve().parents[2]
# one for each kind of place; none that is noticed by a deadline only (10 s)
SOME = [
    ("daemon.create.bundled:1", False),
    ("daemon.create.spawned:1", False),
    ("daemon.create.created:1", True),
    ("daemon.event.received:6", False),
    ("daemon.event.kept:6", True),
    ("daemon.wait.answered:2", False),
    ("daemon.delete.done:1", True),
    ("daemon.end.hidden:1", False),
    ("daemon.bury.deleted:1", False),
    ("daemon.bury.told:1", False),
    ("forkserver.asked:1", False),
    ("forkserver.forked:1", True),
    ("shim.create.made:1", False),
    ("shim.start.executed:1", True),
    ("shim.exec.born:1", False),
    ("shim.exit.reaped:1", False),
    ("shim.exit.reaped:2", False),
    ("shim.event.confirmed:5", False),
    ("shim.delete.deleted:1", False),
    ("shim.shutdown.emptied:1+held", True),
    ("daemon.create.occupied:1+warm", False),
    ("shim.occupy.bound:1+warm", True),
    ("shim.vacate.done:1", False),
    ("runtime.borrowed.namespaces:1+warm", False),
    ("runtime.create.taken:1", False),
    ("runtime.answering:1", False),
    ("runtime.entering.started:1", False),
    ("runtime.entering.started:1", True),
    ("runtime.borrowed.entering:1", False),
    ("runtime.borrowed.executed:1", True),
    ("runtime.recorded:1+hooks", False),
    ("runtime.delete.cgroup:1+hooks", False),
]
ALL = os.environ.get("WHERRY_FAILPOINTS") == "all"


def chosen() -> Iterator[tuple[Point, bool]]:
    for point in POINTS:
        for also in (False, True):
            if ALL or (point.title, also) in SOME:
                yield point, also


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


@pytest.mark.parametrize(("point", "also"), list(chosen()), ids=lambda value: getattr(value, "title", str(value)))
def test_nothing_is_lost_doubled_or_left(rig: Rig, point: Point, also: bool) -> None:
    assert rig.run(point, also=also) == []


def test_the_list_of_places_is_that_of_the_sources() -> None:
    found = set()
    for part in ("core", "daemon", "shim", "runtime", "linux"):
        for path in (HERE / part).glob("**/*.py"):
            found |= set(re.findall(r'\breach\("([a-z.]+)"\)', path.read_text()))
    assert {name for name in found if not name.startswith(ELSEWHERE)} == {point.name for point in POINTS}
    assert all(name in {point.title for point in POINTS} for name, _ in SOME)


def test_the_variable_kills_at_the_nth_time() -> None:
    script = "from wherry.core.failpoints import reach\nfor n in range(5):\n  print(n, flush=True)\n  reach('here')"
    environment = {**os.environ, "WHERRY_FAIL_AT": "here:3"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (-9, ["0", "1", "2"])
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout[-2:] == "4\n"
    )
