"""A pod in one shim: its sandbox, with a process and without one, and the containers that share its namespaces."""

# ruff: noqa: ASYNC110, ASYNC240 - tests look at files and wait for other processes

from __future__ import annotations

import asyncio
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.shim.harness import Lab, Shim, alive, container_spec
from wherry.core import errors, typeurl
from wherry.linux.mounts import mountinfo
from wherry.proto import cgroups_v1_pb2, cgroups_v2_pb2, task_v2_pb2
from wherry.proto import runtime_sandbox_pb2 as pb

SANDBOX = "containerd.runtime.sandbox.v1.Sandbox"


def pod_spec(*kinds: str, **more: Any) -> dict[str, Any]:
    """A pod without a process."""
    return {
        "ociVersion": "1.0.2",
        "hostname": "pod",
        "linux": {"namespaces": [{"type": kind} for kind in kinds], **more},
    }


async def pod(lab: Lab, spec: dict[str, Any], *, rootfs: bool = False, netns: str = "") -> Shim:
    """A shim with a sandbox `pod` in it, created."""
    shim = await lab.spawn("pod")
    (shim.bundle / "config.json").write_text(json.dumps(spec))
    request = pb.CreateSandboxRequest(sandbox_id="pod", bundle_path=str(shim.bundle), netns_path=netns)
    request.options.CopyFrom(typeurl.pack(lab.options))
    if rootfs:
        request.rootfs.add(type="bind", source=str(lab.rootfs), options=["rbind", "rw"])
    await shim.call("CreateSandbox", request, service=SANDBOX)
    return shim


async def start(shim: Shim) -> tuple[int, dict[str, str]]:
    """Start the sandbox; its pid, and the paths of its namespaces."""
    started = await shim.call("StartSandbox", pb.StartSandboxRequest(sandbox_id="pod"), service=SANDBOX)
    spec = typeurl.unpack_json(started.spec, typeurl.SPEC)
    return started.pid, {entry["type"]: entry["path"] for entry in spec["linux"]["namespaces"] if "path" in entry}


async def run(shim: Shim, container: str, namespaces: dict[str, str], *args: str) -> Shim:
    """A container in the pod, running; as a client of the same shim."""
    lab = shim.lab
    bundle = lab.work / "tasks" / "testing" / container
    bundle.mkdir(parents=True)
    member = Shim(lab, container, bundle, shim.bootstrap, shim.client)
    spec = container_spec(container, *args)
    for entry in spec["linux"]["namespaces"]:
        if entry["type"] in namespaces:
            entry["path"] = namespaces[entry["type"]]
    if "uts" in namespaces:
        del spec["hostname"]
    await member.create(spec=spec)
    await member.start()
    return member


async def status(shim: Shim) -> pb.SandboxStatusResponse:
    request = pb.SandboxStatusRequest(sandbox_id="pod", verbose=True)
    answer: pb.SandboxStatusResponse = await shim.call("SandboxStatus", request, service=SANDBOX)
    return answer


async def end(shim: Shim) -> None:
    """Stop, wait, shut down, and look for what is left."""
    waiting = asyncio.create_task(shim.call("WaitSandbox", pb.WaitSandboxRequest(sandbox_id="pod"), service=SANDBOX))
    await shim.call("StopSandbox", pb.StopSandboxRequest(sandbox_id="pod", timeout_secs=20), service=SANDBOX)
    assert (await waiting).exited_at.seconds
    assert (await status(shim)).state == "SANDBOX_NOTREADY"
    await shim.call("ShutdownSandbox", pb.ShutdownSandboxRequest(sandbox_id="pod"), service=SANDBOX)
    async with asyncio.timeout(20):
        while alive(shim.bootstrap.pid):
            await asyncio.sleep(0.01)
    assert not [mount.target for mount in mountinfo() if mount.target.startswith(f"{shim.lab.work}/")]


def namespace(pid: int, kind: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")


async def test_a_pod_without_a_process(lab: Lab) -> None:
    shim = await pod(lab, pod_spec("ipc", "uts", "network", sysctl={"kernel.shmmni": "777"}))
    assert (await status(shim)).state == "SANDBOX_CREATED"
    pid, paths = await start(shim)
    assert (pid, set(paths)) == (0, {"ipc", "uts", "network"})
    assert (await status(shim)).state == "SANDBOX_READY"
    assert json.loads((await status(shim)).info["namespaces"]) == paths
    one = await run(shim, "one", paths, "/bin/sleep", "1000")
    two = await run(shim, "two", paths, "/bin/sh", "-c", "hostname; cat /proc/sys/kernel/shmmni; sleep 1000")
    output = two.output()
    await output.wait_for(b"777\n")
    assert output.data == b"pod\n777\n"
    first, second = [(await member.state()).pid for member in (one, two)]
    for kind in ("ipc", "uts", "net"):
        assert namespace(first, kind) == namespace(second, kind) != os.readlink(f"/proc/self/ns/{kind}")
    assert namespace(first, "pid") != namespace(second, "pid")
    assert namespace(first, "mnt") != namespace(second, "mnt")
    assert json.loads((await status(shim)).info["containers"]) == ["one", "two"]
    # a container comes and goes; neither the shim nor the others mind
    await one.kill()
    await one.wait()
    await one.delete()
    await shim.call("Shutdown", task_v2_pb2.ShutdownRequest(id="one"))
    assert (await two.state()).pid == second
    await two.kill()
    await two.wait()
    await two.delete()
    await shim.call("Shutdown", task_v2_pb2.ShutdownRequest(id="two"))
    assert (await status(shim)).state == "SANDBOX_READY"
    output.close()
    await end(shim)


async def test_a_shared_pid_namespace_has_one_that_reaps(lab: Lab) -> None:
    shim = await pod(lab, pod_spec("ipc", "uts", "network", "pid"))
    reaper, paths = await start(shim)
    async with asyncio.timeout(20):  # the child that made it answers before it ends
        while _parent(reaper) != shim.bootstrap.pid:
            await asyncio.sleep(0.01)
    one = await run(shim, "one", paths, "/bin/sh", "-c", "(sleep 0.2 & ) ; sleep 1000")
    two = await run(shim, "two", paths, "/bin/sh", "-c", "ps -o pid,args; sleep 1000")
    output = two.output()
    await output.wait_for(b"ps -o")
    assert b"    1 /pause" in output.data
    assert b"sleep 1000" in output.data
    # what nobody waits for ends without a zombie
    async with asyncio.timeout(20):
        while b"sleep\x000.2" in _commands(reaper) or _zombies(reaper):
            await asyncio.sleep(0.02)
    # nothing of the host behind /proc/1
    assert os.listdir(f"/proc/{reaper}/root/") == []
    assert {os.readlink(f"/proc/{reaper}/fd/{fd}") for fd in os.listdir(f"/proc/{reaper}/fd")} == {"/dev/null"}
    fields = dict(
        line.split(":\t") for line in Path(f"/proc/{reaper}/status").read_text().splitlines() if ":\t" in line
    )
    assert {fields[name].strip("0") for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {""}
    assert fields["Uid"].split() == ["65535"] * 4
    await two.exec("x", "/bin/sh", "-c", "kill -9 1; ls /proc/1/root; echo $?")
    told = two.output(exec_id="x")
    await two.start("x")
    await two.wait("x")
    assert alive(reaper)
    told.close()
    output.close()
    # its death is everybody's
    await shim.call("StopSandbox", pb.StopSandboxRequest(sandbox_id="pod"), service=SANDBOX)
    assert (await one.wait()).exit_status == (await two.wait()).exit_status == 137
    for member in (one, two):
        await member.delete()
    await end(shim)


async def test_a_pod_with_a_process(lab: Lab) -> None:
    spec = container_spec("pod", "/bin/sleep", "1000")
    shim = await pod(lab, spec, rootfs=True)
    pid, _ = await start(shim)
    paths = json.loads((await status(shim)).info["namespaces"])
    assert paths == {kind: f"/proc/{pid}/ns/{name}" for kind, name in
                     (("ipc", "ipc"), ("uts", "uts"), ("network", "net"), ("pid", "pid"))}  # fmt: skip
    one = await run(shim, "one", paths, "/bin/sleep", "1000")
    assert namespace((await one.state()).pid, "pid") == namespace(pid, "pid")
    metrics = (await shim.call("SandboxMetrics", pb.SandboxMetricsRequest(sandbox_id="pod"), service=SANDBOX)).metrics
    assert isinstance(typeurl.unpack(metrics.data), cgroups_v1_pb2.Metrics | cgroups_v2_pb2.Metrics)
    # it isn't a task
    with pytest.raises(errors.NotFound):
        await shim.call("State", task_v2_pb2.StateRequest(id="pod"))
    os.kill(pid, 9)
    assert (await one.wait()).exit_status == 137
    assert (await shim.call("WaitSandbox", pb.WaitSandboxRequest(sandbox_id="pod"), service=SANDBOX)).exit_status == 137
    await one.delete()
    await end(shim)


async def test_shutdown_takes_containers_along(lab: Lab) -> None:
    shim = await pod(lab, pod_spec("ipc"))
    _, paths = await start(shim)
    one = await run(shim, "one", paths, "/bin/sleep", "1000")
    pid = (await one.state()).pid
    await end(shim)
    assert not alive(pid)
    assert lab.events.topics[-2:] == ["/tasks/exit", "/tasks/delete"]


async def test_a_network_namespace_by_its_path(lab: Lab) -> None:
    first = await lab.spawn("lender")
    await first.create("/bin/sleep", "1000")
    netns = f"/proc/{await first.start()}/ns/net"
    spec = pod_spec("network", "uts", sysctl={"net.ipv4.ip_forward": "1"})
    shim = await pod(lab, spec, netns=netns)
    _, paths = await start(shim)
    assert paths["network"] == netns
    one = await run(shim, "one", paths, "/bin/cat", "/proc/sys/net/ipv4/ip_forward")
    output = one.output()
    await output.wait_for(b"1\n")
    output.close()
    await one.wait()
    await one.delete()
    await first.kill()
    await first.wait()
    await first.delete()
    await end(shim)


async def test_what_a_sandbox_refuses(lab: Lab) -> None:
    shim = await lab.spawn("pod")
    (shim.bundle / "config.json").write_text(json.dumps(pod_spec("user")))
    request = pb.CreateSandboxRequest(sandbox_id="pod", bundle_path=str(shim.bundle))
    with pytest.raises(errors.InvalidArgument, match="user namespace needs uidMappings"):
        await shim.call("CreateSandbox", request, service=SANDBOX)
    (shim.bundle / "config.json").write_text(json.dumps(pod_spec("ipc", sysctl={"kernel.nonsense": "1"})))
    with pytest.raises(errors.WherryError, match=r"write sysctl key kernel\.nonsense"):
        await shim.call("CreateSandbox", request, service=SANDBOX)
    assert not [mount for mount in mountinfo() if mount.target.startswith(f"{lab.work}/")]
    for method, kind in (
        ("StartSandbox", pb.StartSandboxRequest),
        ("SandboxStatus", pb.SandboxStatusRequest),
        ("StopSandbox", pb.StopSandboxRequest),
        ("WaitSandbox", pb.WaitSandboxRequest),
        ("PingSandbox", pb.PingRequest),
        ("SandboxMetrics", pb.SandboxMetricsRequest),
        ("ShutdownSandbox", pb.ShutdownSandboxRequest),
    ):
        with pytest.raises(errors.NotFound, match="sandbox pod: not found"):
            await shim.call(method, kind(sandbox_id="pod"), service=SANDBOX)
    (shim.bundle / "config.json").write_text(json.dumps(pod_spec("ipc")))
    await shim.call("CreateSandbox", request, service=SANDBOX)
    with pytest.raises(errors.AlreadyExists):
        await shim.call("CreateSandbox", request, service=SANDBOX)
    await start(shim)
    with pytest.raises(errors.FailedPrecondition, match="sandbox pod is SANDBOX_READY"):
        await start(shim)
    await end(shim)


async def test_a_pod_whose_shim_is_killed(lab: Lab) -> None:
    shim = await pod(lab, pod_spec("ipc", "pid"))
    reaper, paths = await start(shim)
    one = await run(shim, "one", paths, "/bin/sleep", "1000")
    pid = (await one.state()).pid
    os.kill(shim.bootstrap.pid, 9)
    assert lab.forks is not None
    await lab.forks.delete(lab.request("one"))
    await lab.forks.delete(lab.request("pod"))
    async with asyncio.timeout(20):
        while alive(pid) or alive(reaper):
            await asyncio.sleep(0.01)
    assert not [mount for mount in mountinfo() if mount.target.startswith(f"{lab.work}/")]


def _commands(reaper: int) -> bytes:
    inside = namespace(reaper, "pid")
    found = b""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") == inside:
                found += Path(f"/proc/{pid}/cmdline").read_bytes() + b"\n"
        except OSError:
            continue
    return found


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("PPid:\t")[1].split()[0])


def _zombies(parent: int) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[:2] == ["Z", str(parent)]:
            found.append(pid)
    return found


async def test_a_pod_with_users_of_its_own(lab: Lab) -> None:
    """All of its namespaces belong to its user namespace; the reaper is nobody there, too."""
    maps = [{"containerID": 0, "hostID": 300000, "size": 65536}]
    spec = pod_spec(
        "user",
        "network",
        "ipc",
        "uts",
        "pid",
        uidMappings=maps,
        gidMappings=maps,
        sysctl={"net.ipv4.ip_unprivileged_port_start": "80", "kernel.shm_rmid_forced": "1"},
    )
    shim = await pod(lab, spec)
    pid, namespaces = await start(shim)
    assert set(namespaces) == {"user", "network", "ipc", "uts", "pid"}
    assert os.stat(f"/proc/{pid}/ns/user").st_ino == os.stat(namespaces["user"]).st_ino
    assert Path(f"/proc/{pid}/uid_map").read_text().split() == ["0", "300000", "65536"]
    assert Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[0] == str(300000 + 65535)
    # NS_GET_USERNS: whose each of them is
    for kind in ("network", "ipc", "uts", "pid"):
        fd = os.open(namespaces[kind], os.O_RDONLY)
        owner = fcntl.ioctl(fd, 0xB701)
        assert os.fstat(owner).st_ino == os.stat(namespaces["user"]).st_ino, kind
        os.close(owner)
        os.close(fd)
    await end(shim)
