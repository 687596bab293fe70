"""What the daemon does for containers when they end: policies, removals, notes, over restarts of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest

from tests.cli.conftest import Wherry
from tests.wherryd import BUSYBOX, Wherryd
from wherry.daemon.restarts import Policy

PATIENCE = 40.0


@pytest.fixture(scope="module")
def engine() -> Iterator[Wherryd]:
    """A daemon of this module's own: it is killed."""
    daemon = Wherryd()
    try:
        daemon.start()
        daemon.import_busybox()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture
def wherry(engine: Wherryd) -> Iterator[Wherry]:
    """The command; what a test leaves goes."""
    command = Wherry(engine.address)
    yield command
    left = command.run("ps", "-aq").stdout.split()
    if left:
        command.run("rm", "-f", "-v", *left)


def until(holds: Callable[[], bool]) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it didn't come to be"
        time.sleep(0.05)


def shown(wherry: Wherry, name: str, template: str) -> str:
    """A template of `inspect`."""
    return wherry.run("inspect", "-f", template, name, code=None).stdout.strip()


def state(wherry: Wherry, name: str) -> str:
    """What it does and how often it was started again."""
    return shown(wherry, name, "{{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}")


@pytest.mark.parametrize(
    ("labels", "policy"),
    [
        ({}, Policy("no")),
        ({"containerd.io/restart.status": "running"}, Policy("always")),
        ({"containerd.io/restart.policy": "on-failure:3"}, Policy("on-failure", 3)),
        ({"containerd.io/restart.policy": "unless-stopped"}, Policy("unless-stopped")),
        ({"containerd.io/restart.policy": "of tomorrow"}, Policy("no")),
    ],
)
def test_policies_are_containerds(labels: dict[str, str], policy: Policy) -> None:
    assert Policy.of(labels) == policy


def test_what_a_policy_wants() -> None:
    assert [Policy("on-failure", 2).wants(code, count) for code, count in ((0, 0), (1, 0), (1, 1), (1, 2))] == [
        False, True, True, False,
    ]  # fmt: skip
    assert Policy("always").wants(0, 99)
    assert not Policy("no").wants(1, 0)


def test_on_failure_gives_up(wherry: Wherry) -> None:
    wherry.run("run", "-d", "--name", "fails", "--restart", "on-failure:2", BUSYBOX, "sh", "-c", "exit 3")
    until(lambda: state(wherry, "fails") == "exited 3 2")
    wherry.run("run", "-d", "--name", "works", "--restart", "on-failure", BUSYBOX, "true")
    until(lambda: state(wherry, "works") == "exited 0 0")


def test_always_until_a_person_stops_it(wherry: Wherry) -> None:
    wherry.run("run", "-d", "--name", "again", "--restart", "always", BUSYBOX, "sh", "-c", "echo run; sleep 0.1")
    until(lambda: int(shown(wherry, "again", "{{.RestartCount}}")) >= 2)
    wherry.run("stop", "-t", "0", "again")
    until(lambda: state(wherry, "again").startswith("exited"))
    before = shown(wherry, "again", "{{.RestartCount}}")
    time.sleep(1.5)
    assert shown(wherry, "again", "{{.RestartCount}}") == before
    assert wherry.run("logs", "again").stdout.count("run\n") >= 3


def test_a_killed_daemon_goes_on_where_it_was(engine: Wherryd, wherry: Wherry) -> None:
    wherry.run("run", "-d", "--name", "stays", "--restart", "unless-stopped", BUSYBOX, "sleep", "1000")
    wherry.run("run", "-d", "--name", "ends", "--restart", "always", BUSYBOX, "sh", "-c", "sleep 2; exit 1")
    wherry.run("run", "-d", "--name", "stopped", "--restart", "unless-stopped", BUSYBOX, "sleep", "1000")
    wherry.run("stop", "-t", "0", "stopped")
    pid = shown(wherry, "stays", "{{.State.Pid}}")
    engine.kill()
    time.sleep(2.5)
    engine.start()
    until(lambda: int(shown(wherry, "ends", "{{.RestartCount}}") or 0) >= 1)
    assert shown(wherry, "stays", "{{.State.Status}} {{.State.Pid}} {{.RestartCount}}") == f"running {pid} 0"
    assert shown(wherry, "stopped", "{{.State.Status}}") == "exited"


def test_removal_when_the_client_is_gone(wherry: Wherry) -> None:
    process = wherry.start("run", "--rm", "--name", "orphan", "-v", "/anon", BUSYBOX, "sleep", "1")
    until(lambda: shown(wherry, "orphan", "{{.State.Status}}") == "running")
    process.kill()
    process.wait()
    until(lambda: wherry.run("ps", "-aq").stdout == "" and wherry.run("volume", "ls", "-q").stdout == "")


def test_an_exit_is_noted(engine: Wherryd, wherry: Wherry) -> None:
    wherry.run("run", "--name", "noted", BUSYBOX, "sh", "-c", "exit 6", code=6)
    until(lambda: "wherry/last-run" in wherry.run("containers", "info", shown(wherry, "noted", "{{.Id}}")).stdout)
    wherry.run("tasks", "rm", shown(wherry, "noted", "{{.Id}}"), code=6)
    assert state(wherry, "noted") == "exited 6 0"


def test_health(wherry: Wherry) -> None:
    check = ["--health-cmd", "test -f /ok", "--health-interval", "200ms", "--health-retries", "2"]
    wherry.run("run", "-d", "--name", "ill", *check, BUSYBOX, "sleep", "1000")
    until(lambda: shown(wherry, "ill", "{{.State.Health.Status}}") == "unhealthy")
    log = json.loads(shown(wherry, "ill", "{{json .State.Health.Log}}"))
    assert log[-1]["ExitCode"] == 1
    assert wherry.run("ps", "-q", "--filter", "health=unhealthy").stdout
    wherry.run("exec", "ill", "touch", "/ok")
    until(lambda: shown(wherry, "ill", "{{.State.Health.Status}} {{.State.Health.FailingStreak}}") == "healthy 0")
    assert "(healthy)" in wherry.run("ps").stdout
    # nothing of the checks is left in the container
    assert "test" not in wherry.run("exec", "ill", "ps", "-o", "args").stdout


def test_a_check_that_hangs(wherry: Wherry) -> None:
    check = ["--health-cmd", "sleep 100", "--health-interval", "100ms", "--health-timeout", "200ms"]
    wherry.run("run", "-d", "--name", "hangs", *check, "--health-retries", "1", BUSYBOX, "sleep", "1000")
    until(lambda: shown(wherry, "hangs", "{{.State.Health.Status}}") == "unhealthy")
    assert "exceeded timeout" in shown(wherry, "hangs", "{{json .State.Health.Log}}")
    wherry.run("rm", "-f", "hangs")


def test_a_name_is_one_containers(engine: Wherryd, wherry: Wherry) -> None:
    wherry.run("create", "--name", "only", BUSYBOX, "true")
    error = wherry.run("containers", "create", "--label", "wherry/name=only", BUSYBOX, "other", "true", code=1).stderr
    assert "is in use" in error
    wherry.run("create", "--name", "second", BUSYBOX, "true")
    assert "in use" in wherry.run("rename", "second", "only", code=1).stderr
