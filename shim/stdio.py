"""A process's standard streams: what the client named, and what the process gets.

The client names FIFOs, `file:///path` (appended to), `binary:///path?key=value` (a logging program),
`json-file:///folder` (our own log, `logfile.py`; `json-file-fifo://` copies to the FIFO of who follows, too) or
`cri-log:///path` (Kubernetes' log, `crilog.py`); nothing means /dev/null. The process never gets these themselves, it
gets pipes or a terminal, and the shim copies. A FIFO handed in directly would save the copy (a splice moves pages, it
costs almost nothing) but leak the host's path and inode into the container (`/proc/self/fd/1`, fchmod), and the client
could no longer be told "that was all" while a process that was left behind in the container holds the stream open.

FIFOs are opened for reading and writing: that never blocks, nobody gets SIGPIPE or EPIPE while a client is away, and
what was written waits for the next client that opens it. Where there is a log, too, that one is enough: the FIFO is
given up when its reader goes.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import signal
import socket
import stat
import struct
import termios
from typing import TYPE_CHECKING, Final

from wherry.core import errors
from wherry.core.container_logs import CRI, FOLLOWED, fifo_of, limits
from wherry.core.container_logs import SCHEME as JSON_FILE
from wherry.shim.copying import Copy
from wherry.shim.crilog import CriCopy, CriLog
from wherry.shim.logfile import LogCopy, LogFile
from wherry.shim.loop import DEFAULT_SIGNALS

if TYPE_CHECKING:
    from wherry.shim.loop import Children, Future, Loop

_NONBLOCK: Final = os.O_NONBLOCK | os.O_CLOEXEC
# a logging program has the end of its streams to end by itself; then SIGTERM; then, having had so long in all to write
# out what it holds, SIGKILL (containerd's binaryIOProcTermTimeout)
LOGGER_PATIENCE, LOGGER_GRACE = 2.0, 12.0
# how long a logging program may take to say that it is ready
LOGGER_READY: Final = 30.0


class Stdio:
    """The streams as the client named them, "" for none; a value. With `terminal` stderr isn't used."""

    __slots__ = ("stderr", "stdin", "stdout", "terminal")

    def __init__(self, stdin: str = "", stdout: str = "", stderr: str = "", terminal: bool = False) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self.terminal = terminal


class Owner:
    """Whose process it is, for its logging program; and to whom its pipes belong. A value."""

    __slots__ = ("gid", "id", "namespace", "uid")

    def __init__(self, namespace: str, id: str, uid: int = 0, gid: int = 0) -> None:  # noqa: A002
        self.namespace = namespace
        self.id = id
        self.uid = uid
        self.gid = gid


def split_uri(uri: str) -> tuple[str, str, str]:
    """Scheme ("fifo" for a bare path), path and query. (urllib.parse weighs more than all of this module.)"""
    scheme, found, rest = uri.partition("://")
    if not found or not scheme.replace("-", "").isalnum():
        return "fifo", uri, ""
    path, _, query = rest.partition("?")
    return scheme.lower(), _unquote(path), query


def _unquote(text: str) -> str:
    """Undo percent-encoding (RFC 3986, 2.1)."""
    first, *rest = text.encode().split(b"%")
    out = [first]
    for part in rest:
        try:
            out.append(bytes([int(part[:2], 16)]) + part[2:])
        except ValueError:
            out.append(b"%" + part)
    return b"".join(out).decode(errors="replace")


class _Sink:
    """Where output goes: a descriptor, -1 for nowhere; the path where it is a FIFO. A value."""

    __slots__ = ("fd", "path")

    def __init__(self, fd: int = -1, path: str = "") -> None:
        self.fd = fd
        self.path = path


_NOWHERE: Final = _Sink()


class ProcessIO:
    """The streams of one process, from before its creation until it is deleted.

    `await prepare()`, give `child` (or `console`) to the runtime, call `started()`; `drained` is settled when all
    output has been copied; `close()` frees everything and is safe to call at any time.
    """

    def __init__(self, loop: Loop, children: Children, stdio: Stdio, owner: Owner) -> None:
        self._loop = loop
        self._children = children
        self._stdio = stdio
        self._owner = owner
        self._open: list[int] = []
        self._copies: list[Copy | LogCopy | CriCopy] = []
        self._log: LogFile | CriLog | None = None
        self._outputs = 0
        self._stdin_hold = -1
        self._sinks: tuple[_Sink, _Sink] = (_NOWHERE, _NOWHERE)
        self._logger = 0
        self.child: tuple[int, int, int] | None = None
        """Descriptors for the process's 0, 1, 2; None with a terminal."""
        self.console: Console | None = None
        self.drained: Future[None] = loop.future()

    async def prepare(self) -> None:
        """Open what the client named and make the process's ends. Raises; `close` then."""
        stdio = self._stdio
        try:
            await self._open_sinks()
            if stdio.terminal:
                self.console = Console(self._loop)
            else:
                self.child = (self._child_stdin(), self._child_output(0), self._child_output(1))
        except BaseException:
            self.close()
            raise

    def started(self) -> None:
        """The process runs: close its ends here and take its terminal, if it has one. Raises Internal without it."""
        if self.console is not None:
            self._copy_terminal(self.console.master())
        elif self.child is not None:
            for fd in set(self.child):
                self._close(fd)
            self.child = None
        if not self._outputs:
            self.drained.set(None)

    # -- what the client named -------------------------------------------------------------------------------------

    async def _open_sinks(self) -> None:
        stdio = self._stdio
        scheme, path, query = split_uri(stdio.stdout)
        if scheme == "binary":
            out, err = await self._start_logger(path, query)
            self._sinks = (_Sink(out), _Sink(err))
        elif scheme == "file":
            # one file for both, as containerd has it
            os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
            sink = self._keep(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644))
            self._sinks = (_Sink(sink), _Sink(sink))
        elif scheme in (JSON_FILE, FOLLOWED):
            options = dict(pair.partition("=")[::2] for pair in query.split("&") if pair)
            self._log = LogFile(path, *limits(options), _unquote(options.get("name", "")))
            if scheme == FOLLOWED:
                self._sinks = (self._open_follower(stdio.stdout), self._open_follower(stdio.stderr))
        elif scheme == CRI:
            limit = dict(pair.partition("=")[::2] for pair in query.split("&") if pair).get("max-line", "0")
            self._log = CriLog(path, int(limit) if limit.isascii() and limit.isdigit() else 0)
        elif scheme == "fifo":
            self._sinks = (self._open_sink(stdio.stdout), self._open_sink(stdio.stderr))
        else:
            raise errors.InvalidArgument(f"unknown STDIO scheme {scheme}")

    def _open_sink(self, path: str) -> _Sink:
        if not path:
            return _NOWHERE
        path = path.removeprefix("fifo://")
        if stat.S_ISFIFO(os.stat(path).st_mode):
            return _Sink(self._keep(os.open(path, os.O_RDWR | _NONBLOCK)), path)
        return _Sink(self._keep(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)))

    def _open_follower(self, uri: str) -> _Sink:
        """The FIFO of who reads now; nobody there is fine."""
        path = fifo_of(uri)
        try:
            return _Sink(self._keep(os.open(path, os.O_WRONLY | _NONBLOCK)), path) if path else _NOWHERE
        except OSError:
            return _NOWHERE

    def _child_stdin(self) -> int:
        path = self._stdio.stdin.removeprefix("fifo://")
        if not path:
            return self._keep(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        if not stat.S_ISFIFO(os.stat(path).st_mode):
            return self._keep(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        read, write = self._pipe()
        os.set_blocking(write, False)
        self._copy_stdin(path, write)
        return read

    def _copy_stdin(self, path: str, sink: int) -> None:
        source = self._keep(os.open(path, os.O_RDONLY | _NONBLOCK))
        # held open so that a client that comes and goes isn't the end of the stream; CloseIO closes it
        self._stdin_hold = self._keep(os.open(path, os.O_WRONLY | _NONBLOCK))

        def finished() -> None:
            self._close(source)
            self._stdin_ended(sink)

        self._copies.append(Copy(self._loop, source, sink, finished))

    def _stdin_ended(self, sink: int) -> None:
        if self.console is None:  # a terminal's input has no end of its own
            self._close(sink)

    def _child_output(self, index: int) -> int:
        sink = self._sinks[index]
        if sink.fd < 0 and self._log is None:
            return self._keep(os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC))
        if self._logger:
            return sink.fd  # the logger reads the process's own pipe
        read, write = self._pipe()
        os.set_blocking(read, False)
        self._copy_output(read, sink, "stderr" if index else "stdout")
        return write

    def _copy_output(self, source: int, sink: _Sink, stream: str = "stdout") -> None:
        self._outputs += 1

        def finished() -> None:
            self._close(source)
            self._sink_ended(sink)
            self._outputs -= 1
            if not self._outputs:
                if self._log is not None:
                    self._log.close()  # that was all: who follows it may go
                self.drained.set(None)

        if self._log is None:
            self._copies.append(Copy(self._loop, source, sink.fd, finished))
        elif isinstance(self._log, CriLog):
            self._copies.append(CriCopy(self._loop, source, self._log, stream, finished))
        else:
            prompt = self.console is not None
            self._copies.append(LogCopy(self._loop, source, self._log, stream, finished, prompt=prompt, sink=sink.fd))

    def _sink_ended(self, sink: _Sink) -> None:
        """Let the client see the end; keep what it hasn't read yet, should it only come later."""
        if not sink.path:
            return
        with contextlib.suppress(OSError):
            if struct.unpack("i", fcntl.ioctl(sink.fd, termios.FIONREAD, b"\0" * 4))[0]:
                self._keep(os.open(sink.path, os.O_RDONLY | _NONBLOCK))
        self._close(sink.fd)

    def _copy_terminal(self, master: int) -> None:
        self._keep(master)
        self._copy_output(master, self._sinks[0])
        if self._stdio.stdin:
            self._copy_stdin(self._stdio.stdin.removeprefix("fifo://"), master)

    # -- the logging program ---------------------------------------------------------------------------------------

    async def _start_logger(self, program: str, query: str) -> tuple[int, int]:
        arguments = [program]
        for pair in filter(None, query.split("&")):
            key, _, value = pair.replace("+", " ").partition("=")
            arguments += [_unquote(key), _unquote(value)] if value else [_unquote(key)]
        out_read, out_write = self._pipe()
        err_read, err_write = self._pipe()
        ready_read, ready_write = self._pipe()
        try:
            self._spawn_logger(arguments, (out_read, err_read, ready_write))
        except OSError as error:
            raise errors.WherryError(f"failed to start binary process: {error}") from error
        finally:
            for fd in (out_read, err_read, ready_write):
                self._close(fd)
        ready: Future[None] = self._loop.future()

        def is_ready() -> None:
            self._close(ready_read)
            ready.set(None)

        self._loop.on_read(ready_read, is_ready)
        await self._loop.within(LOGGER_READY, ready, f"logging binary {program}")
        return out_write, err_write

    def _spawn_logger(self, arguments: list[str], streams: tuple[int, int, int]) -> None:
        """3 and 4 are the streams, 5 is closed or written to when it is ready (containerd's logging package)."""
        environment = {**os.environ, "CONTAINER_ID": self._owner.id, "CONTAINER_NAMESPACE": self._owner.namespace}
        # out of the way first: one of ours may have such a number
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in streams]
        actions = [(os.POSIX_SPAWN_DUP2, fd, 3 + index) for index, fd in enumerate(moved)]
        try:
            with self._children:
                self._logger = os.posix_spawn(
                    arguments[0], arguments, environment, file_actions=actions, setsigdef=DEFAULT_SIGNALS
                )
                self._children.exited(self._logger).add_callback(self._logger_ended)
        finally:
            for fd in moved:
                os.close(fd)

    def _logger_ended(self) -> None:
        self._logger = 0

    # -- while it runs ---------------------------------------------------------------------------------------------

    @property
    def moved(self) -> int:
        """Bytes copied so far, in both directions."""
        return sum(copy.moved for copy in self._copies)

    def close_stdin(self) -> None:
        """CloseIO: once the client has closed its end too, the process reads the end of its input."""
        if self._stdin_hold >= 0:
            self._close(self._stdin_hold)
            self._stdin_hold = -1

    def reopen_log(self) -> None:
        """Go on in the file that now has the log's path. Raises FailedPrecondition."""
        if not isinstance(self._log, CriLog):
            raise errors.FailedPrecondition(f"the process of {self._owner.id} has no log of that kind")
        self._log.reopen()

    def attach(self, stdout: str, stderr: str) -> None:
        """Copy what comes from now on to FIFOs that somebody reads, "" for none. Raises FailedPrecondition."""
        if not isinstance(self._log, CriLog):
            raise errors.FailedPrecondition(f"the output of {self._owner.id} goes to nobody who could be joined")
        for copy in [each for each in self._copies if isinstance(each, CriCopy)]:
            path = stderr if copy.stream == "stderr" else stdout
            if not path:
                continue
            try:
                fd = os.open(path, os.O_WRONLY | _NONBLOCK)
            except OSError as error:
                raise errors.FailedPrecondition(f"attaching to {path}: {error.strerror}") from error
            copy.follow(fd)

    def resize(self, width: int, height: int) -> None:
        """Set the terminal's size, in characters; nothing without a terminal."""
        if self.console is not None:
            self.console.resize(width, height)

    def flush(self) -> None:
        """Copy what the process has written so far, as far as it fits."""
        for copy in list(self._copies):
            copy.flush()

    def close(self) -> None:
        """Stop copying, close everything, end the logging program."""
        for copy in self._copies:
            copy.stop()
        self._copies.clear()
        if self._log is not None:
            self._log.close()
        for fd in list(self._open):
            self._close(fd)
        if self.console is not None:
            self.console.close()
        self.child = None
        self.drained.set(None)
        if self._logger:
            self._end_logger(self._logger)

    def _end_logger(self, logger: int) -> None:
        """It sees the end of its streams and should end; SIGTERM and SIGKILL are for one that doesn't."""

        def insist(number: int) -> None:
            if self._logger == logger:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(logger, number)

        self._loop.later(LOGGER_PATIENCE, lambda: insist(signal.SIGTERM))
        self._loop.later(LOGGER_GRACE, lambda: insist(signal.SIGKILL))

    # -- descriptors -----------------------------------------------------------------------------------------------

    def _pipe(self) -> tuple[int, int]:
        read, write = os.pipe2(os.O_CLOEXEC)
        self._open += [read, write]
        if self._owner.uid or self._owner.gid:
            for fd in (read, write):
                os.fchown(fd, self._owner.uid, self._owner.gid)
        return read, write

    def _keep(self, fd: int) -> int:
        self._open.append(fd)
        return fd

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.remove(fd)
            with contextlib.suppress(OSError):
                self._loop.forget(fd)
            os.close(fd)


class Console:
    """How the runtime hands over a terminal: a socket for its master (OCI runtimes' `--console-socket`).

    The bundled runtime gets `child_fd`, an external one `path()`.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._folder = ""
        self._listener: socket.socket | None = None
        self._ours, self._theirs = socket.socketpair()
        self._master = -1

    @property
    def child_fd(self) -> int:
        """A connected SOCK_STREAM socket that takes the master as SCM_RIGHTS."""
        return self._theirs.fileno()

    def path(self) -> str:
        """The path of a socket that listens for the runtime, in a folder of its own that only root may enter."""
        if self._listener is None:
            # a name that nobody guesses, in a place whose name is short enough for a socket
            self._folder = f"/tmp/pty{os.urandom(8).hex()}"
            os.mkdir(self._folder, 0o700)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(f"{self._folder}/pty.sock")
            self._listener.listen(1)
        return f"{self._folder}/pty.sock"

    def master(self) -> int:
        """The terminal's master, non-blocking; the caller closes it. The runtime has returned by now."""
        source = self._ours
        if self._listener is not None:
            self._listener.setblocking(False)
            try:
                source, _ = self._listener.accept()
            except OSError as error:
                raise errors.Internal(f"failed to retrieve console master: {error}") from error
        with source:
            source.settimeout(5.0)
            fds = array.array("i")
            try:
                _, ancillary, _, _ = source.recvmsg(256, socket.CMSG_SPACE(fds.itemsize))
            except OSError as error:
                raise errors.Internal(f"failed to retrieve console master: {error}") from error
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if len(fds) != 1:
            raise errors.Internal("failed to retrieve console master: the runtime sent none")
        self._master = fds[0]
        os.set_inheritable(self._master, False)
        os.set_blocking(self._master, False)
        self._end_handover()
        return self._master

    def resize(self, width: int, height: int) -> None:
        """Set the size in characters, which tells the processes on it (SIGWINCH). Raises InvalidArgument."""
        if not (0 <= width <= 0xFFFF and 0 <= height <= 0xFFFF):
            raise errors.InvalidArgument(f"a terminal of {width} by {height} can't be")
        if self._master >= 0:
            with contextlib.suppress(OSError):  # the process is gone and its terminal with it
                fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def _end_handover(self) -> None:
        self._ours.close()
        self._theirs.close()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            for remove, path in ((os.unlink, f"{self._folder}/pty.sock"), (os.rmdir, self._folder)):
                with contextlib.suppress(OSError):
                    remove(path)

    def close(self) -> None:
        """Free the sockets; the master belongs to whoever took it."""
        self._end_handover()
        self._master = -1
