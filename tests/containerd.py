"""A private containerd of Debian's for tests: own root, state and address; what it leaves is cleaned up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests import leftovers
from tests.peers import need

CONFIG = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt", "io.containerd.cri.v1.images",
  "io.containerd.cri.v1.runtime", "io.containerd.nri.v1.nri"]
[grpc]
  address = "{folder}/c.sock"
[ttrpc]
  address = "{folder}/c.sock.ttrpc"
"""


class Containerd:
    """One daemon; started by `start`, removed with all that it left by `close`."""

    def __init__(self, program: str = "", more: str = "") -> None:
        """`program` is another containerd than Debian's (its shim and `ctr` beside it), `more` configuration."""
        program = program or need("containerd")
        need("runc")
        self.ctr = str(Path(program).with_name("ctr"))
        self.folder = Path(tempfile.mkdtemp(prefix="cd-", dir="/tmp"))
        self.address = str(self.folder / "c.sock")
        config = self.folder / "config.toml"
        config.write_text(CONFIG.format(folder=self.folder) + more)
        environment = {**os.environ, "PATH": f"{Path(program).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([program, "-c", str(config)], stdout=log, stderr=log, env=environment)

    def start(self, timeout: float = 60.0) -> None:
        """Waits until it answers."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            done = subprocess.run([self.ctr, "-a", self.address, "version"], capture_output=True, check=False)
            if done.returncode == 0:
                return
            time.sleep(0.05)
        raise RuntimeError(f"containerd doesn't answer: {(self.folder / 'log').read_text()[-2000:]}")

    def close(self) -> None:
        """Ends the daemon and its shims, unmounts, removes the folder."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        leftovers.end(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
