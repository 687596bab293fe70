"""`wherryd --exit-idle`: it leaves when nobody calls, and not before; its containers go on."""

from __future__ import annotations

import subprocess
import time

from tests.peers import need
from tests.wherryd import BUSYBOX, Wherryd


def test_it_leaves_when_nobody_calls() -> None:
    daemon = Wherryd(args=["--exit-idle", "1"])
    try:
        daemon.start()
        daemon.import_busybox()
        daemon.ctr("run", "-d", BUSYBOX, "one", "sleep", "1000")
        watcher = subprocess.Popen(
            [need("ctr"), "--address", daemon.address, "events"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            time.sleep(2.5)
            # a subscription is a call: somebody is there
            assert daemon.process is not None
            assert daemon.process.poll() is None
        finally:
            watcher.kill()
            watcher.wait()
        assert daemon.process.wait(30) == 0
        assert "nobody has called for a while" in daemon.log_text()
        daemon.start()
        assert daemon.ctr("tasks", "ls").stdout.split()[-1] == "RUNNING"
        daemon.ctr("tasks", "rm", "-f", "one")
    finally:
        daemon.close()


def test_it_makes_way_for_one_that_stays_and_not_for_its_like() -> None:
    daemon = Wherryd(args=["--exit-idle", "60"])
    try:
        daemon.start()
        daemon.import_busybox()
        daemon.ctr("run", "-d", BUSYBOX, "one", "sleep", "1000")
        first = daemon.process
        assert first is not None
        like = subprocess.run(daemon.command(), capture_output=True, text=True, timeout=60, check=False)
        assert like.returncode == 1
        assert f"is in use by pid {first.pid}" in like.stderr
        daemon.args = []
        daemon.start()
        assert first.wait(30) == 0
        assert daemon.ctr("tasks", "ls").stdout.split()[-1] == "RUNNING"
        # one that stays is asked by nobody
        another = subprocess.run(daemon.command(), capture_output=True, text=True, timeout=60, check=False)
        assert f"is in use by pid {daemon.pid}" in another.stderr
        daemon.ctr("tasks", "rm", "-f", "one")
    finally:
        daemon.close()
