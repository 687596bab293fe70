"""The named pipes between a client and a shim.

A shim opens them by their path, so they lie in a private folder below the runtime folder of the host; the folder goes
when the client is done. Reading ends are opened before the task is created: a FIFO without a reader would make the shim
wait, and one whose writer has not come yet reports neither data nor its end to poll(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from types import TracebackType
from typing import Self

from wherry.client.tasks import Stdio
from wherry.core.errors import FailedPrecondition

# a FIFO holds 64 KiB by default; a megabyte (the kernel's limit for everybody) lets a container write on meanwhile
PIPE_SIZE = 1 << 20
F_SETPIPE_SZ = 1031


def runtime_folder() -> str:
    """Where FIFOs belong: a folder in memory that this user may write."""
    if os.geteuid() == 0:
        return "/run/wherry/fifo"
    return os.path.join(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir(), "wherry", "fifo")


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
            self.folder = tempfile.mkdtemp(prefix="", dir=top)
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

    def close_stdin(self) -> None:
        """Gives the writing end up."""
        if self.stdin >= 0:
            os.close(self.stdin)
        self.stdin = -1

    def close(self) -> None:
        """Closes what is open and removes the files; what a container still writes is lost. May be called twice."""
        self.close_stdin()
        for descriptor in (self.stdout, self.stderr):
            if descriptor >= 0:
                os.close(descriptor)
        self.stdout = self.stderr = -1
        self.remove()

    def remove(self) -> None:
        """Removes the files; open ends stay usable."""
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


def _open(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    # over the user's limit for pipes, the default size serves too
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, F_SETPIPE_SZ, PIPE_SIZE)
    return descriptor
