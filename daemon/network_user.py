"""Networks of an ordinary user, who may touch none of the host's interfaces.

`bridge`, the default, is a program of the user's own (usermode.py) for each container. Named networks, and those of
CNI, are in one network namespace of the user's, the hub (network/hub.py): there they are made as root makes them on the
host, and one such program leads from there to the outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Collection

from wherry.core.errors import FailedPrecondition, InvalidArgument
from wherry.core.names import quote
from wherry.network import usermode
from wherry.network.hub import remove
from wherry.network.model import DEFAULT, Connection, Endpoint
from wherry.proto import network_pb2 as pb

KIND = "user"


class UserNetwork:
    """What stands in for root's rights over the host's interfaces."""

    def __init__(self, folder: str) -> None:
        """`folder` gets a folder for each container, and one for the hub."""
        self._top = folder
        self._uplink = os.path.join(folder, "hub")
        self._linking = asyncio.Lock()
        # the hub's file
        self.hub = os.path.join(folder, "hub.net")

    # -- the default network

    def endpoint(self, asked: pb.Attachment, interface: str) -> Endpoint:
        """A container's one endpoint on it. Raises InvalidArgument, FailedPrecondition without a program."""
        if asked.ipv4 or asked.ipv6 or asked.mac:
            raise InvalidArgument(
                f"network {quote(DEFAULT)} gives no addresses that are asked for, without root: use a named network"
            )
        usermode.find()
        return Endpoint(DEFAULT, DEFAULT, interface, KIND)

    async def add(self, connection: Connection, endpoint: Endpoint) -> None:
        """Connect it, with its published ports where no other network of the container has them."""
        ports = connection.ports if connection.relayed() is None else []
        program = usermode.find()
        usermode.choose_ports(ports)
        usermode.check_ports(program, ports)
        await usermode.attach(program, connection.netns, endpoint, ports, self._folder(connection))

    def delete(self, connection: Connection) -> None:
        """Take it off. None there is fine."""
        usermode.detach(self._folder(connection))

    def nameservers(self, connection: Connection) -> str:
        """`resolv.conf` for a container on it, "" for one that isn't."""
        if not any(item.kind == KIND for item in connection.endpoints):
            return ""
        return f"nameserver {usermode.nameserver(usermode.find())}\n"

    @staticmethod
    def program() -> str:
        """What makes it: the program's name, "none" where there is none."""
        try:
            return os.path.basename(usermode.find())
        except FailedPrecondition:
            return "none"

    def _folder(self, connection: Connection) -> str:
        # short: slirp4netns listens there, and a socket's path has 108 bytes
        return os.path.join(self._top, connection.netns.rpartition(".")[2])

    # -- the hub

    async def link(self, hub: int) -> None:
        """The hub, which the worker made and has this number, has a way to the outside.

        Raises FailedPrecondition without a program for that.
        """
        async with self._linking:
            if usermode.attached(self._uplink) and _read(os.path.join(self._uplink, "hub")) == str(hub):
                return
            usermode.detach(self._uplink)  # of a hub before this one, say
            await usermode.uplink(usermode.find(), self.hub, self._uplink)
            with open(os.path.join(self._uplink, "hub"), "w", encoding="ascii") as file:  # noqa: ASYNC230 - in memory
                file.write(str(hub))

    def remove(self) -> None:
        """The hub goes, when no container is on it. None there is fine."""
        usermode.detach(self._uplink)
        remove(self.hub)

    def sweep(self, alive: Collection[Connection]) -> None:
        """Ends the programs of containers that aren't there any more."""
        kept = {self._uplink, self.hub, *(self._folder(item) for item in alive)}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._top):
                if (path := os.path.join(self._top, name)) not in kept:
                    usermode.detach(path)


def refuse_ports(connection: Connection) -> None:
    """Only what is relayed can be published without root. Raises InvalidArgument."""
    for port in connection.ports:
        if port.protocol not in {"tcp", "udp"}:
            raise InvalidArgument(f"port {port.container_port}/{port.protocol} can't be published without root")


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
