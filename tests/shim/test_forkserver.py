"""The fork server, the shims it makes, and what happens when either is killed."""

# ruff: noqa: ASYNC110, ASYNC240 - tests poll for what other processes do

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import py_compile
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.shim.harness import GROUP, Lab, Shim, alive, mounted
from wherry.core import errors
from wherry.proto import task_v2_pb2
from wherry.proto.ttrpc.client import TtrpcClient
from wherry.shim import forkserver
from wherry.shim.client import ForkServer, ShimRequest


def status(pid: int, field: str) -> str:
    """A field of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return line.split(":", 1)[1].strip()
    raise KeyError(field)


async def test_a_shim_is_a_process_of_its_own(lab: Lab) -> None:
    shim = await lab.spawn("a")
    pid = shim.bootstrap.pid
    assert lab.forks is not None
    assert int(status(pid, "PPid")) not in {os.getpid(), lab.forks.pid}
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == str(shim.bundle)
    command = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
    expected = ["containerd-shim-wherry-v1", "-namespace", "testing", "-id", "a", "-address", str(lab.work / "d.sock")]
    assert command == expected
    assert stat.S_IMODE(os.stat(shim.bootstrap.path).st_mode) == 0o600
    assert status(pid, "Threads") == "1"
    files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    ours = (str(lab.work), "/dev/null", "/memfd:wherry-init")
    assert not [name for name in files if name.startswith("/") and not name.startswith(ours)]
    score = int(Path("/proc/self/oom_score_adj").read_text())
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == min(1000, score + 1)
    await shim.shutdown()


async def test_many_at_once(lab: Lab) -> None:
    shims = await asyncio.gather(*(lab.spawn(f"c{number}") for number in range(20)))
    assert len({shim.bootstrap.pid for shim in shims}) == 20

    async def run(shim: Shim) -> int:
        await shim.create("/bin/true", streams=False)
        await shim.start()
        end = await shim.wait()
        await shim.delete()
        await shim.shutdown()
        return int(end.exit_status)

    assert await asyncio.gather(*(run(shim) for shim in shims)) == [0] * 20


async def test_killing_the_fork_server_harms_no_shim_and_another_one_comes(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sleep", "100")
    await shim.start()
    assert lab.forks is not None
    before = lab.forks.pid
    os.kill(before, signal.SIGKILL)
    other = await lab.spawn("b")
    assert lab.forks.pid not in {0, before}
    assert (await shim.state()).status == 2
    await other.shutdown()
    # a shim that is there is taken over, not doubled
    again = await lab.forks.spawn(lab.request("a"))
    assert again.pid == shim.bootstrap.pid
    await shim.kill(9)
    await shim.wait()
    await shim.delete()
    await shim.shutdown()


@pytest.mark.parametrize("lab", ["bundled"], indirect=True)
async def test_a_fork_server_killed_while_it_loads_delays_nobody(lab: Lab) -> None:
    # what its warm-up had forked held the control socket, so that its death was noticed after ten seconds
    for number in range(12):
        lab.forks = await ForkServer.start()
        await asyncio.sleep(0.06 + number * 0.02)
        assert lab.forks.pid
        os.kill(lab.forks.pid, signal.SIGKILL)
        begun = time.monotonic()
        shim = await lab.spawn(f"k{number}")
        assert time.monotonic() - begun < 9
        await shim.shutdown()
        await lab.forks.close()


@pytest.mark.parametrize("lab", ["bundled"], indirect=True)
async def test_a_shim_whose_daemon_died_before_its_answer_is_not_left(lab: Lab) -> None:
    # the next daemon may have looked before it listened: then nobody ended it for two minutes
    request = lab.request("late")
    os.makedirs(request.bundle)
    forks = await ForkServer.start()
    asking = asyncio.create_task(forks.spawn(request))
    await asyncio.sleep(0)  # it is asked while it loads, and comes to that when nobody is there any more
    forks._closing = True
    forks._drop("the daemon is gone")  # and nobody ends the fork server: on a busy machine it still loads for long
    with pytest.raises(errors.Unavailable):
        await asking
    async with asyncio.timeout(30):
        while not Path(request.bundle, "shim.log").exists() or working_in(request.bundle):
            await asyncio.sleep(0.02)
    await forks.close()
    assert not os.path.exists(request.socket)


def working_in(bundle: str) -> list[int]:
    """The processes that work in a bundle: a shim, and what it forks."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{name}/cwd") == bundle:
                found.append(int(name))
    return found


async def test_the_fork_server_ends_with_its_socket(lab: Lab) -> None:
    shim = await lab.spawn("a")
    assert lab.forks is not None
    pid = lab.forks.pid
    await lab.forks.close()
    assert not alive(pid)
    with pytest.raises(errors.Unavailable):
        await lab.forks.ping()
    await shim.shutdown()


async def test_a_request_that_can_not_be(lab: Lab, work: Path) -> None:
    shim = await lab.spawn("a")
    assert lab.forks is not None
    with pytest.raises(errors.WherryError, match="No such file"):
        await lab.forks.spawn(ShimRequest("testing", "b", "/nowhere", str(work / "b.sock"), lab.address))
    (work / "bundle").mkdir()
    (work / "taken").write_text("a file, not a socket")
    with pytest.raises(errors.WherryError):
        await lab.forks.spawn(ShimRequest("testing", "b", str(work / "bundle"), str(work / "taken"), lab.address))
    assert (work / "taken").read_text() == "a file, not a socket"
    await shim.shutdown()


async def test_a_socket_path_longer_than_the_kernel_takes(lab: Lab) -> None:
    await lab.spawn("a")
    assert lab.forks is not None
    folder = lab.work / ("x" * 120)
    folder.mkdir()
    bundle = lab.work / "tasks" / "testing" / "a"
    bootstrap = await lab.forks.spawn(ShimRequest("testing", "b", str(bundle), str(folder / "s.sock"), lab.address))
    client = await TtrpcClient.connect(bootstrap.path)
    await client.call("containerd.task.v2.Task", "Shutdown", task_v2_pb2.ShutdownRequest(id="b"))
    await client.close()


async def test_sigkill_of_the_shim(lab: Lab) -> None:
    shim = await lab.spawn("a")
    created = await shim.create("/bin/sleep", "100")
    await shim.start()
    os.kill(shim.bootstrap.pid, signal.SIGKILL)
    await shim.client.wait_closed()
    assert alive(created.pid)
    assert lab.forks is not None
    dead = await lab.forks.delete(lab.request("a"))
    assert (dead.pid, dead.exit_status) == (created.pid, 137)
    assert "shim" in dead.reason
    assert not alive(created.pid)
    assert not mounted(shim.bundle / "rootfs")
    assert not [path for path in (lab.work / "root").rglob("*") if path.is_file()]
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{GROUP}-a"))
    assert (await lab.forks.delete(lab.request("a"))).exit_status == 137


async def test_an_exit_that_the_shim_had_seen_outlives_it(lab: Lab) -> None:
    shim = await lab.spawn("a")
    created = await shim.create("/bin/sh", "-c", "exit 9")
    await shim.start()
    end = await shim.wait()
    os.kill(shim.bootstrap.pid, signal.SIGKILL)
    await shim.client.wait_closed()
    assert lab.forks is not None
    dead = await lab.forks.delete(lab.request("a"))
    assert (dead.pid, dead.exit_status, dead.reason) == (created.pid, 9, "")
    assert dead.exited_at_ns == end.exited_at.ToNanoseconds()
    assert not mounted(shim.bundle / "rootfs")


async def test_a_shim_imports_nothing_once_it_serves(work: Path, lab: Lab) -> None:
    shim = await lab.spawn("a")
    opened = work / "opened"
    before = await modules(shim)
    await shim.create("/bin/sleep", "100")
    await shim.start()
    await shim.exec("t", "/bin/sh", "-c", "exit 1", terminal=True)
    await shim.start("t")
    await shim.wait("t")
    await shim.delete("t")
    await shim.exec("bad", "nosuch")
    with pytest.raises(errors.WherryError):
        await shim.start("bad")
    await shim.call("Stats", task_v2_pb2.StatsRequest(id="a"))
    await shim.call("Pids", task_v2_pb2.PidsRequest(id="a"))
    await shim.call("Pause", task_v2_pb2.PauseRequest(id="a"))
    await shim.call("Resume", task_v2_pb2.ResumeRequest(id="a"))
    with pytest.raises(errors.WherryError):
        await shim.call("Checkpoint", task_v2_pb2.CheckpointTaskRequest(id="a", path=str(opened)))
    await shim.kill(9)
    await shim.wait()
    await shim.delete()
    assert await modules(shim) == before
    await shim.shutdown()


async def test_what_a_shim_has_no_use_for_is_not_in_its_memory(lab: Lab) -> None:
    """Four mappings for each library, which every fork copies and every end takes down again."""
    shim = await lab.spawn("a")
    unused = {"asyncio", "grpc", "hashlib", "logging", "platform", "random", "shutil", "sqlite3", "ssl", "subprocess"}
    assert unused & set(await modules(shim)) == set()
    maps = Path(f"/proc/{shim.bootstrap.pid}/maps").read_text()
    assert [name for name in ("libcrypto", "libssl", "liblzma", "libbz2") if name in maps] == []
    await shim.shutdown()


async def modules(shim: Shim) -> list[str]:
    """The names in `sys.modules` of a shim, by its SIGUSR1 (a shim writes them into its log for that)."""
    log = shim.bundle / "shim.log"
    size = log.stat().st_size
    os.kill(shim.bootstrap.pid, signal.SIGUSR1)
    async with asyncio.timeout(30):
        while b"modules=" not in (text := log.read_bytes()[size:]) or not text.endswith(b"\n"):
            await asyncio.sleep(0.005)
    line = next(line for line in text.splitlines() if b"modules=" in line)
    return str(json.loads(line.split(b"modules=", 1)[1])).split()


WALK = """
import os, signal, sys
from wherry.linux.process import set_child_subreaper
from wherry.runtime import container, make
from wherry.runtime.errors import ContainerError
from wherry.shim import warming_runtime
container.preload()
set_child_subreaper()
def die(plan, pid):
    os.kill(os.getpid(), signal.SIGKILL)
make.record = die
try:
    warming_runtime.walk_runtime(sys.argv[1] + "/walk", range(1))
except ContainerError as error:
    print(error.message)
try:
    os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    print("no children")
"""


def test_a_walk_that_is_cut_short_leaves_no_zombie(tmp_path: Path) -> None:
    """On a busy machine the maker of the first container was killed by SIGPIPE: its init was a zombie of the fork
    server's for life."""
    done = subprocess.run(
        [sys.executable, "-c", WALK, tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == ["the runtime died (wait status 9)", "no children"], done.stderr


def test_which_modules_count_as_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start after an installation compiles in another process: what the compiler leaves in the heap made each
    shim 220 kB heavier."""
    monkeypatch.setattr(forkserver, "__file__", str(tmp_path / "forkserver.py"))
    source = tmp_path / "nursery.py"
    source.write_text("pass\n")
    assert not forkserver.compiled()
    py_compile.compile(str(source), optimize=2)
    assert forkserver.compiled()
    source.write_text("pass  # newer\n")
    assert not forkserver.compiled()
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(source), optimize=2, invalidation_mode=mode)
    assert forkserver.compiled()
