"""A daemon that leaves when nobody needs it: `wherryd --exit-idle SECONDS`, for daemons that a client started.

Containers go on without it, and the next client starts another one. It is needed while a call is under way (a wait, a
subscription and an attached client are calls), and for some time after the last.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wherry.daemon.observed import Ended
    from wherry.proto.service import Context, Method

# what shims and health checks ask says nothing about whether a client is there
_OTHERS = frozenset({"containerd.services.events.ttrpc.v1.Events", "grpc.health.v1.Health"})


class IdleWatch:
    """Sees calls come and go. An `Observer`."""

    def __init__(self, seconds: float) -> None:
        """`seconds` without a call are idleness."""
        self._seconds = seconds
        self._calls = 0
        self._last = time.monotonic()

    def began(self, method: Method, context: Context) -> Ended:
        """A call: nobody is idle until it ends."""
        del context
        if method.service in _OTHERS:
            return lambda code: None
        self._calls += 1

        def ended(code: int) -> None:
            del code
            self._calls -= 1
            self._last = time.monotonic()

        return ended

    async def wait(self) -> None:
        """Returns when nobody has called for long enough."""
        while True:
            left = self._seconds if self._calls else self._last + self._seconds - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(left)
