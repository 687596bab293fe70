"""The one network that an ordinary user's containers have: `bridge` is a program of the user's own."""

from __future__ import annotations

import os

from wherry.core.errors import InvalidArgument
from wherry.core.names import quote
from wherry.network import usermode
from wherry.network.model import DEFAULT, Connection, Endpoint

KIND = "user"


class UserNetwork:
    """What stands in for bridges in a user namespace, which may touch none of the host's interfaces."""

    def __init__(self, folder: str) -> None:
        """`folder` gets a folder for each container."""
        self._top = folder

    def endpoint(self, name: str, mode: str) -> Endpoint:
        """A container's one endpoint. Raises InvalidArgument for others, FailedPrecondition without a program."""
        if mode != "bridge" and name not in {DEFAULT, "default"}:
            raise InvalidArgument(f"network {quote(name)}: without root there is one network alone, {quote(DEFAULT)}")
        usermode.find()
        return Endpoint(DEFAULT, DEFAULT, "eth0", KIND)

    async def add(self, connection: Connection, endpoint: Endpoint) -> None:
        """Connect it, with its published ports."""
        usermode.choose_ports(connection.ports)
        await usermode.attach(usermode.find(), connection.netns, endpoint, connection.ports, self._folder(connection))

    def delete(self, connection: Connection) -> None:
        """Take it off. None there is fine."""
        usermode.detach(self._folder(connection))

    def nameservers(self, connection: Connection) -> str:
        """`resolv.conf` for a container on it, "" for one that isn't."""
        if not any(item.kind == KIND for item in connection.endpoints):
            return ""
        return f"nameserver {usermode.nameserver(usermode.find())}\n"

    def _folder(self, connection: Connection) -> str:
        # short: slirp4netns listens there, and a socket's path has 108 bytes
        return os.path.join(self._top, connection.netns.rpartition(".")[2])
