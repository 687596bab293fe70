"""Who may use a folder or a socket: one daemon at a time, and the refused one is told who has it.

A lock is a file that stays where it is, locked with flock(2) for as long as the daemon lives (the kernel lets go when
it dies, however it dies). Its content says who holds it: a line of JSON with pid, address, root and state, and with
`exit_idle` where it leaves by itself.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import time

from wherry.core.errors import FailedPrecondition
from wherry.proto.addresses import short_path

# seconds between two looks at who holds a lock
_LOOK = 0.02


class Lock:
    """A held lock; let go by `close` or with the process. Its descriptor is not inherited by children."""

    def __init__(self, path: str, what: str, holder: dict[str, object]) -> None:
        """Take the lock at `path`, which guards `what` ("root /var/lib/wherry"), as `holder` (plain values).

        Raises FailedPrecondition with who holds it, OSError where the file can't be made.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = os.pread(self._fd, 4096, 0)
            self.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise FailedPrecondition(f"{what} is in use by {_describe(text)}") from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, json.dumps(holder).encode() + b"\n", 0)

    def close(self) -> None:
        """Let go. The file stays: removing it would let two daemons hold locks on two files of one name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def displace(path: str, timeout: float) -> None:
    """Have the holder of the lock at `path` leave where it would by itself (`--exit-idle`): somebody means to stay.

    Its containers go on. Waits for its end, `timeout` seconds at most; whoever takes the lock then is told the rest.
    """
    deadline, asked = time.monotonic() + timeout, 0
    while (pid := _leaver(path)) and time.monotonic() < deadline:
        if pid != asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            asked = pid
        time.sleep(_LOOK)


def await_leaver(path: str, address: str, timeout: float) -> None:
    """Wait, `timeout` seconds at most, while the holder of the lock at `path` is one that is about to leave by itself:
    it doesn't serve at `address` any more, and a client that found it so wants another one."""
    deadline = time.monotonic() + timeout
    while _leaver(path) and not _listens(address) and time.monotonic() < deadline:
        time.sleep(_LOOK)


def _leaver(path: str) -> int:
    """The pid of the holder of the lock at `path`, where it leaves when nobody calls; else 0."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                holder = json.loads(os.pread(fd, 4096, 0))
                return int(holder["pid"]) if holder.get("exit_idle") else 0
        finally:
            os.close(fd)
    return 0


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.ExitStack() as stack:
        try:
            probe.connect(stack.enter_context(short_path(path)))
        except OSError:
            return False
    return True


def refuse_listener(path: str) -> None:
    """Raise FailedPrecondition where somebody listens on the socket (a daemon that knows nothing of our locks).

    A socket file that nobody listens on is left over from a crash, and free.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.ExitStack() as stack:
        probe.settimeout(1.0)
        try:
            probe.connect(stack.enter_context(short_path(path)))
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except BlockingIOError:
            raise FailedPrecondition(f"address {path} is in use: its listener's queue is full") from None
        except OSError as error:
            raise FailedPrecondition(f"address {path} can't be used: {error}") from error
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    raise FailedPrecondition(f"address {path} is in use by pid {pid} ({_program(pid)})")


def _describe(text: bytes) -> str:
    try:
        holder = json.loads(text)
        details = ", ".join(f"{key} {value}" for key, value in holder.items() if key != "pid")
        return f"pid {holder['pid']} ({details})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "another process"  # it took the lock a moment ago and hasn't written yet


def _program(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "unknown"
