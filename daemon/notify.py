"""What systemd and a daemon tell each other: readiness (sd_notify(3)) and sockets handed over (sd_listen_fds(3)).

gRPC in Python can't adopt a listening socket, so what is accepted on one that was handed over is relayed to a private
one; `Relay` does that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Coroutine
from typing import Any, Final

import structlog

log = structlog.get_logger(__name__)

_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
_CHUNK: Final = 256 * 1024


def notify(*lines: str) -> None:
    """Tell the service manager (`READY=1`, `STOPPING=1`, `STATUS=…`); without one, or where it is gone, nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
        sock.send("\n".join(lines).encode())


def listeners() -> dict[str, socket.socket]:
    """The unix sockets that were handed over, by path; their variables go from the environment: no child is meant.

    Sockets of another family, and those that don't listen, are closed and reported.
    """
    count, pid = os.environ.pop("LISTEN_FDS", "0"), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found: dict[str, socket.socket] = {}
    for number in range(_FIRST_FD, _FIRST_FD + int(count)):
        try:
            os.set_inheritable(number, False)
            sock = socket.socket(fileno=number)
        except OSError as error:
            log.warning("handed over descriptor is no socket", fd=number, error=str(error))
            continue
        if sock.family != socket.AF_UNIX or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            log.warning("handed over socket is no listening unix socket", fd=number)
            sock.close()
            continue
        sock.setblocking(False)
        found[sock.getsockname()] = sock
    return found


class Relay:
    """Accepts on a socket that was handed over and connects each client to a private socket, both ways."""

    def __init__(self, listener: socket.socket, target: str) -> None:
        self._listener = listener
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begin to accept."""
        self._server = await asyncio.start_unix_server(self._client, sock=self._listener, limit=_CHUNK)

    async def close(self) -> None:
        """Stop accepting (the service manager keeps the socket) and hang up."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._spawn(self._relay(reader, writer))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            back_reader, back_writer = await asyncio.open_unix_connection(self._target, limit=_CHUNK)
        except OSError as error:
            log.warning("relay has no server", target=self._target, error=str(error))
            writer.close()
            return
        try:
            await asyncio.gather(_pump(reader, back_writer), _pump(back_reader, writer))
        except OSError:
            pass  # one side hung up in the middle: the other learns it by the close below
        finally:
            writer.close()
            back_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
