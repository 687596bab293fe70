"""Ordinary users for tests: each with a home, a runtime folder and everything that it starts, all gone afterwards."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests import busybox
from tests.peers import missing, need

# other users can't look into root's home, where the interpreter of the tests may be
PYTHON = "/usr/bin/python3"
TREE = Path(__file__).parents[1]


@functools.cache
def install() -> Path:
    """The `bin` of an environment that every user can read, with Wherry in it; one for all tests."""
    if not os.path.exists(PYTHON):
        missing(f"{PYTHON} is missing: apt-get install python3")
    folder = Path(tempfile.mkdtemp(prefix="rootless-", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    subprocess.run([PYTHON, "-m", "venv", folder / "venv"], check=True)
    folder.chmod(0o755)
    subprocess.run([folder / "venv/bin/pip", "install", "-q", str(TREE)], check=True, capture_output=True)
    return folder / "venv/bin"


class User:
    """Somebody who isn't root, with a home and a runtime folder, and everything that they start."""

    def __init__(self, name: str, uid: int) -> None:
        self.name = name
        self.uid = uid
        self.folder = Path(tempfile.mkdtemp(prefix=f"user-{name}-", dir="/tmp"))
        self.bin = install()
        for part in (self.folder, self.folder / "home", self.folder / "run"):
            part.mkdir(exist_ok=True)
            os.chown(part, uid, uid)
        self.run = self.folder / "run"
        self.address = str(self.run / "wherry/wherryd.sock")
        archive = self.folder / "busybox.tar"
        busybox.write_archive(archive)
        self.archive = str(archive)
        self.more: dict[str, str] = {}

    def environment(self) -> dict[str, str]:
        path = f"{self.bin}:/usr/bin:/bin:/usr/sbin:/sbin"
        return {"HOME": str(self.folder / "home"), "XDG_RUNTIME_DIR": str(self.run), "PATH": path, **self.more}

    def __call__(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.command("wherry", *args, check=check)

    def words(self, *args: str) -> list[str]:
        """What runs a command as this user."""
        return ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--init-groups", *args]

    def command(self, *args: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Any command as this user."""
        done = subprocess.run(
            self.words(*args),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=100,
            cwd="/",
            check=False,
            **options,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def processes(self) -> list[int]:
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{name}/cmdline").read_bytes()
                if str(self.folder).encode() in line or self._is_mine(int(name)) or self._is_inside(int(name)):
                    found.append(int(name))
        return found

    def _is_inside(self, pid: int) -> bool:
        """In a container whose shim was killed: nothing but its root says whose it is."""
        mounts = Path(f"/proc/{pid}/mountinfo").read_bytes().splitlines()
        return any(line.split()[4] == b"/" and str(self.folder).encode() in line for line in mounts)

    def _is_mine(self, pid: int) -> bool:
        """By its environment, or by what it is called: another test may run as the same user."""
        if os.stat(f"/proc/{pid}").st_uid != self.uid:
            return False
        return str(self.folder).encode() in Path(f"/proc/{pid}/environ").read_bytes()

    def close(self) -> None:
        for _ in range(20):
            for pid in self.processes():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if not self.processes():
                break
        shutil.rmtree(self.folder, ignore_errors=True)


def of_host(name: str) -> User:
    """A user that the host has, or gets, with ids of /etc/subuid."""
    need("newuidmap")
    with contextlib.suppress(KeyError):
        return User(name, pwd.getpwnam(name).pw_uid)
    for path in ("/etc/subuid", "/etc/subgid"):
        Path(path).touch()  # without them useradd grants no ids
    subprocess.run(["useradd", "-m", name], check=True)
    return User(name, pwd.getpwnam(name).pw_uid)


@contextlib.contextmanager
def granted(name: str, first: int, count: int) -> Iterator[None]:
    """Ids for a user in /etc/subuid and /etc/subgid, for as long as a test takes."""
    line = f"{name}:{first}:{count}\n"
    for path in ("/etc/subuid", "/etc/subgid"):
        _change(path, lambda text: text + line)
    try:
        yield
    finally:
        for path in ("/etc/subuid", "/etc/subgid"):
            _change(path, lambda text: text.replace(line, "", 1))


def _change(path: str, change: Callable[[str], str]) -> None:
    with open(path, "a+", encoding="ascii") as file:  # a host may not have it yet
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = change(file.read())
        file.truncate(0)
        file.write(text)


@contextlib.contextmanager
def devices(*names: str) -> Iterator[None]:
    """Devices as every distribution's udev has them: for everybody."""
    modes = {Path("/dev", name): Path("/dev", name).stat().st_mode & 0o777 for name in names}
    for path in modes:
        path.chmod(0o666)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
