"""A `wherryd` of one's own: started for a program or a command, stopped with it.

It has folders of its own, so that it disturbs no other; its containers' shims outlive it, and the next one over the
same folders finds them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Self

from wherry.core import places
from wherry.core.errors import Unavailable
from wherry.proto.ttrpc import sockets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wherry.client.api import Client

# seconds until a daemon must serve: a cold start takes about one
START = 60.0
# seconds that it has for its end, before it is killed
STOP = 15.0
# lines of its log that an error shows
LINES = 15


# its folders are not those of the daemon that a service manager starts
NAME = "wherry-embedded"


# what `wherryd systemd install --user --enable` leaves, with and without --socket
_ENABLED = ("default.target.wants/wherryd.service", "sockets.target.wants/wherryd.socket")


def start_service(address: str) -> bool:
    """Have the user's service manager start the user's daemon, where it was told to keep one (`wherryd systemd install
    --user`): one of our own would stand in its way. Whether somebody answers at the address then."""
    units = os.path.join(places.config_folder(), "systemd", "user")
    if not any(os.path.lexists(os.path.join(units, link)) for link in _ENABLED):
        return False
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            ["systemctl", "--user", "start", "wherryd.service"], capture_output=True, timeout=START, check=True
        )
        return _answers(address)
    return False


def _answers(address: str) -> bool:
    with contextlib.suppress(Unavailable):
        sockets.connect(f"{address}.ttrpc", 1.0).close()
        return True
    return False


class Embedded:
    """A daemon as a child process. One that already serves on the same folders is used, and left running."""

    def __init__(
        self,
        *,
        root: str = "",
        state: str = "",
        address: str = "",
        log_level: str = "info",
        args: Sequence[str] = (),
        stays: bool = False,
    ) -> None:
        """`args` are further arguments of `wherryd`; with `stays` it isn't stopped with us. Nothing starts here."""
        self.root = os.path.abspath(root or places.root(NAME))
        self.state = os.path.abspath(state or places.state(NAME))
        self.address = address or os.path.join(self.state, "wherryd.sock")
        self.log = os.path.join(self.state, "wherryd.log")
        self._args = [*args, "--log-level", log_level]
        self._stays = stays
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The daemon's process id; None where it isn't ours or doesn't run."""
        return self._process.pid if self._process is not None else None

    def start(self, timeout: float = START) -> None:
        """Starts it and waits until it serves. Raises Unavailable with the end of its log where it doesn't."""
        if self._process is not None or _answers(self.address):
            return
        os.makedirs(self.root, mode=0o711, exist_ok=True)
        os.makedirs(self.state, mode=0o711, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="wherry-ready-")
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as ready:
                ready.bind(os.path.join(folder, "s"))
                self._spawn(os.path.join(folder, "s"))
                self._wait(ready, timeout)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def stop(self) -> None:
        """Ends the daemon that `start` started; its containers run on."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None or self._stays:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """Ends it as a crash would (SIGKILL)."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _spawn(self, notify: str) -> None:
        command = [sys.executable, "-m", "wherry.daemon", "--address", self.address]
        command += ["--root", self.root, "--state", self.state, *self._args]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": notify},
                # a Ctrl-C on the terminal is for the container, not for the daemon under it
                process_group=None if self._stays else 0,
                start_new_session=self._stays,
            )

    def _wait(self, ready: socket.socket, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        ready.settimeout(0.05)
        while self._process is not None and self._process.poll() is None and time.monotonic() < deadline:
            try:
                words = ready.recv(4096).split(b"\n")
            except TimeoutError:
                continue
            if b"READY=1" in words:
                return
        code = None if self._process is None else self._process.poll()
        self.kill()
        if code and "is in use by" in self._tail() and self._another(deadline):
            return
        why = f"didn't serve within {timeout:.0f} s" if code is None else f"ended with exit code {code}"
        raise Unavailable(f"the embedded wherryd {why}; the end of {self.log}:\n{self._tail()}")

    def _another(self, deadline: float) -> bool:
        """Whether somebody else, who was first, serves in time: two clients may start a daemon at the same moment."""
        while time.monotonic() < deadline:
            if _answers(self.address):
                return True
            time.sleep(0.02)
        return False

    def _tail(self) -> str:
        try:
            with open(self.log, errors="replace", encoding="utf-8") as log:
                return "".join(log.readlines()[-LINES:]).rstrip()
        except OSError as error:
            return f"(no log: {error.strerror})"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Client:
        """Starts it and connects: `async with Embedded() as client`."""
        import asyncio

        from wherry.client.address import connect

        await asyncio.to_thread(self.start)
        try:
            self._client = await connect(self.address)
        except BaseException:
            await asyncio.to_thread(self.stop)
            raise
        return self._client

    async def __aexit__(self, *_: object) -> None:
        import asyncio

        await self._client.close()
        await asyncio.to_thread(self.stop)
