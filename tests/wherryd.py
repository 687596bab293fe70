"""A real wherryd for tests: started as a process on folders of its own, killed, restarted, and cleaned up after.

    def test_something(wherryd: Wherryd) -> None:       # a fixture; re-export it in your folder's conftest.py
        wherryd.import_busybox()
        assert wherryd.ctr("run", "--rm", BUSYBOX, "one", "echo", "hi").stdout == "hi\\n"
        wherryd.kill()                                   # SIGKILL to the daemon alone
        wherryd.start()
        assert wherryd.leftovers() == []                 # after the containers are gone

Cleaning up goes by the daemon's own folder: whatever process names it (command line, working directory, open files,
mounts of its own mount namespace) is killed, whatever is mounted under it is unmounted, and the cgroups that those
processes were in go, so that tests of several people can run beside each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import busybox, leftovers, networks
from tests.peers import need

BUSYBOX = busybox.NAME
# cgroups that other daemons' containers may be about to come into
SHARED = ("default", "k8s.io", "moby")
VACANT = "containerd-shim-wherry-v1 -vacant "
# an emulated machine takes its time
START_TIMEOUT = float(os.environ.get("WHERRY_TESTS_START_SECONDS", "60"))


class Wherryd:
    """One daemon and all that it started. `folder` is made short (sun_path has 108 bytes) and removed by `close`."""

    def __init__(self, *, config: str = "", args: Sequence[str] = (), env: dict[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wd-", dir="/tmp"))
        self.address = str(self.folder / "d.sock")
        self.root = self.folder / "root"
        self.state = self.folder / "state"
        self.config = self.folder / "config.toml"
        self.log = self.folder / "log"
        self.args = list(args)
        self.env = dict(env or {})
        self.process: subprocess.Popen[bytes] | None = None
        if config:
            self.config.write_text(config)

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        if self.process is None:
            raise RuntimeError("wherryd is not running")
        return self.process.pid

    def command(self) -> list[str]:
        """The command line that `start` runs."""
        command = [sys.executable, "-m", "wherry.daemon", "--address", self.address]
        command += ["--root", str(self.root), "--state", str(self.state), "--log-level", "debug"]
        if self.config.exists():
            command += ["--config", str(self.config)]
        return [*command, *self.args]

    def start(self, timeout: float = START_TIMEOUT) -> float:
        """Start the daemon and wait until it says that it is ready (NOTIFY_SOCKET); the seconds that it took.

        Raises RuntimeError with the end of its log where it exits or is not ready in time.
        """
        path = self.folder / "notify"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log.open("ab") as log:
            notify.bind(str(path))
            notify.settimeout(0.05)
            began = time.monotonic()
            environment = {**os.environ, **self.env, "NOTIFY_SOCKET": str(path)}
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd="/"
            )
            while time.monotonic() - began < timeout:
                with contextlib.suppress(TimeoutError):
                    if b"READY=1" in notify.recv(4096):
                        return time.monotonic() - began
                if self.process.poll() is not None:
                    break
        raise RuntimeError(f"wherryd is not ready (exit code {self.process.poll()}): {self.log_text()[-3000:]}")

    def kill(self) -> None:
        """SIGKILL to the daemon alone, as a crash; its shims and containers go on."""
        self._end(signal.SIGKILL)

    def lose_power(self) -> None:
        """SIGKILL to everything, and nothing is mounted any more; what is on disk stays, STATE included."""
        self.kill()
        leftovers.end(self.folder)

    def stop(self) -> int:
        """SIGTERM to the daemon; its exit code."""
        return self._end(signal.SIGTERM)

    def restart(self) -> float:
        """`kill` and `start`; the seconds until it served again."""
        self.kill()
        return self.start()

    def _end(self, signum: signal.Signals) -> int:
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signum)
        code = self.process.wait(timeout=60)
        self.process = None
        return code

    def log_text(self) -> str:
        """What the daemon logged so far, all starts of it."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def ctr(
        self, *args: str, namespace: str = "", check: bool = True, timeout: float = 60, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Debian's ctr on this daemon; with `check` a failure raises with its stderr. Output is text."""
        command = [need("ctr"), "--address", self.address, *(["--namespace", namespace] if namespace else []), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, input=stdin, check=False)
        if check and done.returncode != 0:
            raise AssertionError(f"{command} exits with {done.returncode}: {done.stderr}{done.stdout}")
        return done

    def import_busybox(self, namespace: str = "") -> str:
        """Import an image with busybox in it, unpacked; its name (`BUSYBOX`)."""
        archive = self.folder / "busybox.tar"
        if not archive.exists():
            busybox.write_archive(archive)
        self.ctr("images", "import", str(archive), namespace=namespace)
        return BUSYBOX

    def processes(self) -> list[int]:
        """The pids of everything that names this folder, the daemon included, children before parents."""
        return leftovers.processes(self.folder)

    def mounts(self) -> list[str]:
        """The mount points under this folder in the tests' mount namespace, deepest first."""
        return leftovers.mounts(self.folder)

    def bundles(self) -> list[str]:
        """The bundles that are there, as `NAMESPACE/ID`."""
        return sorted(str(path.relative_to(self.state / "tasks")) for path in (self.state / "tasks").glob("*/*"))

    def leftovers(self) -> list[str]:
        """What containers may leave behind, the daemon and its helpers aside: shims, mounts, bundles, sockets.

        A vacant shim is one of the helpers as long as its daemon lives.
        """
        own = set() if self.process is None else {*leftovers.tree(self.process.pid), *self.vacant()}
        found = [f"process {pid}: {leftovers.command_line(pid)}" for pid in self.processes() if pid not in own]
        found += [f"mount {target}" for target in self.mounts()]
        found += [f"bundle {name}" for name in self.bundles()]
        return found + [f"socket {path.name}" for path in (self.state / "s").glob("*")]

    def vacant(self) -> list[int]:
        """The pids of shims that had a container and wait for another one (`daemon/vacant.py`)."""
        return [pid for pid in self.processes() if VACANT in leftovers.command_line(pid)]

    def settle(self, timeout: float = 30.0) -> list[str]:
        """`leftovers`, given up to `timeout` seconds to become none."""
        end = time.monotonic() + timeout
        while (found := self.leftovers()) and time.monotonic() < end:
            time.sleep(0.05)
        return found

    def _cgroups(self) -> set[str]:
        """The directories of its containers' cgroups, those without a process included, and what they are in."""
        tasks = self.state / "tasks"
        paths = {Path("/", folder.name) for folder in tasks.glob("*")}
        for bundle in self.bundles():
            with contextlib.suppress(OSError, ValueError):
                config = json.loads((tasks / bundle / "config.json").read_text())
                path = Path("/", config["linux"].get("cgroupsPath") or bundle)
                paths |= {path, *path.parents[:-1]}
        wanted = sorted(str(path) for path in paths if path.name not in SHARED)
        return {str(found) for path in wanted for found in Path("/sys/fs/cgroup").glob(f"*{path}")}

    def close(self) -> None:
        """End everything, unmount everything, remove the folder."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.kill()
        leftovers.end(self.folder, self._cgroups())
        for record in Path("/run/containerd/runc").glob("*/*/state.json"):
            with contextlib.suppress(OSError):
                if str(self.folder) in record.read_text(errors="replace"):
                    shutil.rmtree(record.parent)
        networks.clean(self.state)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def wherryd() -> Iterator[Wherryd]:
    """A daemon that runs, for one test."""
    daemon = Wherryd()
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()
