"""A host that was rebooted while containers ran, with a state folder that outlived it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests import leftovers
from tests.daemon.test_restart import task_pids
from tests.wherryd import BUSYBOX, Wherryd


def reboot(daemon: Wherryd) -> None:
    """What a power loss does, as far as one daemon is concerned: nothing of it runs, nothing is mounted."""
    daemon.lose_power()
    (daemon.state / "boot_id").write_text("another boot\n")


def stat_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def test_stale_state_goes_and_nobody_else_is_harmed(wherryd: Wherryd) -> None:
    wherryd.import_busybox()
    for name in ("one", "two"):
        wherryd.ctr("run", "-d", BUSYBOX, name, "sleep", "1000")
    bundle = wherryd.state / "tasks" / "default" / "one"
    record = wherryd.state / "runtime" / "default" / "one" / "state.json"
    reboot(wherryd)
    # a process of the new boot that has the number, and even the start time, of the container's init
    with subprocess.Popen(["sleep", "1000"]) as other:
        try:
            (bundle / "init.pid").write_text(str(other.pid))
            state = json.loads(record.read_text())
            state.update(pid=other.pid, pid_started=int(stat_of(other.pid)[19]))
            record.write_text(json.dumps(state))
            wherryd.start()
            assert task_pids(wherryd) == {}
            assert wherryd.settle() == []
            assert other.poll() is None
        finally:
            other.kill()
    assert list((wherryd.state / "runtime").glob("*/*")) == []
    # the containers' records are there, and each starts once
    assert wherryd.ctr("containers", "ls", "-q").stdout.split() == ["one", "two"]
    wherryd.ctr("task", "start", "-d", "one")
    assert list(task_pids(wherryd)) == ["one"]
    assert len([1 for pid in wherryd.processes() if "-id one" in leftovers.command_line(pid)]) == 1
    wherryd.restart()
    assert list(task_pids(wherryd)) == ["one"]


def test_a_restart_within_one_boot_removes_nothing(wherryd: Wherryd) -> None:
    wherryd.import_busybox()
    wherryd.ctr("run", "-d", BUSYBOX, "stays", "sleep", "1000")
    before = task_pids(wherryd)
    for known in (True, False):
        wherryd.kill()
        if not known:  # a daemon of an older version had no such file
            (wherryd.state / "boot_id").unlink()
        wherryd.start()
        assert task_pids(wherryd) == before
