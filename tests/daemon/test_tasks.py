"""Tasks as ctr sees them: on our shim with the bundled runtime and with runc, and on containerd's shim."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import need
from tests.wherryd import BUSYBOX, Wherryd
from wherry.client import connect
from wherry.client.tasks import Ending

RUNTIMES = ("bundled", "runc", "foreign")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Wherryd]:
    daemon = Wherryd()
    try:
        daemon.start()
        daemon.import_busybox()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> list[str]:
    """ctr's flags for one way to run a container."""
    if request.param == "runc":
        return ["--runc-binary", need("runc")]
    if request.param == "foreign":
        need("runc")
        return ["--runtime", need("containerd-shim-runc-v2")]
    return []


@pytest.fixture(autouse=True)
def nothing_left(daemon: Wherryd) -> Iterator[None]:
    yield
    assert daemon.settle() == []
    assert "fork without exec" not in daemon.log_text()
    assert "call failed" not in daemon.log_text()


def wait_for(daemon: Wherryd, identity: str, state: str, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        listed = daemon.ctr("task", "ls").stdout
        if any(line.split()[0] == identity and line.split()[2] == state for line in listed.splitlines()[1:]):
            return
        time.sleep(0.05)
    raise AssertionError(f"{identity} is not {state}: {daemon.ctr('task', 'ls').stdout}")


def test_run_passes_output_and_exit_code_on(daemon: Wherryd, runtime: list[str]) -> None:
    assert daemon.ctr("run", "--rm", *runtime, BUSYBOX, "one", "echo", "hello").stdout == "hello\n"
    done = daemon.ctr("run", "--rm", *runtime, BUSYBOX, "two", "sh", "-c", "echo oops >&2; exit 7", check=False)
    assert (done.returncode, done.stderr) == (7, "oops\n")
    done = daemon.ctr("run", "--rm", *runtime, BUSYBOX, "three", "sh", "-c", "read x; echo $x", stdin="through\n")
    assert done.stdout == "through\n"


def test_a_detached_container_through_its_states(daemon: Wherryd, runtime: list[str]) -> None:
    daemon.ctr("run", "-d", *runtime, BUSYBOX, "long", "sleep", "1000")
    wait_for(daemon, "long", "RUNNING")
    assert daemon.ctr("task", "exec", "--exec-id", "x", "long", "echo", "in").stdout == "in\n"
    done = daemon.ctr("task", "exec", "--exec-id", "x", "long", "sh", "-c", "exit 3", check=False)
    assert done.returncode == 3
    assert len(daemon.ctr("task", "ps", "long").stdout.splitlines()) == 2
    daemon.ctr("task", "pause", "long")
    wait_for(daemon, "long", "PAUSED")
    daemon.ctr("task", "resume", "long")
    wait_for(daemon, "long", "RUNNING")
    assert "memory" in daemon.ctr("task", "metrics", "long").stdout
    done = daemon.ctr("task", "delete", "long", check=False)
    assert "must be stopped before deletion: running: failed precondition" in done.stderr
    daemon.ctr("task", "kill", "-s", "KILL", "long")
    wait_for(daemon, "long", "STOPPED")
    assert "exit code 137" in daemon.ctr("task", "delete", "long", check=False).stderr
    daemon.ctr("containers", "delete", "long")


def test_a_missing_command_is_named_and_nothing_stays(daemon: Wherryd, runtime: list[str]) -> None:
    done = daemon.ctr("run", "--rm", *runtime, BUSYBOX, "gone", "/no/such", check=False)
    assert done.returncode != 0
    assert "failed to create shim task: " in done.stderr
    assert "/no/such" in done.stderr
    assert "no such file or directory" in done.stderr
    assert daemon.bundles() == []
    daemon.ctr("containers", "delete", "gone", check=False)


def test_a_missing_working_directory(daemon: Wherryd, runtime: list[str]) -> None:
    # the runtimes make it, as the reference does: a relative one is what can't be
    assert daemon.ctr("run", "--rm", *runtime, "--cwd", "/no/dir", BUSYBOX, "cwd", "pwd").stdout == "/no/dir\n"
    done = daemon.ctr("run", "--rm", *runtime, "--cwd", "relative", BUSYBOX, "cwd2", "pwd", check=False)
    assert done.returncode != 0
    assert "cwd" in done.stderr.lower()
    assert daemon.bundles() == []
    daemon.ctr("containers", "delete", "cwd2", check=False)


def test_a_terminal(daemon: Wherryd) -> None:
    master, slave = pty.openpty()
    command = [need("ctr"), "-a", daemon.address, "run", "--rm", "-t", BUSYBOX, "tty", "sh", "-c", "tty; stty size"]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as process:
        os.close(slave)
        output = b""
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:
                break
            if not data:
                break
            output += data
        assert process.wait(timeout=20) == 0
    os.close(master)
    assert b"/dev/pts/0" in output or b"/dev/console" in output


def test_a_task_is_created_once(daemon: Wherryd) -> None:
    daemon.ctr("run", "-d", BUSYBOX, "once", "sleep", "1000")
    done = daemon.ctr("task", "start", "once", check=False)
    assert "task once: already exists" in done.stderr
    daemon.ctr("task", "kill", "-s", "KILL", "once")
    wait_for(daemon, "once", "STOPPED")
    daemon.ctr("task", "delete", "once", check=False)
    daemon.ctr("containers", "delete", "once")


def test_a_task_whose_record_is_gone_can_be_ended(daemon: Wherryd, runtime: list[str]) -> None:
    daemon.ctr("run", "-d", *runtime, BUSYBOX, "bare", "sleep", "1000")

    async def end() -> int:
        async with await connect(daemon.address) as client:
            await client.containers.delete("bare")
            assert [task.id for task in await client.tasks.list()] == ["bare"]
            waiting = client.tasks.waiting("bare")
            await client.tasks.kill("bare", signal.SIGKILL)
            await waiting.result()
            return (await client.tasks.delete("bare")).status

    assert asyncio.run(end()) == 137
    assert "bare" not in daemon.ctr("task", "ls").stdout
    daemon.ctr("snapshots", "rm", "bare", check=False)  # where the collector wasn't faster


def test_what_is_not_there_is_said_in_containerds_words(daemon: Wherryd) -> None:
    done = daemon.ctr("task", "kill", "nobody", check=False)
    assert 'container "nobody" in namespace "default": not found' in done.stderr
    daemon.ctr("containers", "create", BUSYBOX, "idle")
    for command in (["kill"], ["pause"], ["metrics"], ["ps"]):
        done = daemon.ctr("task", *command, "idle", check=False)
        assert "task idle not found: not found" in done.stderr, command
    done = daemon.ctr("task", "exec", "--exec-id", "x", "idle", "true", check=False)
    assert "task idle not found: not found" in done.stderr
    daemon.ctr("containers", "delete", "idle")


def test_an_exec_id_that_is_none(daemon: Wherryd) -> None:
    daemon.ctr("run", "-d", BUSYBOX, "execs", "sleep", "1000")
    done = daemon.ctr("task", "exec", "--exec-id", "a b", "execs", "true", check=False)
    assert "invalid exec id a b: identifier" in done.stderr
    daemon.ctr("task", "kill", "-s", "KILL", "execs")
    wait_for(daemon, "execs", "STOPPED")
    daemon.ctr("task", "delete", "execs", check=False)
    daemon.ctr("containers", "delete", "execs")


def test_namespaces_have_tasks_of_the_same_name(daemon: Wherryd) -> None:
    daemon.import_busybox("other")
    for namespace in ("default", "other"):
        daemon.ctr("run", "-d", BUSYBOX, "same", "sleep", "1000", namespace=namespace)
    pids = {daemon.ctr("task", "ls", namespace=name).stdout.splitlines()[1].split()[1] for name in ("default", "other")}
    assert len(pids) == 2
    for namespace in ("default", "other"):
        daemon.ctr("task", "delete", "--force", "same", namespace=namespace, check=False)
        daemon.ctr("containers", "delete", "same", namespace=namespace)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/no/such/shim", 'no executable file "/no/such/shim": not found'),
        ("io.containerd.absent.v7", 'binary "containerd-shim-absent-v7" is in none of '),
        ("what is this", 'invalid runtime name "what is this"'),
    ],
)
def test_a_missing_shim_is_named(daemon: Wherryd, name: str, says: str) -> None:
    done = daemon.ctr("run", "--runtime", name, BUSYBOX, "noshim", "true", check=False)
    assert says in done.stderr
    daemon.ctr("containers", "delete", "noshim")


def test_runtimes_of_the_configuration(daemon: Wherryd) -> None:
    shim = need("containerd-shim-runc-v2")
    own = Wherryd(
        config=f"""
version = 2
[runtimes."io.containerd.special.v1"]
  shim = "{shim}"
[runtimes."io.containerd.runc.v2"]
  binary = "{need("runc")}"
[runtimes."io.containerd.broken.v1"]
  shim = "containerd-shim-nowhere"
"""
    )
    try:
        own.start()
        own.import_busybox()
        done = own.ctr("run", "--rm", "--runtime", "io.containerd.special.v1", BUSYBOX, "one", "echo", "special")
        assert done.stdout == "special\n"
        own.ctr("run", "-d", BUSYBOX, "two", "sleep", "1000")
        bundle = own.state / "tasks" / "default" / "two"
        assert not (bundle / "launch.json").exists()
        assert need("runc") in (bundle / "runtime.json").read_text()
        done = own.ctr("run", "--runtime", "io.containerd.broken.v1", BUSYBOX, "three", "true", check=False)
        assert (
            'runtimes."io.containerd.broken.v1" in the configuration: binary "containerd-shim-nowhere"' in done.stderr
        )
    finally:
        own.close()


def test_the_oom_score_of_the_configuration() -> None:
    own = Wherryd(config="version = 2\noom_score = 55\n")
    try:
        own.start()
        own.import_busybox()
        assert Path(f"/proc/{own.pid}/oom_score_adj").read_text() == "55\n"
        assert own.ctr("run", "--rm", BUSYBOX, "one", "cat", "/proc/1/oom_score_adj").stdout == "56\n"
    finally:
        own.close()


def test_a_client_and_the_daemon_go_and_another_client_attaches(daemon: Wherryd, runtime: list[str]) -> None:
    script = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done"
    ctr = ["ctr", "--address", daemon.address]
    first = [*ctr, "run", *runtime, BUSYBOX, "attach", "sh", "-c", script]
    with subprocess.Popen(first, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        for _ in range(20):
            client.stdout.readline()
        client.kill()
        daemon.kill()
    daemon.start()
    with subprocess.Popen([*ctr, "task", "attach", "attach"], stdout=subprocess.PIPE) as again:
        assert again.stdout is not None
        numbers = [int(again.stdout.readline()) for _ in range(60)]
        # it had waited for a reader: nothing is missing from there on
        assert numbers == list(range(numbers[0], numbers[0] + 60))
        assert numbers[0] >= 20
        daemon.ctr("task", "kill", "-s", "KILL", "attach")
        again.stdout.read()
        assert again.wait(20) == 137
    daemon.ctr("task", "delete", "--force", "attach", check=False)
    daemon.ctr("containers", "delete", "attach")


def test_a_process_that_ran_out_of_memory_is_explained(daemon: Wherryd) -> None:
    hungry = "x=aaaaaaaaaaaaaaaaaaaa; while :; do x=$x$x; done"
    daemon.ctr("run", "-d", "--memory-limit", str(16 << 20), BUSYBOX, "hungry", "sh", "-c", hungry)

    async def explain() -> Ending | None:
        async with await connect(daemon.address) as client:
            assert (await client.tasks.wait("hungry")).status == 137
            return await client.tasks.explain("hungry")

    ending = asyncio.run(explain())
    assert ending is not None
    assert re.fullmatch(
        rf"out of memory: the limit of cgroup \S*/hungry was reached, the kernel killed sh \(pid {ending.pid}\)",
        ending.reason,
    )
    assert (ending.status, ending.reason in daemon.log_text()) == (137, True)
    daemon.ctr("task", "delete", "hungry", check=False)
    daemon.ctr("containers", "delete", "hungry")
    daemon.ctr("run", "-d", BUSYBOX, "content", "sleep", "1000")

    async def of_one_that_runs() -> Ending | None:
        async with await connect(daemon.address) as client:
            return await client.tasks.explain("content")

    assert asyncio.run(of_one_that_runs()) is None
    daemon.ctr("task", "delete", "--force", "content", check=False)
    daemon.ctr("containers", "delete", "content")
