"""The client for programs, over both daemons: containers, commands, files, limits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.client.conftest import IMAGE, NAMESPACE
from wherry.client import CommandFailed, Container, OutOfMemory, TimedOut, Wherry
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound


@pytest_asyncio.fixture
async def wherry(address: str, tmp_path: Path) -> AsyncIterator[Wherry]:
    async with Wherry(address, namespace=NAMESPACE, timeout=30, sandboxes=str(tmp_path / "sandboxes")) as connected:
        yield connected


@pytest_asyncio.fixture
async def guest(wherry: Wherry) -> AsyncIterator[Container]:
    async with wherry.run(IMAGE, ["sleep", "100"], memory=64 << 20, env={"SEA": "north"}) as container:
        yield container


async def test_lines_as_they_come_and_the_exit_code(wherry: Wherry) -> None:
    async with wherry.run(IMAGE, ["sh", "-c", "echo one; read x; echo $x; exit 3"]) as container:
        lines = container.stdout
        assert await lines.readline() == b"one\n"
        await container.send(b"two\n")
        assert [line async for line in lines] == [b"two\n"]
        assert (await container.wait(10)).status == 3
    assert container.id not in {found.id for found in await wherry.client.containers.list()}


async def test_a_command_and_what_it_wrote(guest: Container) -> None:
    done = await guest.exec(
        ["sh", "-c", "cat; echo $SEA $MORE >&2; pwd; exit 7"], input=b"in ", env={"MORE": "x"}, cwd="/tmp"
    )
    assert (done.status, done.stdout, done.stderr, done.text) == (7, b"in /tmp\n", b"north x\n", "in /tmp")
    assert (await guest.exec(["id", "-u"], user=(65534, 65534))).text == "65534"
    with pytest.raises(CommandFailed, match="'sh' ended with exit code 7: bad") as failure:
        await guest.exec(["sh", "-c", "echo bad >&2; exit 7"], check=True)
    assert failure.value.status == 7
    with pytest.raises(InvalidArgument, match="list of words"):
        await guest.exec("true")


async def test_without_input_there_is_no_pipe_for_it(guest: Container) -> None:
    assert (await guest.exec(["sh", "-c", "cat; readlink /proc/self/fd/0"], timeout=10)).text == "/dev/null"
    assert (await guest.exec(["cat"], input=b"some", timeout=10)).text == "some"


async def test_a_command_that_takes_too_long_is_gone(guest: Container) -> None:
    with pytest.raises(TimedOut, match=r"was killed after 0\.5 s") as failure:
        await guest.exec(["sh", "-c", "echo begun; sleep 99"], timeout=0.5)
    assert failure.value.stdout == b"begun\n"
    assert "sleep 99" not in (await guest.exec(["ps"])).text


async def test_what_writes_more_than_is_kept_goes_on(guest: Container) -> None:
    done = await guest.exec(["head", "-c", "3000000", "/dev/zero"], output=1000)
    assert (done.status, len(done.stdout), done.truncated) == (0, 1000, True)


async def test_a_command_over_the_memory_limit(guest: Container) -> None:
    hungry = ["sh", "-c", "exec awk 'BEGIN { s = \"x\"; while (1) s = s s }'"]
    assert (await guest.usage()).memory_limit == 64 << 20
    with pytest.raises(OutOfMemory, match="was killed over the memory limit"):
        await guest.exec(hungry, check=True, timeout=60)
    await guest.limit(memory=96 << 20)
    assert (await guest.usage()).memory_limit == 96 << 20


async def test_cancelled_a_command_is_gone(guest: Container) -> None:
    running = asyncio.create_task(guest.exec(["sleep", "98"]))
    while "sleep 98" not in (await guest.exec(["ps"])).text:  # noqa: ASYNC110 - what is waited for is in the container
        await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert "sleep 98" not in (await guest.exec(["ps"])).text


async def test_files_in_and_out(guest: Container, tmp_path: Path) -> None:
    await guest.write("/work/deep/file", "text", mode=0o750, uid=12, gid=13)
    assert (await guest.exec(["stat", "-c", "%a %u %g", "/work/deep/file"])).text == "750 12 13"
    assert await guest.read("/work/deep/file") == b"text"
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "a").write_bytes(os.urandom(3 << 20))
    (tree / "link").symlink_to("sub/a")
    await guest.store(str(tree), "/work/tree", uid=7)
    assert (await guest.exec(["stat", "-c", "%u", "/work/tree/sub/a"])).text == "7"
    await guest.fetch("/work/tree", str(tmp_path / "back"))
    assert (tmp_path / "back/sub/a").read_bytes() == (tree / "sub/a").read_bytes()
    assert os.readlink(tmp_path / "back/link") == "sub/a"
    with pytest.raises(NotFound, match="/nowhere"):
        await guest.read("/nowhere")
    with pytest.raises(InvalidArgument, match="is a folder"):
        await guest.read("/work")
    with pytest.raises(FailedPrecondition, match="more than 10 bytes"):
        await guest.read("/work/tree/sub/a", limit=10)


async def test_links_of_the_container_lead_nowhere_else(guest: Container, tmp_path: Path) -> None:
    """What a naive `/proc/PID/root` + path would follow out to the host ends inside of the container."""
    secret = tmp_path / "secret"
    secret.write_text("host")
    naive = f"/proc/{await guest.pid()}/root/evil"
    await guest.exec(["ln", "-s", str(secret), "/evil"], check=True)
    await guest.exec(["ln", "-s", "../../../../../../..", "/up"], check=True)
    assert await asyncio.to_thread(Path(naive).read_text) == "host"
    with pytest.raises(NotFound):
        await guest.read("/evil")
    await guest.write("/up/tmp/mine", "inside")
    assert (await guest.exec(["cat", "/tmp/mine"])).text == "inside"
    with pytest.raises((NotFound, FailedPrecondition, InvalidArgument)):
        await guest.write("/evil", "overwritten")
    assert secret.read_text() == "host"
    # a device or a FIFO must not make us wait
    await guest.exec(["mkfifo", "/fifo"], check=True)
    with pytest.raises(InvalidArgument, match="no regular file"):
        await guest.read("/fifo")


async def test_pausing(guest: Container) -> None:
    await guest.pause()
    assert (await guest.client.tasks.get(guest.id)).status == "PAUSED"
    await guest.resume()
    assert (await guest.exec(["true"])).status == 0
