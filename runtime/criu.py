"""One conversation with criu: `criu swrk 3`, a child that takes one request on the socket it has as descriptor 3.

By this service and not by its command line, because only so criu hands over a restored terminal's master, tells when
the restored process may be recorded, and asks for hooks in between (its "notifications").
"""

from __future__ import annotations

import _socket
import array
import fcntl
import os

from wherry.linux import syscalls as sc
from wherry.runtime import criu_messages as messages
from wherry.runtime.errors import ContainerError
from wherry.runtime.plan import take_streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Notified = Callable[[str, int, list[int]], None]

#: The first descriptor in criu after its socket: where those of `passed` begin.
FIRST_PASSED = 4
_SOCKET = 3
_PACKET = 65536
_MOST_FDS = 16
_SAFE = 100  # descriptors are parked from here on while 3 and what follows are given out
_QUOTED = 20  # lines of criu's log in a message
OLDEST = 30000  # 3.0, the first with the request for its version


class Swrk:
    """criu, started. program: its name or path; passed: descriptors that it has as 4, 5, …; stdio as for `create`.
    ContainerError if it can't be started."""

    def __init__(
        self,
        program: str,
        *,
        passed: list[int] | None = None,
        stdio: tuple[int, int, int] | None = None,
    ) -> None:
        near, far = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        said, says = os.pipe()
        self._sock = near
        self.pid = os.fork()
        if self.pid == 0:
            _become(program, [far.fileno(), *(passed or ())], stdio, says)
        far.close()
        os.close(says)
        with open(said, "rb") as file:
            problem = file.read()
        if problem:
            self.close()
            raise ContainerError(problem.decode("utf-8", "replace"))

    def ask(self, request: dict[str, Any], notified: Notified | None = None) -> dict[str, Any]:
        """Send the request and answer criu's notifications (`notified`: name, pid, descriptors, which are closed
        afterwards) until its answer comes. ContainerError if that says that it failed."""
        self._send(request)
        while True:
            answer, fds = self._receive()
            try:
                kind = answer.get("type", messages.EMPTY)
                if not answer.get("success"):
                    name = messages.TYPE_NAMES.get(kind, str(kind))
                    text = answer.get("cr_errmsg", "")
                    raise ContainerError(
                        f"criu failed: type {name} errno {answer.get('cr_errno', 0)}{text and ': '}{text}"
                    )
                if kind != messages.NOTIFY:
                    return answer
                if notified:
                    notify = answer.get("notify") or {}
                    notified(notify.get("script", ""), notify.get("pid", 0), fds)
            finally:
                for fd in fds:
                    os.close(fd)
            self._send({"type": messages.NOTIFY, "notify_success": True})

    def _send(self, request: dict[str, Any]) -> None:
        try:
            self._sock.send(messages.encode(request, messages.REQUEST))
        except OSError as error:
            raise ContainerError(f"criu failed: it takes no request: {error.strerror}") from None

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        room = _socket.CMSG_SPACE(4 * _MOST_FDS)
        data, ancillary, _, _ = self._sock.recvmsg(_PACKET, room, _socket.MSG_CMSG_CLOEXEC)
        fds: list[int] = []
        for level, kind, raw in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                fds += array.array("i", raw[: len(raw) - len(raw) % 4])
        if not data:
            raise ContainerError(f"criu failed: it ended without an answer ({self._end()})")
        try:
            return messages.decode(data, messages.RESPONSE), fds
        except ValueError as error:
            raise ContainerError(f"criu failed: {error}") from None

    def _end(self) -> str:
        pid, self.pid = self.pid, 0
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid else 0
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def close(self) -> None:
        """Hang up, which ends it, and reap it."""
        self._sock.close()
        if self.pid:
            self._end()


def _failure(kind: int, answer: dict[str, Any]) -> str:
    text = answer.get("cr_errmsg", "")
    name = messages.TYPE_NAMES.get(kind, str(kind))
    return f"criu failed: type {name} errno {answer.get('cr_errno', 0)}{': ' if text else ''}{text}"


def _become(program: str, fds: list[int], stdio: tuple[int, int, int] | None, says: int) -> None:
    """The child's part; never returns. What fails is written to `says`, which a successful exec closes."""
    try:
        sc.reset_signals()
        take_streams(stdio)
        says = fcntl.fcntl(says, fcntl.F_DUPFD_CLOEXEC, _SAFE)
        parked = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _SAFE) for fd in fds]
        for number, fd in enumerate(parked):
            os.dup2(fd, _SOCKET + number)
        sc.close_range(_SOCKET + len(fds), flags=sc.CLOSE_RANGE_CLOEXEC)
        os.execvp(program, [program, "swrk", str(_SOCKET)])
    except FileNotFoundError:
        os.write(says, f'exec: "{program}": executable file not found in $PATH'.encode())
    except OSError as error:
        os.write(says, f"exec {program}: {(error.strerror or '').lower()}".encode())
    finally:
        os._exit(127)


def version(program: str) -> int:
    """criu's, as 31701 for 3.17.1; ContainerError if there is none that we can talk to."""
    try:
        swrk = Swrk(program)
        try:
            found = swrk.ask({"type": messages.VERSION}).get("version") or {}
        finally:
            swrk.close()
    except ContainerError as error:
        raise ContainerError(f"criu version check failed: {error.message}") from None
    number = int(found.get("major_number", 0) * 10000 + found.get("minor_number", 0) * 100 + found.get("sublevel", 0))
    if number < OLDEST:
        raise ContainerError(f"criu version {number} must be {OLDEST} or higher")
    return number


def require_feature(program: str, name: str) -> None:
    """ContainerError if this criu, on this kernel, lacks a feature: `mem_track` or `lazy_pages`."""
    swrk = Swrk(program)
    try:
        answer = swrk.ask({"type": messages.FEATURE_CHECK, "features": {name: True}})
    finally:
        swrk.close()
    if not (answer.get("features") or {}).get(name):
        raise ContainerError(f"criu is missing features: {name}")


def quoted(folder: str, file: str) -> str:
    """Where criu's log is, and its lines that speak of errors: criu's own words for what went wrong."""
    path = os.path.join(folder, file)
    try:
        with open(path, encoding="utf-8", errors="replace") as log:
            lines = [line.rstrip() for line in log if "Error" in line]
    except OSError:
        return ""
    return "\n".join([f"\nlog file: {path}", *lines[-_QUOTED:]])
