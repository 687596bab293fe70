"""Debian's dockerd, with the runtime as one of `--add-runtime`; and the command line `docker`, alike podman's."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests import leftovers
from tests.busybox import NAME, write_archive
from tests.containerd import Containerd
from tests.peers import need
from tests.runtime.callers import MEMORY, PIDS, WAIT, Caller, Done, call, call_on_terminal


class DockerLike(Caller):
    """docker's command line. `command`: the words before the verb; `flags`: what each container is made with."""

    command: list[str]
    flags: list[str]
    image = NAME

    def _run(self, name: str, script: str, *flags: str) -> list[str]:
        self.used.add(name)
        return [*self.command, "run", *flags, *self.flags, "--name", name, self.image, "sh", "-c", script]

    def run(self, name: str, script: str) -> Done:
        return call(self._run(name, script, "--rm"), check=False)

    def run_on_terminal(self, name: str, script: str) -> str:
        return call_on_terminal(self._run(name, script + WAIT, "--rm", "-it"))

    def start(self, name: str, script: str) -> None:
        call(self._run(name, script, "--detach", "--memory", str(MEMORY), "--pids-limit", str(PIDS)))

    def exec(self, name: str, script: str) -> Done:
        return call([*self.command, "exec", name, "sh", "-c", script], check=False)

    def exec_on_terminal(self, name: str, script: str) -> str:
        return call_on_terminal([*self.command, "exec", "-it", name, "sh", "-c", script + WAIT])

    def pause(self, name: str) -> None:
        call([*self.command, "pause", name])

    def resume(self, name: str) -> None:
        call([*self.command, "unpause", name])

    def status(self, name: str) -> str:
        shown = call([*self.command, "inspect", "--format", "{{.State.Status}}", name], check=False)
        status = shown.stdout.strip() if shown.returncode == 0 else ""
        return "stopped" if status == "exited" else status

    def stop(self, name: str) -> int:
        call([*self.command, "stop", "-t", "10", name])
        return int(call([*self.command, "inspect", "--format", "{{.State.ExitCode}}", name]).stdout)

    def remove(self, name: str) -> None:
        call([*self.command, "rm", name])

    def discard(self, name: str) -> None:
        call([*self.command, "kill", name], check=False)  # podman's rm --force would wait for its end
        call([*self.command, "rm", "--force", name], check=False)


class Dockerd:
    """A private daemon, above a private containerd; runtimes are known to it by the names in `runtimes`."""

    def __init__(self, runtimes: dict[str, str]) -> None:
        program = need("dockerd")
        need("docker")
        self.containerd = Containerd()
        self.containerd.start()
        self.folder = Path(tempfile.mkdtemp(prefix="dk-", dir="/tmp"))
        self.host = f"unix://{self.folder}/d.sock"
        command = [
            *(program, "--containerd", self.containerd.address, "-H", self.host, "-p", str(self.folder / "pid")),
            *("--data-root", str(self.folder / "data"), "--exec-root", str(self.folder / "exec")),
            *("--config-file", str(self._empty_config()), "--iptables=false", "--ip6tables=false", "--bridge=none"),
            *(word for name, path in runtimes.items() for word in ("--add-runtime", f"{name}={path}")),
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _empty_config(self) -> Path:
        path = self.folder / "daemon.json"
        path.write_text("{}")
        return path

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while call(["docker", "-H", self.host, "version"], check=False).returncode:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"dockerd doesn't answer: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)
        archive = self.folder / "image.tar"
        write_archive(archive)
        oci = self.folder / "docker.tar"
        call([need("skopeo"), "copy", "-q", f"oci-archive:{archive}", f"docker-archive:{oci}:{NAME}"])
        call(["docker", "-H", self.host, "load", "-i", str(oci)])

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        self.process.kill()
        self.process.wait()
        self.containerd.close()
        leftovers.unmount(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)


class Docker(DockerLike):
    def __init__(self, runtime: str, folder: Path, daemon: Dockerd) -> None:
        super().__init__(runtime, folder)
        self.command = ["docker", "-H", daemon.host]
        self.flags = ["--runtime", f"test-{os.path.basename(runtime)}", "--net", "none"]
