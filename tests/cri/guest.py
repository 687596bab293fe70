"""A node in the VM: systemd makes its cgroups, and there is no ctr."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import busybox
from tests.cri.kubelet import NAMESPACE, WherryLab

SYSTEMD = """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    SystemdCgroup = true
"""


class GuestLab(WherryLab):
    """Images come by our own command line."""

    def import_archive(self, archive: Path) -> None:
        """An archive's images for the node."""
        command = [sys.executable, "-m", "wherry.cli", "--address", self.address, "-n", NAMESPACE]
        done = subprocess.run(
            [*command, "images", "import", str(archive)], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr

    def import_busybox(self) -> str:
        archive = self.folder / "busybox.tar"
        busybox.write_archive(archive)
        self.import_archive(archive)
        return busybox.NAME
