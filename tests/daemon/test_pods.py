"""Pods under wherryd: tasks that share a shim, by sandbox and by the annotations that containerd's shims group by."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from tests.peers import need
from tests.shim.harness import alive
from tests.wherryd import BUSYBOX, Wherryd
from wherry.core import typeurl
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound, WherryError
from wherry.proto import containers_pb2, sandbox_pb2, tasks_pb2, types_pb2
from wherry.proto.service import TTRPC_NAMESPACE
from wherry.proto.ttrpc.client import TtrpcClient

CONTROLLER = "containerd.services.sandbox.v1.Controller"
STORE = "containerd.services.sandbox.v1.Store"
TASKS = "containerd.services.tasks.v1.Tasks"
# a hook that takes longer than the daemon waits
SLOW = {"path": "/bin/sh", "args": ["sh", "-c", "sleep 4"]}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Wherryd]:
    daemon = Wherryd()
    try:
        daemon.config.write_text('version = 2\n[runtimes.handled]\n  pod_annotations = ["pass.*"]\n')
        daemon.start()
        daemon.import_busybox()
        yield daemon
    finally:
        daemon.close()


class Caller:
    """The daemon's ttrpc door."""

    def __init__(self, daemon: Wherryd) -> None:
        self.daemon = daemon
        self.client: TtrpcClient | None = None

    async def __call__(self, service: str, method: str, request: Message) -> Any:
        if self.client is None or self.client.closed:
            self.client = await TtrpcClient.connect(f"{self.daemon.address}.ttrpc")
        metadata = {TTRPC_NAMESPACE: "default"}
        return await self.client.call(service, method, request, timeout=60, metadata=metadata)

    async def sandbox(self, identity: str, spec: dict[str, Any], runtime: str = "", **more: Any) -> Any:
        """Store a sandbox, create and start it; what Start answers."""
        box = types_pb2.Sandbox(sandbox_id=identity, spec=typeurl.pack_json(typeurl.SPEC, spec))
        box.runtime.name = runtime or "io.containerd.runc.v2"
        await self(STORE, "Create", sandbox_pb2.StoreCreateRequest(sandbox=box))
        await self(CONTROLLER, "Create", sandbox_pb2.ControllerCreateRequest(sandbox_id=identity, **more))
        return await self(CONTROLLER, "Start", sandbox_pb2.ControllerStartRequest(sandbox_id=identity))

    async def status(self, identity: str) -> sandbox_pb2.ControllerStatusResponse:
        request = sandbox_pb2.ControllerStatusRequest(sandbox_id=identity, verbose=True)
        answer: sandbox_pb2.ControllerStatusResponse = await self(CONTROLLER, "Status", request)
        return answer

    async def make(
        self, identity: str, *flags: str, sandbox: str = "", annotations: dict[str, str] | None = None, **more: Any
    ) -> None:
        """A container of `sleep 1000` with what ctr can't say: a sandbox, annotations, `more` of a specification."""
        self.daemon.ctr("containers", "create", *flags, BUSYBOX, identity, "sleep", "1000")
        request = containers_pb2.GetContainerRequest(id=identity)
        record = (await self("containerd.services.containers.v1.Containers", "Get", request)).container
        self.daemon.ctr("containers", "delete", "--keep-snapshot", identity)
        record.sandbox = sandbox
        spec = typeurl.unpack_json(record.spec)
        spec.update(more, annotations=annotations or {})
        record.spec.CopyFrom(typeurl.pack_json(record.spec.type_url, spec))
        create = containers_pb2.CreateContainerRequest(container=record)
        await self("containerd.services.containers.v1.Containers", "Create", create)

    async def restart(self) -> None:
        """The daemon is killed and comes again."""
        if self.client is not None:
            await self.client.close()
        await asyncio.to_thread(self.daemon.restart)

    async def end(self, identity: str) -> None:
        """Shut a sandbox down and remove its record."""
        await self(CONTROLLER, "Stop", sandbox_pb2.ControllerStopRequest(sandbox_id=identity, timeout_secs=10))
        await self(CONTROLLER, "Shutdown", sandbox_pb2.ControllerShutdownRequest(sandbox_id=identity))
        await self(STORE, "Delete", sandbox_pb2.StoreDeleteRequest(sandbox_id=identity))


@pytest.fixture
async def call(daemon: Wherryd) -> AsyncIterator[Caller]:
    caller = Caller(daemon)
    yield caller
    if caller.client is not None:
        await caller.client.close()


def pod_spec(*kinds: str) -> dict[str, Any]:
    return {"ociVersion": "1.0.2", "hostname": "pod", "linux": {"namespaces": [{"type": kind} for kind in kinds]}}


def shims(daemon: Wherryd) -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"containerd-shim-" in command and daemon.address.encode() in command and b"publish" not in command[:200]:
            found.append(int(pid))
    return found


def pids(daemon: Wherryd) -> dict[str, int]:
    lines = daemon.ctr("task", "ls").stdout.splitlines()[1:]
    return {line.split()[0]: int(line.split()[1]) for line in lines}


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children(pid: int) -> set[int]:
    return {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def remove(daemon: Wherryd, *names: str) -> None:
    for name in names:
        daemon.ctr("task", "delete", "--force", name, check=False)
        daemon.ctr("containers", "delete", name, check=False)


@pytest.mark.parametrize("label", ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"])
@pytest.mark.parametrize("shim", ["ours", "runc-v2"])
async def test_a_group_shares_a_shim(daemon: Wherryd, call: Caller, label: str, shim: str) -> None:
    flags = [] if shim == "ours" else ["--runtime", need("containerd-shim-runc-v2")]
    names = [f"{shim}-{label[-5:]}-{number}" for number in range(3)]
    for name in names:
        await call.make(name, *flags, annotations={label: "thegroup"})
        daemon.ctr("task", "start", "-d", name)
    inits = pids(daemon)
    (shared,) = {parent(inits[name]) for name in names}
    assert shared in shims(daemon)
    # a container goes, the others stay, also over a restart of the daemon
    began = time.monotonic()
    remove(daemon, names[0])
    daemon.ctr("task", "exec", "--exec-id", "x", names[1], "true")
    assert time.monotonic() - began < 30
    await call.restart()
    assert {name: pids(daemon)[name] for name in names[1:]} == {name: inits[name] for name in names[1:]}
    remove(daemon, names[1])
    assert daemon.ctr("task", "exec", "--exec-id", "y", names[2], "echo", "still").stdout == "still\n"
    remove(daemon, names[2])
    assert daemon.settle(40) == []
    assert not alive(shared)


async def test_a_groups_shim_that_is_killed(daemon: Wherryd, call: Caller) -> None:
    names = ["killed-0", "killed-1"]
    for name in names:
        await call.make(name, annotations={"io.containerd.runc.v2.group": "doomed"})
        daemon.ctr("task", "start", "-d", name)
    inits = pids(daemon)
    (shared,) = {parent(inits[name]) for name in names}
    os.kill(shared, signal.SIGKILL)
    end = time.monotonic() + 60
    while set(names) & set(pids(daemon)) or any(alive(inits[name]) for name in names):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    told = [f'"id": "{name}", "pid": {inits[name]}, "exit_status": 137' for name in names]
    while not all(line in daemon.log_text() for line in told):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    # the group can be made again
    daemon.ctr("task", "start", "-d", names[0])
    remove(daemon, *names)
    assert daemon.settle(40) == []
    assert [daemon.log_text().count(line) for line in told] == [1, 1]


async def test_a_member_that_is_made_too_late(call: Caller, daemon: Wherryd) -> None:
    """The daemon's patience ends while the group's shim is at it: what it makes then is nobody's, and doesn't stay."""
    daemon.stop()
    settings = daemon.config.read_text()
    daemon.config.write_text(f'{settings}[timeouts]\n  "io.wherry.timeout.task.create" = "2s"\n')
    daemon.start()
    group = {"io.containerd.runc.v2.group": "patient"}
    await call.make("in-time", annotations=group)
    daemon.ctr("task", "start", "-d", "in-time")
    init = pids(daemon)["in-time"]
    await call.make("too-late", annotations=group, hooks={"createRuntime": [SLOW]})
    refused = daemon.ctr("task", "start", "-d", "too-late", check=False)
    assert "deadline exceeded" in refused.stderr
    end = time.monotonic() + 60
    while children(parent(init)) != {init}:
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    assert set(pids(daemon)) == {"in-time"}
    # the name is free
    daemon.ctr("containers", "delete", "too-late")
    await call.make("too-late", annotations=group)
    daemon.ctr("task", "start", "-d", "too-late")
    assert parent(pids(daemon)["too-late"]) == parent(init)
    remove(daemon, "in-time", "too-late")
    assert daemon.settle(40) == []
    daemon.config.write_text(settings)
    await call.restart()


async def test_a_sandbox_and_its_containers(daemon: Wherryd, call: Caller) -> None:
    started = await call.sandbox("box", pod_spec("ipc", "uts", "pid"))
    assert started.pid
    assert started.address.startswith("ttrpc+unix:///")
    assert (await call.status("box")).state == "SANDBOX_READY"
    with pytest.raises(AlreadyExists, match="sandbox box: already exists"):
        await call(CONTROLLER, "Create", sandbox_pb2.ControllerCreateRequest(sandbox_id="box"))
    paths = json.loads((await call.status("box")).info["namespaces"])
    assert set(paths) == {"ipc", "uts", "pid"}
    for name in ("member-0", "member-1"):
        joined = [word for kind, path in paths.items() for word in ("--with-ns", f"{kind}:{path}")]
        await call.make(name, *joined, sandbox="box")
        daemon.ctr("task", "start", "-d", name)
    inits = pids(daemon)
    assert set(inits) == {"member-0", "member-1"}  # the sandbox is no task
    (shared,) = {parent(pid) for pid in inits.values()}
    assert parent(started.pid) == shared
    for kind in ("ipc", "uts", "pid"):
        assert len({os.readlink(f"/proc/{pid}/ns/{kind}") for pid in (*inits.values(), started.pid)}) == 1
    assert daemon.ctr("task", "exec", "--exec-id", "h", "member-0", "hostname").stdout == "pod\n"
    await call.restart()
    assert pids(daemon) == inits
    assert (await call.status("box")).state == "SANDBOX_READY"
    assert json.loads((await call.status("box")).info["namespaces"]) == paths
    remove(daemon, "member-0")
    assert alive(inits["member-1"])
    waiting = asyncio.create_task(call(CONTROLLER, "Wait", sandbox_pb2.ControllerWaitRequest(sandbox_id="box")))
    platform = await call(CONTROLLER, "Platform", sandbox_pb2.ControllerPlatformRequest(sandbox_id="box"))
    assert platform.platform.os == "linux"
    metrics = await call(CONTROLLER, "Metrics", sandbox_pb2.ControllerMetricsRequest(sandbox_id="box"))
    assert metrics.metrics.id == "box"
    await call(CONTROLLER, "Update", sandbox_pb2.ControllerUpdateRequest(sandbox_id="box"))
    await call.end("box")
    assert (await waiting).exit_status == 137
    assert not alive(inits["member-1"])
    remove(daemon, "member-1")
    assert daemon.settle(40) == []
    with pytest.raises(NotFound, match="sandbox box: not found"):
        await call.status("box")
    # what isn't there any more is gone already
    await call(CONTROLLER, "Shutdown", sandbox_pb2.ControllerShutdownRequest(sandbox_id="box"))


async def test_a_sandbox_with_a_pause_process(daemon: Wherryd, call: Caller) -> None:
    daemon.ctr("containers", "create", BUSYBOX, "pattern", "sleep", "1000")
    spec = json.loads(daemon.ctr("containers", "info", "--spec", "pattern").stdout)
    daemon.ctr("containers", "delete", "pattern")
    daemon.ctr("snapshots", "prepare", "pausing", _chain(daemon))
    snapshot = daemon.ctr("snapshots", "mounts", "/target", "pausing").stdout
    request = {"annotations": {"pass.on": "1", "keep.back": "2"}}
    started = await call.sandbox("paused", spec, "handled", rootfs=_mounts(snapshot), **request)
    kept = json.loads((daemon.state / "tasks" / "default" / "paused" / "config.json").read_text())
    assert kept["annotations"] == {"pass.on": "1"}
    metrics = await call(CONTROLLER, "Metrics", sandbox_pb2.ControllerMetricsRequest(sandbox_id="paused"))
    assert metrics.metrics.data.value
    waiting = asyncio.create_task(call(CONTROLLER, "Wait", sandbox_pb2.ControllerWaitRequest(sandbox_id="paused")))
    os.kill(started.pid, signal.SIGKILL)
    assert (await waiting).exit_status == 137
    assert (await call.status("paused")).state == "SANDBOX_NOTREADY"
    await call.end("paused")
    daemon.ctr("snapshots", "rm", "pausing")
    assert daemon.settle(40) == []


async def test_a_sandboxs_shim_that_is_killed(daemon: Wherryd, call: Caller) -> None:
    started = await call.sandbox("lost", pod_spec("ipc", "pid"))
    waiting = asyncio.create_task(call(CONTROLLER, "Wait", sandbox_pb2.ControllerWaitRequest(sandbox_id="lost")))
    await call.status("lost")
    os.kill(parent(started.pid), signal.SIGKILL)
    assert (await waiting).exit_status == 137
    with pytest.raises(NotFound):
        await call.status("lost")
    assert not alive(started.pid)
    await call(STORE, "Delete", sandbox_pb2.StoreDeleteRequest(sandbox_id="lost"))
    assert daemon.settle(40) == []


async def test_a_sandbox_whose_record_is_gone_ends_with_the_daemon(daemon: Wherryd, call: Caller) -> None:
    await call.sandbox("orphan", pod_spec("ipc", "pid"))
    await call(STORE, "Delete", sandbox_pb2.StoreDeleteRequest(sandbox_id="orphan"))
    await call.restart()
    assert daemon.settle(40) == []


async def test_what_a_controller_refuses(daemon: Wherryd, call: Caller) -> None:
    create = sandbox_pb2.ControllerCreateRequest(sandbox_id="nothing")
    with pytest.raises(NotFound, match='sandbox "nothing": not found'):
        await call(CONTROLLER, "Create", create)
    create.sandboxer = "podsandbox"
    with pytest.raises(NotFound, match='sandbox controller "podsandbox": not found'):
        await call(CONTROLLER, "Create", create)
    for method, kind in (
        ("Start", sandbox_pb2.ControllerStartRequest),
        ("Stop", sandbox_pb2.ControllerStopRequest),
        ("Wait", sandbox_pb2.ControllerWaitRequest),
        ("Status", sandbox_pb2.ControllerStatusRequest),
        ("Platform", sandbox_pb2.ControllerPlatformRequest),
        ("Metrics", sandbox_pb2.ControllerMetricsRequest),
        ("Update", sandbox_pb2.ControllerUpdateRequest),
    ):
        with pytest.raises(NotFound, match="sandbox nothing: not found"):
            await call(CONTROLLER, method, kind(sandbox_id="nothing"))
    with pytest.raises(WherryError, match="failed to create sandbox usered: a sandbox's user namespace needs"):
        await call.sandbox("usered", pod_spec("user"))
    with pytest.raises(NotFound, match="containerd-shim-absent-v9"):
        await call.sandbox("shimless", pod_spec("ipc"), "io.containerd.absent.v9")
    with pytest.raises(InvalidArgument):
        await call.sandbox("a/b", pod_spec("ipc"))
    await call.make("lonely", sandbox="nowhere")
    with pytest.raises(NotFound, match="sandbox nowhere: not found"):
        await call(TASKS, "Create", tasks_pb2.CreateTaskRequest(container_id="lonely"))
    daemon.ctr("containers", "delete", "lonely")
    for identity in ("usered", "shimless"):
        await call(STORE, "Delete", sandbox_pb2.StoreDeleteRequest(sandbox_id=identity))
    assert daemon.settle(40) == []


def _chain(daemon: Wherryd) -> str:
    """The snapshot of the busybox image."""
    return next(line.split()[0] for line in daemon.ctr("snapshots", "ls").stdout.splitlines() if "Committed" in line)


def _mounts(command: str) -> list[types_pb2.Mount]:
    """The mounts that ctr writes as a command line: `mount -t TYPE SOURCE TARGET -o OPTIONS`."""
    words = command.split()
    options = words[words.index("-o") + 1].split(",")
    return [types_pb2.Mount(type=words[words.index("-t") + 1], source=words[3], options=options)]
