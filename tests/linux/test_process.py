"""Titles, start times, forks: on real processes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from wherry.linux import process
from wherry.linux import syscalls as sc


def in_child(body: object) -> int:
    """Run `body` in a forked child; its exit code (0 if it returned)."""
    pid = os.fork()
    if pid == 0:
        try:
            body()  # type: ignore[operator]
        except BaseException:  # noqa: BLE001 - a forked child of pytest's must not go on in pytest
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("length", [3, 3000])
def test_a_title_of_any_length_is_what_ps_shows(length: int) -> None:
    def body() -> None:
        process.set_process_title(["short-first"], "first")
        process.set_process_title(["wherry-shim", "-namespace", "default", "-id", "x" * length], "wherry-shim")
        assert Path("/proc/self/cmdline").read_text().split("\0")[:-1][-1] == "x" * length
        assert Path("/proc/self/comm").read_text() == "wherry-shim\n"
        shown = subprocess.run(["ps", "-wwo", "args=", str(os.getpid())], capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == "wherry-shim -namespace default -id " + "x" * length

    assert in_child(body) == 0


def test_a_process_is_named_by_its_pid_and_start() -> None:
    child = subprocess.Popen(["sleep", "100"])
    started = process.start_time(child.pid)
    assert process.is_alive(child.pid, started)
    assert not process.is_alive(child.pid, started + 1)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process.is_alive(child.pid, started)  # a zombie
    child.wait()
    assert not process.is_alive(child.pid)
    with pytest.raises(ProcessLookupError):
        process.start_time(child.pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="namespaces take root")
def test_a_fork_into_namespaces() -> None:
    reader, writer = os.pipe()
    pid = sc.fork(sc.CLONE_NEWPID | sc.CLONE_NEWUTS)
    if pid == 0:
        sc.sethostname("inside")
        os.write(writer, f"{os.getpid()} {os.uname().nodename}".encode())
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    assert os.read(reader, 100) == b"1 inside"
    assert os.uname().nodename != "inside"
    os.close(reader)
    os.close(writer)


def test_errors_carry_the_path() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        sc.openat2(sc.AT_FDCWD, "/no/such/file", os.O_RDONLY)
    assert caught.value.filename == "/no/such/file"
    with pytest.raises(ValueError, match="null byte"):
        sc.umount2("/a\0b")
