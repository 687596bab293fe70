"""Containers driven by a program: streams, exits, exec, cancellation; over both daemons."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import IMAGE
from wherry.client import Client
from wherry.client.launch import Launch
from wherry.client.programs import execute, run
from wherry.client.spec import SpecOptions
from wherry.core.errors import NotFound, WherryError


def launch(name: str, *args: str, user: str | None = None, **options: object) -> Launch:
    return Launch(id=name, image=IMAGE, user=user, spec=SpecOptions(args=args, **options))  # type: ignore[arg-type]


async def test_input_output_and_exit_code(client: Client) -> None:
    async with run(client, launch("cat", "sh", "-c", "cat; echo err >&2; exit 3")) as program:
        await program.write(b"x" * 200_000)
        writing = asyncio.create_task(program.close_stdin())
        assert len(await program.stdout.read()) == 200_000
        assert await program.stderr.read() == b"err\n"
        await writing
        assert (await program.wait()).status == 3
    assert await client.containers.list(["id==cat"]) == []
    with pytest.raises(NotFound):
        await client.snapshots().stat("cat")


async def test_a_signal_ends_it(client: Client) -> None:
    async with run(client, launch("sleeper", "sleep", "60")) as program:
        assert (await client.tasks.get("sleeper")).status == "RUNNING"
        assert program.pid in [pid for pid, _ in await client.tasks.pids("sleeper")]
        await client.tasks.pause("sleeper")
        assert (await client.tasks.get("sleeper")).status == "PAUSED"
        await client.tasks.resume("sleeper")
        assert [sample.id for sample in await client.tasks.metrics(["sleeper"])] == ["sleeper"]
        await program.kill(signal.SIGKILL)
        assert (await program.wait()).status == 137


async def test_further_processes(client: Client) -> None:
    async with run(client, launch("host", "sleep", "60")) as program:
        args = ["sh", "-c", "read line; echo got $line; exit 5"]
        async with execute(client, program.container, args, cwd="/tmp") as other:
            await other.write(b"it\n")
            assert await other.stdout.read() == b"got it\n"
            assert (await other.wait()).status == 5


async def test_whoever_the_image_names(client: Client) -> None:
    async with run(client, launch("user", "id", "-u", user="nobody")) as program:
        assert await program.stdout.read() == b"65534\n"
    with pytest.raises(WherryError, match="unable to find user stranger"):
        async with run(client, launch("user", "id", user="stranger")):
            pass
    assert await client.containers.list(["id==user"]) == []


async def test_what_was_asked_for_holds(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mounted\n")
    mounts = [{"type": "bind", "source": str(tmp_path), "destination": "/tmp", "options": ["rbind", "ro"]}]
    options: dict[str, Any] = {"env": ["A=b"], "hostname": "boat", "cwd": "/home", "read_only": True, "mounts": mounts}
    script = "echo $A; hostname; pwd; cat /tmp/file; touch /x"
    async with run(client, launch("asked", "sh", "-c", script, **options)) as program:
        assert (await program.stdout.read()).split() == [b"b", b"boat", b"/home", b"mounted"]
        assert b"Read-only file system" in await program.stderr.read()


async def test_a_command_that_is_not_there(client: Client) -> None:
    with pytest.raises(WherryError, match="nope"):
        async with run(client, launch("missing", "nope")):
            pass
    assert await client.containers.list(["id==missing"]) == []
    with pytest.raises(NotFound):
        await client.snapshots().stat("missing")


async def test_cancelled_it_leaves_nothing(client: Client) -> None:
    started = asyncio.Event()

    async def work() -> None:
        async with run(client, launch("cancelled", "sleep", "60")) as program:
            started.set()
            await program.wait()

    task = asyncio.create_task(work())
    await asyncio.wait_for(started.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await client.containers.list(["id==cancelled"]) == []
    assert "cancelled" not in {item.container_id for item in await client.tasks.list()}
