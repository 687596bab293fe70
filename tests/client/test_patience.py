"""A daemon that is killed and started again under a program: what may be repeated is, the rest says so."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.wherryd import BUSYBOX, Wherryd
from wherry.client import Wherry, connect
from wherry.client.patience import may_repeat
from wherry.core.errors import DeadlineExceeded, Unavailable


@pytest_asyncio.fixture
async def daemon() -> AsyncIterator[Wherryd]:
    one = Wherryd()
    try:
        await asyncio.to_thread(one.start)
        await asyncio.to_thread(one.import_busybox)
        yield one
    finally:
        await asyncio.to_thread(one.close)


async def test_a_container_over_a_restart(daemon: Wherryd) -> None:
    script = "echo one; read line; echo $line; exit 9"
    async with Wherry(daemon.address) as wherry, wherry.run(BUSYBOX, ["sh", "-c", script]) as container:
        assert await container.stdout.readline() == b"one\n"
        daemon.kill()
        await asyncio.sleep(0.2)  # what is sent before the connection's end was seen may have arrived
        asked = asyncio.create_task(wherry.client.version())
        box = asyncio.create_task(container.exec(["echo", "two"]))
        await asyncio.sleep(0.3)
        assert not asked.done()
        await asyncio.to_thread(daemon.start)
        assert (await asked).version
        assert (await box).text == "two"
        await container.send(b"three\n")
        assert await container.stdout.readline() == b"three\n"
        assert (await container.wait(20)).status == 9


async def test_patience_has_an_end(daemon: Wherryd) -> None:
    async with await connect(daemon.address, patience=0.5) as client:
        daemon.kill()
        began = time.monotonic()
        with pytest.raises(Unavailable):
            await client.version()
        assert 0.4 < time.monotonic() - began < 20
    await asyncio.to_thread(daemon.start)
    async with await connect(daemon.address, patience=30, timeout=0.5) as client:
        daemon.kill()
        with pytest.raises((Unavailable, DeadlineExceeded)):
            await client.version()


def test_what_may_be_repeated() -> None:
    lost, never = Unavailable("Socket closed"), Unavailable("failed to connect to all addresses; last error: …")
    assert may_repeat("containerd.services.tasks.v1.Tasks/Wait", lost)
    assert not may_repeat("containerd.services.tasks.v1.Tasks/Create", lost)
    assert may_repeat("containerd.services.tasks.v1.Tasks/Create", never)


async def test_events_go_on(daemon: Wherryd) -> None:
    async with Wherry(daemon.address) as wherry:
        found: asyncio.Queue[str] = asyncio.Queue()

        async def watch() -> None:
            async for event in wherry.events(['topic=="/tasks/exit"']):
                found.put_nowait(event.fields()["container_id"])

        watching = asyncio.create_task(watch())
        try:
            for _ in range(2):
                # until the subscription is there, an event may pass unseen
                async with asyncio.timeout(30):
                    while found.empty():
                        async with wherry.run(BUSYBOX, ["true"]) as container:
                            await container.wait()
                        await asyncio.sleep(0.1)
                while not found.empty():
                    found.get_nowait()
                await asyncio.to_thread(daemon.restart)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def test_events_that_come_while_the_daemon_is_away_are_not_missed(daemon: Wherryd) -> None:
    async with Wherry(daemon.address) as wherry:
        found: list[tuple[str, int]] = []
        more = asyncio.Event()

        async def watch() -> None:
            async for event in wherry.events(['topic=="/tasks/exit"']):
                fields = event.fields()
                found.append((fields["container_id"], fields.get("exit_status", 0)))
                more.set()

        async def known(name: str, seconds: float = 30) -> None:
            async with asyncio.timeout(seconds):
                while name not in dict(found):
                    more.clear()
                    await more.wait()

        watching = asyncio.create_task(watch())
        try:
            for _ in range(30):  # until the subscription is there
                async with wherry.run(BUSYBOX, ["true"]) as first:
                    with contextlib.suppress(TimeoutError):
                        await known(first.id, 1)
                        break
            assert found[-1:] == [(first.id, 0)]
            del found[:-1]
            async with wherry.run(BUSYBOX, ["sh", "-c", "sleep 1; exit 4"]) as container:
                await asyncio.to_thread(daemon.kill)
                await asyncio.sleep(2)
                await asyncio.to_thread(daemon.start)
                await known(container.id)
            assert found == [(first.id, 0), (container.id, 4)]
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
