"""The owner's side of the keeper (`wherry.client.keeper`): started with the first sandbox, told of each."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys

from wherry.core import idle, places
from wherry.core.errors import Unavailable
from wherry.linux.process import start_time


def default_folder() -> str:
    """Where sandboxes keep what outlives a process."""
    return os.path.join(places.root("wherry-client"), "sandboxes")


class Keeper:
    """One process for all sandboxes of one client."""

    def __init__(self, address: str, folder: str = "") -> None:
        """`address` is the daemon's socket; `folder` holds a folder for each sandbox. Nothing starts here."""
        self.address = os.path.abspath(address)
        self.folder = os.path.abspath(folder or default_folder())
        self.idle = ""
        self.pid = 0
        self.started = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Starts the process where it doesn't run yet. Raises Unavailable where that can't be done."""
        async with self._starting:
            if self._process is None:
                await asyncio.to_thread(self._spawn)

    def _spawn(self) -> None:
        try:
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            self.idle = idle.place(os.path.dirname(self.folder))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "wherry.client.keeper", self.folder],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                # a signal for the owner's group isn't for it
                start_new_session=True,
            )
        except OSError as error:
            raise Unavailable(f"can't start the keeper of sandboxes in {self.folder}: {error}") from error
        self.pid = self._process.pid
        self.started = start_time(self.pid)

    def remember(self, name: str, seconds: float) -> None:
        """From now on it removes this sandbox when we end, or after so many seconds (0: no limit)."""
        self._say(f"+ {name} {seconds}\n")

    def forget(self, name: str) -> None:
        """The sandbox is gone."""
        self._say(f"- {name}\n")

    def _say(self, line: str) -> None:
        pipe = self._process.stdin if self._process is not None else None
        if pipe is None:
            return
        # a keeper that was killed is replaced by the next one of this host, which finds the records
        with contextlib.suppress(BrokenPipeError):
            pipe.write(line.encode())
            pipe.flush()

    async def close(self) -> None:
        """Ends it, after it has removed what is left."""
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(process.communicate)
