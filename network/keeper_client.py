"""The daemon's side of the keeper: finds the one that an earlier daemon left, starts one when it is needed.

When the keeper ends for no reason of ours it is started again and told all; `restarted` is called then, because the
ports of its name servers may be others now.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from wherry.core.errors import FailedPrecondition, Internal, PermissionDenied, Unavailable, WherryError
from wherry.network.protocol import VERSION

_TIMEOUT = 10.0
_LINE_LIMIT = 64 << 20
# seconds before the next start of one that ends again and again
_BACKOFF = (0.0, 0.1, 0.5, 2.0, 10.0)
Wanted = Callable[[], Mapping[str, Any]]


class KeeperClient:
    """Requests to `wherry.network.keeper`. For one event loop."""

    def __init__(
        self,
        path: str,
        wanted: Wanted,
        restarted: Callable[[Mapping[str, int]], Awaitable[None]],
        hub: str = "",
        python: str = sys.executable,
    ) -> None:
        """`path` of its socket; `wanted` gives `networks` and `owners` as a `sync` has them.

        `hub` is the file of the network namespace with an ordinary user's bridges.
        """
        self._hub = hub
        self._path, self._wanted, self._restarted, self._python = path, wanted, restarted, python
        self._lock = asyncio.Lock()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._watching: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._closing = False
        self._fails = 0
        self.pid = 0

    async def adopt(self) -> bool:
        """Take over the keeper that is there; False where there is none."""
        async with self._lock:
            return await self._connect()

    async def sync(self) -> Mapping[str, int]:
        """Tell it all; the ports of the name servers by network. Starts it where there is none."""
        async with self._lock:
            await self._ensure()
            return await self._sync()

    async def network(self, identity: str, network: Mapping[str, Any] | None) -> int:
        """Serve a network's names, or no longer; the port."""
        answer = await self._request({"op": "network", "id": identity, "network": network})
        return int(answer["port"])

    async def owner(self, key: str, owner: Mapping[str, Any] | None) -> list[int]:
        """A container's names and ports, or None without them; the host's ports in the order of `ports`.

        Raises FailedPrecondition where a port is in use.
        """
        answer = await self._request({"op": "owner", "key": key, "owner": owner})
        return [int(port) for port in answer["ports"]]

    @property
    def there(self) -> bool:
        """Whether one runs that we speak with."""
        return self._writer is not None

    @property
    def adopted(self) -> bool:
        """Whether an earlier daemon started the one that runs."""
        return self._process is None or self._process.pid != self.pid

    async def leave(self) -> None:
        """Hang up: one that keeps nothing ends then, and the next request starts another."""
        async with self._lock:
            if self._watching is not None:
                self._watching.cancel()
                self._watching = None
            self._disconnect()

    async def close(self) -> None:
        """Leave it; it stays for as long as it keeps something."""
        self._closing = True
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        self._disconnect()

    # -- one connection

    async def _request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        async with self._lock:
            for attempt in (0, 1):
                await self._ensure()
                try:
                    return await self._exchange(request)
                except Unavailable:
                    # it ended just now; a new one is told all before it is told this
                    self._disconnect()
                    if attempt:
                        raise
        raise Unavailable("the network keeper is gone")

    async def _exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        reader, writer = self._reader, self._writer
        if reader is None or writer is None:
            raise Unavailable("the network keeper is gone")
        try:
            writer.write(json.dumps(request).encode() + b"\n")
            async with asyncio.timeout(_TIMEOUT):
                line = await reader.readline()
        except TimeoutError:
            self._disconnect()
            raise Unavailable(f"the network keeper didn't answer in {_TIMEOUT:.0f} s") from None
        except (OSError, ValueError) as error:
            raise Unavailable(f"the network keeper is gone: {error}") from error
        if not line:
            raise Unavailable("the network keeper is gone")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _refused(*answer["error"])
        return answer

    async def _sync(self) -> Mapping[str, int]:
        answer = await self._exchange({"op": "sync", **self._wanted()})
        ports: Mapping[str, int] = answer["ports"]
        return ports

    async def _ensure(self) -> None:
        if self._writer is not None and self._reader is not None and not self._reader.at_eof():
            return
        if not await self._connect():
            await self._start()
            ports = await self._sync()
            telling = asyncio.create_task(self._tell(ports))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    async def _tell(self, ports: Mapping[str, int]) -> None:
        with contextlib.suppress(WherryError):  # who asks for something next is told what is wrong
            await self._restarted(ports)

    async def _connect(self) -> bool:
        """Connects to a keeper of our version; another one is left to end by itself when its ports are taken away."""
        self._disconnect()
        try:
            async with asyncio.timeout(_TIMEOUT):
                reader, writer = await asyncio.open_unix_connection(sock=_connected(self._path), limit=_LINE_LIMIT)
        except (OSError, TimeoutError):
            return False
        self._reader, self._writer = reader, writer
        try:
            hello = await self._exchange({"op": "hello"})
        except WherryError:
            self._disconnect()
            return False
        if hello.get("version") != VERSION:
            with contextlib.suppress(WherryError):
                await self._exchange({"op": "sync", "networks": {}, "owners": {}})
            self._disconnect()
            return False
        self.pid = int(hello["pid"])
        self._watch()
        return True

    async def _start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        with listener:
            _bind(listener, self._path)
            listener.listen(8)
            try:
                # a session of its own: what ends the daemon's process group doesn't end it
                self._process = await asyncio.create_subprocess_exec(
                    self._python,
                    "-I",
                    "-m",
                    "wherry.network.keeper",
                    str(listener.fileno()),
                    self._path,
                    *([self._hub] if self._hub else []),
                    pass_fds=(listener.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                raise Unavailable(f"the network keeper can't be started: {error}") from error
        if not await self._connect():
            raise Unavailable("the network keeper doesn't answer")

    def _disconnect(self) -> None:
        writer, self._writer, self._reader = self._writer, None, None
        if writer is not None:
            writer.close()

    # -- its end

    def _watch(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        self._watching = asyncio.create_task(self._mourn(self.pid))

    async def _mourn(self, pid: int) -> None:
        """Waits for the keeper's end and starts another one where there is something to keep."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            pidfd = -1
        try:
            if pidfd >= 0:
                ended = asyncio.Event()
                loop = asyncio.get_running_loop()
                loop.add_reader(pidfd, ended.set)
                try:
                    await ended.wait()
                finally:
                    loop.remove_reader(pidfd)
        finally:
            if pidfd >= 0:
                os.close(pidfd)
        while not self._closing:
            await asyncio.sleep(_BACKOFF[min(self._fails, len(_BACKOFF) - 1)])
            self._fails += 1
            async with self._lock:
                if self._writer is not None and self.pid != pid:
                    return  # somebody who asked for something started one meanwhile, who watches it, too
                self._disconnect()
                if not self._wanted()["owners"]:
                    return
                self._watching = None  # the new one is watched by a task of its own
                try:
                    await self._ensure()
                except WherryError:
                    continue
            asyncio.get_running_loop().call_later(60, self._calm)
            return

    def _calm(self) -> None:
        self._fails = 0


def _bind(listener: socket.socket, path: str) -> None:
    """Binds with mode 0600, however long the path is (unix(7): sun_path has 108 bytes)."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    old = os.umask(0o177)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.umask(old)
        os.close(folder)


def _connected(path: str) -> socket.socket:
    """A connection to it. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # the backlog is long enough that this waits for nobody
            sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
        finally:
            os.close(folder)
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _refused(code: int, text: str) -> WherryError:
    if code == errno.EADDRINUSE:
        return FailedPrecondition(f"{text}: failed precondition")
    if code == errno.EADDRNOTAVAIL:
        return FailedPrecondition(f"{text} (no interface of the host has it): failed precondition")
    if code in (errno.EACCES, errno.EPERM):
        # ip(7): which are root's alone is a setting
        return PermissionDenied(f"{text} (low ports are root's: sysctl net.ipv4.ip_unprivileged_port_start)")
    return Internal(text)
