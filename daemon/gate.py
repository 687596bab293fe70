"""First come, first served, for work that all of a machine's processors are needed for.

Sixteen containers that are made at once take as long as sixteen one after the other; but where all begin together, the
processors are shared out by chance, and some end long after the others. A few at a time, in the order of asking, the
last one is earlier than that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """A few turns at once. Whoever takes longer than its share goes on, but holds nobody up any more: a mount that
    hangs and a hook that waits are not work."""

    def __init__(self, at_once: int, share: float) -> None:
        """`share`: for so many seconds a turn counts."""
        self._free = asyncio.Semaphore(at_once)
        self._share = share

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for a turn, and has it for the block."""
        await self._free.acquire()
        given_back = False

        def give_back() -> None:
            nonlocal given_back
            if not given_back:
                given_back = True
                self._free.release()

        timer = asyncio.get_running_loop().call_later(self._share, give_back)
        try:
            yield
        finally:
            timer.cancel()
            give_back()
