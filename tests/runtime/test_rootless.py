"""An ordinary user's containers: run as `nobody`, with a copy of the tree that everybody can read."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peers import need
from tests.runtime.bundles import Bundle, Spec
from wherry.runtime import default_spec

NOBODY = 65534


class User:
    """The runtime as the command of a user without rights; `prefix` goes before it."""

    def __init__(self, home: Path, rootfs: str) -> None:
        self.home = home
        self.bundle = Bundle(home, rootfs)

    def run(self, change: Callable[[Spec], object], *words: str, prefix: str = "") -> subprocess.CompletedProcess[str]:
        """`run one`, or with `words` another command; the configuration is written for it."""
        spec_home = self.home / "config.json"

        def rootless(spec: Spec) -> None:
            made = default_spec.make(rootless=True)
            for key in ("uidMappings", "gidMappings"):
                made["linux"][key] = [{"containerID": 0, "hostID": NOBODY, "size": 1}]
            spec.update({**made, "root": spec["root"], "process": {**made["process"], "terminal": False}})
            spec["linux"].pop("resources", None)
            change(spec)

        self.bundle.write(rootless)
        os.chmod(spec_home, 0o644)
        said = words or ("run", "one")
        line = shlex.join([_python(), "-m", "wherry.runtime.command", "--root", str(self.home / "state"), *said])
        command = f"{prefix} cd {self.home}; exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups {line}"
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self.home / "lib"), "HOME": "/"}
        return subprocess.run(
            ["unshare", "--mount", "sh", "-ec", command],
            env=environment, capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip


def _python() -> str:
    """One that another user can start (pyenv's lies in root's home)."""
    for path in (sys.executable, "/usr/bin/python3"):
        check = ["setpriv", "--reuid", str(NOBODY), path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        if os.path.exists(path) and subprocess.run(check, check=False, capture_output=True).returncode == 0:
            return path
    pytest.skip("no Python 3.11 that everybody can start")


@pytest.fixture
def user(rootfs: str) -> Iterator[User]:
    home = Path(tempfile.mkdtemp(prefix="wherry-rootless-"))
    for part in ("core", "linux", "runtime"):
        found = importlib.import_module(f"wherry.{part}").__path__[0]
        shutil.copytree(found, home / "lib" / "wherry" / part, ignore=shutil.ignore_patterns("__pycache__"))
    os.chown(home, NOBODY, NOBODY)
    os.chmod(home, 0o755)
    yield User(home, rootfs)
    shutil.rmtree(home)


def command(script: str) -> Callable[[Spec], object]:
    return lambda spec: spec["process"].update(args=["sh", "-c", script])


def test_a_container_of_an_ordinary_user(user: User) -> None:
    done = user.run(command("id -u; cat /proc/self/setgroups; hostname; exit 7"))
    assert (done.stdout.split(), done.returncode) == (["0", "deny", "wherry"], 7), done.stderr
    assert os.listdir(user.home / "state") == []


def test_exec_pause_and_delete(user: User) -> None:
    """The pid namespace is joined by way of the user namespace. Without a cgroup nothing can be frozen, and it says
    so. (The caller has closed its streams, too.)"""
    background = command("exec sleep 100")
    started = user.run(
        background, "run", "--detach", "--pid-file", str(user.home / "pid"), "one", prefix="exec >&- 2>&-;"
    )
    assert started.returncode == 0
    try:
        entered = user.run(background, "exec", "one", "sh", "-c", "echo $$ $(id -u) $(cat /proc/1/comm); exit 4")
        assert entered.returncode == 4, entered.stderr
        pid, uid, first = entered.stdout.split()
        assert (int(pid) > 1, uid, first) == (True, "0", "sleep")
        assert "no cgroup" in user.run(background, "pause", "one").stderr
        missing = user.run(background, "exec", "one", "nosuch")
        assert (missing.returncode, "executable file not found" in missing.stderr) == (255, True)
    finally:
        assert user.run(background, "delete", "--force", "one").returncode == 0
    assert os.listdir(user.home / "state") == []


def test_limits_without_a_delegated_cgroup_are_refused(user: User) -> None:
    done = user.run(lambda spec: spec["linux"].update(resources={"memory": {"limit": 1 << 25}}))
    assert done.returncode == 1
    assert "limits (memory) can't be had without rights" in done.stderr
    assert os.listdir(user.home / "state") == []


def test_ranges_are_mapped_by_newuidmap(user: User) -> None:
    need("newuidmap")

    def change(spec: Spec) -> None:
        command("cat /proc/self/uid_map /proc/self/gid_map; id -u; id -G")(spec)
        spec["process"]["user"] = {"uid": 5, "gid": 6, "additionalGids": [7]}
        for key in ("uidMappings", "gidMappings"):
            spec["linux"][key].append({"containerID": 1, "hostID": 200000, "size": 1000})

    (user.home / "sub").write_text("nobody:200000:1000\nnogroup:200000:1000\n")
    granted = "for f in subuid subgid; do mount --bind sub /etc/$f; done;"
    done = user.run(change, prefix=f"cd {user.home}; {granted}")
    assert done.returncode == 0, done.stderr
    fields = done.stdout.split()
    assert fields[:6] == ["0", "65534", "1", "1", "200000", "1000"]
    assert fields[12:] == ["5", "6", "7"]
    refused = user.run(change)
    assert refused.returncode == 1
    assert "newuidmap" in refused.stderr
    assert "/etc/subuid" in refused.stderr
