"""Debian's podman, and so its conmon, with `--runtime`.

podman takes a hybrid host for v2 and then misses the controllers: it runs in a mount namespace without the v2 tree.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from tests import leftovers
from tests.busybox import write_archive
from tests.peers import need
from tests.runtime.callers import call
from tests.runtime.callers.docker import DockerLike

# podman's own defaults may be above this machine's hard limits
_ULIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096")


class Storage:
    """Where podman keeps all that it has; and a process whose mount namespace every call of podman enters."""

    def __init__(self) -> None:
        self.podman = need("podman")
        need("conmon")
        self.folder = Path(tempfile.mkdtemp(prefix="pm-", dir="/tmp"))
        script = "if [ -d /sys/fs/cgroup/unified ]; then umount /sys/fs/cgroup/unified; fi; echo ready; exec cat"
        words = ["unshare", "-m", "sh", "-c", script]
        self._holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # ends when we do
        if self._holder.stdout is None or self._holder.stdout.readline() != b"ready\n":
            raise RuntimeError("no mount namespace for podman")
        archive = self.folder / "image.tar"
        write_archive(archive)
        call([*self.command(), "load", "-i", str(archive)])

    def command(self, runtime: str = "") -> list[str]:
        places = ("--root", f"{self.folder}/root", "--runroot", f"{self.folder}/run", "--tmpdir", f"{self.folder}/tmp")
        words = [*("nsenter", "-t", str(self._holder.pid), "-m", self.podman), *places, "--cgroup-manager", "cgroupfs"]
        return [*words, "--events-backend", "none", *(("--runtime", runtime) if runtime else ())]

    def close(self) -> None:
        self._holder.send_signal(signal.SIGKILL)
        self._holder.wait()
        for stream in (self._holder.stdin, self._holder.stdout):
            if stream:
                stream.close()
        leftovers.unmount(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)


class Podman(DockerLike):
    def __init__(self, runtime: str, folder: Path, storage: Storage) -> None:
        super().__init__(runtime, folder)
        self.command = storage.command(runtime)
        self.flags = ["--net", "none", *_ULIMITS]
