"""Addresses that are given out once: a request waits under a token until somebody comes for it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final

from wherry.core.errors import ResourceExhausted
from wherry.cri.streaming.remote import Call

# seconds, and how many at once (kubelet's own cache has the same)
LIFETIME: Final = 60.0
MOST: Final = 1000


class Tokens:
    """Calls by token. Each is taken at most once, within a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._calls: dict[str, tuple[Call, float]] = {}  # in the order of their end

    def put(self, call: Call) -> str:
        """Keep a call; its token. Raises ResourceExhausted."""
        self._expire()
        if len(self._calls) >= MOST:
            raise ResourceExhausted(f"maximum number of in-flight requests exceeded: {MOST} streams were asked for")
        token = secrets.token_urlsafe(16)
        self._calls[token] = call, self._clock() + LIFETIME
        return token

    def take(self, token: str) -> Call | None:
        """The call, None where there is none (any more)."""
        self._expire()
        found = self._calls.pop(token, None)
        return found[0] if found is not None else None

    def _expire(self) -> None:
        now = self._clock()
        while self._calls:
            token, (_, end) = next(iter(self._calls.items()))
            if end > now:
                return
            del self._calls[token]
