"""The shim's options: where it lives, how soon it is killed for memory, who owns a container's pipes."""

# ruff: noqa: ASYNC240 - tests look at files

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.shim.harness import Lab, Shim, process_spec
from wherry.linux import cgroups
from wherry.proto.ttrpc.client import TtrpcClient
from wherry.shim.client import ShimRequest


async def spawn(lab: Lab, **changes: object) -> Shim:
    """A shim with something else in its request."""
    first = await lab.spawn("plain")
    await first.shutdown()
    assert lab.forks is not None
    bundle = lab.work / "tasks" / "testing" / "opt"
    bundle.mkdir()
    request: ShimRequest = replace(lab.request("opt"), **changes)  # type: ignore[arg-type]  # by name
    bootstrap = await lab.forks.spawn(request)
    shim = Shim(lab, "opt", bundle, bootstrap, await TtrpcClient.connect(bootstrap.path))
    lab.shims.append(shim)
    return shim


async def end(shim: Shim) -> None:
    await shim.kill(9)
    await shim.wait()
    await shim.delete()
    await shim.shutdown()


async def test_the_shims_cgroup(lab: Lab) -> None:
    name = f"/wherry-h5/shims-{os.getpid()}"
    shim = await spawn(lab, shim_cgroup=name)
    try:
        lines = Path(f"/proc/{shim.bootstrap.pid}/cgroup").read_text().splitlines()
        inside = [line for line in lines if line.endswith(name)]
        assert len(inside) >= (1 if cgroups.host().mode == cgroups.layout.Mode.V2 else 5)
        # the container goes where its specification says
        await shim.create("/bin/sleep", "1000", streams=False)
        pid = await shim.start()
        assert name not in Path(f"/proc/{pid}/cgroup").read_text()
        await end(shim)
    finally:
        for line in Path("/proc/mounts").read_text().splitlines():
            if line.split()[2] in ("cgroup", "cgroup2"):
                with contextlib.suppress(OSError):
                    os.rmdir(f"{line.split()[1]}{name}")


async def test_the_shims_oom_score(lab: Lab) -> None:
    shim = await spawn(lab, oom_score_adj=321)
    assert Path(f"/proc/{shim.bootstrap.pid}/oom_score_adj").read_text() == "321\n"
    await shim.create("/bin/sleep", "1000", streams=False)
    pid = await shim.start()
    # a specification without one: as its shim, as with containerd
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "321\n"
    await end(shim)


@pytest.mark.parametrize("terminal", [False, True])
async def test_who_owns_the_pipes(lab: Lab, terminal: bool) -> None:
    """For containers whose user is not root and that open /dev/stdout again."""
    lab.options.io_uid, lab.options.io_gid = 1000, 1001
    shim = await lab.spawn("pipes")
    await shim.create("/bin/sleep", "1000", terminal=terminal)
    pid = await shim.start()
    if not terminal:
        # the user is root; runtimes give the streams to the process's user, and leave the group
        assert [_owner(pid, fd) for fd in (0, 1, 2)] == [(0, 1001)] * 3
    spec = process_spec("/bin/sleep", "1000")
    spec["user"] = {"uid": 1000, "gid": 1000}
    await shim.exec("x", spec=spec)
    added = await shim.start("x")
    assert [_owner(added, fd) for fd in (0, 1, 2)] == [(1000, 1001)] * 3
    await end(shim)


def _owner(pid: int, fd: int) -> tuple[int, int]:
    found = os.stat(f"/proc/{pid}/fd/{fd}")
    return found.st_uid, found.st_gid
