"""`wherryd` as an ordinary user: a user with granted ids and one without, each of which only sees its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import busybox
from tests.peers import missing, need
from wherry.linux.rootless import Range, granted

# other users can't look into root's home, where the interpreter of the tests may be
PYTHON = "/usr/bin/python3"
TREE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def install(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment that every user can read, with Wherry in it."""
    if not os.path.exists(PYTHON):
        missing(f"{PYTHON} is missing: apt-get install python3")
    folder = Path(tempfile.mkdtemp(prefix="rootless-", dir="/tmp"))
    try:
        subprocess.run([PYTHON, "-m", "venv", folder / "venv"], check=True)
        folder.chmod(0o755)
        subprocess.run([folder / "venv/bin/pip", "install", "-q", str(TREE)], check=True, capture_output=True)
        yield folder / "venv/bin"
    finally:
        shutil.rmtree(folder)


class User:
    """Somebody who isn't root, with a home and a runtime folder, and everything that they start."""

    def __init__(self, name: str, uid: int, bin_: Path) -> None:
        self.uid = uid
        self.folder = Path(tempfile.mkdtemp(prefix=f"user-{name}-", dir="/tmp"))
        self.bin = bin_
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
        command = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--init-groups", "wherry", *args]
        done = subprocess.run(
            command, env=self.environment(), capture_output=True, text=True, timeout=100, cwd="/", check=False
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    def processes(self) -> list[int]:
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{name}/cmdline").read_bytes()
                if str(self.folder).encode() in line or (
                    b"wherry" in line and os.stat(f"/proc/{name}").st_uid == self.uid
                ):
                    found.append(int(name))
        return found

    def close(self) -> None:
        for _ in range(20):
            for pid in self.processes():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if not self.processes():
                break
        shutil.rmtree(self.folder)


@pytest.fixture
def barrow(install: Path) -> Iterator[User]:
    """A user with ids in /etc/subuid."""
    need("newuidmap")
    if subprocess.run(["id", "barrow"], capture_output=True, check=False).returncode:
        subprocess.run(["useradd", "-m", "barrow"], check=True)
    uid = int(subprocess.run(["id", "-u", "barrow"], capture_output=True, text=True, check=True).stdout)
    assert granted("/etc/subuid", "barrow", uid)
    user = User("barrow", uid, install)
    try:
        yield user
    finally:
        user.close()


@pytest.fixture
def nobody(install: Path) -> Iterator[User]:
    """A user without any other id."""
    user = User("nobody", 65534, install)
    try:
        yield user
    finally:
        user.close()


def test_the_main_job(barrow: User) -> None:
    barrow("images", "import", barrow.archive)
    run = ("run", "--rm", "--net", "none", busybox.NAME)
    assert barrow(*run, "sh", "-c", "id -u; touch /new; stat -c %u /new").stdout == "0\n0\n"
    done = barrow(*run, "sh", "-c", "cat /proc/self/uid_map; exit 3", check=False)
    assert done.returncode == 3
    assert str(barrow.uid) in done.stdout.split()
    # what runs with another id inside is an id of the user's range outside
    assert barrow("run", "--rm", "--net", "none", "-u", "1000", busybox.NAME, "id", "-u").stdout == "1000\n"


def test_containers_outlive_the_daemon_and_the_namespaces_go_with_the_last(barrow: User) -> None:
    barrow("--embedded", "images", "import", barrow.archive)
    barrow("--embedded", "run", "-d", "--name", "long", "--net", "none", busybox.NAME, "sleep", "1000")
    assert barrow("--embedded", "exec", "long", "echo", "in").stdout == "in\n"
    holder = int((barrow.run / "wherry-embedded/rootless").read_text().split()[0])
    os.kill(holder, 0)
    barrow("--embedded", "rm", "-f", "long")
    barrow("--embedded", "version")
    assert not (barrow.run / "wherry-embedded/rootless").exists()


def test_nothing_configured(barrow: User) -> None:
    """Two commands at once: one of them starts the daemon, which both use, and the next ones as well."""
    words = ["setpriv", f"--reuid={barrow.uid}", f"--regid={barrow.uid}", "--init-groups", "wherry", "version"]
    both = [
        subprocess.Popen(words, env=barrow.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for one in both:
        out, err = one.communicate(timeout=100)
        assert one.returncode == 0, err
        assert "Server:" in out
    barrow("images", "import", barrow.archive)
    assert barrow("run", "--rm", "--net", "none", busybox.NAME, "echo", "hi").stdout == "hi\n"
    daemons = [pid for pid in barrow.processes() if b"--exit-idle" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(daemons) == 1


def test_a_limit_that_can_not_be_had_is_refused(barrow: User) -> None:
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        pytest.skip("cgroups may be delegated here")
    barrow("images", "import", barrow.archive)
    done = barrow("run", "--rm", "--net", "none", "-m", "64m", busybox.NAME, "true", check=False)
    assert done.returncode == 125
    assert "limits (memory) can't be had without rights: no cgroup is delegated" in done.stderr


@pytest.fixture
def tun() -> Iterator[None]:
    """/dev/net/tun as every distribution's udev has it: for everybody."""
    device = Path("/dev/net/tun")
    mode = device.stat().st_mode & 0o777
    device.chmod(0o666)
    yield
    device.chmod(mode)


@pytest.mark.usefixtures("tun")
@pytest.mark.parametrize("program", ["pasta", "slirp4netns"])
def test_a_network_with_a_published_port(barrow: User, program: str) -> None:
    need(program)
    barrow.more["WHERRY_USER_NETWORK"] = program
    barrow("images", "import", barrow.archive)
    serve = "echo works >/tmp/index.html; httpd -f -p 80 -h /tmp"
    barrow("run", "-d", "--name", "web", "-p", "127.0.0.1::80", busybox.NAME, "sh", "-c", serve)
    port = barrow("port", "web").stdout.strip().rpartition(":")[2]
    end = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/index.html", timeout=5) as answer:
                assert answer.read() == b"works\n"
                break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)
    assert barrow("exec", "web", "cat", "/etc/resolv.conf").stdout.startswith("nameserver ")
    taken = barrow("run", "--rm", "-p", f"127.0.0.1:{port}:80", busybox.NAME, "true", check=False)
    assert taken.returncode == 125
    assert f"can't publish port 127.0.0.1:{port}" in taken.stderr
    other = barrow("run", "--rm", "--net", "other", busybox.NAME, "true", check=False)
    assert "without root there is one network alone" in other.stderr
    barrow("rm", "-f", "web")
    end = time.monotonic() + 30
    while any(program.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in barrow.processes()):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_network_that_can_not_be_had_says_what_to_install(barrow: User) -> None:
    barrow.more["WHERRY_USER_NETWORK"] = "neither"
    barrow("images", "import", barrow.archive)
    done = barrow("run", "--rm", busybox.NAME, "true", check=False)
    assert done.returncode == 125
    assert "install the package passt or slirp4netns, or use --net none" in done.stderr


def test_a_user_with_one_id(nobody: User) -> None:
    nobody("images", "import", nobody.archive)
    out = nobody("run", "--rm", "--net", "none", busybox.NAME, "cat", "/proc/self/uid_map").stdout
    assert out.split() == ["0", "65534", "1"]


def test_nobody_else_reaches_a_users_daemon(barrow: User, nobody: User) -> None:
    barrow("images", "import", barrow.archive)
    barrow("run", "-d", "--name", "mine", "--net", "none", busybox.NAME, "sleep", "1000")
    for path in (barrow.run / "wherry", barrow.folder / "home/.local/share/wherry"):
        for command in (["ls", str(path)], ["cat", str(path / "lock")]):
            done = subprocess.run(
                ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command],
                capture_output=True,
                check=False,
            )
            assert done.returncode != 0, (path, command)
    assert nobody("-a", barrow.address, "ps", check=False).returncode == 1


def test_granted_ids(tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    file.write_text("other:1:2\nme:100000:65536\n1234:7:8\nme:x:y\nme:5:0\n\ngarbage\n")
    assert granted(str(file), "me", 1234) == [Range(100000, 65536), Range(7, 8)]
    assert granted(str(tmp_path / "none"), "me", 1) == []
