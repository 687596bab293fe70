"""The named pipes between a client and a shim.

A shim opens them by their path, so they lie in a private folder below the runtime folder of the host; the folder goes
when the client is done. Reading ends are opened before the task is created: a FIFO without a reader would make the shim
wait, and one whose writer has not come yet reports neither data nor its end to poll(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from types import TracebackType
from typing import Self

from wherry.client.tasks import Stdio
from wherry.core import places
from wherry.core.container_logs import fifo_of
from wherry.core.errors import FailedPrecondition

# a FIFO holds 64 KiB by default; a megabyte (the kernel's limit for everybody) lets a container write on meanwhile
PIPE_SIZE = 1 << 20
F_SETPIPE_SZ = 1031


def runtime_folder() -> str:
    """Where FIFOs belong: a folder in memory that this user may write."""
    return os.path.join(places.runtime_folder(), "wherry", "fifo")


class Fifos:
    """A process' streams as FIFOs. Descriptors are -1 where there is no such stream or it was closed."""

    def __init__(self, process: str, *, stdin: bool, terminal: bool = False, parent: str = "") -> None:
        """Makes the folder and the FIFOs; `process` names them for people who look into the folder.

        Raises FailedPrecondition where the folder can't be written.
        """
        self.stdin = self.stdout = self.stderr = -1
        top = parent or runtime_folder()
        try:
            os.makedirs(top, mode=0o711, exist_ok=True)
            # tempfile does the same, and takes longer to load than all the rest here
            self.folder = os.path.join(top, os.urandom(8).hex())
            os.mkdir(self.folder, 0o700)
        except OSError as error:
            raise FailedPrecondition(f"can't make FIFOs in {top}: {error.strerror}") from error
        names = (["stdin"] if stdin else []) + ["stdout"] + ([] if terminal else ["stderr"])
        paths = {name: os.path.join(self.folder, f"{process}-{name}") for name in names}
        try:
            for path in paths.values():
                os.mkfifo(path, 0o600)
            # both ways: without a reader, opening for writing alone fails, and the shim opens it later
            if stdin:
                self.stdin = _open(paths["stdin"], os.O_RDWR)
            self.stdout = _open(paths["stdout"], os.O_RDONLY)
            if not terminal:
                self.stderr = _open(paths["stderr"], os.O_RDONLY)
        except BaseException:
            self.close()
            raise
        self.stdio = Stdio(paths.get("stdin", ""), paths["stdout"], paths.get("stderr", ""), terminal)

    @classmethod
    def existing(cls, stdio: Stdio) -> Fifos:
        """The FIFOs of a process that runs already; streams that are no FIFOs (URIs, files) are left out.

        Raises FailedPrecondition where nothing is left to attach to.
        """
        fifos = cls.__new__(cls)
        fifos.stdio = stdio
        fifos.stdin = fifos.stdout = fifos.stderr = -1
        fifos.folder = ""
        for name in ("stdin", "stdout", "stderr"):
            path = getattr(stdio, name)
            if path and is_fifo(path):
                # the shim holds the other end; it would not hurt if it didn't, see above
                setattr(fifos, name, _open(path, os.O_RDWR if name == "stdin" else os.O_RDONLY))
        if fifos.stdout < 0 and fifos.stderr < 0 and fifos.stdin < 0:
            raise FailedPrecondition("the process has no streams to attach to (started with --null-io or --log-uri?)")
        return fifos

    def close_stdin(self) -> None:
        """Gives the writing end up."""
        if self.stdin >= 0:
            os.close(self.stdin)
        self.stdin = -1

    def close(self) -> None:
        """Closes what is open and removes the files; what a container still writes is lost. May be called twice."""
        self.release()
        self.remove()

    def release(self) -> None:
        """Closes the descriptors and leaves the files to who attaches later."""
        self.close_stdin()
        for descriptor in (self.stdout, self.stderr):
            if descriptor >= 0:
                os.close(descriptor)
        self.stdout = self.stderr = -1

    def remove(self) -> None:
        """Removes the files; open ends stay usable. FIFOs that somebody else made stay."""
        if not self.folder:
            return
        try:
            for name in os.listdir(self.folder):
                os.unlink(os.path.join(self.folder, name))
            os.rmdir(self.folder)
        except FileNotFoundError:
            # somebody cleaned the runtime folder up
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def lone_stdin(process: str) -> str:
    """A FIFO for the input of a process that nobody is attached to yet, in its own folder; `discard` removes it."""
    folder = os.path.join(runtime_folder(), os.urandom(8).hex())
    try:
        os.makedirs(folder, mode=0o711, exist_ok=True)
        path = os.path.join(folder, f"{process}-stdin")
        os.mkfifo(path, 0o600)
    except OSError as error:
        raise FailedPrecondition(f"can't make a FIFO in {folder}: {error.strerror}") from error
    return path


def is_fifo(path: str) -> bool:
    """Whether a stream is a FIFO of this host."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False


def discard(stdio: Stdio) -> None:
    """Removes what a client that detached left for a process: its FIFOs and their folder, nothing else."""
    folders = set()
    for path in map(fifo_of, (stdio.stdin, stdio.stdout, stdio.stderr)):
        if path and is_fifo(path):
            folders.add(os.path.dirname(path))
            with contextlib.suppress(OSError):
                os.unlink(path)
    for folder in folders:
        # it stays where something else is in it
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def _open(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    # over the user's limit for pipes, the default size serves too
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, F_SETPIPE_SZ, PIPE_SIZE)
    return descriptor
