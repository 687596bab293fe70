"""The task service, driven over ttrpc, on runc and on the bundled runtime."""

# ruff: noqa: ASYNC110, ASYNC240 - tests poll for what other processes do

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.shim.harness import GROUP, Lab, Shim, alive, container_spec, mounted, process_spec
from wherry.core import errors, typeurl
from wherry.proto import cgroups_v1_pb2, cgroups_v2_pb2, runc_options_pb2, task_v2_pb2, task_v3_pb2


async def test_life_of_a_container(lab: Lab) -> None:
    shim = await lab.spawn("a")
    shim.fifos("")
    out = shim.output()
    created = await shim.create("/bin/sh", "-c", "echo hello; exit 7")
    assert created.pid > 0
    assert (await shim.state()).status == 1
    waiting = asyncio.create_task(shim.wait())
    assert await shim.start() == created.pid
    ended = await waiting
    assert ended.exit_status == 7
    assert (await shim.state()).status == 3
    kept = json.loads((shim.bundle / "exits" / "init.json").read_text())
    assert (kept["pid"], kept["exit_status"]) == (created.pid, 7)
    deleted = await shim.delete()
    assert (deleted.exit_status, deleted.pid) == (7, created.pid)
    assert deleted.exited_at == ended.exited_at
    await asyncio.wait_for(out.ended.wait(), 30)
    assert bytes(out.data) == b"hello\n"
    assert not mounted(shim.bundle / "rootfs")
    await lab.events.wait_for("/tasks/delete")
    assert lab.events.topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    assert all(envelope.namespace == "testing" for envelope in lab.events.envelopes)
    await shim.shutdown()
    assert not Path(shim.bootstrap.path).exists()


async def test_exec_in_a_running_container(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sleep", "100")
    pid = await shim.start()
    with pytest.raises(errors.NotFound, match="process does not exist x: not found"):
        await shim.start("x")
    await shim.exec("x", "/bin/sh", "-c", "echo out; echo err >&2; exit 3")
    with pytest.raises(errors.AlreadyExists, match="id x: already exists"):
        await shim.exec("x", "/bin/true")
    out, err = shim.output("stdout", "x"), shim.output("stderr", "x")
    assert (await shim.state("x")).status == 1
    exec_pid = await shim.start("x")
    assert (await shim.wait("x")).exit_status == 3
    assert (await shim.delete("x")).exit_status == 3
    await asyncio.wait_for(asyncio.gather(out.ended.wait(), err.ended.wait()), 30)
    assert (bytes(out.data), bytes(err.data)) == (b"out\n", b"err\n")
    assert (await shim.state()).pid == pid
    await lab.events.wait_for("/tasks/exit")
    (exit_event,) = lab.events.of("/tasks/exit")
    assert (exit_event.id, exit_event.container_id, exit_event.pid) == ("x", "a", exec_pid)
    order = [topic for topic in lab.events.topics if "exec" in topic or topic == "/tasks/exit"]
    assert order == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]
    await _end(shim)


async def test_pids_name_the_exec(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sleep", "100")
    pid = await shim.start()
    await shim.exec("x", "/bin/sleep", "100")
    exec_pid = await shim.start("x")
    processes = (await shim.call("Pids", task_v2_pb2.PidsRequest(id="a"))).processes
    assert {process.pid for process in processes} == {pid, exec_pid}
    details = {process.pid: process.info for process in processes}[exec_pid]
    assert typeurl.unpack_as(details, runc_options_pb2.ProcessDetails).exec_id == "x"
    await shim.kill(signal.SIGTERM, "x")
    assert (await shim.wait("x")).exit_status == 128 + signal.SIGTERM
    with pytest.raises(errors.NotFound, match="process already finished: not found"):
        await shim.kill(9, "x")
    await _end(shim)


async def test_signals_and_their_exit_status(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sh", "-c", "trap 'exit 42' TERM; echo ready; while :; do sleep 0.05; done")
    out = shim.output()
    await shim.start()
    await out.wait_for(b"ready")
    await shim.kill(signal.SIGTERM)
    assert (await shim.wait()).exit_status == 42
    with pytest.raises(errors.NotFound, match="process already finished: not found"):
        await shim.kill(9)
    await shim.delete()
    with pytest.raises(errors.NotFound, match="container not created: not found"):
        await shim.state()
    await shim.shutdown()


async def test_signals_start_as_the_kernel_has_them(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/grep", "-E", "SigBlk|SigIgn", "/proc/self/status")
    out = shim.output()
    await shim.start()
    await shim.wait()
    await shim.delete()
    await asyncio.wait_for(out.ended.wait(), 30)
    blocked, ignored = (int(line.split()[1], 16) for line in out.data.decode().splitlines())
    # 32 and 33 are the C library's own and not to be had
    assert (blocked, ignored & ~(0b11 << 31)) == (0, 0)
    await shim.shutdown()


async def test_nothing_of_the_shim_is_open_in_the_container(lab: Lab) -> None:
    shim = await lab.spawn("a")
    created = await shim.create("/bin/ls", "-l", "/proc/self/fd")
    open_files = {os.readlink(f"/proc/{created.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{created.pid}/fd")}
    assert not [name for name in open_files if name.endswith((".sock", ".log")) or "socket:" in name or "epoll" in name]
    out = shim.output()
    await shim.start()
    await shim.wait()
    await shim.delete()
    await asyncio.wait_for(out.ended.wait(), 30)
    assert len([line for line in out.data.decode().splitlines() if "->" in line]) == 3
    await shim.shutdown()


async def test_kill_all_where_pids_are_shared(lab: Lab) -> None:
    shim = await lab.spawn("a")
    spec = container_spec("a", "/bin/sh", "-c", "sleep 1000 & echo $!; exec sleep 0.2", pid_namespace=False)
    await shim.create(spec=spec)
    out = shim.output()
    await shim.start()
    assert (await shim.wait()).exit_status == 0
    left = int(out.data.split()[0])
    async with asyncio.timeout(30):
        while alive(left):
            await asyncio.sleep(0.01)
    await shim.delete()
    await shim.shutdown()


async def test_kill_all_reaches_every_process_of_the_cgroup(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sh", "-c", "trap : USR1; sleep 1000 & sleep 1000 & while :; do wait; done")
    await shim.start()
    # also what has left the session, and what was added
    await shim.exec("x", "/bin/sh", "-c", "setsid sleep 1000 & exec sleep 1000", streams=False)
    await shim.start("x")
    pids: set[int] = set()
    async with asyncio.timeout(20):
        while len(pids) < 5:
            processes = (await shim.call("Pids", task_v2_pb2.PidsRequest(id="a"))).processes
            pids = {process.pid for process in processes}
            await asyncio.sleep(0.02)
    init = (await shim.state()).pid
    await shim.kill(signal.SIGUSR1, everyone=True)
    assert (await shim.wait("x")).exit_status == 128 + signal.SIGUSR1
    async with asyncio.timeout(20):
        while any(alive(pid) for pid in pids - {init}):
            await asyncio.sleep(0.02)
    assert alive(init)  # it has a handler
    await shim.kill(signal.SIGKILL, everyone=True)
    assert (await shim.wait()).exit_status == 137
    await shim.delete()
    await shim.shutdown()


async def test_pause_and_resume(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sleep", "100")
    with pytest.raises(errors.WherryError, match="cannot pause task in created state"):
        await shim.call("Pause", task_v2_pb2.PauseRequest(id="a"))
    await shim.start()
    await shim.call("Pause", task_v2_pb2.PauseRequest(id="a"))
    assert (await shim.state()).status == 4
    with pytest.raises(errors.WherryError, match="cannot exec in a paused state"):
        await shim.exec("x", "/bin/true")
    with pytest.raises(errors.WherryError, match="cannot delete a paused process"):
        await shim.delete()
    await shim.call("Resume", task_v2_pb2.ResumeRequest(id="a"))
    assert (await shim.state()).status == 2
    with pytest.raises(errors.WherryError, match="cannot resume a running process"):
        await shim.call("Resume", task_v2_pb2.ResumeRequest(id="a"))
    await lab.events.wait_for("/tasks/resumed")
    assert lab.events.topics[-2:] == ["/tasks/paused", "/tasks/resumed"]
    await _end(shim)


async def test_metrics_and_update(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sleep", "100")
    await shim.start()

    async def figures() -> Any:
        return typeurl.unpack((await shim.call("Stats", task_v2_pb2.StatsRequest(id="a"))).stats)

    metrics = await figures()
    assert isinstance(metrics, (cgroups_v1_pb2.Metrics, cgroups_v2_pb2.Metrics))
    async with asyncio.timeout(30):  # runc's init has threads until it has become the program
        while (await figures()).pids.current != 1:
            await asyncio.sleep(0.01)
    resources = typeurl.pack_json(typeurl.LINUX_RESOURCES, {"pids": {"limit": 50}})
    await shim.call("Update", task_v2_pb2.UpdateTaskRequest(id="a", resources=resources))
    assert (await figures()).pids.limit == 50
    await _end(shim)


async def test_deleting_what_was_never_started(lab: Lab) -> None:
    shim = await lab.spawn("a")
    created = await shim.create("/bin/true")
    waiting = asyncio.create_task(shim.wait())
    await asyncio.sleep(0.05)
    assert (await shim.delete()).exit_status == 137
    assert (await waiting).exit_status == 137
    assert not alive(created.pid)
    assert not mounted(shim.bundle / "rootfs")
    await lab.events.wait_for("/tasks/delete")
    await shim.shutdown()


async def test_a_command_that_is_not_there(lab: Lab) -> None:
    shim = await lab.spawn("a")
    with pytest.raises(errors.WherryError, match=r'OCI runtime create failed: .*exec: "/bin/nosuch".*no such file'):
        await shim.create("/bin/nosuch")
    assert not mounted(shim.bundle / "rootfs")
    with pytest.raises(errors.NotFound):
        await shim.state()
    await shim.shutdown()


async def test_an_exec_that_can_not_run(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sleep", "100")
    await shim.start()
    await shim.exec("x", "nosuch")
    with pytest.raises(errors.WherryError, match=r'OCI runtime exec failed: .*"nosuch": executable file not found'):
        await shim.start("x")
    await shim.exec("y", spec={**process_spec("/bin/true"), "cwd": "/nowhere"})
    with pytest.raises(errors.WherryError, match="OCI runtime exec failed"):
        await shim.start("y")
    with pytest.raises(errors.InvalidArgument, match="exec id"):
        await shim.exec("../x", "/bin/true", streams=False)
    await _end(shim)


async def test_a_spec_that_is_not_json(lab: Lab) -> None:
    shim = await lab.spawn("a")
    (shim.bundle / "config.json").write_text("{nonsense")
    with pytest.raises(errors.InvalidArgument, match="not JSON"):
        await shim.call("Create", task_v2_pb2.CreateTaskRequest(id="a", bundle=str(shim.bundle)))
    with pytest.raises(errors.NotFound):
        await shim.state()
    await shim.shutdown()


async def test_a_root_that_can_not_be_mounted(lab: Lab) -> None:
    shim = await lab.spawn("a")
    (shim.bundle / "config.json").write_text(json.dumps(container_spec("a", "/bin/true")))
    request = task_v2_pb2.CreateTaskRequest(id="a", bundle=str(shim.bundle))
    request.rootfs.add(type="bind", source=str(lab.rootfs), options=["rbind"])
    request.rootfs.add(type="overlay", source="overlay", options=["lowerdir=/nowhere"])
    with pytest.raises(errors.WherryError, match="failed to mount rootfs component"):
        await shim.call("Create", request)
    assert not mounted(shim.bundle / "rootfs")
    await shim.shutdown()


async def test_the_third_version_is_the_same_service(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sleep", "100")
    pid = await shim.start()
    service = "containerd.task.v3.Task"
    connected = await shim.call("Connect", task_v3_pb2.ConnectRequest(id="a"), service=service)
    assert (connected.shim_pid, connected.task_pid) == (shim.bootstrap.pid, pid)
    with pytest.raises(errors.WherryError, match="cannot delete a running process"):
        await shim.call("Delete", task_v3_pb2.DeleteRequest(id="a"), service=service)
    await shim.call("Shutdown", task_v3_pb2.ShutdownRequest(id="a"), service=service)
    assert alive(shim.bootstrap.pid)  # it has a container
    await _end(shim)


@pytest.mark.parametrize("sudden", [False, True])
async def test_out_of_memory(lab: Lab, sudden: bool) -> None:
    """`sudden`: it is over before the start is, so nobody can have watched; the hook after it makes sure of that."""
    shim = await lab.spawn("a")
    spec = container_spec("a", "/bin/sh", "-c", "x=aaaaaaaaaaaaaaaaaaaa; while :; do x=$x$x; done")
    spec["linux"]["resources"]["memory"] = {"limit": 16 << 20, "swap": 16 << 20}
    if sudden:
        number = "$(sed 's/.*\"pid\":\\s*\\([0-9]*\\).*/\\1/')"
        gone = rf"while grep -q '^State:\s*[^Z]' /proc/{number}/status; do sleep 0.1; done"
        spec["hooks"] = {"poststart": [{"path": "/bin/sh", "args": ["sh", "-c", gone], "timeout": 60}]}
    await shim.create(spec=spec)
    await shim.start()
    assert (await shim.wait()).exit_status == 137
    await lab.events.wait_for("/tasks/exit")
    assert lab.events.topics == ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit"]
    kept = json.loads((shim.bundle / "exits" / "init.json").read_text())
    assert re.fullmatch(
        rf"out of memory: the limit of cgroup \S*/{GROUP}-a was reached, the kernel killed sh \(pid {kept['pid']}\)",
        kept["reason"],
    )
    await shim.delete()
    await shim.shutdown()


async def test_out_of_memory_in_a_process_that_was_added(lab: Lab) -> None:
    shim = await lab.spawn("a")
    spec = container_spec("a", "/bin/sleep", "1000")
    spec["linux"]["resources"]["memory"] = {"limit": 16 << 20, "swap": 16 << 20}
    await shim.create(spec=spec)
    await shim.start()
    await shim.exec("hungry", "/bin/sh", "-c", "x=aaaaaaaaaaaaaaaaaaaa; while :; do x=$x$x; done", streams=False)
    pid = await shim.start("hungry")
    assert (await shim.wait("hungry")).exit_status == 137
    await lab.events.wait_for("/tasks/oom")
    kept = json.loads((shim.bundle / "exits" / "exec-hungry.json").read_text())
    assert f"the kernel killed sh (pid {pid})" in kept["reason"]
    # what is killed for another reason isn't explained by that
    await shim.exec("killed", "/bin/sleep", "1000", streams=False)
    await shim.start("killed")
    await shim.kill(9, "killed")
    assert (await shim.wait("killed")).exit_status == 137
    assert json.loads((shim.bundle / "exits" / "exec-killed.json").read_text())["reason"] == ""
    await _end(shim)


async def test_many_wait_and_all_are_answered(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sleep", "0.2")
    waiting = [asyncio.create_task(shim.wait()) for _ in range(20)]
    await shim.start()
    assert [answer.exit_status for answer in await asyncio.gather(*waiting)] == [0] * 20
    assert (await shim.wait()).exit_status == 0
    await shim.delete()
    await shim.shutdown()


async def _end(shim: Shim) -> None:
    await shim.kill(9)
    assert (await shim.wait()).exit_status == 137
    await shim.delete()
    await shim.shutdown()
