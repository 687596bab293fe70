"""dockerd on wherryd: as a client of its socket, and as the parent of a `containerd` that is wherryd."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import leftovers
from tests.peers import need
from tests.rootfs import build_busybox_rootfs
from tests.shim.harness import alive
from tests.wherryd import Wherryd

IMAGE = "busybox:test"


class Dockerd:
    """A dockerd of one's own. `containerd` is the socket it is to use, "" for one that it starts itself."""

    def __init__(self, folder: Path, containerd: str = "", path: str = "") -> None:
        self.folder = folder
        self.address = f"unix://{folder}/docker.sock"
        self.containerd = containerd
        self.path = path
        self.log = folder / "dockerd.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it serves."""
        need("docker")
        (self.folder / "daemon.json").write_text("{}")  # not that of the host
        command = [need("dockerd"), "-H", self.address, "--data-root", f"{self.folder}/data"]
        command += [
            "--exec-root",
            f"{self.folder}/exec",
            "-p",
            f"{self.folder}/docker.pid",
            "--config-file",
            f"{self.folder}/daemon.json",
        ]
        command += ["--iptables=false", "--ip6tables=false", "--bridge=none", "--live-restore"]
        if self.containerd:
            command += ["--containerd", self.containerd]
        environment = {**os.environ, "PATH": f"{self.path}:{os.environ['PATH']}:/usr/sbin:/sbin"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        end = time.monotonic() + 40
        while self("version", check=False).returncode:
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def __call__(self, *args: str, check: bool = True, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
        """`docker`; raises with what it said."""
        command = ["docker", "-H", self.address, *args]
        done = subprocess.run(command, capture_output=True, timeout=60, input=stdin, check=False)
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if check and done.returncode:
            pytest.fail(f"docker {' '.join(args)}: {out}{err}")
        return subprocess.CompletedProcess(command, done.returncode, out, err)

    def import_busybox(self) -> None:
        """An image with busybox in it."""
        root = build_busybox_rootfs(self.folder / "rootfs")
        tar = subprocess.run(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE, check=True).stdout
        self("import", "-", IMAGE, stdin=tar)

    def state(self, name: str, what: str = "Status") -> str:
        """`docker inspect` of a container's state."""
        return self("inspect", "-f", f"{{{{.State.{what}}}}}", name).stdout.strip()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        if self.process is not None:
            self.process.send_signal(number)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def close(self) -> None:
        """Remove all containers, end it, unmount what is left."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                names = self("ps", "-aq", check=False).stdout.split()
                if names:
                    self("rm", "-f", *names, check=False)
        self.stop()
        leftovers.unmount(self.folder)


@pytest.fixture(scope="module")
def wherryd() -> Iterator[Wherryd]:
    daemon = Wherryd()
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture(scope="module")
def docker(wherryd: Wherryd) -> Iterator[Dockerd]:
    folder = Path(tempfile.mkdtemp(prefix="wherry-docker-"))
    daemon = Dockerd(folder, wherryd.address)
    try:
        daemon.start()
        daemon.import_busybox()
        yield daemon
    finally:
        daemon.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "docker" in request.fixturenames and "wherryd" in request.fixturenames:
        docker, wherryd = request.getfixturevalue("docker"), request.getfixturevalue("wherryd")
        names = docker("ps", "-aq").stdout.split()
        assert not names, docker("ps", "-a").stdout
        eventually(lambda: all("dockerd" in item for item in wherryd.leftovers()))


def run(docker: Dockerd, *args: str) -> str:
    return docker("run", "--net", "none", *args).stdout


def test_run(docker: Dockerd, wherryd: Wherryd) -> None:
    assert run(docker, "--rm", IMAGE, "echo", "docked") == "docked\n"
    done = docker("run", "--rm", "--net", "none", IMAGE, "sh", "-c", "echo oops >&2; exit 3", check=False)
    assert (done.returncode, done.stderr) == (3, "oops\n")
    assert docker("run", "--rm", "-i", "--net", "none", IMAGE, "cat", stdin=b"typed").stdout == "typed"
    done = docker("run", "--rm", "--net", "none", IMAGE, "/no/such", check=False)
    assert done.returncode == 127
    assert "no such file or directory" in done.stderr
    # more than pipes hold, to both streams
    script = (
        "i=0; while [ $i -lt 3000 ]; do echo out$i-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; echo err$i >&2; i=$((i+1)); done"
    )
    done = docker("run", "--rm", "--net", "none", IMAGE, "sh", "-c", script)
    assert len(done.stdout.splitlines()) == len(done.stderr.splitlines()) == 3000


def test_a_terminal(docker: Dockerd, wherryd: Wherryd) -> None:
    # docker sizes the terminal after the start
    shown = "test -t 0 && test -t 1 && until stty size 2>&1 | grep 33; do sleep 0.05; done"
    command = ["docker", "-H", docker.address, "run", "--rm", "-it", "--net", "none", IMAGE, "sh", "-c", shown]
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as process:
        os.close(slave)
        output = b""
        with contextlib.suppress(OSError):  # EIO is a terminal's end
            while data := os.read(master, 4096):
                output += data
        assert process.wait(60) == 0
    os.close(master)
    assert output == b"33 77\r\n"


def test_a_detached_container(docker: Dockerd, wherryd: Wherryd) -> None:
    run(
        docker,
        "-d",
        "--name",
        "dd",
        IMAGE,
        "sh",
        "-c",
        "trap 'echo bye; exit 4' TERM; echo hello; while :; do sleep 0.05; done",
    )
    assert docker("exec", "dd", "echo", "in").stdout == "in\n"
    assert docker("exec", "dd", "sh", "-c", "exit 9", check=False).returncode == 9
    assert docker("exec", "-i", "dd", "cat", stdin=b"into").stdout == "into"
    assert "while :" in docker("top", "dd").stdout
    stats = json.loads(docker("stats", "--no-stream", "--format", "{{json .}}", "dd").stdout)
    assert stats["Name"] == "dd"
    assert int(stats["PIDs"]) >= 1
    docker("pause", "dd")
    assert docker.state("dd") == "paused"
    docker("unpause", "dd")
    assert docker.state("dd") == "running"
    docker("update", "--memory", "64m", "--memory-swap", "64m", "dd")
    docker("stop", "-t", "20", "dd")
    assert (docker.state("dd"), docker.state("dd", "ExitCode")) == ("exited", "4")
    assert docker("logs", "dd").stdout == "hello\nbye\n"
    docker("start", "dd")
    first = docker.state("dd", "Pid")
    docker("restart", "-t", "20", "dd")
    assert docker.state("dd", "Pid") not in (first, "0")
    docker("kill", "dd")
    assert docker("wait", "dd").stdout == "137\n"
    assert docker("logs", "dd").stdout.startswith("hello\nbye\nhello\n")
    docker("rm", "dd")


def test_a_restart_policy(docker: Dockerd, wherryd: Wherryd) -> None:
    run(docker, "-d", "--name", "again", "--restart", "on-failure:2", IMAGE, "sh", "-c", "echo once; exit 1")
    eventually(lambda: docker.state("again") == "exited")
    assert docker("logs", "again").stdout == "once\n" * 3
    docker("rm", "again")


def test_out_of_memory(docker: Dockerd, wherryd: Wherryd) -> None:
    hungry = "x=aaaaaaaaaaaaaaaaaaaa; while :; do x=$x$x; done"
    run(docker, "-d", "--name", "hungry", "-m", "16m", "--memory-swap", "16m", IMAGE, "sh", "-c", hungry)
    assert docker("wait", "hungry").stdout == "137\n"
    eventually(lambda: docker.state("hungry", "OOMKilled") == "true")
    docker("rm", "hungry")


def test_dockerd_and_wherryd_restart_under_containers(docker: Dockerd, wherryd: Wherryd) -> None:
    counts = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"
    run(docker, "-d", "--name", "lives", IMAGE, "sh", "-c", counts)
    run(docker, "-d", "--name", "ends", IMAGE, "sh", "-c", "while [ ! -e /end ]; do sleep 0.05; done; exit 6")
    pid = int(docker.state("lives", "Pid"))
    docker("exec", "ends", "sh", "-c", "(sleep 0.7; touch /end) >/dev/null 2>&1 &")
    docker.stop(signal.SIGKILL)
    eventually(lambda: "STOPPED" in wherryd.ctr("task", "ls", namespace="moby").stdout)
    docker.start()
    assert alive(pid)
    assert (docker.state("lives"), int(docker.state("lives", "Pid"))) == ("running", pid)
    assert (docker.state("ends"), docker.state("ends", "ExitCode")) == ("exited", "6")
    wherryd.restart()
    eventually(lambda: docker("exec", "lives", "echo", "in", check=False).stdout == "in\n")
    assert alive(pid)
    numbers = docker("logs", "lives").stdout.split()
    eventually(lambda: len(docker("logs", "lives").stdout.split()) > len(numbers) + 5)
    numbers = docker("logs", "lives").stdout.split()
    assert numbers == [str(number) for number in range(len(numbers))]
    docker("rm", "-f", "lives", "ends")


def test_wherryd_as_the_containerd_of_dockerd() -> None:
    """dockerd starts `containerd --config …` from its PATH, asks for its health, and ends it."""
    folder = Path(tempfile.mkdtemp(prefix="wherry-docker-"))
    (folder / "bin").mkdir()
    program = folder / "bin" / "containerd"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m wherry.daemon "$@"\n')
    program.chmod(0o755)
    docker = Dockerd(folder, path=str(folder / "bin"))
    try:
        docker.start()
        docker.import_busybox()
        config = (folder / "exec" / "containerd" / "containerd.toml").read_text()
        assert str(folder / "exec" / "containerd" / "containerd.sock") in config
        command = (folder / "exec" / "containerd" / "containerd.pid").read_text()
        assert b"wherry.daemon" in Path(f"/proc/{command}/cmdline").read_bytes()
        assert run(docker, "--rm", IMAGE, "echo", "child") == "child\n"
        run(docker, "-d", "--name", "stays", IMAGE, "sleep", "1000")
        pid = int(docker.state("stays", "Pid"))
        # dockerd restarts a containerd of its own that died
        os.kill(int(command), signal.SIGKILL)
        eventually(lambda: docker("exec", "stays", "echo", "in", check=False).stdout == "in\n", 40)
        assert alive(pid)
        assert (folder / "exec" / "containerd" / "containerd.pid").read_text() != command
        docker("rm", "-f", "stays")
        ours = (folder / "exec" / "containerd" / "containerd.pid").read_text()
        docker.stop()
        eventually(lambda: not alive(int(ours)))
    finally:
        docker.close()
        leftovers.end(folder)
        shutil.rmtree(folder, ignore_errors=True)


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
