"""`wherry run` and `wherry tasks` as a person types them: streams, signals, exit codes, terminals."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Wherry
from tests.rootfs import build_busybox_rootfs
from tests.wherryd import BUSYBOX, Wherryd

SIGNS = "echo here > /sign; echo there; sleep 100"


def read_until(descriptor: int, pattern: bytes, timeout: float = 15.0) -> bytes:
    data = b""
    end = time.monotonic() + timeout
    while not re.search(pattern, data):
        left = end - time.monotonic()
        assert left > 0, f"{pattern!r} didn't come, but {data!r}"
        if select.select([descriptor], [], [], left)[0]:
            try:
                piece = os.read(descriptor, 65536)
            except OSError:
                piece = b""
            assert piece, f"{pattern!r} didn't come, but the end after {data!r}"
            data += piece
    return data


def test_output_input_and_exit_code(wherry: Wherry) -> None:
    done = wherry.run(
        "containers", "run", "--rm", BUSYBOX, "a", "sh", "-c", "cat; echo err >&2; exit 7", stdin="in\n", code=7
    )
    assert (done.stdout, done.stderr) == ("in\n", "err\n")


def test_what_is_removed_at_its_end_waits_for_no_disk(wherry: Wherry, tmp_path: Path) -> None:
    """The overlay of `run --rm` is volatile, and what looks at the files of a running container works."""
    look = "grep -c 'overlay.*volatile' /proc/self/mountinfo"
    assert wherry.run("run", "--rm", BUSYBOX, "sh", "-c", look).stdout == "1\n"
    assert wherry.run("run", "--rm", "--read-only", BUSYBOX, "sh", "-c", look).stdout == "1\n"
    wherry.run("run", "--name", "kept", BUSYBOX, "sh", "-c", look, code=1)
    wherry.run("rm", "kept")
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            wherry.start("run", "--rm", "--name", "passing", BUSYBOX, "sh", "-c", SIGNS, stdout=subprocess.PIPE)
        )
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        assert "A /sign" in wherry.run("diff", "passing").stdout
        wherry.run("cp", "passing:/sign", str(tmp_path))
        assert (tmp_path / "sign").read_text() == "here\n"
        wherry.run("images", "commit", "passing", "localhost/passing:1")
        wherry.run("kill", "passing")
        assert process.wait(30) == 137
    assert wherry.run("run", "--rm", "localhost/passing:1", "cat", "/sign").stdout == "here\n"
    assert "passing" not in wherry.run("ps", "-a").stdout


def test_a_command_whose_time_is_over_leaves_nothing(wherry: Wherry, daemon: Wherryd) -> None:
    done = wherry.run("--timeout", "1s", "containers", "run", "--rm", BUSYBOX, "late", "sleep", "100", code=None)
    assert done.returncode not in {0, 137}
    assert "deadline exceeded" in done.stderr
    assert "late" not in wherry.run("tasks", "ls", "-q").stdout
    assert wherry.ids() == []
    assert "late" not in wherry.run("snapshots", "ls").stdout
    assert daemon.settle() == []


def test_much_output_comes_whole(wherry: Wherry, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with target.open("wb") as out:
        script = "head -c 5000000 /dev/zero; echo end"
        assert wherry.start("containers", "run", "--rm", BUSYBOX, "much", "sh", "-c", script, stdout=out).wait(60) == 0
    assert target.stat().st_size == 5_000_004
    with target.open("ab") as out:
        assert wherry.start("containers", "run", "--rm", BUSYBOX, "more", "echo", "appended", stdout=out).wait(60) == 0
    assert target.read_bytes().endswith(b"end\nappended\n")


def test_much_input_goes_whole(wherry: Wherry) -> None:
    done = wherry.run("containers", "run", "--rm", BUSYBOX, "count", "wc", "-c", stdin="x" * 3_000_000)
    assert done.stdout.strip() == "3000000"


def test_a_reader_that_has_enough(wherry: Wherry) -> None:
    with wherry.start(
        "containers", "run", "--rm", BUSYBOX, "yes", "yes", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(20) == 141


@pytest.mark.parametrize(("command", "code"), [("nope", 127), ("/no/such", 127), ("/etc/passwd", 126)])
def test_commands_that_cannot_run(wherry: Wherry, command: str, code: int) -> None:
    done = wherry.run("containers", "run", "--rm", BUSYBOX, "bad", command, code=code)
    assert command in done.stderr
    assert done.stderr.startswith("wherry: ")
    assert done.stderr.count("\n") == 1


def test_errors_of_ours_are_125(wherry: Wherry) -> None:
    assert "not found" in wherry.run("containers", "run", "--rm", "docker.io/library/none:1", "x", code=125).stderr
    assert "--detach and --rm" in wherry.run("containers", "run", "--rm", "-d", BUSYBOX, "x", code=125).stderr
    assert "must match" in wherry.run("containers", "run", "--rm", BUSYBOX, "no/such/id", "true", code=125).stderr
    assert (
        "mount" in wherry.run("containers", "run", "--rm", "--mount", "nonsense", BUSYBOX, "x", "true", code=125).stderr
    )


def test_signals_go_to_the_container(wherry: Wherry) -> None:
    script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    with wherry.start(
        "containers", "run", "--rm", BUSYBOX, "sig", "sh", "-c", script, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"caught\n"
        assert process.wait(20) == 9


def test_a_signal_at_any_moment_leaves_nothing(wherry: Wherry) -> None:
    for delay in (0.04, 0.07, 0.09, 0.11, 0.13):
        with wherry.start(
            "containers", "run", "--rm", BUSYBOX, "early", "sleep", "0.3", stderr=subprocess.DEVNULL
        ) as process:
            time.sleep(delay)
            process.send_signal(signal.SIGTERM)
            process.wait(20)
        assert wherry.ids() == []
        assert wherry.ids(("tasks", "ls", "-q")) == []


def test_options_reach_the_container(wherry: Wherry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mounted\n")
    tmp_path.chmod(0o755)
    (tmp_path / "env").write_text("# comment\nFROM_FILE=1\n")
    script = "id -u; hostname; pwd; cat /mnt/file; echo $A $FROM_FILE; touch /x 2>/dev/null || echo read-only"
    mount = f"type=bind,src={tmp_path},dst=/mnt,options=rbind:ro"
    options = ["--user", "nobody", "--hostname", "boat", "--cwd", "/home", "--env", "A=b", "--read-only"]
    options += ["--env-file", f"{tmp_path}/env", "--mount", mount, "--memory", "64m", "--cpus", "0.5"]
    options += ["--label", "x=y", "--annotation", "p=q", "--seccomp", "--pid-file", f"{tmp_path}/pid"]
    done = wherry.run("containers", "run", "--rm", *options, BUSYBOX, "opt", "sh", "-c", script)
    assert done.stdout.split() == ["65534", "boat", "/home", "mounted", "b", "1", "read-only"]
    assert int((tmp_path / "pid").read_text()) > 1


def test_a_folder_as_root(wherry: Wherry, tmp_path: Path) -> None:
    build_busybox_rootfs(tmp_path)
    assert (
        wherry.run("containers", "run", "--rm", "--rootfs", str(tmp_path), "folder", "/bin/echo", "hi").stdout == "hi\n"
    )


def test_a_terminal(wherry: Wherry) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    process = wherry.start(
        "containers", "run", "--rm", "-t", BUSYBOX, "tty", "sh", stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    try:
        read_until(master, rb"# ")
        os.write(master, b"ttysize 2>/dev/null || stty size; echo t=$TERM\n")
        out = read_until(master, rb"t=xterm")
        assert b"77 33" in out or b"33 77" in out
        os.write(master, b"exit 4\n")
        with contextlib.suppress(OSError, AssertionError):
            read_until(master, rb"never", 3)
        assert process.wait(20) == 4
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_a_terminal_without_one_here(wherry: Wherry) -> None:
    done = wherry.run("containers", "run", "--rm", "-t", BUSYBOX, "notty", "sh", "-c", "tty; cat", stdin="x\n")
    assert "/dev/pts/" in done.stdout
    assert "x\n" in done.stdout


def test_detached_with_exec_attach_and_kill(wherry: Wherry, tmp_path: Path) -> None:
    script = "trap 'echo bye; exit 5' TERM; while :; do echo tick; sleep 0.1; done"
    assert wherry.run("containers", "run", "-d", BUSYBOX, "web", "sh", "-c", script).stdout == ""
    assert (
        wherry.run("tasks", "exec", "web", "sh", "-c", "read x; echo got $x; exit 3", stdin="it\n", code=3).stdout
        == "got it\n"
    )
    assert (
        wherry.run("tasks", "exec", "--user", "nobody", "--cwd", "/tmp", "web", "sh", "-c", "id -u; pwd").stdout
        == "65534\n/tmp\n"
    )
    assert wherry.run("tasks", "exec", "web", "nope", code=127).stdout == ""
    assert "RUNNING" in wherry.run("tasks", "ls").stdout
    assert len(wherry.run("tasks", "ps", "-q", "web").stdout.split()) >= 1
    assert "pids.current" in wherry.run("tasks", "metrics", "web").stdout
    wherry.run("tasks", "pause", "web")
    assert "PAUSED" in wherry.run("tasks", "ls").stdout
    wherry.run("tasks", "resume", "web")
    with wherry.start("tasks", "attach", "web", stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as attached:
        assert attached.stdout is not None
        assert attached.stdout.readline() == b"tick\n"
        wherry.run("tasks", "kill", "web")
        assert attached.stdout.read().endswith(b"bye\n")
        assert attached.wait(20) == 5
    assert wherry.ids(("tasks", "ls", "-q")) == []
    wherry.run("containers", "rm", "web")


def test_start_and_remove_in_steps(wherry: Wherry, tmp_path: Path) -> None:
    log = tmp_path / "log"
    wherry.run("containers", "create", BUSYBOX, "steps", "sh", "-c", "echo logged; exit 6")
    assert wherry.run("tasks", "start", "--log-uri", f"file://{log}", "steps", code=6).stdout == ""
    assert log.read_text() == "logged\n"
    wherry.run("tasks", "start", "-d", "--null-io", "steps")
    end = time.monotonic() + 30
    while "STOPPED" not in wherry.run("tasks", "ls").stdout and time.monotonic() < end:
        time.sleep(0.05)
    wherry.run("tasks", "rm", "steps", code=6)
    wherry.run("tasks", "start", "-d", "steps")
    wherry.run("tasks", "rm", "-f", "steps", code=None)
    wherry.run("containers", "rm", "steps")


def test_a_daemon_that_dies_meanwhile(tmp_path: Path) -> None:
    daemon = Wherryd()
    try:
        daemon.start()
        daemon.import_busybox()
        wherry = Wherry(daemon.address)
        script = "echo one; read x; echo $x; exit 8"
        command = ("containers", "run", "--rm", BUSYBOX, "survivor", "sh", "-c", script)
        with wherry.start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == b"one\n"
            daemon.kill()
            process.stdin.write(b"two\n")
            process.stdin.flush()
            # streams don't pass through the daemon, and the container ends without it
            assert process.stdout.readline() == b"two\n"
            time.sleep(0.3)
            assert process.poll() is None
            daemon.start()
            assert process.wait(30) == 8
            process.stdin.close()
        assert wherry.ids() == []
        assert daemon.settle() == []
    finally:
        daemon.close()


def test_a_slow_reader_of_a_pipe_loses_nothing(wherry: Wherry) -> None:
    with wherry.start("run", "--rm", BUSYBOX, "head", "-c", "500000", "/dev/zero", stdout=subprocess.PIPE) as process:
        # the container has ended, and our pipe is full
        time.sleep(1.5)
        assert process.stdout is not None
        assert len(process.stdout.read()) == 500_000
        assert process.wait(60) == 0
