"""Our clients against ttrpc as Go speaks it: Debian's `containerd-shim-runc-v2`, started by hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import need
from wherry.core.errors import NotFound, Unimplemented
from wherry.proto import task_v2_pb2, task_v3_pb2
from wherry.proto.ttrpc.blocking import BlockingClient
from wherry.proto.ttrpc.client import TtrpcClient

TASK = "containerd.task.v2.Task"
NAMESPACE = {"containerd-namespace-ttrpc": "wherry-test"}


@pytest.fixture
def shim(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """The address of a running shim and its pid."""
    binary = need("containerd-shim-runc-v2")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "config.json").write_text(json.dumps({"ociVersion": "1.0.2", "root": {"path": "rootfs"}}))
    (bundle / "log").touch()
    name = f"wherry-go-peer-{os.getpid()}"
    command = [binary, "-namespace", "wherry-test", "-id", name, "-address", str(tmp_path / "containerd.sock")]
    environment = {**os.environ, "TTRPC_ADDRESS": str(tmp_path / "containerd.sock.ttrpc"), "GOMAXPROCS": "1"}
    with (bundle / "log").open("r+b") as log:
        started = subprocess.run(
            [*command, "start"], cwd=bundle, env=environment, stdout=subprocess.PIPE, stderr=log, check=True, timeout=20
        )
    address = started.stdout.decode().strip()
    if address.startswith("{"):
        address = json.loads(address)["address"]
    with BlockingClient(address) as client:
        pid = client.call(TASK, "Connect", task_v2_pb2.ConnectRequest(), timeout=5, metadata=NAMESPACE).shim_pid  # type: ignore[attr-defined]
    yield address, pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    Path(address.removeprefix("unix://")).unlink(missing_ok=True)


async def test_the_asyncio_client(shim: tuple[str, int]) -> None:
    address, pid = shim
    client = await TtrpcClient.connect(address)
    connected = await client.call(TASK, "Connect", task_v2_pb2.ConnectRequest(), timeout=5, metadata=NAMESPACE)
    assert connected.shim_pid == pid  # type: ignore[attr-defined]
    with pytest.raises(NotFound):
        await client.call(TASK, "State", task_v2_pb2.StateRequest(id="absent"), timeout=5, metadata=NAMESPACE)
    with pytest.raises(Unimplemented, match=r"service containerd\.task\.v3\.Task"):
        await client.call("containerd.task.v3.Task", "State", task_v3_pb2.StateRequest(id="absent"), timeout=5)
    answers = await asyncio.gather(
        *(client.call(TASK, "Connect", task_v2_pb2.ConnectRequest(), metadata=NAMESPACE) for _ in range(50))
    )
    assert {answer.shim_pid for answer in answers} == {pid}  # type: ignore[attr-defined]
    try:
        await client.call(TASK, "Shutdown", task_v2_pb2.ShutdownRequest(now=True), timeout=5, metadata=NAMESPACE)
    finally:
        await asyncio.wait_for(client.wait_closed(), 5)
        await client.close()


def test_the_blocking_client(shim: tuple[str, int]) -> None:
    address, pid = shim
    with BlockingClient(address) as client:
        connected = client.call(TASK, "Connect", task_v2_pb2.ConnectRequest(), timeout=5, metadata=NAMESPACE)
        assert connected.shim_pid == pid  # type: ignore[attr-defined]
        with pytest.raises(NotFound):
            client.call(TASK, "State", task_v2_pb2.StateRequest(id="absent"), timeout=5, metadata=NAMESPACE)
