"""Shims in reserve: a shim whose container was deleted is the next container's, if one comes soon.

Where containers come and go, this saves half of what each of them costs (`wherry.shim.reuse` has the shim's side). Few
are kept, and for a moment only: on a quiet machine there is none.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

import structlog
from google.protobuf import empty_pb2, wrappers_pb2

from wherry.core.errors import DeadlineExceeded, WherryError
from wherry.daemon.link import Shim
from wherry.proto import wherry_shim_pb2 as _shim  # noqa: F401  # declares the service
from wherry.proto.ttrpc.client import TtrpcClient
from wherry.shim.client import REUSE

log = structlog.get_logger(__name__)

# how many at most, for how many seconds, and for how many containers: whatever a shim may gather, it gathers no more
_MOST: Final = 8
_KEPT: Final = 1.0
_LIVES: Final = 64
# seconds for a shim to take a container, which is a few system calls; one that doesn't answer is left
_OCCUPY: Final = 2.0


class Vacancy(NamedTuple):
    """A shim without a container: the connection to it, its pid, and how many containers it has had."""

    client: TtrpcClient
    pid: int
    lives: int


class Vacant:
    """Those of one daemon. For one event loop."""

    def __init__(self) -> None:
        self._there: dict[Vacancy, asyncio.TimerHandle] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._coming = 0
        self._closed = False

    async def keep(self, shim: Shim, limit: float) -> bool:
        """Have a shim forget its container, within so many seconds; False where it has to leave instead.

        The shim's connection is ours then, and this object's user can no more call it.
        """
        client = shim.client
        if not isinstance(client, TtrpcClient) or client.closed or client.busy:
            return False  # an end of the connection is what tells those who still wait
        if self._closed or len(self._there) + self._coming >= _MOST or shim.lives >= _LIVES:
            return False
        self._coming += 1
        try:
            await shim.call("Vacate", empty_pb2.Empty(), empty_pb2.Empty, limit, REUSE)
        except WherryError:
            return False
        finally:
            self._coming -= 1
        shim.part()
        if self._closed or client.closed or client.busy:
            await client.close()  # and the shim goes with it
            return True
        one = Vacancy(client, shim.bootstrap.pid, shim.lives)
        self._there[one] = asyncio.get_running_loop().call_later(_KEPT, self._dismiss, one)
        client.watch(lambda error: self._forget(one))
        return True

    async def give(self, words: bytes) -> Vacancy | None:
        """A shim that has become another container's, which `words` describe; None where there is none that would."""
        while self._there:
            one = next(reversed(self._there))  # the warmest
            self._forget(one)
            try:
                await one.client.call(REUSE, "Occupy", wrappers_pb2.BytesValue(value=words), timeout=_OCCUPY)
            except WherryError as error:
                log.warning("a shim in reserve is no good", pid=one.pid, error=error.message)
                await one.client.close()
                if isinstance(error, DeadlineExceeded):
                    return None  # a machine that thrashes: no second one is tried
            else:
                return one._replace(lives=one.lives + 1)
        return None

    async def close(self) -> None:
        """Let all of them go."""
        self._closed = True
        for one in tuple(self._there):
            self._dismiss(one)
        if self._leaving:
            await asyncio.wait(self._leaving)

    def _forget(self, one: Vacancy) -> None:
        timer = self._there.pop(one, None)
        if timer is not None:
            timer.cancel()

    def _dismiss(self, one: Vacancy) -> None:
        """It ends with its connection."""
        self._forget(one)
        leaving = asyncio.get_running_loop().create_task(one.client.close())
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)
