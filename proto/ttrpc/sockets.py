"""Unix sockets that are files: bound with the right mode from their first moment on, at paths of any length."""

from __future__ import annotations

import errno
import os
import stat

from wherry.core.errors import AlreadyExists, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import TypeVar

    S = TypeVar("S", bound=socket.SocketType)

# sun_path of unix(7), without the closing zero byte
MAX_PATH = 107
# connections that wait to be accepted
BACKLOG = 512


def bind(path: str, mode: int = 0o600, *, replace: bool = False) -> socket.socket:
    """A listening, non-blocking socket at `path`.

    The kernel makes the file with the mode of the socket's own inode, so that it is set before binding and neither the
    umask (the process's, for all threads) nor a moment without protection is needed. `replace` removes a socket that is
    there and that nobody listens on. Raises AlreadyExists where somebody listens (or a file is there), OSError.
    """
    import socket  # noqa: PLC0415 - see connect_plain

    if replace:
        _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(sock.fileno(), mode)
        _at(path, sock.bind)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExists(f"{path}: address already in use: already exists") from error
        error.filename = error.filename or path
        raise
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: str, timeout: float | None = None) -> socket.socket:
    """A connected, blocking socket with this timeout in seconds. Raises Unavailable where nobody listens."""
    import socket  # noqa: PLC0415 - see connect_plain

    return _connected(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC), path, timeout)


def connect_plain(path: str, timeout: float | None = None) -> socket.SocketType:
    """As `connect`, for the command line: the type in C, without the module that makes enums of hundreds of numbers."""
    import _socket  # noqa: PLC0415

    return _connected(_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC), path, timeout)


def _connected(sock: S, path: str, timeout: float | None) -> S:
    sock.settimeout(timeout)
    try:
        _at(path, sock.connect)
    except OSError as error:
        sock.close()
        reason = "timed out" if isinstance(error, TimeoutError) else os.strerror(error.errno or errno.EIO).lower()
        raise Unavailable(f"connection to {path}: {reason}: unavailable") from error
    except BaseException:
        sock.close()
        raise
    return sock


def strip_scheme(address: str) -> str:
    """The path of an address as containerd and its shims write it (`unix:///run/x.sock`)."""
    return address.removeprefix("unix://")


def _at(path: str, call: Callable[[str], None]) -> None:
    """Call bind or connect with a name that fits sun_path: a long one through its folder's descriptor."""
    if len(os.fsencode(path)) <= MAX_PATH:
        call(path)
        return
    folder, name = os.path.split(path)
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        call(f"/proc/self/fd/{fd}/{name}")
    finally:
        os.close(fd)


def _remove_stale(path: str) -> None:
    try:
        connect(path, timeout=1).close()
    except Unavailable as error:
        cause = error.__cause__
        # a file that is no socket refuses connections too, but isn't ours to remove
        if isinstance(cause, ConnectionRefusedError) and stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
        elif not isinstance(cause, FileNotFoundError):
            raise AlreadyExists(f"{path}: {error.message}: already exists") from error
    else:
        raise AlreadyExists(f"{path}: address already in use: already exists")
