"""One run of the command line: where the daemon is, the connection to it, and what global options say."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from wherry.client.address import connect_blocking, default_address, default_namespace
from wherry.client.api import Client
from wherry.core import places
from wherry.core.errors import PermissionDenied, Unavailable

if TYPE_CHECKING:
    from wherry.client.embedded import Embedded


# seconds after which a daemon that was started for a user leaves when nobody calls any more
IDLE = "60"


class NoDaemon(Unavailable):
    """Nobody answers at the address; its text says how to start somebody."""


class Session:
    """The global options (times in seconds, 0 is no limit), and the client that they lead to."""

    def __init__(self) -> None:
        self.address = default_address()
        self.namespace = default_namespace()
        self.timeout = 0.0
        self.connect_timeout = 10.0
        self.debug = False
        self.embedded = False
        self.root = ""
        self.state = ""
        self._started = time.monotonic()
        self._client: Client | None = None
        self._daemon: Embedded | None = None

    @property
    def client(self) -> Client:
        """The client, connected when it is first asked for. Raises NoDaemon, PermissionDenied."""
        if self._client is None:
            self._client = self.another()
        return self._client

    def another(self) -> Client:
        """A client over a connection of its own (for signals that interrupt a call on the first)."""
        if self.embedded and self._daemon is None:
            self._daemon = self._embed()
            self.address = self._daemon.address
        try:
            transport = connect_blocking(self.address, self.connect_timeout or None)
        except PermissionDenied:
            raise
        except Unavailable as error:
            if places.is_users() and not self.embedded and self.address == places.address():
                # nobody starts a daemon for an ordinary user, who expects none to be needed: it comes and goes
                self._users_daemon()
                return self.another()
            raise NoDaemon(
                f"no daemon answers at {self.address} ({_reason(error.message)}): start one with 'systemctl start "
                "wherryd' or 'wherryd &', name another with --address, or use a passing one: 'wherry --embedded ...'"
            ) from error
        deadline = self._started + self.timeout if self.timeout else None
        return Client.over(transport, self.namespace, deadline=deadline)

    def _embed(self) -> Embedded:
        from wherry.client.embedded import Embedded

        daemon = Embedded(root=self.root, state=self.state)
        daemon.start()
        return daemon

    def _users_daemon(self) -> None:
        from wherry.client.embedded import Embedded, start_service

        if not start_service(self.address):
            args = ["--exit-idle", IDLE]
            Embedded(root=places.root(), state=places.state(), address=self.address, args=args, stays=True).start()

    async def close(self) -> None:
        """Ends the connection, and the daemon that was started for this command."""
        if self._client is not None:
            await self._client.close()
            self._client = None
        if self._daemon is not None:
            self._daemon.stop()
            self._daemon = None


def _reason(text: str) -> str:
    """Why a connection failed, without what the message around it says anyway: `connection to PATH: refused: …`."""
    return text.removesuffix(": unavailable").rpartition(": ")[2]
