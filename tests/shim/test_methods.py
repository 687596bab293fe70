"""Every method of the task service in every state, ours beside containerd's shims: `methods.txt` says what is answered.

The reference is asked the same: a row that it doesn't hold is wrong.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.peers import need
from tests.shim import methods
from tests.shim.harness import Lab, Shim, lab_at
from tests.sid import need_sid
from wherry.core.errors import WherryError
from wherry.proto import task_v2_pb2
from wherry.proto.ttrpc.client import TtrpcClient
from wherry.shim.client import ForeignShim, ShimLog, delete_shim, start_foreign_shim


class Strangers:
    """containerd's shim, started as containerd does it."""

    def __init__(self, lab: Lab, binary: str) -> None:
        self.lab = lab
        self.binary = binary
        self.logs: dict[str, ShimLog] = {}

    async def spawn(self, container: str, bundle: Path) -> Shim:
        self.logs[container] = ShimLog(str(bundle), lambda line: None)
        bootstrap = await start_foreign_shim(self._foreign(container, bundle))
        client = await TtrpcClient.connect(bootstrap.path)
        return Shim(self.lab, container, bundle, bootstrap, client)

    async def release(self, shim: Shim) -> None:
        with contextlib.suppress(WherryError):
            await delete_shim(self._foreign(shim.id, shim.bundle))
        self.logs.pop(shim.id).close()
        await shim.client.close()

    def _foreign(self, container: str, bundle: Path) -> ForeignShim:
        return ForeignShim(self.binary, "testing", container, str(bundle), f"{self.lab.work}/d.sock", self.lab.address)


def kill_strangers(lab: Lab) -> None:
    """Those of this lab's folder that a failure left."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"/containerd-shim-runc-v2\0" in command and f"{lab.work}/".encode() in command:
                os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
async def lab(request: pytest.FixtureRequest, work: Path, rootfs: Path) -> AsyncIterator[Lab]:
    binary = "" if request.param == "bundled" else need("runc")
    async with lab_at(work, rootfs, binary) as lab:
        yield lab


@pytest.mark.parametrize(
    ("lab", "binary", "version"),
    [
        ("bundled", "", 2),
        ("bundled", "", 3),
        ("runc", "", 2),
        ("runc", "bookworm", 2),
        ("runc", "sid", 3),
    ],
    indirect=["lab"],
)
async def test_every_method_in_every_state(lab: Lab, binary: str, version: int) -> None:
    strangers = None
    if binary:
        client = need("containerd-shim-runc-v2") if binary == "bookworm" else need_sid()
        strangers = Strangers(lab, str(Path(client).with_name("containerd-shim-runc-v2")))
    lab.service = f"containerd.task.v{version}.Task"
    names = iter(range(1000))

    async def fresh() -> Shim:
        name = f"m{next(names)}"
        if strangers is None:
            shim = await lab.spawn(name)
        else:
            bundle = lab.work / "tasks" / "testing" / name
            for folder in (bundle, bundle / "rootfs", bundle / "work"):
                folder.mkdir(parents=True)
            (bundle / "config.json").write_text("{}")
            shim = await strangers.spawn(name, bundle)
        (shim.bundle / "config.json").write_text("{}")
        return shim

    async def release(shim: Shim) -> None:
        for call in (
            lambda: shim.call("Resume", task_v2_pb2.ResumeRequest(id=shim.id)),
            lambda: shim.kill(9),
            lambda: shim.wait(timeout=20),
            shim.delete,
            lambda: shim.call("Shutdown", task_v2_pb2.ShutdownRequest(id=shim.id)),
        ):
            with contextlib.suppress(WherryError):
                await call()
        if strangers is not None:
            await strangers.release(shim)

    try:
        found = await methods.walk(fresh, release, lab.service)
    finally:
        kill_strangers(lab)
    told = methods.table()
    assert set(found) == set(told)
    wrong = {
        key: (answer, told[key])
        for key, answer in found.items()
        # with runc below, some words are runc's; a checkpoint succeeds where criu can read the kernel
        if not any(
            methods.is_as_told(answer, text)
            for text in (told[key][:1] if lab.binary == "" and key[2] != "Checkpoint" else told[key])
        )
    }
    assert not wrong
