"""SIGKILL on the daemon and on shims: nothing is lost, nothing is doubled, nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

from tests.daemon.test_tasks import RUNTIMES, runtime, wait_for
from tests.peers import need
from tests.wherryd import BUSYBOX, Wherryd
from wherry.client import connect

__all__ = ["runtime"]
assert RUNTIMES


@pytest.fixture
def daemon(wherryd: Wherryd) -> Wherryd:
    wherryd.import_busybox()
    return wherryd


def task_pids(daemon: Wherryd) -> dict[str, int]:
    lines = daemon.ctr("task", "ls").stdout.splitlines()[1:]
    return {line.split()[0]: int(line.split()[1]) for line in lines}


def shim_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and that nobody has reaped doesn't."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def listening(daemon: Wherryd, program: str = "") -> Iterator[list[str]]:
    """`ctr events` from the moment at which it hears; what it has printed so far."""
    lines: list[str] = []
    command = [program or need("ctr"), "-a", daemon.address, "events"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=_keep, args=[process.stdout, lines])
        reader.start()
        try:
            end = time.monotonic() + 30
            while not lines:
                assert time.monotonic() < end, "ctr hears no events"
                daemon.ctr("namespaces", "create", f"mark-{time.monotonic_ns()}")
                time.sleep(0.05)
            yield lines
        finally:
            process.terminate()
            reader.join()


def _keep(source: IO[str], lines: list[str]) -> None:
    lines.extend(line.rstrip() for line in source)  # one by one, as they come


@contextmanager
def events(daemon: Wherryd, program: str = "") -> Iterator[list[str]]:
    """What `ctr events` prints meanwhile."""
    found: list[str] = []
    with listening(daemon, program) as lines:
        yield found
        time.sleep(0.3)  # for what should not come
        # events come in order: with the last one all are here
        daemon.ctr("namespaces", "create", last := f"mark-{time.monotonic_ns()}")
        end = time.monotonic() + 30
        while not any(last in line for line in lines):
            assert time.monotonic() < end, lines
            time.sleep(0.02)
        found += [line for line in lines if "mark-" not in line]


def test_containers_outlive_the_daemon(daemon: Wherryd, runtime: list[str]) -> None:
    daemon.ctr("run", "-d", *runtime, BUSYBOX, "stays", "sleep", "1000")
    daemon.ctr("run", "-d", *runtime, BUSYBOX, "ends", "sh", "-c", "sleep 0.7; exit 9")
    before = task_pids(daemon)
    daemon.kill()
    os.kill(before["stays"], 0)
    time.sleep(1)
    daemon.start()
    assert task_pids(daemon)["stays"] == before["stays"]
    wait_for(daemon, "ends", "STOPPED")
    assert daemon.ctr("task", "exec", "--exec-id", "y", "stays", "echo", "again").stdout == "again\n"
    assert "exit code 9" in daemon.ctr("task", "delete", "ends", check=False).stderr
    daemon.ctr("task", "kill", "-s", "KILL", "stays")
    wait_for(daemon, "stays", "STOPPED")
    daemon.ctr("task", "delete", "stays", check=False)
    assert daemon.settle() == []


def test_an_orderly_stop_leaves_containers_alone(daemon: Wherryd) -> None:
    daemon.ctr("run", "-d", BUSYBOX, "stays", "sleep", "1000")
    before = task_pids(daemon)
    assert daemon.stop() == 0
    os.kill(before["stays"], 0)
    daemon.start()
    assert task_pids(daemon) == before


def test_a_killed_shim_is_reported_once(daemon: Wherryd, runtime: list[str]) -> None:
    daemon.ctr("run", "-d", *runtime, BUSYBOX, "orphan", "sleep", "1000")
    init = task_pids(daemon)["orphan"]
    with events(daemon) as seen:
        os.kill(shim_of(init), signal.SIGKILL)
        end = time.monotonic() + 30
        while task_pids(daemon) and time.monotonic() < end:
            time.sleep(0.05)
    exits = [line for line in seen if "/tasks/exit" in line]
    assert len(exits) == 1, seen
    assert '"exit_status":137' in exits[0]
    assert sum("/tasks/delete" in line for line in seen) == 1
    assert daemon.settle() == []
    daemon.ctr("containers", "delete", "orphan")


def test_a_wait_is_answered_when_the_shim_is_killed(daemon: Wherryd) -> None:
    command = [need("ctr"), "-a", daemon.address, "run", BUSYBOX, "waited", "sleep", "1000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as client:
        wait_for(daemon, "waited", "RUNNING")
        os.kill(shim_of(task_pids(daemon)["waited"]), signal.SIGKILL)
        assert client.wait(timeout=15) != 0
    assert daemon.settle() == []


def test_a_shim_that_died_with_the_daemon_is_cleaned_up(daemon: Wherryd, runtime: list[str]) -> None:
    daemon.ctr("run", "-d", *runtime, BUSYBOX, "both", "sleep", "1000")
    init = task_pids(daemon)["both"]
    shim = shim_of(init)
    daemon.kill()
    os.kill(shim, signal.SIGKILL)
    daemon.start()
    assert task_pids(daemon) == {}
    assert daemon.settle() == []
    assert "container ended with its shim" in daemon.log_text()
    assert not alive(init)


def test_a_create_that_the_daemon_did_not_survive_leaves_nothing(daemon: Wherryd) -> None:
    daemon.ctr("containers", "create", BUSYBOX, "half")
    daemon.kill()
    bundle = daemon.state / "tasks" / "default" / "half"
    (bundle / "rootfs").mkdir(parents=True)
    (bundle / "config.json").write_text("{}")
    hidden = daemon.state / "tasks" / "default" / ".gone"
    hidden.mkdir()
    daemon.start()
    assert task_pids(daemon) == {}
    assert daemon.settle() == []
    assert not hidden.exists()
    assert "/tasks/exit" not in daemon.log_text()


def test_a_mute_shim_delays_nobody_else(daemon: Wherryd) -> None:
    for name in ("mute", "well"):
        daemon.ctr("run", "-d", BUSYBOX, name, "sleep", "1000")
    pids = task_pids(daemon)
    shim = shim_of(pids["mute"])
    # so long that a busy machine is no mute shim
    limits = {"shim.load": "50s", "task.state": "6s"}
    lines = [f'"io.containerd.timeout.{name}" = "{limit}"\n' for name, limit in limits.items()]
    daemon.config.write_text(f"version = 2\n[timeouts]\n{''.join(lines)}")
    os.kill(shim, signal.SIGSTOP)
    try:
        assert daemon.restart() < 40
        began = time.monotonic()
        assert daemon.ctr("task", "exec", "--exec-id", "x", "well", "echo", "fine").stdout == "fine\n"
        assert time.monotonic() - began < 6
        # listed as of unknown state, in bounded time, and once it was found mute at once
        assert "UNKNOWN" in daemon.ctr("task", "ls", timeout=40).stdout
        began = time.monotonic()
        daemon.ctr("task", "ls")
        assert time.monotonic() - began < 6
    finally:
        os.kill(shim, signal.SIGCONT)
    end = time.monotonic() + 30
    while task_pids(daemon) != pids and time.monotonic() < end:
        time.sleep(0.1)
    assert task_pids(daemon) == pids


def test_ten_containers_are_found_again_quickly(daemon: Wherryd) -> None:
    for number in range(10):
        daemon.ctr("run", "-d", BUSYBOX, f"c{number}", "sleep", "1000")
    before = task_pids(daemon)
    assert len(before) == 10
    daemon.restart()
    assert task_pids(daemon) == before
    assert "shim is gone" not in daemon.log_text()


def test_the_fork_server_may_be_killed(daemon: Wherryd) -> None:
    daemon.ctr("run", "-d", BUSYBOX, "before", "sleep", "1000")
    before = task_pids(daemon)
    with open(f"/proc/{daemon.pid}/task/{daemon.pid}/children") as file:
        children = [int(pid) for pid in file.read().split()]
    (server,) = [pid for pid in children if "forkserver" in command_line(pid)]
    os.kill(server, signal.SIGKILL)
    assert daemon.ctr("run", "--rm", BUSYBOX, "after", "echo", "fine").stdout == "fine\n"
    assert task_pids(daemon) == before
    assert daemon.ctr("task", "exec", "--exec-id", "x", "before", "echo", "too").stdout == "too\n"


def command_line(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().replace(b"\0", b" ").decode(errors="replace")
    return ""


def test_a_shim_killed_while_it_makes_a_container_leaves_nothing(daemon: Wherryd) -> None:
    killed = 0
    for number in range(10):
        command = [need("ctr"), "-a", daemon.address, "run", "--rm", BUSYBOX, f"s{number}", "sleep", "0.05"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
            time.sleep(0.03 + number * 0.01)
            for pid in daemon.processes():
                if command_line(pid).startswith("containerd-shim-wherry-v1"):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        killed += 1
            client.wait(timeout=20)
        assert daemon.settle() == []
    assert killed
    assert task_pids(daemon) == {}
    assert not [path for path in Path("/sys/fs/cgroup").glob("*/default/s[0-9]") if path.is_dir()]


def test_many_at_once_leave_nothing(daemon: Wherryd) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = [f"m{number}" for number in range(24)]
        outputs = pool.map(lambda name: daemon.ctr("run", "--rm", BUSYBOX, name, "echo", name).stdout, names)
        assert list(outputs) == [f"{name}\n" for name in names]
    assert task_pids(daemon) == {}
    assert daemon.settle() == []


def test_the_daemon_is_killed_while_containers_come_and_go(daemon: Wherryd) -> None:
    command = [need("ctr"), "-a", daemon.address, "run", "--rm", BUSYBOX]
    clients = [
        subprocess.Popen([*command, f"k{number}", "true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for number in range(8)
    ]
    time.sleep(0.12)
    daemon.kill()
    for client in clients:
        client.kill()
        client.wait()
    daemon.start()
    for name in task_pids(daemon):
        # a task that was created, started or had ended is there in its state, and can be deleted
        daemon.ctr("task", "delete", "--force", name, check=False)
    assert task_pids(daemon) == {}
    assert daemon.settle() == []
    assert daemon.ctr("run", "--rm", BUSYBOX, "after", "echo", "fine").stdout == "fine\n"


def test_a_create_that_a_dead_daemon_had_begun_leaves_nothing(daemon: Wherryd) -> None:
    """Its shim is still at it (a slow hook) when the next daemon comes; what it makes goes with it."""
    hooked = daemon.folder / "hooked"
    daemon.ctr("containers", "create", BUSYBOX, "slow", "sleep", "1000")

    async def hook(args: list[str]) -> None:
        async with await connect(daemon.address) as client:
            record = await client.containers.get("slow")
            spec = {**(record.spec or {}), "hooks": {"createRuntime": [{"path": "/bin/sh", "args": args}]}}
            await client.containers.update(record._replace(spec=spec), ["spec"])

    asyncio.run(hook(["sh", "-c", f"touch {hooked}; sleep 2"]))
    with subprocess.Popen([need("ctr"), "-a", daemon.address, "task", "start", "-d", "slow"], stderr=subprocess.PIPE):
        while not hooked.exists():
            time.sleep(0.01)
        daemon.kill()
    daemon.start()
    assert daemon.settle(60) == []
    # neither a cgroup nor the runtime's record is in the way of the next one
    asyncio.run(hook(["sh", "-c", "exit 0"]))
    daemon.ctr("task", "start", "-d", "slow")
    daemon.ctr("task", "kill", "-s", "KILL", "slow")
    wait_for(daemon, "slow", "STOPPED", 60)
    daemon.ctr("task", "delete", "slow", check=False)  # its status is the command's
    assert daemon.settle(60) == []
