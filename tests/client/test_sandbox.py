"""Sandboxes over both daemons: limits, forks, the end of the owner."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.client.conftest import IMAGE, NAMESPACE
from wherry.client import CommandFailed, OutOfMemory, Wherry
from wherry.client.disk import KINDS
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound, WherryError
from wherry.linux.quota import supported


@pytest_asyncio.fixture
async def wherry(address: str, tmp_path: Path) -> AsyncIterator[Wherry]:
    folder = tmp_path / "sandboxes"
    async with Wherry(address, namespace=NAMESPACE, timeout=30, sandboxes=str(folder)) as connected:
        yield connected
    assert not folder.exists() or os.listdir(folder) == []
    assert str(folder) not in mounts()


@pytest.fixture(autouse=True)
def unmounted(tmp_path: Path) -> Iterator[None]:
    """What a test that failed left mounted goes all the same."""
    yield
    for line in mounts().splitlines():
        if (place := line.split()[4]).startswith(f"{tmp_path}/"):
            subprocess.run(["umount", "-l", place], check=False)


def mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


async def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.05)


async def gone(wherry: Wherry, name: str) -> bool:
    records = {record.id for record in await wherry.client.containers.list()}
    tasks = {task.container_id for task in await wherry.client.tasks.list()}
    snapshots = {snapshot.name async for snapshot in wherry.client.snapshots().list()}
    return name not in records | tasks | snapshots


async def test_commands_without_a_network(wherry: Wherry) -> None:
    async with wherry.sandbox(IMAGE, env={"A": "b"}, cwd="/tmp", hostname="box") as box:
        assert (await box.exec(["sh", "-c", "echo $A; pwd; hostname"])).text == "b\n/tmp\nbox"
        names = (await box.exec(["ls", "/sys/class/net"])).text.split()
        assert names == ["lo"]
        assert "Seccomp:\t2" in (await box.exec(["cat", "/proc/self/status"])).text
        name = box.id
    assert await gone(wherry, name)


async def test_orphans_are_reaped(wherry: Wherry) -> None:
    """The idle process takes the place of init: whoever loses its parent leaves no zombie behind."""
    async with wherry.sandbox(IMAGE) as box:
        await box.exec(["sh", "-c", "(sleep 0.2 &) ; true"], check=True)
        end = time.monotonic() + 30
        while "sleep" in (await box.exec(["ps"])).text:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)


async def test_limits_hold(wherry: Wherry, ours: bool) -> None:
    async with wherry.sandbox(IMAGE, memory=32 << 20, pids=16, cpus=0.5) as box:
        with pytest.raises(OutOfMemory):
            await box.exec(["awk", 'BEGIN { s = "x"; while (1) s = s s }'], check=True, timeout=60)
        forks = await box.exec(
            ["sh", "-c", "i=0; while [ $i -lt 40 ]; do sleep 99 >/dev/null 2>&1 & i=$((i+1)); done"], timeout=60
        )
        assert b"can't fork" in forks.stderr
        end = time.monotonic() + 30
        while True:
            try:
                await box.exec(["killall", "sleep"], check=True)
                break
            except WherryError as error:
                # runc's threads count as well while it comes in, and it aborts when there is no room for them
                if ours or "OCI runtime exec failed" not in str(error) or time.monotonic() > end:
                    raise
        assert (await box.exec(["true"])).status == 0


@pytest.mark.parametrize("kind", ["loop", "tmpfs"])
async def test_a_full_disk(wherry: Wherry, kind: str) -> None:
    async with wherry.sandbox(IMAGE, disk=8 << 20, disk_kind=kind) as box:
        assert box.disk.kind == kind
        full = await box.exec(["dd", "if=/dev/zero", "of=/big", "bs=1M", "count=20"])
        assert b"No space left on device" in full.stderr
        await box.exec(["rm", "/big"], check=True)
        await box.exec(["sh", "-c", "echo fits > /small; rm /etc/group"], check=True)


async def test_a_disk_that_can_not_be_limited_is_refused(wherry: Wherry) -> None:
    with pytest.raises(InvalidArgument, match="too small"):
        await wherry.sandbox(IMAGE, disk=1000)
    with pytest.raises(InvalidArgument, match="unknown kind of disk 'floppy'"):
        await wherry.sandbox(IMAGE, disk=8 << 20, disk_kind="floppy")
    assert KINDS[0] == "quota"
    if not await counts_projects(wherry):
        with pytest.raises(
            FailedPrecondition, match=r"can't limit .* \(quota: .* of the snapshots counts no projects\)"
        ):
            await wherry.sandbox(IMAGE, disk=8 << 20, disk_kind="quota")
    else:
        async with wherry.sandbox(IMAGE, disk=8 << 20, disk_kind="quota") as box:
            assert (await box.exec(["dd", "if=/dev/zero", "of=/big", "bs=1M", "count=20"])).status != 0


async def counts_projects(wherry: Wherry) -> bool:
    async with wherry.sandbox(IMAGE) as box:
        return supported(box.disk.upper)


@pytest.mark.parametrize("limit", [0, 16 << 20])
async def test_forks_have_the_files_of_the_moment(wherry: Wherry, limit: int) -> None:
    async with wherry.sandbox(IMAGE, disk=limit, disk_kind="loop" if limit else "") as box:
        script = (
            "mkdir /d; echo 1 > /d/a; ln /d/a /d/b; rm /etc/group; rm -r /home; mkdir /home; ln -s a /d/l; chown 9 /d/a"
        )
        await box.exec(["sh", "-c", script], check=True)
        forks = await box.fork(3)
        await box.exec(["sh", "-c", "echo later > /d/a"], check=True)
        look = "cat /d/a; stat -c '%h %u' /d/b; readlink /d/l; ls /etc /home; ls / | wc -l"
        texts = [(await fork.exec(["sh", "-c", look])).text for fork in forks]
        assert len(set(texts)) == 1
        assert texts[0].splitlines()[:4] == ["1", "2 9", "a", "/etc:"]
        assert "group" not in texts[0]
        await forks[0].exec(["sh", "-c", "echo mine > /d/a; touch /only"], check=True)
        assert (await forks[1].exec(["cat", "/d/a"])).text == "1"
        assert (await box.exec(["cat", "/d/a"])).text == "later"
        uppers = {fork.disk.upper for fork in forks} | {box.disk.upper}
        assert len(uppers) == 4
        for line in mounts().splitlines():
            lower = line.partition("lowerdir=")[2].partition(",")[0].split(":")
            assert not uppers & set(lower)
        (second,) = await forks[0].fork()
        assert (await second.exec(["cat", "/d/a"])).text == "mine"
        await forks[2].close()
        with pytest.raises(NotFound):
            await forks[2].exec(["true"])
        names = [box.id, second.id, *(fork.id for fork in forks)]
    # the rest goes with the Wherry
    assert await gone(wherry, names[0])


async def test_all_go_with_the_wherry(address: str, tmp_path: Path, wherry: Wherry) -> None:
    async with Wherry(address, namespace=NAMESPACE, sandboxes=str(tmp_path / "other")) as owner:
        box = await owner.sandbox(IMAGE)
        forks = await box.fork(2)
        assert (await forks[1].exec(["true"])).status == 0
    for name in [box.id, *(fork.id for fork in forks)]:
        assert await gone(wherry, name)
    assert os.listdir(tmp_path / "other") == []


async def test_nothing_is_left_where_it_can_not_start(wherry: Wherry) -> None:
    before = {record.id for record in await wherry.client.containers.list()}
    with pytest.raises(InvalidArgument, match="isn't an absolute path"):
        await wherry.sandbox(IMAGE, cwd="not/absolute")
    assert {record.id for record in await wherry.client.containers.list()} == before


async def test_its_time_is_up(wherry: Wherry) -> None:
    box = await wherry.sandbox(IMAGE, ttl=1.0)
    end = time.monotonic() + 30
    while not await gone(wherry, box.id):
        assert time.monotonic() < end
        await asyncio.sleep(0.1)
    with pytest.raises(NotFound):
        await box.exec(["true"])


OWNER = """
import asyncio, sys
from wherry.client import Wherry

async def main():
    async with Wherry(sys.argv[1], namespace=sys.argv[2], sandboxes=sys.argv[3]) as wherry:
        box = await wherry.sandbox(sys.argv[4], disk=8 << 20, disk_kind="tmpfs")
        (fork,) = await box.fork()
        print(box.id, fork.id, wherry._keeper.pid, flush=True)
        await box.exec(["sleep", "1000"])

asyncio.run(main())
"""


@pytest.mark.parametrize("keeper_too", [False, True])
async def test_the_owner_is_killed(wherry: Wherry, address: str, tmp_path: Path, keeper_too: bool) -> None:
    folder = tmp_path / "owned"
    command = [sys.executable, "-c", OWNER, address, NAMESPACE, str(folder), IMAGE]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220 - read by the line
    assert owner.stdout is not None
    try:
        first, second, keeper = owner.stdout.readline().split()
        if keeper_too:
            os.kill(int(keeper), signal.SIGKILL)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    if keeper_too:
        # the next one on the same folder does its work
        async with Wherry(address, namespace=NAMESPACE, sandboxes=str(folder)) as next_owner:
            await next_owner.sandbox(IMAGE)
    await until(lambda: os.listdir(folder) == [], "the folder is empty")
    assert await gone(wherry, first)
    assert await gone(wherry, second)
    assert str(folder) not in mounts()


async def test_a_failed_command_says_so(wherry: Wherry) -> None:
    async with wherry.sandbox(IMAGE) as box:
        with pytest.raises(CommandFailed, match="exit code 2"):
            await box.exec(["sh", "-c", "exit 2"], check=True)
