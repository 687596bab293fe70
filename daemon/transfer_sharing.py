"""Work that several transfers want at once and that is done once: a layer's download, its extraction."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager

# seconds between two looks at how far the other one is
INTERVAL = 0.1


class Turn:
    """One piece of work that is being done; `event` and `progress` (bytes) are what its doer tells."""

    def __init__(self) -> None:
        self.event = ""
        self.progress = 0
        self._ended = asyncio.Event()

    def tell(self, event: str, progress: int) -> None:
        """How far it is, for those who wait."""
        self.event, self.progress = event, progress

    def end(self) -> None:
        """It is over, well or not."""
        self._ended.set()

    async def wait(self, told: Callable[[str, int], None]) -> None:
        """Return when it is over; meanwhile pass on what its doer tells."""
        waiting = asyncio.ensure_future(self._ended.wait())
        try:
            while not waiting.done():
                if self.event:
                    told(self.event, self.progress)
                await asyncio.wait({waiting}, timeout=INTERVAL)
        finally:
            waiting.cancel()


class Turns:
    """Who does what now, by a key. A doer that fails or leaves hands over to one of those who wait."""

    def __init__(self) -> None:
        self._running: dict[Hashable, Turn] = {}

    @asynccontextmanager
    async def take(self, key: Hashable, told: Callable[[str, int], None]) -> AsyncIterator[tuple[Turn, bool]]:
        """Wait until nobody else does it, then have the turn. Whether somebody else did it meanwhile is the second:

        then it is probably done, and whoever has the turn looks first.
        """
        waited = False
        while (running := self._running.get(key)) is not None:
            waited = True
            await running.wait(told)
        turn = self._running[key] = Turn()
        try:
            yield turn, waited
        finally:
            del self._running[key]
            turn.end()
