"""The two daemons under measurement, each in folders of its own, and the registry that both pull from."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Self

# how long a daemon may take until it answers before the measurement is given up, in seconds
START_LIMIT = 15.0


def program(name: str) -> str:
    """The path of a program: beside this interpreter, or where Debian has it."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])
    path = shutil.which(name, path=places)
    if path is None:
        raise SystemExit(f"bench: {name} is missing; .ci/run says which Debian packages the peers are in")
    return path


class Daemon:
    """A daemon in its own folders. `kind` is "wherry" or "containerd"; `ctr` drives both. `config` is more TOML."""

    def __init__(self, kind: str, folder: Path, *, name: str = "", config: str = "") -> None:
        self.kind = kind
        self.config = config
        self.folder = folder / (name or kind)
        self.folder.mkdir()
        # as on a real host: what must not outlive a boot is on a tmpfs (/run), the rest on the disk
        (self.folder / "state").mkdir(mode=0o711)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0711", "tmpfs", f"{self.folder}/state"], check=True)
        self.address = str(self.folder / "d.sock")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it; returns the seconds until it answered its first call."""
        arguments = ["--address", self.address, "--root", f"{self.folder}/root", "--state", f"{self.folder}/state"]
        if self.kind == "containerd" or self.config:
            config = self.folder / "config.toml"
            config.write_text(f'version = 2\n[ttrpc]\n  address = "{self.address}.ttrpc"\n{self.config}')
            arguments = ["--config", str(config), *arguments]
        command = [program("containerd" if self.kind == "containerd" else "wherryd"), *arguments]
        begun = time.monotonic()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        while time.monotonic() - begun < START_LIMIT:
            if subprocess.run([program("ctr"), "-a", self.address, "version"], capture_output=True).returncode == 0:
                return time.monotonic() - begun
            time.sleep(0.005)
        raise SystemExit(f"bench: {self.kind} does not serve; its log is {self.folder}/log")

    def kill(self) -> None:
        """SIGKILL; containers and shims go on."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def ctr(self, *arguments: str) -> str:
        """Run `ctr` on it and return what it prints; a failure ends the measurement with its message."""
        done = subprocess.run([program("ctr"), "-a", self.address, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench: ctr {' '.join(arguments)} on {self.kind}: {done.stderr.strip()}")
        return done.stdout

    def tasks(self) -> dict[str, int]:
        """The pids of the running tasks by container id."""
        rows = [line.split() for line in self.ctr("task", "ls").splitlines()[1:]]
        return {row[0]: int(row[1]) for row in rows if row[2] == "RUNNING"}

    def stop(self) -> None:
        """End its containers, the daemon, what is left of its processes, and its mounts."""
        with contextlib.suppress(SystemExit):
            for name in self.tasks():
                subprocess.run([program("ctr"), "-a", self.address, "task", "rm", "-f", name], capture_output=True)
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        for pid in self.leftovers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._forget_in_runc()
        points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for point in reversed([point for point in points if point.startswith(f"{self.folder}/")]):
            subprocess.run(["umount", "-l", point], capture_output=True)

    def _forget_in_runc(self) -> None:
        """Remove runc's records of containers whose shims were killed: they lie outside of this daemon's folder."""
        for root in ("/run/containerd/runc/default", "/run/containerd/runc/k8s.io"):
            runc = [program("runc"), "--root", root]
            listed = subprocess.run([*runc, "list", "-f", "json"], capture_output=True, text=True)
            for entry in json.loads(listed.stdout or "null") or []:
                if entry["bundle"].startswith(f"{self.folder}/"):
                    subprocess.run([*runc, "delete", "-f", entry["id"]], capture_output=True)

    def leftovers(self) -> list[int]:
        """Processes that name this daemon's folder in their command line: shims that are left."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if os.fsencode(f"{self.folder}/") in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
        return found


class Lab:
    """A scratch folder with a registry, the image `busybox` in it, and both daemons; a context manager."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wherry-bench-"))
        self.daemons: list[Daemon] = []
        self.registry: subprocess.Popen[bytes] | None = None
        self.image = ""

    def __enter__(self) -> Self:
        try:
            self._set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _set_up(self) -> None:
        port = _free_port()
        config = self.folder / "registry.yml"
        config.write_text(
            f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {self.folder}/registry}}}}\n"
            f'http: {{addr: "127.0.0.1:{port}"}}\nlog: {{level: error}}\n'
        )
        with (self.folder / "registry.log").open("wb") as log:
            self.registry = subprocess.Popen([program("docker-registry"), "serve", str(config)], stdout=log, stderr=log)
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=2):
                break
            time.sleep(0.05)
        self.image = f"127.0.0.1:{port}/library/busybox:latest"
        layout = self.folder / "layout"
        busybox_layout(layout, ["sh"])
        self.publish(layout, "busybox")
        for kind in ("wherry", "containerd"):
            self.add(kind)

    def publish(self, layout: Path, name: str) -> str:
        """Have the image of a layout in the registry; its reference."""
        reference = f"{self.image.partition('/')[0]}/library/{name}:latest"
        command = [program("skopeo"), "copy", "-q", "--dest-tls-verify=false", f"oci:{layout}:latest"]
        subprocess.run([*command, f"docker://{reference}"], check=True)
        return reference

    def add(self, kind: str, *, name: str = "", config: str = "") -> Daemon:
        """A running daemon that has the image."""
        daemon = Daemon(kind, self.folder, name=name, config=config)
        self.daemons.append(daemon)
        daemon.start()
        daemon.ctr("images", "pull", "--plain-http", self.image)
        return daemon

    def __exit__(self, *_: object) -> None:
        for daemon in self.daemons:
            daemon.stop()
        if self.registry is not None:
            self.registry.terminate()
            self.registry.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def busybox_layout(layout: Path, command: list[str]) -> None:
    """An OCI layout with one plain layer: a static busybox with its links."""
    busybox = program("busybox")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for folder in ("bin", "dev", "etc", "proc", "root", "sys", "tmp"):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
        tar.add(busybox, "bin/busybox")
        for applet in subprocess.run([busybox, "--list"], capture_output=True, text=True).stdout.split():
            if applet != "busybox":
                info = tarfile.TarInfo(f"bin/{applet}")
                info.type, info.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(info)
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{media_type}", "digest": f"sha256:{digest}", "size": len(data)}

    layer = put(buffer.getvalue(), "layer.v1.tar")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": command},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }
    media_type = "application/vnd.oci.image.manifest.v1+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": put(json.dumps(config).encode(), "config.v1+json"),
        "layers": [layer],
    }
    entry = put(json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
