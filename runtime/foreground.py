"""`run` and `exec` as a person or a script waits for them: signals go on, the exit code comes back.

With a terminal and nobody to take its master, this process stands between: raw mode here, bytes to and fro.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import os

from wherry.linux import process
from wherry.runtime import container
from wherry.runtime.errors import INVALID, ContainerError

TYPE_CHECKING = False
_SIGWINCH = 28
_OURS = frozenset((9, 13, 17, 19, 23))  # SIGKILL, SIGPIPE, SIGCHLD, SIGSTOP, SIGURG

if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable

    from wherry.runtime.checkpoint import Options


def run(request: container.CreateRequest, *, detach: bool, keep: bool, pidfd_socket: str = "") -> int:
    """create, start, and unless detached wait and delete; returns the exit code (128 + N for signal N)."""
    from wherry.runtime import create

    def begin() -> int:
        return create.create(request, meanwhile=_load_the_rest)

    return _live(request, begin, starts=True, detach=detach, keep=keep, pidfd_socket=pidfd_socket)


def restore(request: container.CreateRequest, options: Options, *, detach: bool) -> int:
    """The same with a container that goes on where it was when it was written."""
    from wherry.runtime import restore as implementation

    def begin() -> int:
        return implementation.restore(request, options)

    return _live(request, begin, starts=False, detach=detach, keep=False)


def _live(
    request: container.CreateRequest,
    begin: Callable[[], int],
    *,
    starts: bool,
    detach: bool,
    keep: bool,
    pidfd_socket: str = "",
) -> int:
    """A container's life as far as its caller waits for it. begin: makes it and returns init's pid; starts: init has
    yet to be told to execute the program."""
    from wherry.runtime import spec

    if request.spec is None:
        request.spec = spec.load(request.bundle)
    terminal = bool((request.spec.get("process") or {}).get("terminal"))
    _check_console(terminal, request.console_socket, detach=detach)
    # init's parent may be a process in between that is gone by then
    process.set_child_subreaper()
    relay = _Relay.wanted(terminal, request.console_socket)
    if relay:
        request.console_fd = relay.far_end
    try:
        pid = begin()
        try:
            if relay:
                relay.receive()
            if pidfd_socket:
                from wherry.runtime import commands

                commands.send_pidfd(pidfd_socket, pid)
            if not detach:
                _forward_signals(pid, relay)  # before the program can make anybody believe that it is ready for them
            if starts:
                container.start(request.root, request.id)
            code = 0 if detach else _wait(pid, relay)
        except BaseException:
            container.delete(request.root, request.id, force=True)
            raise
    finally:
        if relay:
            relay.close()
    if not detach and not keep:
        container.delete(request.root, request.id, force=True)
    return code


def _load_the_rest() -> None:
    """While the child mounts: what start, wait and delete will import."""
    import select  # noqa: F401

    from wherry.runtime import lifecycle  # noqa: F401


def exec_process(request: container.ExecRequest, *, detach: bool, pidfd_socket: str = "") -> int:
    terminal = bool(request.process.get("terminal"))
    _check_console(terminal, request.console_socket, detach=detach)
    process.set_child_subreaper()
    relay = _Relay.wanted(terminal, request.console_socket)
    if relay:
        request.console_fd = relay.far_end
    try:
        pid = container.exec_process(request)
        if relay:
            relay.receive()
        if pidfd_socket:
            from wherry.runtime import commands

            commands.send_pidfd(pidfd_socket, pid)
        if detach:
            return 0
        _forward_signals(pid, relay)
        return _wait(pid, relay)
    finally:
        if relay:
            relay.close()


def _check_console(terminal: bool, path: str, *, detach: bool) -> None:
    if detach and terminal and not path:
        raise ContainerError("cannot allocate tty if runc will detach without setting console socket", INVALID)
    if path and not (detach and terminal):
        raise ContainerError("cannot use console socket if runc will not detach or allocate tty", INVALID)


def _forward_signals(pid: int, relay: _Relay | None) -> None:
    """All signals that can be caught and that mean the program, not us."""
    native = __import__("_signal")  # what `signal` wraps in an enum, which would take 3 ms to make

    def forward(number: int, _frame: object) -> None:
        if relay and number == _SIGWINCH:
            relay.resize()
            return
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    for number in range(1, 32):
        if number not in _OURS:
            native.signal(number, forward)


def _wait(pid: int, relay: _Relay | None) -> int:
    if relay:
        relay.pump(pid)
    while True:
        found, status = os.waitpid(-1, 0)  # orphans of the container's are ours, too
        if found == pid:
            code = os.waitstatus_to_exitcode(status)
            return 128 - code if code < 0 else code


class _Relay:
    """Between our standard streams and the container's terminal."""

    def __init__(self) -> None:
        import _socket

        near, far = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        self.near: _socket.socket | None = near
        self.far_end = far.detach()
        self.master = -1
        self._restore: Callable[[], None] | None = None

    @classmethod
    def wanted(cls, terminal: bool, path: str) -> _Relay | None:
        return cls() if terminal and not path else None

    def receive(self) -> None:
        """Take the master that init sent, give it our size, and make our side raw."""
        import _socket
        import array
        import termios
        import tty

        os.close(self.far_end)
        self.far_end = -1
        if self.near is None:
            return
        _, ancillary, _, _ = self.near.recvmsg(4096, _socket.CMSG_SPACE(4))
        for level, kind, data in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                self.master = array.array("i", data[:4])[0]
                os.set_inheritable(self.master, False)
        if self.master < 0:
            raise ContainerError("the container sent no terminal")
        self.resize()
        if os.isatty(0):
            before = termios.tcgetattr(0)
            self._restore = lambda: termios.tcsetattr(0, termios.TCSADRAIN, before)
            tty.setraw(0, termios.TCSADRAIN)  # what was typed before this moment is not lost

    def resize(self) -> None:
        import fcntl
        import termios

        if os.isatty(0) and self.master >= 0:
            fcntl.ioctl(self.master, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))

    def pump(self, pid: int) -> None:
        """Move bytes until the terminal's other side is gone or the process has ended and all is read."""
        import select

        pidfd = os.pidfd_open(pid)
        sources = [0, self.master, pidfd]
        try:
            while self.master in sources:
                timeout = None if pidfd in sources else 0.05
                ready, _, _ = select.select(sources, [], [], timeout)
                if not ready and pidfd not in sources:
                    return
                if self.master in ready and not _copy(self.master, 1):
                    sources.remove(self.master)
                if 0 in ready and not _copy(0, self.master):
                    sources.remove(0)
                if pidfd in ready:
                    sources.remove(pidfd)
        finally:
            os.close(pidfd)

    def close(self) -> None:
        if self._restore:
            self._restore()
        for fd in (self.far_end, self.master):
            if fd >= 0:
                os.close(fd)
        self.far_end = self.master = -1
        if self.near is not None:
            self.near.close()
            self.near = None


def _copy(source: int, target: int) -> bool:
    """False at the end of the source: end of file, or EIO from a terminal that nobody holds any more."""
    try:
        data = os.read(source, 65536)
    except OSError:
        return False
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]
    return bool(data)
