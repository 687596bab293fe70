"""A shim as the daemon sees it: what becomes of a call under way when the daemon itself hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf.empty_pb2 import Empty

from wherry.core.errors import DeadlineExceeded, NotFound, Unavailable
from wherry.daemon.bundle import Bundle, Launch
from wherry.daemon.link import Limits, Shim
from wherry.proto import task_v3_pb2 as task
from wherry.proto.service import Context
from wherry.proto.ttrpc.server import TtrpcServer
from wherry.shim.client import Bootstrap


class Silent:
    """A shim that answers no Kill."""

    SERVICE = "containerd.task.v3.Task"

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def kill(self, request: task.KillRequest, context: Context) -> Empty:
        """Never."""
        self.asked.set()
        await asyncio.Event().wait()
        return Empty()


@pytest.fixture
async def silent(tmp_path: Path) -> AsyncIterator[tuple[Silent, str]]:
    service, path = Silent(), str(tmp_path / "s")
    server = TtrpcServer([service])
    await server.serve_unix(path)
    yield service, path
    await server.close()


@pytest.mark.parametrize("sandbox", [False, True])
async def test_a_call_under_way_when_another_one_has_deleted_the_task(
    silent: tuple[Silent, str], tmp_path: Path, sandbox: bool
) -> None:
    # a kubelet's StopContainer met the end that was noted at the same moment, and was told CANCELLED
    service, path = silent
    bundle = Bundle(str(tmp_path), "k8s.io", "c")
    shim = Shim(
        bundle, Launch("io.containerd.wherry.v1", sandbox=sandbox), Bootstrap(f"unix://{path}", "ttrpc", 3), Limits()
    )
    await shim.connect(5, lambda gone: None)
    killing = asyncio.create_task(shim.call("Kill", task.KillRequest(id="c"), Empty))
    await service.asked.wait()
    shim.leaving = True
    await shim.hang_up()
    text = "sandbox c: not found" if sandbox else "task c not found: not found"
    with pytest.raises(NotFound, match=f"^{text}$"):
        await killing


async def test_a_call_under_way_when_the_daemon_goes_down(silent: tuple[Silent, str], tmp_path: Path) -> None:
    service, path = silent
    shim = Shim(Bundle(str(tmp_path), "n", "c"), Launch("x"), Bootstrap(f"unix://{path}", "ttrpc", 3), Limits())
    await shim.connect(5, lambda gone: None)
    killing = asyncio.create_task(shim.call("Kill", task.KillRequest(id="c"), Empty))
    await service.asked.wait()
    await shim.hang_up()
    with pytest.raises(Unavailable, match="going down"):
        await killing


async def test_a_call_that_is_not_answered_says_whose_shim_it_is(silent: tuple[Silent, str], tmp_path: Path) -> None:
    _, path = silent
    bootstrap = Bootstrap(f"unix://{path}", "ttrpc", 3, pid=42)
    shim = Shim(Bundle(str(tmp_path), "n", "c"), Launch("x"), bootstrap, Limits(call=0.2))
    await shim.connect(5, lambda gone: None)
    with pytest.raises(DeadlineExceeded, match=r"^shim of c \(pid 42\) did not answer Kill within 0.2 s"):
        await shim.call("Kill", task.KillRequest(id="c"), Empty)
    await shim.hang_up()
