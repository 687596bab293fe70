"""Checkpoint and restore by criu itself; Debian's can't read the vdso of kernels from 6.2 on, so this is for the VM."""

# ruff: noqa: ASYNC110 - tests wait for other processes

from __future__ import annotations

import asyncio
import os

import pytest

from tests.peers import need
from tests.shim.harness import Lab, Shim, alive, container_spec
from wherry.core import typeurl
from wherry.proto import runc_options_pb2, task_v2_pb2

COUNT = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"


@pytest.fixture(autouse=True)
def criu() -> None:
    need("criu")
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 2):
        pytest.skip("Debian's criu 3.17 fails on this kernel's vdso; `make test-v2` has one that it can read")


async def checkpoint(shim: Shim, *, leave: bool) -> str:
    images = shim.lab.work / "images"
    images.mkdir()
    request = task_v2_pb2.CheckpointTaskRequest(id=shim.id, path=str(images))
    request.options.CopyFrom(typeurl.pack(runc_options_pb2.CheckpointOptions(exit=not leave)))
    await shim.call("Checkpoint", request, timeout=60)
    return str(images)


async def restore(lab: Lab, images: str) -> Shim:
    shim = await lab.spawn("again")
    await shim.create(spec=container_spec("again", "/bin/sh", "-c", COUNT), checkpoint=images)
    assert (await shim.state()).status == 1  # created, and no process yet
    await shim.start()
    return shim


@pytest.mark.parametrize("leave", [True, False])
async def test_there_and_back(lab: Lab, leave: bool) -> None:
    shim = await lab.spawn("first")
    await shim.create("/bin/sh", "-c", COUNT)
    pid = await shim.start()
    output = shim.output()
    await output.wait_for(b"\n5\n")
    images = await checkpoint(shim, leave=leave)
    if leave:
        seen = len(output.data)
        async with asyncio.timeout(20):
            while len(output.data) <= seen:
                await asyncio.sleep(0.02)
        await shim.kill()
    await shim.wait()
    assert not alive(pid)
    output.close()
    await shim.delete()
    await shim.shutdown()
    assert "/tasks/checkpointed" in lab.events.topics

    again = await restore(lab, images)
    output = again.output()
    async with asyncio.timeout(20):
        while len(output.data.split()) < 3:
            await asyncio.sleep(0.02)
    assert int(output.data.split()[0]) >= 5  # it goes on where it was
    await again.exec("x", "/bin/echo", "in")
    told = again.output(exec_id="x")
    await again.start("x")
    assert (await again.wait("x")).exit_status == 0
    await told.wait_for(b"in\n")
    told.close()
    output.close()
    await again.kill()
    assert (await again.wait()).exit_status == 137
    await again.delete()
    await again.shutdown()
