"""Our shim under Debian's containerd, bookworm's 1.6 and sid's 2.x: what a stranger's daemon asks of it, by `ctr`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.busybox import NAME, write_archive
from tests.peers import need
from tests.shim.harness import alive
from tests.sid import need_sid


class Containerd:
    """A containerd of one's own, with our shim on its PATH. `program` and `client` are the daemon's and ctr's paths."""

    def __init__(self, work: Path, program: str, client: str) -> None:
        self.work = work
        self.program = program
        self.client = client
        self.address = work / "c.sock"
        (work / "bin").mkdir()
        # also under the name of containerd's own shim: ctr takes --runc-binary only for that
        for name in ("containerd-shim-wherry-v1", "containerd-shim-runc-v2"):
            shim = work / "bin" / name
            shim.write_text(f"#!{sys.executable} -I\nfrom wherry.shim.bootstrap import main\nmain()\n")
            shim.chmod(0o755)
        config = work / "config.toml"
        config.write_text(
            'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[ttrpc]\n  address = "{self.address}.ttrpc"\n'
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.log = (work / "log").open("ab")

    def start(self) -> None:
        """Start, and wait until it serves."""
        command = [self.program, "--config", str(self.work / "config.toml"), "--address", str(self.address)]
        command += ["--root", str(self.work / "root"), "--state", str(self.work / "state")]
        environment = {**os.environ, "PATH": f"{self.work / 'bin'}:{os.environ['PATH']}:/usr/sbin:/sbin"}
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 30
        while self.ctr("version", check=False).returncode:
            assert time.monotonic() < deadline, (self.work / "log").read_text()[-2000:]
            time.sleep(0.05)

    def ctr(self, *args: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """`ctr`; raises with what it said."""
        done = subprocess.run(
            [self.client, "-a", str(self.address), *args],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            input=stdin,
        )
        if check and done.returncode:
            pytest.fail(f"ctr {' '.join(args)}: {done.stdout}{done.stderr}")
        return done

    def run(self, container: str, *command: str, options: tuple[str, ...], check: bool = True) -> str:
        """`ctr run` with our shim; what it printed."""
        done = self.ctr("run", *options, NAME, container, *command, check=check)
        return done.stdout if check else f"{done.returncode} {done.stdout}{done.stderr}"

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the daemon."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(10)
            self.process = None

    def shims(self) -> list[int]:
        """The pids of our shims under this daemon."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    command = (folder / "cmdline").read_bytes()
                    if command.startswith(b"containerd-shim-wherry-v1\0") and str(self.address).encode() in command:
                        found.append(int(folder.name))
        return found


@pytest.fixture(scope="module", params=["bookworm", "sid"])
def containerd(request: pytest.FixtureRequest) -> Iterator[Containerd]:
    """One daemon for all tests here, with the image."""
    need("runc")
    client = need("ctr") if request.param == "bookworm" else need_sid()
    program = need("containerd") if request.param == "bookworm" else str(Path(client).with_name("containerd"))
    work = Path(tempfile.mkdtemp(prefix="wherry-shim-c-"))
    daemon = Containerd(work, program, client)
    try:
        daemon.start()
        write_archive(work / "image.tar")
        daemon.ctr("images", "import", str(work / "image.tar"))
        yield daemon
    finally:
        for line in daemon.ctr("task", "ls", "-q", check=False).stdout.split():
            daemon.ctr("task", "rm", "-f", line, check=False)
        for pid in daemon.shims():
            os.kill(pid, signal.SIGKILL)
        daemon.stop()
        daemon.log.close()
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in reversed([path for path in mounts if path.startswith(str(work))]):
            subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(work, ignore_errors=True)


@pytest.fixture(params=["bundled", "runc"])
def run(request: pytest.FixtureRequest, containerd: Containerd) -> Callable[..., str]:
    """`ctr run` with our shim and either runtime."""
    extra: tuple[str, ...] = ("--runtime", "io.containerd.wherry.v1")
    if request.param == "runc":
        extra = ("--runtime", "io.containerd.runc.v2", "--runc-binary", need("runc"))
        extra += ("--runc-root", str(containerd.work / "runc"))

    def call(container: str, *command: str, options: tuple[str, ...] = (), check: bool = True) -> str:
        return containerd.run(container, *command, options=(*extra, *options), check=check)

    return call


def test_run_and_its_exit_code(containerd: Containerd, run: Callable[..., str]) -> None:
    assert run("one", "echo", "ours", options=("--rm",)) == "ours\n"
    assert run("two", "sh", "-c", "echo bad >&2; exit 7", options=("--rm",), check=False) == "7 bad\n"
    answer = run("three", "nosuch", options=("--rm",), check=False)
    assert 'exec: "nosuch": executable file not found' in answer
    assert containerd.ctr("task", "ls", "-q").stdout == ""
    _none_left(containerd)


def test_a_container_that_stays(containerd: Containerd, run: Callable[..., str]) -> None:
    run("c-stays", "sleep", "1000", options=("-d",))
    ctr = containerd.ctr
    try:
        assert ctr("task", "exec", "--exec-id", "x", "c-stays", "echo", "in").stdout == "in\n"
        assert ctr("task", "exec", "--exec-id", "y", "c-stays", "sh", "-c", "exit 5", check=False).returncode == 5
        assert ctr("task", "exec", "--exec-id", "z", "c-stays", "cat", stdin="typed\n").stdout == "typed\n"
        assert len(ctr("task", "ps", "c-stays").stdout.splitlines()) == 2
        assert "pids.current" in ctr("task", "metrics", "c-stays").stdout
        ctr("task", "pause", "c-stays")
        assert "PAUSED" in ctr("task", "ls").stdout
        ctr("task", "resume", "c-stays")
        assert "RUNNING" in ctr("task", "ls").stdout
        ctr("task", "kill", "-s", "SIGTERM", "c-stays")
        ctr("task", "kill", "-s", "SIGKILL", "c-stays", check=False)
        _wait_for(lambda: "STOPPED" in ctr("task", "ls").stdout)
    finally:
        ctr("task", "rm", "-f", "c-stays")
        ctr("containers", "rm", "c-stays")
    _none_left(containerd)


def test_a_terminal(containerd: Containerd, run: Callable[..., str]) -> None:
    need("script")
    run("term", "sleep", "1000", options=("-d",))
    try:
        inner = f"{containerd.client} -a {containerd.address} task exec -t --exec-id t term "
        inner += "sh -c 'test -t 0 && echo terminal'"
        done = subprocess.run(["script", "-qec", inner, "/dev/null"], capture_output=True, timeout=30, check=False)
        assert b"terminal\r" in done.stdout
    finally:
        containerd.ctr("task", "rm", "-f", "term")
        containerd.ctr("containers", "rm", "term")


def test_the_restart_of_containerd(containerd: Containerd, run: Callable[..., str]) -> None:
    run("c-alive", "sleep", "1000", options=("-d",))
    run("c-ended", "sh", "-c", "sleep 0.3; exit 6", options=("-d",))
    shims = containerd.shims()
    containerd.stop(signal.SIGKILL)
    time.sleep(0.6)
    containerd.start()
    assert containerd.shims() == shims
    try:
        assert containerd.ctr("task", "exec", "--exec-id", "x", "c-alive", "echo", "in").stdout == "in\n"
        lines = {line.split()[0]: line.split()[2] for line in containerd.ctr("task", "ls").stdout.splitlines()[1:]}
        if "c-ended" in lines:  # containerd 2.x removes what has stopped when it starts again, whichever shim it has
            assert lines.pop("c-ended") == "STOPPED"
            assert "exit with non-zero exit code 6" in containerd.ctr("task", "rm", "c-ended").stderr
        assert lines == {"c-alive": "RUNNING"}
    finally:
        containerd.ctr("task", "rm", "-f", "c-alive")
        for name in ("c-alive", "c-ended"):
            containerd.ctr("containers", "rm", name)
    _none_left(containerd)


def test_a_shim_that_is_killed(containerd: Containerd, run: Callable[..., str]) -> None:
    run("c-victim", "sleep", "1000", options=("-d",))
    (shim,) = containerd.shims()
    line = next(line for line in containerd.ctr("task", "ls").stdout.splitlines() if line.startswith("c-victim"))
    init = int(line.split()[1])
    assert alive(init)
    os.kill(shim, signal.SIGKILL)
    _wait_for(lambda: not alive(init))
    _wait_for(lambda: "RUNNING" not in containerd.ctr("task", "ls").stdout)
    containerd.ctr("task", "rm", "-f", "c-victim", check=False)
    containerd.ctr("containers", "rm", "c-victim")
    _none_left(containerd)


def test_containers_of_a_group_share_a_shim(containerd: Containerd, run: Callable[..., str]) -> None:
    names = ["pod-0", "pod-1", "pod-2"]
    for name in names:
        run(name, "sleep", "1000", options=("-d", "--annotation", "io.kubernetes.cri.sandbox-id=pod-0"))
    (shim,) = containerd.shims()
    try:
        containerd.ctr("task", "rm", "-f", "pod-0")
        containerd.stop(signal.SIGKILL)
        containerd.start()
        assert containerd.shims() == [shim]
        for name in names[1:]:
            assert containerd.ctr("task", "exec", "--exec-id", "x", name, "echo", name).stdout == f"{name}\n"
    finally:
        for name in names:
            containerd.ctr("task", "rm", "-f", name, check=False)
            containerd.ctr("containers", "rm", name)
    _none_left(containerd)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _none_left(containerd: Containerd) -> None:
    state = containerd.work / "state"
    _wait_for(lambda: not containerd.shims())
    _wait_for(lambda: str(state) not in Path("/proc/mounts").read_text())
    _wait_for(lambda: not list((state / "io.containerd.runtime.v2.task").glob("*/*")))
