"""How long a container's start and an exec take over the API, alone and among others."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.api import Api
from bench.chart import draw
from bench.daemons import Daemon
from wherry.client.wherry import Wherry

AT_ONCE = (1, 2, 4, 8, 16)
# containers for each daemon and number at once, in so many turns; p99 is then the second largest of 120
CONTAINERS, TURNS = 120, 3
EXECS = 40


@dataclass
class Starts:
    """Of one daemon with a number at once: seconds of each start, and what all the lives took."""

    seconds: list[float] = field(default_factory=list)
    containers: int = 0
    whole: float = 0.0

    @property
    def rate(self) -> float:
        """Containers a second, from their records to their removal."""
        return self.containers / self.whole

    def percentile(self, percent: int) -> float:
        """Milliseconds that so many percent of the starts took at most."""
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1] * 1000


def by_turns(daemons: Sequence[Daemon], image: str) -> dict[int, list[Starts]]:
    """For each number at once the figures of each daemon, measured in turn."""
    found = {number: [Starts() for _ in daemons] for number in AT_ONCE}
    for turn in range(TURNS):
        for number, row in found.items():
            for daemon, starts in zip(daemons, row, strict=True):
                asyncio.run(_measure(daemon, image, number, f"{daemon.kind}{turn}-{number}", starts))
    return found


async def _measure(daemon: Daemon, image: str, at_once: int, name: str, starts: Starts) -> None:
    """A start is what is there from the container's record to the answer of Start."""
    async with Api(daemon, image) as api:
        await api.run_to_end(f"{name}-warm")
        names = iter([f"{name}-{number}" for number in range(CONTAINERS // TURNS)])

        async def work() -> None:
            for each in names:
                starts.seconds.append(await api.run_to_end(each))
                starts.containers += 1

        begun = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(at_once)))
        starts.whole += time.perf_counter() - begun


def execs_by_turns(daemons: Sequence[Daemon], image: str) -> list[float]:
    """Median milliseconds of exec'ing `true` in a running container: Exec, Start, Wait and DeleteProcess."""

    async def measure() -> list[list[float]]:
        found: list[list[float]] = [[] for _ in daemons]
        apis = [Api(daemon, image) for daemon in daemons]
        for api in apis:
            await api.__aenter__()
            await api.sleep(f"exec-{api.kind}")
        for number in range(-3, EXECS):
            for api, row in zip(apis, found, strict=True):
                begun = time.perf_counter()
                await api.exec_true(f"exec-{api.kind}", f"x{number + 3}")
                if number >= 0:
                    row.append(time.perf_counter() - begun)
        for api in apis:
            await api.end(f"exec-{api.kind}")
            await api.__aexit__(None, None, None)
        return found

    return [statistics.median(row) * 1000 for row in asyncio.run(measure())]


def sandbox_execs_by_turns(daemons: Sequence[Daemon], image: str) -> list[float]:
    """Median milliseconds of `Sandbox.exec` of `true`: what a program waits that uses the client, streams and all."""

    async def measure() -> list[list[float]]:
        found: list[list[float]] = [[] for _ in daemons]
        async with contextlib.AsyncExitStack() as stack:
            boxes = []
            for daemon in daemons:
                wherry = Wherry(daemon.address, sandboxes=str(daemon.folder / "sandboxes"))
                boxes.append(await (await stack.enter_async_context(wherry)).sandbox(image))
            for number in range(-3, EXECS):
                for box, row in zip(boxes, found, strict=True):
                    begun = time.perf_counter()
                    done = await box.exec(["true"])
                    if number >= 0:
                        row.append(time.perf_counter() - begun)
                    done.check()
        return found

    return [statistics.median(row) * 1000 for row in asyncio.run(measure())]


def picture(found: dict[int, list[Starts]], daemons: Sequence[Daemon]) -> str:
    """p50 and p99 of each daemon as SVG."""
    lines = {
        f"{daemon.kind} p{percent}": [found[number][index].percentile(percent) for number in AT_ONCE]
        for percent in (50, 99)
        for index, daemon in enumerate(daemons)
    }
    return draw("A container's start over the API", AT_ONCE, lines, "containers at once", "ms")
