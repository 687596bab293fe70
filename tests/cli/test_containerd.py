"""The same command on containerd, whose ttrpc socket serves nothing of the API: it goes on by gRPC."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import busybox
from tests.cli.conftest import Wherry
from tests.containerd import Containerd
from tests.wherryd import BUSYBOX


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wherry]:
    """The command line on a containerd with an image."""
    daemon = Containerd()
    try:
        daemon.start()
        archive = tmp_path_factory.mktemp("image") / "busybox.tar"
        busybox.write_archive(archive)
        wherry = Wherry(daemon.address)
        wherry.run("images", "import", str(archive))
        yield wherry
    finally:
        daemon.close()


def test_listings(other: Wherry) -> None:
    assert other.run("images", "ls", "-q").stdout.split() == [BUSYBOX]
    assert other.run("containers", "ls").stdout.startswith("CONTAINER")
    assert "ok" in other.run("plugins", "ls").stdout
    assert len(other.run("content", "ls", "-q").stdout.split()) == 3


def test_run_exec_and_kill(other: Wherry, tmp_path: Path) -> None:
    done = other.run(
        "containers", "run", "--rm", BUSYBOX, "a", "sh", "-c", "cat; echo err >&2; exit 7", stdin="in", code=7
    )
    assert (done.stdout, done.stderr) == ("in", "err\n")
    assert "nope" in other.run("containers", "run", "--rm", BUSYBOX, "a", "nope", code=127).stderr
    other.run("containers", "run", "-d", BUSYBOX, "b", "sleep", "60")
    assert other.run("tasks", "exec", "b", "echo", "hi").stdout == "hi\n"
    other.run("tasks", "rm", "-f", "b")
    other.run("containers", "rm", "b")
    assert other.ids() == []


def test_signals(other: Wherry) -> None:
    script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done"
    with other.start(
        "containers", "run", "--rm", BUSYBOX, "sig", "sh", "-c", script, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 9
    assert other.ids() == []


def test_what_it_does_not_serve_is_said(other: Wherry) -> None:
    done = other.run("pull", "127.0.0.1:1/none:1", code=1)
    assert "no transfer service" in done.stderr


def test_dockers_verbs(other: Wherry) -> None:
    assert other.run("run", "--rm", BUSYBOX, "echo", "hi").stdout == "hi\n"
    assert other.run("run", "--rm", "-v", "/etc:/host:ro", "-e", "A=b", BUSYBOX, "sh", "-c", "echo $A").stdout == "b\n"
    identity = other.run("run", "-d", "--name", "web", "--net", "none", BUSYBOX, "sleep", "100").stdout.strip()
    try:
        assert other.run("ps", "--format", "{{.Names}} {{.State}}").stdout.strip() == "web running"
        assert other.run("exec", "web", "echo", "in").stdout == "in\n"
        assert other.run("inspect", "-f", "{{.Id}}", "web").stdout.strip() == identity
        assert "no volumes" in other.run("run", "--rm", "-v", "named:/x", BUSYBOX, "true", code=125).stderr
        assert "no networks" in other.run("run", "--rm", "-p", "80", BUSYBOX, "true", code=125).stderr
        other.run("stop", "-t", "0", "web")
        assert other.run("wait", "web").stdout == "137\n"
    finally:
        other.run("rm", "-f", "web")
    assert "busybox" in other.run("images").stdout
