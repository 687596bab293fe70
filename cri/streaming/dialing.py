"""A connection to a port within a pod.

A socket belongs to the network namespace of the thread that made it. A thread of its own enters the pod's, makes the
socket and ends: nothing else of the daemon is ever seen from there, and no process is started for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Final

from wherry.core.errors import Unavailable
from wherry.linux import syscalls

# seconds; a port within the same kernel answers at once, or its queue is full
CONNECT: Final = 10.0
# as containerd: what "localhost" is, the old way first
_LOCALHOST: Final = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


async def dial(netns: str, port: int) -> socket.socket:
    """A non-blocking socket that is connected to localhost:`port` in a network namespace (a path, "": the host's).

    Raises Unavailable.
    """
    reasons = []
    for family, address in _LOCALHOST:
        try:
            made = await _made(netns, family)
        except OSError as error:
            reasons.append(f"entering {netns}: {error.strerror}" if netns else str(error))
            continue
        try:
            async with asyncio.timeout(CONNECT):
                await asyncio.get_running_loop().sock_connect(made, (address, port))
        except TimeoutError:
            made.close()
            reasons.append(f"{address}: no answer within {CONNECT:g} s")
        except OSError as error:
            made.close()
            reasons.append(f"{address}: {os.strerror(error.errno) if error.errno else error}")
        except BaseException:
            made.close()
            raise
        else:
            return made
    where = f" inside namespace {netns!r}" if netns else ""
    raise Unavailable(f"failed to connect to localhost:{port}{where}: {'; '.join(reasons)}")


async def _made(netns: str, family: int) -> socket.socket:
    if not netns:
        return _plain(family)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[socket.socket] = loop.create_future()

    def enter() -> None:
        try:
            fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
            try:
                syscalls.setns(fd, syscalls.CLONE_NEWNET)
            finally:
                os.close(fd)
            made = _plain(family)
        except OSError as error:
            _tell(loop, partial(_fail, done, error))
        else:
            _tell(loop, partial(_hand_over, done, made))

    threading.Thread(target=enter, name="wherry-netns", daemon=True).start()
    return await done


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the daemon ends
        loop.call_soon_threadsafe(call)


def _fail(done: asyncio.Future[socket.socket], error: OSError) -> None:
    if not done.done():
        done.set_exception(error)


def _hand_over(done: asyncio.Future[socket.socket], made: socket.socket) -> None:
    if done.done():  # whoever asked went away
        made.close()
    else:
        done.set_result(made)


def _plain(family: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    made.setblocking(False)
    return made
