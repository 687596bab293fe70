"""Docker's verbs as hands know them: a container's life, what is shown of it, exit codes, complaints."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Wherry
from tests.wherryd import BUSYBOX

# containers that end by themselves are waited for so long at most, in seconds
PATIENCE = 30.0


def eventually(holds: Callable[[], bool]) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it didn't come to be"
        time.sleep(0.05)


def status(wherry: Wherry, name: str) -> str:
    """What `inspect` says that a container does; "" for one that is gone."""
    return wherry.run("inspect", "-f", "{{.State.Status}}", name, code=None).stdout.strip()


def test_a_life(wherry: Wherry) -> None:
    identity = wherry.run("run", "-d", "--name", "web", "-e", "A=b", BUSYBOX, "sh", "-c", "sleep 1000").stdout.strip()
    assert re.fullmatch("[0-9a-f]{64}", identity)
    try:
        head, line = wherry.run("ps").stdout.splitlines()
        assert head.split()[:2] == ["CONTAINER", "ID"]
        assert line.startswith(identity[:12])
        assert "web" in line
        assert " Up " in line
        assert wherry.run("ps", "-q", "--no-trunc", "--filter", "name=^web$").stdout.strip() == identity
        assert wherry.run("exec", identity[:6], "sh", "-c", "echo $A; exit 5", code=5).stdout == "b\n"
        assert wherry.run("exec", "-i", "web", "cat", stdin="in").stdout == "in"
        assert wherry.run("exec", "web", "cat", stdin="not passed on").stdout == ""
        assert (
            wherry.run("exec", "-u", "nobody", "-w", "/tmp", "web", "sh", "-c", "id -un; pwd").stdout
            == "nobody\n/tmp\n"
        )
        assert wherry.run("exec", "web", "nope", code=127).stdout == ""
        wherry.run("pause", "web")
        assert status(wherry, "web") == "paused"
        assert "is paused" in wherry.run("start", "web", code=1).stderr
        wherry.run("unpause", "web")
        assert "not paused, but running" in wherry.run("unpause", "web", code=1).stderr
        assert "cannot remove container web: it is running" in wherry.run("rm", "web", code=1).stderr
        wherry.run("rename", "web", "shop")
        assert "no such container: web" in wherry.run("stop", "web", code=1).stderr
        assert wherry.run("stop", "-t", "0", "shop").stdout == "shop\n"
        assert wherry.run("wait", "shop").stdout == "137\n"
        assert "Exited (137)" in wherry.run("ps", "-a").stdout
        assert wherry.run("ps", "-q").stdout == ""
        wherry.run("start", "shop")
        wherry.run("restart", "-t", "0", "shop")
        assert wherry.run("kill", "-s", "KILL", "shop").stdout == "shop\n"
        eventually(lambda: status(wherry, "shop") == "exited")
    finally:
        wherry.run("rm", "-f", identity)
    assert wherry.run("ps", "-aq").stdout == ""


def test_exit_codes_and_streams(wherry: Wherry) -> None:
    done = wherry.run("run", "--rm", BUSYBOX, "sh", "-c", "echo out; echo err >&2; exit 7", code=7)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert wherry.run("run", "--rm", "-i", BUSYBOX, "cat", stdin="x" * 100_000).stdout == "x" * 100_000
    assert wherry.run("run", "--rm", BUSYBOX, "cat", stdin="not passed on").stdout == ""
    assert "nope" in wherry.run("run", "--rm", BUSYBOX, "nope", code=127).stderr
    assert wherry.run("run", "--rm", BUSYBOX, "/tmp", code=126).stderr
    assert wherry.run("run", "--rm", "--cpus", "-1", BUSYBOX, "true", code=125).stderr.startswith("wherry: --cpus")
    assert wherry.run("run", "--pull", "never", "none.invalid/none", code=125).stderr.count("\n") == 1


def test_signals_and_the_container_that_follows_from_them(wherry: Wherry) -> None:
    script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    with wherry.start("run", "--rm", BUSYBOX, "sh", "-c", script, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 9


def test_detach_keys_leave_it_running(wherry: Wherry) -> None:
    master, slave = pty.openpty()
    process = wherry.start("run", "-it", "--name", "tty", BUSYBOX, "sh", stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    try:
        seen = b""
        while b"# " not in seen:
            seen += os.read(master, 1024)
        os.write(master, b"echo a\x10b\r")
        while b"b\r\n" not in seen:
            seen += os.read(master, 1024)
        os.write(master, b"\x10\x11")
        assert process.wait(PATIENCE) == 0
        assert status(wherry, "tty") == "running"
    finally:
        process.kill()
        process.wait()
        os.close(master)
        wherry.run("rm", "-f", "tty")


def test_names_ids_and_their_beginnings(wherry: Wherry) -> None:
    first = wherry.run("create", "--name", "one", BUSYBOX, "true").stdout.strip()
    try:
        assert "already exists" not in first
        error = wherry.run("create", "--name", "one", BUSYBOX, "true", code=1).stderr
        assert "in use by container" in error
        assert "invalid container name" in wherry.run("create", "--name", "a b", BUSYBOX, "true", code=1).stderr
        assert status(wherry, "one") == status(wherry, first[:12]) == status(wherry, first) == "created"
        wherry.run("containers", "create", BUSYBOX, "of-ctr", "true")
        assert status(wherry, "of-ctr") == "created"
        assert "of-ctr" in wherry.run("ps", "-a", "--format", "{{.Names}}").stdout.split()
        wherry.run("start", "-a", "one")
        assert status(wherry, "one") == "exited"
    finally:
        wherry.run("rm", "one", "of-ctr")


def test_what_is_shown(wherry: Wherry) -> None:
    wherry.run("run", "-d", "--name", "shown", "--label", "app=x", "-w", "/tmp", BUSYBOX, "sleep", "1000")
    try:
        row = json.loads(wherry.run("ps", "--format", "json").stdout)
        assert (row["Names"], row["State"], row["Image"]) == (
            "shown",
            "running",
            BUSYBOX.removeprefix("docker.io/library/"),
        )
        assert wherry.run("ps", "--format", "table {{.Names}}\\t{{.State}}").stdout.split() == [
            "NAMES", "STATE", "shown", "running",
        ]  # fmt: skip
        for text, fits in (
            ("label=app=x", True),
            ("label=app=y", False),
            ("status=exited", False),
            ("ancestor=nope", False),
        ):
            assert bool(wherry.run("ps", "-q", "--filter", text).stdout) is fits
        assert "unknown filter 'x'" in wherry.run("ps", "--filter", "x=y", code=1).stderr
        (found,) = json.loads(wherry.run("inspect", "shown").stdout)
        assert (found["Name"], found["Config"]["Labels"], found["Config"]["WorkingDir"]) == (
            "/shown",
            {"app": "x"},
            "/tmp",
        )
        assert found["State"]["Pid"] > 0
        assert "MEM USAGE" in wherry.run("stats", "--no-stream", "shown").stdout
        assert "sleep 1000" in wherry.run("top", "shown").stdout
        wherry.run("update", "--memory", "64m", "--restart", "on-failure:2", "shown")
        template = (
            "{{.HostConfig.Memory}} {{.HostConfig.RestartPolicy.Name}} {{.HostConfig.RestartPolicy.MaximumRetryCount}}"
        )
        assert wherry.run("inspect", "-f", template, "shown").stdout == f"{64 << 20} on-failure 2\n"
        assert "no such container, image, volume or network: nope" in wherry.run("inspect", "nope", code=1).stderr
    finally:
        wherry.run("rm", "-f", "shown")


def test_a_cidfile_and_removal_by_the_daemon(wherry: Wherry, tmp_path: Path) -> None:
    path = tmp_path / "cid"
    identity = wherry.run("run", "-d", "--rm", "--cidfile", str(path), BUSYBOX, "sleep", "0.2").stdout.strip()
    assert path.read_text() == identity
    eventually(lambda: wherry.run("ps", "-aq").stdout == "")
    assert "is there" in wherry.run("run", "--cidfile", str(path), BUSYBOX, "true", code=125).stderr


def test_output_in_the_foreground_is_kept(wherry: Wherry) -> None:
    try:
        done = wherry.run("run", "--name", "fg", BUSYBOX, "sh", "-c", "echo out; echo err >&2; exit 5", code=5)
        assert (done.stdout, done.stderr) == ("out\n", "err\n")
        assert wherry.run("logs", "fg").stdout == "out\n"
        assert wherry.run("run", "-i", "--name", "fgi", BUSYBOX, "cat", stdin="in\n").stdout == "in\n"
        many = wherry.run("run", "--name", "many", BUSYBOX, "seq", "30000").stdout.splitlines()
        assert (len(many), many[-1]) == (30000, "30000")
    finally:
        wherry.run("rm", "-f", "fg", "fgi", "many")


def test_the_output_of_one_that_goes_when_it_ends_is_kept_while_it_lives(wherry: Wherry) -> None:
    script = "echo out; echo err >&2; sleep 1000"
    process = wherry.start("run", "--rm", "--name", "going", BUSYBOX, "sh", "-c", script, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"out\n"
        eventually(lambda: wherry.run("logs", "going").stderr == "err\n")
        assert wherry.run("logs", "going").stdout == "out\n"
        log = wherry.run("inspect", "-f", "{{.LogPath}}", "going").stdout.strip()
        assert os.path.exists(log)
        wherry.run("kill", "going")
        assert process.wait(PATIENCE) == 137
        assert not os.path.exists(os.path.dirname(log))
    finally:
        process.kill()
        process.communicate()
        wherry.run("rm", "-f", "going", code=None)


def test_what_was_started_again_in_the_foreground_is_kept_too(wherry: Wherry) -> None:
    wherry.run("create", "--name", "again", BUSYBOX, "sh", "-c", "echo once more")
    try:
        assert wherry.run("start", "-a", "again").stdout == "once more\n"
        assert wherry.run("logs", "again").stdout == "once more\n"
    finally:
        wherry.run("rm", "-f", "again")


def test_a_terminal_is_kept_and_whoever_leaves_holds_nothing_up(wherry: Wherry) -> None:
    master, slave = pty.openpty()
    # more than a FIFO holds, after the person in front of it has gone
    script = "echo ready; read x; seq 400000 | tail -n 300000; echo all; sleep 1000"
    command = ("run", "-it", "--name", "left", BUSYBOX, "sh", "-c", script)
    process = wherry.start(*command, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    try:
        seen = b""
        while b"ready" not in seen:
            seen += os.read(master, 1024)
        os.write(master, b"\x10\x11")
        assert process.wait(PATIENCE) == 0
        assert "ready" in wherry.run("logs", "left").stdout
        again = wherry.start("attach", "left", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert again.stdin is not None
        again.stdin.write(b"\n")
        again.stdin.flush()
        eventually(lambda: "all" in wherry.run("logs", "--tail", "1", "left").stdout)
        wherry.run("kill", "left")
        output, _ = again.communicate(timeout=PATIENCE)
        assert b"all" in output
    finally:
        process.kill()
        process.wait()
        os.close(master)
        wherry.run("rm", "-f", "left")


def test_attach_to_what_logs(wherry: Wherry) -> None:
    script = "echo before; read x; echo got $x; exit 4"
    wherry.run("run", "-d", "-i", "--name", "reads", BUSYBOX, "sh", "-c", script)
    try:
        eventually(lambda: "before" in wherry.run("logs", "reads").stdout)
        assert wherry.run("attach", "reads", stdin="it\n", code=4).stdout == "got it\n"
        assert "can't be attached to: it is exited" in wherry.run("attach", "reads", code=1).stderr
    finally:
        wherry.run("rm", "-f", "reads")
