"""First come, first served, a few at once, and nobody held up for long."""

from __future__ import annotations

import asyncio
import time

from wherry.daemon.gate import Gate


async def test_a_few_at_once_in_the_order_of_asking() -> None:
    gate, running, most, order = Gate(2, 60.0), 0, 0, []

    async def work(number: int) -> None:
        nonlocal running, most
        async with gate.turn():
            running += 1
            most = max(most, running)
            order.append(number)
            await asyncio.sleep(0)
            running -= 1

    await asyncio.gather(*(work(number) for number in range(10)))
    assert most == 2
    assert order == list(range(10))


async def test_who_hangs_holds_nobody_up() -> None:
    gate = Gate(1, 0.05)
    forever = asyncio.Event()

    async def hang() -> None:
        async with gate.turn():
            await forever.wait()

    hanging = [asyncio.create_task(hang()) for _ in range(3)]
    await asyncio.sleep(0)
    began = time.monotonic()
    async with asyncio.timeout(20), gate.turn():
        assert time.monotonic() - began > 0.1
    forever.set()
    await asyncio.gather(*hanging)
    # what was given back early isn't given back twice
    async with gate.turn():
        waiting = asyncio.create_task(hang())
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting
