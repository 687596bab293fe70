"""Debian's containerd, dockerd, podman and conmon, unmodified, with wherry-runtime where they had runc; and with runc,
because a test that runc fails is wrong."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.containerd import Containerd
from tests.runtime.bundles import cgroups_of
from tests.runtime.callers import MEMORY, PIDS, Caller, write_program
from tests.runtime.callers.conmon import Conmon
from tests.runtime.callers.containerd import Ctr
from tests.runtime.callers.docker import Docker, Dockerd
from tests.runtime.callers.podman import Podman, Storage

_RUNTIMES = ("wherry-runtime", "runc")


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="wherry-callers-") as folder:
        yield {name: write_program(name, Path(folder)) for name in _RUNTIMES}


@pytest.fixture(scope="module")
def containerd() -> Iterator[Containerd]:
    daemon = Containerd()
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture(scope="module")
def dockerd(programs: dict[str, str]) -> Iterator[Dockerd]:
    daemon = Dockerd({f"test-{name}": path for name, path in programs.items()})
    yield daemon
    daemon.close()


@pytest.fixture(scope="module")
def podman() -> Iterator[Storage]:
    storage = Storage()
    yield storage
    storage.close()


@pytest.fixture(params=_RUNTIMES)
def runtime(request: pytest.FixtureRequest, programs: dict[str, str]) -> str:
    return programs[request.param]


@pytest.fixture(params=["containerd", "dockerd", "podman", "conmon"])
def caller(request: pytest.FixtureRequest, runtime: str, rootfs: str, tmp_path: Path) -> Iterator[Caller]:
    made: Caller
    if request.param == "containerd":
        made = Ctr(runtime, tmp_path, request.getfixturevalue("containerd"), rootfs)
    elif request.param == "dockerd":
        made = Docker(runtime, tmp_path, request.getfixturevalue("dockerd"))
    elif request.param == "podman":
        made = Podman(runtime, tmp_path, request.getfixturevalue("podman"))
    else:
        made = Conmon(runtime, tmp_path, rootfs)
    yield made
    made.clean()


@pytest.fixture
def name() -> str:
    return f"caller-{uuid.uuid4().hex[:10]}"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_runs_and_ends(caller: Caller, name: str) -> None:
    done = caller.run(name, "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (7, "out", "err")
    assert caller.status(name) == ""
    assert cgroups_of(name) == []


def test_a_terminal(caller: Caller, name: str) -> None:
    assert "/dev/pts/0" in caller.run_on_terminal(name, "tty")


def test_its_life(caller: Caller, name: str) -> None:
    """Started in the background, entered, paused, stopped by a signal that it catches, removed."""
    caller.start(name, "trap 'exit 9' TERM; while :; do sleep 0.1; done")
    assert caller.status(name) == "running"
    done = caller.exec(name, "echo in; exit 3")
    assert (done.returncode, done.stdout.strip()) == (3, "in")
    assert "/dev/pts/" in caller.exec_on_terminal(name, "tty")
    caller.pause(name)
    assert caller.status(name) == "paused"
    caller.resume(name)
    assert caller.status(name) == "running"
    assert caller.stop(name) == 9
    wait_until(lambda: caller.status(name) in ("stopped", ""))
    caller.remove(name)
    assert caller.status(name) == ""
    assert cgroups_of(name) == []


def test_limits_hold(caller: Caller, name: str) -> None:
    caller.start(name, "while :; do sleep 1; done")
    hog = caller.exec(name, f"dd if=/dev/zero of=/dev/null bs={2 * MEMORY} count=1")
    assert hog.returncode == 137
    forks = caller.exec(name, f"i=0; while [ $i -lt {PIDS + 5} ]; do i=$((i+1)); sleep 3 & done; echo all")
    assert "fork" in forks.stderr
    assert "all" not in forks.stdout
    assert caller.status(name) == "running"
