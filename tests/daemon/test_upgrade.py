"""An upgrade: the shim of an older copy of the code goes on under the daemon of the newer one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.test_restart import shim_of, task_pids
from tests.wherryd import BUSYBOX, Wherryd

PARTS = ["core", "proto", "linux", "runtime", "snapshotter", "registry", "network", "shim", "daemon", "systemd"]
SOURCE = Path(__file__).resolve().parents[2]


class Copied(Wherryd):
    """A daemon that runs from a copy of the tree, by an interpreter that knows no other."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = self.folder / "tree" / "wherry"
        self.install()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(self.folder / "venv")], check=True)
        site = next((self.folder / "venv").glob("lib/python3*/site-packages"))
        # what it needs from elsewhere comes after the copy, whose `wherry` is the first one found
        (site / "copy.pth").write_text(f"{self.tree.parent}\n{sysconfig.get_paths()['purelib']}\n")

    def install(self) -> None:
        """Lay the copy anew, as an installer does it: the old files go, others come."""
        shutil.rmtree(self.tree, ignore_errors=True)
        for part in PARTS:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(SOURCE / part, self.tree / part, ignore=ignore)

    def command(self) -> list[str]:
        """As the parent's, with the copy's interpreter."""
        return [str(self.folder / "venv" / "bin" / "python"), *super().command()[1:]]


@pytest.fixture
def copied() -> Iterator[Copied]:
    daemon = Copied()
    try:
        daemon.start()
        daemon.import_busybox()
        yield daemon
    finally:
        daemon.close()


def test_a_shim_of_the_older_code_is_driven_by_the_newer_daemon(copied: Copied) -> None:
    copied.ctr("run", "-d", BUSYBOX, "old", "sleep", "1000")
    copied.ctr("run", "-d", BUSYBOX, "ends", "sh", "-c", "sleep 1; exit 5")
    before = task_pids(copied)
    shim = shim_of(before["old"])
    copied.kill()
    # the files go from under the shim: whatever it would load now isn't there
    shutil.rmtree(copied.tree)
    time.sleep(1)
    copied.install()
    (copied.tree / "daemon" / "version.py").write_text(
        (copied.tree / "daemon" / "version.py").read_text() + "\nVERSION = '99.0'\n"
    )
    copied.start()
    assert "99.0" in copied.ctr("version").stdout
    assert task_pids(copied)["old"] == before["old"]
    assert shim_of(before["old"]) == shim
    assert copied.ctr("task", "exec", "--exec-id", "x", "old", "echo", "still here").stdout == "still here\n"
    failed = copied.ctr("task", "exec", "--exec-id", "y", "old", "/no/such", check=False)
    assert "/no/such" in failed.stderr
    copied.ctr("task", "pause", "old")
    copied.ctr("task", "resume", "old")
    assert "exit code 5" in copied.ctr("task", "delete", "ends", check=False).stderr
    copied.ctr("task", "kill", "-s", "KILL", "old")
    copied.ctr("task", "delete", "-f", "old", check=False)
    copied.ctr("run", "--rm", BUSYBOX, "new", "true")
    assert copied.settle() == []


def test_a_fork_server_does_not_survive_into_the_next_daemon(copied: Copied) -> None:
    before = {pid for pid in copied.processes() if pid != copied.pid}
    assert before
    copied.kill()
    end = time.monotonic() + 30
    while set(copied.processes()) & before and time.monotonic() < end:
        time.sleep(0.05)
    assert not set(copied.processes()) & before
