"""One daemon for each root, state and address; the second is told who has it and harms nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wherryd import Wherryd
from wherry.core.errors import FailedPrecondition
from wherry.daemon.lock import Lock, refuse_listener


def test_a_lock_says_who_holds_it_and_goes_with_its_holder(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    code = (
        "import sys, time; from wherry.daemon.lock import Lock\n"
        f"Lock({path!r}, 'root /r', {{'pid': 12345, 'address': '/a.sock'}}); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FailedPrecondition, match=r"root /r is in use by pid 12345 \(address /a.sock\)"):
            Lock(path, "root /r", {"pid": 1})
        other.kill()
        other.wait()
    Lock(path, "root /r", {"pid": os.getpid()}).close()


def test_a_listener_that_knows_no_lock_is_respected(tmp_path: Path) -> None:
    path = str(tmp_path / "x.sock")
    refuse_listener(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        refuse_listener(path)  # bound, but nobody listens: left over
        other.listen()
        with pytest.raises(FailedPrecondition, match=f"address {path} is in use by pid {os.getpid()}"):
            refuse_listener(path)
    assert os.path.exists(path)


@pytest.mark.parametrize("same", ["root", "state", "address"])
def test_a_second_daemon_is_refused_and_the_first_serves_on(wherryd: Wherryd, same: str) -> None:
    other = Wherryd()
    try:
        setattr(other, same, getattr(wherryd, same))
        done = subprocess.run(other.command(), capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 1
        assert f"is in use by pid {wherryd.pid}" in done.stderr
        assert wherryd.address in done.stderr
        assert same in done.stderr
    finally:
        other.close()
    assert "Server:" in wherryd.ctr("version").stdout
    wherryd.restart()
    assert "Server:" in wherryd.ctr("version").stdout


def test_long_paths_and_modes(tmp_path: Path) -> None:
    daemon = Wherryd()
    try:
        folder = daemon.folder / ("x" * 90)
        daemon.address = str(folder / ("y" * 40 + ".sock"))
        daemon.start()
        for path in (daemon.address, f"{daemon.address}.ttrpc"):
            status = os.stat(path)
            assert status.st_mode & 0o777 == 0o600
        assert os.stat(daemon.state).st_mode & 0o777 == 0o711
        assert daemon.stop() == 0
        assert not os.path.exists(daemon.address)
    finally:
        daemon.close()
