"""wherryd with shims that aren't its own: containerd's of two generations, and each form of the start protocol."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import strange_shims
from tests.peers import need
from tests.shim.harness import alive
from tests.sid import need_sid
from tests.wherryd import BUSYBOX, Wherryd

WORKING = ("runc-v2", "sid", "address", "result", "params", "grpc")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Wherryd]:
    daemon = Wherryd()
    try:
        paths = {kind: str(path) for kind, path in strange_shims.write(daemon.folder).items()}
        with contextlib.suppress(pytest.skip.Exception):
            paths["sid"] = sid_shim()
        daemon.config.write_text(
            "version = 2\n"
            + "".join(f'[runtimes."test.{kind}.v1"]\n  shim = "{path}"\n' for kind, path in paths.items())
        )
        daemon.start()
        daemon.import_busybox()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture(params=WORKING)
def flags(request: pytest.FixtureRequest) -> list[str]:
    """ctr's flags for one shim: by its absolute path, and by names of the configuration."""
    need("runc")
    if request.param == "runc-v2":
        return ["--runtime", need("containerd-shim-runc-v2")]
    if request.param == "sid":
        sid_shim()
    return ["--runtime", f"test.{request.param}.v1"]


def sid_shim() -> str:
    return str(Path(need_sid()).with_name("containerd-shim-runc-v2"))


def state_of(daemon: Wherryd, identity: str) -> str:
    lines = daemon.ctr("task", "ls").stdout.splitlines()[1:]
    return next((line.split()[2] for line in lines if line.split()[0] == identity), "")


def wait_for(daemon: Wherryd, identity: str, state: str) -> None:
    end = time.monotonic() + 30
    while (now := state_of(daemon, identity)) != state:
        assert time.monotonic() < end, f"{identity} is {now}, not {state}"
        time.sleep(0.05)


def test_a_day_with_a_strange_shim(daemon: Wherryd, flags: list[str]) -> None:
    need("script")
    ctr = daemon.ctr
    assert ctr("run", "--rm", *flags, BUSYBOX, "one", "sh", "-c", "read x; echo $x", stdin="in\n").stdout == "in\n"
    assert ctr("run", "--rm", *flags, BUSYBOX, "two", "sh", "-c", "exit 7", check=False).returncode == 7
    done = ctr("run", "--rm", *flags, BUSYBOX, "three", "/no/such", check=False)
    assert "no such file or directory" in done.stderr

    ctr("run", "-d", *flags, BUSYBOX, "day", "sleep", "1000")
    assert ctr("task", "exec", "--exec-id", "x", "day", "echo", "out").stdout == "out\n"
    terminal = f"ctr -a {daemon.address} task exec -t --exec-id t day sh -c 'test -t 0 && echo terminal'"
    said = subprocess.run(["script", "-qec", terminal, "/dev/null"], capture_output=True, timeout=60, check=False)
    assert b"terminal\r" in said.stdout
    ctr("task", "pause", "day")
    assert state_of(daemon, "day") == "PAUSED"
    ctr("task", "resume", "day")
    assert "pids.current" in ctr("task", "metrics", "day").stdout
    assert len(ctr("task", "ps", "day").stdout.splitlines()) == 2

    daemon.restart()
    assert state_of(daemon, "day") == "RUNNING"
    assert ctr("task", "exec", "--exec-id", "y", "day", "echo", "again").stdout == "again\n"
    ctr("task", "kill", "-s", "KILL", "day")
    wait_for(daemon, "day", "STOPPED")
    assert "exit code 137" in ctr("task", "delete", "day", check=False).stderr
    ctr("containers", "delete", "day")
    assert daemon.settle(15) == []


def test_a_strange_shim_that_is_killed(daemon: Wherryd, flags: list[str]) -> None:
    daemon.ctr("run", "-d", *flags, BUSYBOX, "victim", "sleep", "1000")
    init = int(daemon.ctr("task", "ls").stdout.splitlines()[1].split()[1])
    parent = int(Path(f"/proc/{init}/stat").read_text().rpartition(")")[2].split()[1])
    assert b"containerd-shim" in Path(f"/proc/{parent}/cmdline").read_bytes()
    os.kill(parent, signal.SIGKILL)
    end = time.monotonic() + 30
    while alive(init) or state_of(daemon, "victim"):
        assert time.monotonic() < end
        time.sleep(0.05)
    daemon.ctr("containers", "delete", "victim")
    assert daemon.settle(15) == []


def test_a_shim_that_takes_its_time_to_leave_is_not_killed(daemon: Wherryd) -> None:
    """It still has events to tell; nobody waits for it but who wants its name."""
    daemon.ctr("run", "--rm", "--runtime", "test.lingers.v1", BUSYBOX, "late", "true")
    assert state_of(daemon, "late") == ""
    assert daemon.settle(20) == []
    assert (daemon.state / "left").exists(), daemon.log_text()[-3000:]


def test_what_a_new_shim_reads(daemon: Wherryd) -> None:
    """Field by field, as containerd 2.3 writes it."""
    flags = ["--runtime", "test.params.v1"]
    daemon.ctr("run", "--rm", *flags, BUSYBOX, "asked", "true")
    data = (daemon.state / "stdin-asked").read_bytes()
    expected = b"\x0a\x05asked\x12\x07default"
    # log_level is an enum of which debug is -4: ten bytes of varint
    expected += b"\x18\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x01\x22\x052.3.0"
    expected += b"\x2a" + bytes([len(daemon.address) + 6]) + f"{daemon.address}.ttrpc".encode()
    expected += b"\x32" + bytes([len(daemon.address)]) + daemon.address.encode() + b"\x3a"
    assert data.startswith(expected)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("newer", "unsupported shim version (4)"),
        ("silent", "printed no address"),
        ("fails", "the moon is in the wrong phase"),
    ],
)
def test_a_shim_that_does_not_start(daemon: Wherryd, kind: str, says: str) -> None:
    done = daemon.ctr("run", "--runtime", f"test.{kind}.v1", BUSYBOX, "none", "true", check=False)
    assert says in done.stderr
    daemon.ctr("containers", "delete", "none")
    assert daemon.settle() == []
