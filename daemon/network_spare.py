"""A network made in advance: what an ordinary user's container waits for longest is the program that makes its network.

While one container starts, the network of the next is made: a namespace with such a program (usermode.py), for a
container without published ports, which are told to the program at its start. There is one at most; it goes when nobody
wants it for a while, and with the daemon. One that a killed daemon left is swept by the next like a dead container's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import NamedTuple

from wherry.core.errors import WherryError
from wherry.daemon.network_kernel import Kernel
from wherry.network import usermode
from wherry.network.model import DEFAULT, Connection, Endpoint

INTERFACE = "eth0"
# beside those of containerd's namespaces, which begin with a letter or a digit
_FOLDER = ".spare"
# seconds: without anybody who wants it; behind the start of a container, which has the processors for itself
_KEPT, _BEHIND = 30.0, 0.05


class Made(NamedTuple):
    """The file that holds the namespace, the folder of its program, and the endpoint as the program set it up."""

    netns: str
    folder: str
    endpoint: Endpoint


class Spare:
    """The one that is there, or is being made. For one event loop."""

    def __init__(self, kernel: Kernel, folder: str) -> None:
        """`folder` gets a folder for the program."""
        self._kernel = kernel
        self._top = folder
        self._making: asyncio.Task[Made | None] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def prepare(self) -> None:
        """Make one where there is none: nothing waits for it."""
        if self._closed:
            return
        if self._making is None:
            self._making = asyncio.get_running_loop().create_task(self._make())
        self._rest()

    async def give(self, connection: Connection, endpoints: Sequence[Endpoint]) -> bool:
        """It is this container's, where that wants just such a one; behind its start the next one is made."""
        if connection.ports or [(item.kind, item.interface) for item in endpoints] != [("user", INTERFACE)]:
            return False
        made = await self._take()
        if made is not None:
            connection.netns = made.netns
            endpoints[0].ipv4, endpoints[0].gateway4 = made.endpoint.ipv4, made.endpoint.gateway4
        asyncio.get_running_loop().call_later(_BEHIND, self.prepare)
        return made is not None

    async def _take(self) -> Made | None:
        making, self._making = self._making, None
        made = await asyncio.shield(making) if making is not None else None
        if made is None or usermode.attached(made.folder):
            return made
        await self._remove(made)
        return None

    async def close(self) -> None:
        """Without it."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._leaving is not None:
            await self._leaving
        await self._drop()

    async def _make(self) -> Made | None:
        token = os.urandom(4).hex()
        made = Made(
            os.path.join(self._kernel.folder, _FOLDER, f"spare.{token}"),
            os.path.join(self._top, token),
            Endpoint(DEFAULT, DEFAULT, INTERFACE, "user"),
        )
        try:
            await self._kernel.namespace(made.netns)
            await usermode.attach(usermode.find(), made.netns, made.endpoint, (), made.folder)
        except (WherryError, OSError):  # who asks for a network next is told what is wrong
            await self._remove(made)
            return None
        return made

    async def _remove(self, made: Made) -> None:
        usermode.detach(made.folder)
        with contextlib.suppress(WherryError, OSError):
            await self._kernel.detach(Connection("", "", "bridge", netns=made.netns), (), whole=True)

    async def _drop(self) -> None:
        making, self._making = self._making, None
        if making is not None and (made := await making) is not None:
            await self._remove(made)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(_KEPT, self._leave)

    def _leave(self) -> None:
        self._leaving = asyncio.get_running_loop().create_task(self._drop())
