"""containerd's own client does a day's work on wherryd: Debian's ctr 1.6, and the 2.x of sid."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.daemon.test_restart import events
from tests.peers import need
from tests.sid import need_sid
from tests.wherryd import BUSYBOX, Wherryd

Ctr = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(params=["bookworm", "sid"])
def program(request: pytest.FixtureRequest) -> str:
    return need("ctr") if request.param == "bookworm" else need_sid("ctr")


@pytest.fixture
def ctr(program: str, wherryd: Wherryd) -> Ctr:
    """Run it; its output is text, a failure raises unless `check` is False."""
    wherryd.import_busybox()

    def run(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [program, "--address", wherryd.address, *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, (args, done.stderr)
        return done

    return run


def status(ctr: Ctr, name: str) -> str:
    rows = [line.split() for line in ctr("task", "ls").stdout.splitlines()[1:]]
    return next((row[2] for row in rows if row[0] == name), "")


def wait_for(ctr: Ctr, name: str, wanted: str) -> None:
    end = time.monotonic() + 30
    while status(ctr, name) != wanted and time.monotonic() < end:
        time.sleep(0.05)
    assert status(ctr, name) == wanted


def test_version_and_plugins(ctr: Ctr) -> None:
    assert "Server:" in ctr("version").stdout
    plugins = ctr("plugins", "ls").stdout
    assert all(name in plugins for name in ("overlayfs", "tasks", "content", "images", "leases"))
    assert "error" not in plugins


def test_a_container_in_the_foreground(ctr: Ctr, wherryd: Wherryd) -> None:
    assert ctr("run", "--rm", BUSYBOX, "one", "echo", "hello").stdout == "hello\n"
    assert ctr("run", "--rm", BUSYBOX, "two", "sh", "-c", "exit 7", check=False).returncode == 7
    missing = ctr("run", "--rm", BUSYBOX, "three", "/no/such", check=False)
    assert missing.returncode != 0
    assert "/no/such" in missing.stderr
    assert wherryd.settle() == []


def test_a_container_in_the_background(ctr: Ctr, wherryd: Wherryd) -> None:
    ctr("run", "-d", BUSYBOX, "sleeps", "sleep", "1000")
    assert ctr("task", "exec", "--exec-id", "x", "sleeps", "echo", "in").stdout == "in\n"
    assert ctr("task", "exec", "--exec-id", "y", "sleeps", "sh", "-c", "exit 4", check=False).returncode == 4
    ctr("task", "pause", "sleeps")
    assert status(ctr, "sleeps") == "PAUSED"
    ctr("task", "resume", "sleeps")
    assert status(ctr, "sleeps") == "RUNNING"
    assert "memory" in ctr("task", "metrics", "sleeps").stdout
    assert len(ctr("task", "ps", "sleeps").stdout.splitlines()) == 2
    ctr("task", "kill", "-s", "KILL", "sleeps")
    wait_for(ctr, "sleeps", "STOPPED")
    assert "137" in ctr("task", "delete", "sleeps", check=False).stderr
    ctr("containers", "delete", "sleeps")
    assert wherryd.settle() == []


def test_a_terminal(program: str, ctr: Ctr, wherryd: Wherryd) -> None:
    master, slave = pty.openpty()
    command = [program, "--address", wherryd.address, "run", "--rm", "-t", BUSYBOX, "tty", "sh", "-c", "tty; exit 5"]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        said = b""
        try:
            while data := os.read(master, 4096):
                said += data
        except OSError:  # EIO: the last one on the terminal has gone
            pass
        assert process.wait(timeout=20) == 5
    os.close(master)
    assert b"/dev/pts/0" in said
    assert wherryd.settle() == []


def test_images_snapshots_content_leases_namespaces(ctr: Ctr, wherryd: Wherryd) -> None:
    ctr("images", "tag", BUSYBOX, "tagged:1")
    assert "tagged:1" in ctr("images", "ls", "-q").stdout.split()
    archive = str(wherryd.folder / "exported.tar")
    ctr("images", "export", archive, "tagged:1")
    ctr("images", "rm", "--sync", "tagged:1")
    ctr("images", "import", archive)
    assert "tagged:1" in ctr("images", "ls", "-q").stdout.split()
    assert "sha256:" in ctr("snapshots", "ls").stdout
    digest = ctr("content", "ls", "-q").stdout.split()[0]
    assert ctr("content", "get", digest).stdout
    lease = ctr("leases", "create").stdout.strip()
    assert lease in ctr("leases", "ls", "-q").stdout.split()
    ctr("leases", "delete", lease)
    ctr("namespaces", "create", "other", "label=value")
    assert "other" in ctr("namespaces", "ls", "-q").stdout.split()
    assert ctr("-n", "other", "images", "ls", "-q").stdout == ""
    ctr("namespaces", "remove", "other")


def test_events(program: str, ctr: Ctr, wherryd: Wherryd) -> None:
    with events(wherryd, program) as lines:
        ctr("run", "--rm", BUSYBOX, "seen", "true")
    topics = [next(word for word in line.split() if word.startswith("/")) for line in lines]
    of_the_task = [topic for topic in topics if topic.startswith("/tasks/")]
    assert of_the_task == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    ended = json.loads(next(line for line in lines if "/tasks/exit" in line).partition("/tasks/exit")[2])
    assert (ended["container_id"], ended.get("exit_status", 0)) == ("seen", 0)
