"""Network namespaces that files keep alive: made here, without a process, by a thread that ends afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import threading
from typing import Final

from wherry.linux import mounts
from wherry.linux import syscalls as sc

_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1


async def make(path: str) -> None:
    """Make a namespace whose loopback is up, and bind it to a file. Raises OSError; then nothing is left."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell(error: BaseException | None) -> None:
        if done.cancelled():
            if error is None:
                remove(path)
        elif error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def work() -> None:
        # a thread for this alone: it stays in the new namespace, which nobody else may find himself in
        error: BaseException | None = None
        try:
            _make(path)
        except BaseException as caught:  # noqa: BLE001 -- handed to who waits
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, error)

    threading.Thread(target=work, name="netns", daemon=True).start()
    await done


def _make(path: str) -> None:
    sc.unshare(sc.CLONE_NEWNET)
    _loopback_up()
    os.makedirs(os.path.dirname(path), 0o711, exist_ok=True)
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    try:
        sc.mount("/proc/thread-self/ns/net", path, "", sc.MS_BIND)
    except OSError:
        os.unlink(path)
        raise


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack_from("16sh", fcntl.ioctl(sock, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def is_there(path: str) -> bool:
    """Whether a path is a network namespace that is kept."""
    return bool(path) and os.path.exists(path) and (path.startswith("/proc/") or mounts.is_mountpoint(path))


def remove(path: str) -> None:
    """Let go of it; it is gone with the last process in it. Fine where there is none."""
    with contextlib.suppress(OSError):
        mounts.unmount_all(path, sc.MNT_DETACH)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
