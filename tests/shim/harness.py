"""Drives real shims: a fork server, a listener for their events, containers on a busybox root, streams by FIFO."""

# ruff: noqa: ASYNC109, ASYNC110 - tests poll for what other processes do

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from wherry.core import typeurl
from wherry.linux import mounts
from wherry.proto import events_pb2, events_ttrpc_pb2, runc_options_pb2, task_v2_pb2, types_pb2
from wherry.proto import task_v3_pb2 as _v3  # noqa: F401  # declares the third version of the service
from wherry.proto.service import Context
from wherry.proto.ttrpc.client import TtrpcClient
from wherry.proto.ttrpc.server import TtrpcServer
from wherry.shim.client import Bootstrap, ForkServer, ShimRequest

# so that their types are known to `typeurl.unpack`
EVENTS = events_pb2
TASK = "containerd.task.v2.Task"
CAPABILITIES = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT"]
# below it are the cgroups of the containers; tests may run twice on a machine
GROUP = f"wherry-h5/{os.getpid()}"


def process_spec(*args: str, terminal: bool = False, cwd: str = "/") -> dict[str, Any]:
    """An OCI process."""
    return {
        "args": list(args),
        "cwd": cwd,
        "env": ["PATH=/bin:/sbin:/usr/bin", "TERM=xterm"],
        "user": {"uid": 0, "gid": 0},
        "terminal": terminal,
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
    }


def container_spec(container_id: str, *args: str, terminal: bool = False, pid_namespace: bool = True) -> dict[str, Any]:
    """A config.json: own namespaces, /proc, /dev, a cgroup of its own."""
    namespaces = [{"type": kind} for kind in ("ipc", "uts", "mount", "network")]
    if pid_namespace:
        namespaces.append({"type": "pid"})
    return {
        "ociVersion": "1.0.2",
        "process": process_spec(*args, terminal=terminal),
        "root": {"path": "rootfs"},
        "hostname": "shimtest",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "mode=755", "size=65536k"],
            },
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            },
        ],
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": f"/{GROUP}-{container_id}",
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        },
    }


class EventsService:
    """The daemon's end of `Forward`: keeps what comes."""

    SERVICE = "containerd.services.events.ttrpc.v1.Events"

    def __init__(self) -> None:
        self.envelopes: list[types_pb2.Envelope] = []

    async def forward(self, request: events_ttrpc_pb2.ForwardRequest, context: Context) -> Empty:
        """Keep one."""
        self.envelopes.append(request.envelope)
        return Empty()

    @property
    def topics(self) -> list[str]:
        """What came, in order."""
        return [envelope.topic for envelope in self.envelopes]

    def of(self, topic: str) -> list[Any]:
        """The events of a topic."""
        return [typeurl.unpack(envelope.event) for envelope in self.envelopes if envelope.topic == topic]

    async def wait_for(self, topic: str, count: int = 1) -> None:
        """Wait until so many of a topic came."""
        async with asyncio.timeout(30):
            while self.topics.count(topic) < count:
                await asyncio.sleep(0.005)


@dataclass
class Output:
    """What a FIFO brought, read as it comes (or on demand when `paused`)."""

    path: Path
    data: bytearray = field(default_factory=bytearray)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    fd: int = -1

    def open(self) -> None:
        """Read whenever there is something."""
        self.fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        asyncio.get_running_loop().add_reader(self.fd, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return
        if data:
            self.data += data
        elif self.data or os.environ:
            self.close()
            self.ended.set()

    def close(self) -> None:
        """The client goes away."""
        if self.fd >= 0:
            asyncio.get_running_loop().remove_reader(self.fd)
            os.close(self.fd)
            self.fd = -1

    async def wait_for(self, text: bytes) -> None:
        """Wait until it contains this."""
        async with asyncio.timeout(30):
            while text not in self.data:
                await asyncio.sleep(0.005)


class Shim:
    """A client of one shim and its container `id`."""

    def __init__(self, lab: Lab, container_id: str, bundle: Path, bootstrap: Bootstrap, client: TtrpcClient) -> None:
        self.lab = lab
        self.id = container_id
        self.bundle = bundle
        self.bootstrap = bootstrap
        self.client = client

    async def call(self, method: str, request: Message, *, timeout: float = 30, service: str = "") -> Any:
        """One call of the task service."""
        return await self.client.call(service or self.lab.service, method, request, timeout=timeout)

    async def create(
        self, *args: str, streams: bool = True, terminal: bool = False, spec: dict[str, Any] | None = None, **names: str
    ) -> Any:
        """Write config.json and call Create, with FIFOs `in`, `out`, `err` in the bundle for `streams`."""
        config = spec or container_spec(self.id, *args, terminal=terminal)
        (self.bundle / "config.json").write_text(json.dumps(config))
        request = task_v2_pb2.CreateTaskRequest(id=self.id, bundle=str(self.bundle), terminal=terminal)
        request.rootfs.add(type="bind", source=str(self.lab.rootfs), options=["rbind", "rw"])
        request.options.CopyFrom(typeurl.pack(self.lab.options))
        if streams:
            names = {**self.fifos(""), **names}
        for name, path in names.items():
            if not (terminal and name == "stderr"):
                setattr(request, name, path)
        return await self.call("Create", request)

    def fifos(self, exec_id: str) -> dict[str, str]:
        """Make the FIFOs of a process."""
        found = {}
        for name in ("stdin", "stdout", "stderr"):
            path = self.bundle / f"{exec_id or 'init'}-{name}"
            if not path.exists():
                os.mkfifo(path)
            found[name] = str(path)
        return found

    def output(self, name: str = "stdout", exec_id: str = "") -> Output:
        """Begin to read an output FIFO."""
        output = Output(self.bundle / f"{exec_id or 'init'}-{name}")
        output.open()
        return output

    async def start(self, exec_id: str = "") -> int:
        """Start; the pid."""
        return int((await self.call("Start", task_v2_pb2.StartRequest(id=self.id, exec_id=exec_id))).pid)

    async def exec(
        self, exec_id: str, *args: str, streams: bool = True, terminal: bool = False, spec: object = None
    ) -> None:
        """Add a process."""
        request = task_v2_pb2.ExecProcessRequest(id=self.id, exec_id=exec_id, terminal=terminal)
        request.spec.CopyFrom(typeurl.pack_json(typeurl.PROCESS, spec or process_spec(*args, terminal=terminal)))
        if streams:
            for name, path in self.fifos(exec_id).items():
                if not (terminal and name == "stderr"):
                    setattr(request, name, path)
        await self.call("Exec", request)

    async def wait(self, exec_id: str = "", timeout: float = 30) -> Any:
        """Wait for the end."""
        return await self.call("Wait", task_v2_pb2.WaitRequest(id=self.id, exec_id=exec_id), timeout=timeout)

    async def delete(self, exec_id: str = "") -> Any:
        """Delete."""
        return await self.call("Delete", task_v2_pb2.DeleteRequest(id=self.id, exec_id=exec_id))

    async def kill(self, signal: int = 9, exec_id: str = "", everyone: bool = False) -> None:
        """Signal."""
        request = task_v2_pb2.KillRequest(id=self.id, exec_id=exec_id, signal=signal, all=everyone)
        await self.call("Kill", request)

    async def state(self, exec_id: str = "") -> Any:
        """State."""
        return await self.call("State", task_v2_pb2.StateRequest(id=self.id, exec_id=exec_id))

    async def shutdown(self) -> None:
        """Shutdown, and wait until the shim is gone."""
        await self.call("Shutdown", task_v2_pb2.ShutdownRequest(id=self.id))
        async with asyncio.timeout(30):
            while alive(self.bootstrap.pid):
                await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie doesn't)."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


class Lab:
    """A place for shims that leaves nothing behind."""

    def __init__(self, work: Path, rootfs: Path, binary: str) -> None:
        self.work = work
        self.rootfs = rootfs
        self.binary = binary
        self.options = runc_options_pb2.Options(binary_name=binary, root=str(work / "root"))
        self.service = TASK
        self.events = EventsService()
        self.shims: list[Shim] = []
        self._server: TtrpcServer | None = None
        self.forks: ForkServer | None = None

    @property
    def address(self) -> str:
        """The daemon's ttrpc socket."""
        return str(self.work / "d.sock.ttrpc")

    async def listen(self) -> None:
        """Be the daemon that events go to."""
        self._server = TtrpcServer([self.events])
        await self._server.serve_unix(self.address)

    async def stop_listening(self) -> None:
        """The daemon is gone."""
        if self._server is not None:
            await self._server.close()
            self._server = None

    async def spawn(self, container_id: str) -> Shim:
        """A shim from the fork server, with a bundle."""
        if self.forks is None:
            self.forks = await ForkServer.start()
        bundle = self.work / "tasks" / "testing" / container_id
        bundle.mkdir(parents=True)
        request = self.request(container_id)
        bootstrap = await self.forks.spawn(request)
        client = await TtrpcClient.connect(bootstrap.path)
        shim = Shim(self, container_id, bundle, bootstrap, client)
        self.shims.append(shim)
        return shim

    def request(self, container_id: str) -> ShimRequest:
        """What a shim is started with."""
        return ShimRequest(
            "testing",
            container_id,
            str(self.work / "tasks" / "testing" / container_id),
            str(self.work / f"{container_id}.sock"),
            self.address,
            str(self.work / "d.sock"),
        )

    async def close(self) -> None:
        """Kill what is left, by the ids that this lab gave out."""
        for shim in self.shims:
            pids = [shim.bootstrap.pid]
            with contextlib.suppress(OSError, ValueError):
                pids.append(int((shim.bundle / "init.pid").read_text()))
            await shim.client.close()
            if self.forks is not None:
                for pid in pids[:1]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, 9)
                with contextlib.suppress(Exception):
                    await self.forks.delete(self.request(shim.id))
            mounts.unmount_all(str(shim.bundle / "rootfs"))
        if self.forks is not None:
            await self.forks.close()
        await self.stop_listening()


@contextlib.asynccontextmanager
async def lab_at(work: Path, rootfs: Path, binary: str) -> AsyncIterator[Lab]:
    """A lab for the time of a test."""
    lab = Lab(work, rootfs, binary)
    await lab.listen()
    try:
        yield lab
    finally:
        await lab.close()


def have(program: str) -> bool:
    """Whether a program is there."""
    return shutil.which(program) is not None


def mounted(path: Path) -> bool:
    """Whether something is mounted at a path."""
    return subprocess.run(["mountpoint", "-q", str(path)], check=False).returncode == 0
