"""`wherry logs`: of containers that run, that ended, while the daemon is down, and over a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.test_restart import shim_of
from tests.wherryd import BUSYBOX, Wherryd
from wherry.core.container_logs import FOLDER

NAMESPACE = f"logs{os.getpid()}"


@pytest.fixture
def daemon() -> Iterator[Wherryd]:
    wherryd = Wherryd()
    try:
        wherryd.start()
        wherryd.import_busybox(NAMESPACE)
        yield wherryd
    finally:
        wherryd.close()
        shutil.rmtree(f"{FOLDER}/{NAMESPACE}", ignore_errors=True)


def command(daemon: Wherryd, *args: str) -> list[str]:
    return [sys.executable, "-m", "wherry.cli", "-a", daemon.address, "-n", NAMESPACE, *args]


def wherry(daemon: Wherryd, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(daemon, *args), capture_output=True, text=True, timeout=60, check=False)
    if check and done.returncode:
        raise AssertionError(f"{args} exits with {done.returncode}: {done.stderr}")
    return done


def run(daemon: Wherryd, name: str, script: str, *options: str) -> None:
    wherry(daemon, "run", "-d", "--name", name, "--net", "none", *options, BUSYBOX, "sh", "-c", script)


def folder(daemon: Wherryd, name: str) -> Path:
    return Path(json.loads(wherry(daemon, "inspect", name).stdout)[0]["LogPath"]).parent


def pid(daemon: Wherryd, name: str) -> int:
    return int(json.loads(wherry(daemon, "inspect", name).stdout)[0]["State"]["Pid"])


def wait_for(path: Path, text: str) -> None:
    end = time.monotonic() + 30
    while text not in (path.read_text() if path.exists() else ""):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_a_container_wrote_is_shown_by_stream_and_after_its_end(daemon: Wherryd) -> None:
    run(daemon, "one", "echo out; echo err >&2; printf half")
    assert wherry(daemon, "wait", "one").stdout == "0\n"
    shown = wherry(daemon, "logs", "one")
    assert (shown.stdout, shown.stderr) == ("out\nhalf", "err\n")
    # which of the two streams was read last is the shim's affair
    timed = wherry(daemon, "logs", "-t", "--tail", "2", "one")
    assert timed.stdout.endswith("Z half")
    assert timed.stdout.count("Z ") + timed.stderr.count("Z ") == 2
    where = folder(daemon, "one")
    assert where.is_dir()
    wherry(daemon, "rm", "one")
    assert not where.exists()


def test_logs_are_followed_and_read_while_the_daemon_is_down(daemon: Wherryd) -> None:
    run(daemon, "two", "i=0; while [ ! -e /stop ]; do i=$((i+1)); echo line $i; sleep 0.05; done; echo done")
    root = Path(f"/proc/{pid(daemon, 'two')}/root")
    with subprocess.Popen(command(daemon, "logs", "-f", "two"), stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "line 1\n"
        daemon.kill()
        shown = wherry(daemon, "logs", "--tail", "2", "two").stdout.splitlines()
        assert len(shown) == 2
        assert all(line.startswith("line ") for line in shown)
        (root / "stop").touch()
        rest = follower.stdout.read().splitlines()
        assert follower.wait(timeout=20) == 0
    assert rest[-1] == "done"
    assert [int(line.split()[1]) for line in rest[:-1]] == list(range(2, len(rest) + 1))
    daemon.start()
    wherry(daemon, "rm", "-f", "two")
    assert daemon.settle() == []


def test_no_log_and_logs_that_are_elsewhere_are_said_to_be_so(daemon: Wherryd) -> None:
    run(daemon, "none", "echo lost", "--log-driver", "none")
    refused = wherry(daemon, "logs", "none", check=False)
    assert refused.returncode == 1
    assert "has no log" in refused.stderr
    refused = wherry(daemon, "logs", "nobody", check=False)
    assert "no such container: nobody" in refused.stderr
    for options in (["--log-opt", "max-size=1"], ["--log-driver", "none", "--log-opt", "max-size=1m"]):
        wrong = wherry(daemon, "run", "-d", "--name", "x", *options, BUSYBOX, "true", check=False)
        assert wrong.returncode != 0
        assert "log option" in wrong.stderr


def test_a_log_is_rotated(daemon: Wherryd) -> None:
    script = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo line $i; done"
    run(daemon, "many", script, "--log-opt", "max-size=16k", "--log-opt", "max-file=3")
    # followed to its end: the last lines may still be on their way when the process has gone
    wherry(daemon, "logs", "-f", "many")
    shown = [int(line.split()[1]) for line in wherry(daemon, "logs", "many").stdout.splitlines()]
    assert shown == list(range(shown[0], 3001))
    names = sorted(path.name for path in folder(daemon, "many").iterdir())
    assert names == ["json.log", "json.log.1", "json.log.2", "name"]


def test_bytes_of_a_program_come_out_as_they_went_in(daemon: Wherryd) -> None:
    run(daemon, "bytes", "head -c 300000 /dev/urandom | tee /data; sleep 1000")
    with open(f"/proc/{pid(daemon, 'bytes')}/root/data", "rb") as file:
        end = time.monotonic() + 30
        while True:
            file.seek(0)
            data = file.read()
            shown = subprocess.run(command(daemon, "logs", "bytes"), capture_output=True, check=True).stdout
            if len(data) == 300000 == len(shown) or time.monotonic() > end:
                break
    assert shown == data
    wherry(daemon, "rm", "-f", "bytes")


def test_a_full_disk_under_the_log_stops_nobody(daemon: Wherryd) -> None:
    script = "while [ ! -e /stop ]; do echo 0123456789012345678901234567890123456789; touch /alive; done; exit 4"
    wherry(daemon, "create", "--name", "full", "--net", "none", BUSYBOX, "sh", "-c", script)
    where = folder(daemon, "full")
    where.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(where)], check=True)
    try:
        wherry(daemon, "start", "full")
        root = Path(f"/proc/{pid(daemon, 'full')}/root")
        end = time.monotonic() + 30
        while (free := os.statvfs(where)).f_bavail * free.f_bsize > 4096:
            assert time.monotonic() < end
            time.sleep(0.05)
        (root / "alive").unlink(missing_ok=True)
        while not (root / "alive").exists():  # it writes on
            assert time.monotonic() < end
            time.sleep(0.05)
        subprocess.run(["mount", "-o", "remount,size=8m", str(where)], check=True)
        wait_for(where / "json.log", '"lost":')
        (root / "stop").touch()
        assert wherry(daemon, "wait", "full").stdout == "4\n"
        assert "are missing here" in wherry(daemon, "logs", "full").stderr + wherry(daemon, "logs", "full").stdout
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_several_follow_at_once_and_each_sees_all(daemon: Wherryd) -> None:
    run(daemon, "loud", "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo line $i; done", "--log-opt", "max-size=64k")
    followers = [subprocess.Popen(command(daemon, "logs", "-f", "loud"), stdout=subprocess.PIPE) for _ in range(3)]
    shown = [follower.communicate(timeout=30)[0].decode() for follower in followers]
    assert shown == ["".join(f"line {number}\n" for number in range(1, 2001))] * 3


def test_a_killed_shim_ends_those_who_follow_its_log(daemon: Wherryd) -> None:
    run(daemon, "orphan", "echo here; sleep 1000")
    with subprocess.Popen(command(daemon, "logs", "-f", "orphan"), stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == "here\n"
        os.kill(shim_of(pid(daemon, "orphan")), signal.SIGKILL)
        assert follower.wait(timeout=20) == 0
    wherry(daemon, "rm", "-f", "orphan")
    assert daemon.settle() == []
