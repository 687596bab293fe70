"""When a registry is asked again, and how long is waited before."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from wherry.core.errors import DeadlineExceeded, ResourceExhausted, Unavailable, WherryError

T = TypeVar("T")

# attempts in a row that bring nothing, before a host is given up ...
MAX_ATTEMPTS = 5
# ... where not even a connection comes about or a time limit passes, and where another host can be asked instead
MAX_SILENT = 3
MAX_WITH_OTHERS = 2
# seconds before the second attempt, doubled for each further one
FIRST_PAUSE = 0.1
# seconds that a registry's `Retry-After` may make us wait
MAX_PAUSE = 20.0


class TooBusy(ResourceExhausted):
    """The registry wants to be asked again after some seconds."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NoConnection(Unavailable):
    """Nobody took the connection."""


class Hopeless(Unavailable):
    """The peer is there, and asking it again won't help: a certificate that isn't trusted, redirects without an end."""


class Backoff:
    """The attempts at one thing at one host. `others`: there are further hosts, so that this one isn't waited for."""

    def __init__(self, *, others: bool = False) -> None:
        self._others = others
        self._failures = 0

    def moved(self) -> None:
        """Something came: the count begins anew."""
        self._failures = 0

    async def wait(self, error: WherryError) -> None:
        """Wait before the next attempt; raises `error` where there is none."""
        self._failures += 1
        if not worth_a_retry(error) or self._failures >= self._limit(error):
            raise error
        pause = FIRST_PAUSE * 2 ** (self._failures - 1) * random.uniform(0.7, 1.3)  # noqa: S311 - no secret
        wanted = error.retry_after if isinstance(error, TooBusy) else 0.0
        await asyncio.sleep(min(max(pause, wanted), MAX_PAUSE))

    def _limit(self, error: WherryError) -> int:
        if self._others:
            return MAX_WITH_OTHERS
        return MAX_SILENT if isinstance(error, NoConnection | DeadlineExceeded) else MAX_ATTEMPTS


def worth_a_retry(error: WherryError) -> bool:
    """Whether the same request may do better in a moment."""
    return isinstance(error, Unavailable | DeadlineExceeded | TooBusy) and not isinstance(error, Hopeless)


async def retried(attempt: Callable[[], Awaitable[T]], *, others: bool = False) -> T:
    """What `attempt` returns, after as many tries as are worth it."""
    backoff = Backoff(others=others)
    while True:
        try:
            return await attempt()
        except WherryError as error:
            await backoff.wait(error)


def seconds_of(retry_after: str) -> float:
    """The seconds that a `Retry-After` means: a number or a date (RFC 9110, 10.2.3); 0 for what is neither."""
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max(0.0, moment.timestamp() - time.time())
