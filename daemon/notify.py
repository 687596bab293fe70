"""What systemd and a daemon tell each other: readiness (sd_notify(3)) and sockets handed over (sd_listen_fds(3))."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Final

import structlog

log = structlog.get_logger(__name__)

_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START


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
