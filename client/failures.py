"""What can come out of a command in a container besides its success, for programs that want exceptions."""

from __future__ import annotations

from typing import ClassVar

from wherry.core.errors import Code, WherryError


class CommandFailed(WherryError):
    """A command ended with another exit code than 0, where success was asked for."""

    code: ClassVar[int] = Code.ABORTED

    def __init__(self, args: tuple[str, ...], status: int, stdout: bytes, stderr: bytes, why: str = "") -> None:
        last = stderr.decode(errors="replace").strip().rpartition("\n")[2]
        super().__init__(f"{args[0]!r} {why or f'ended with exit code {status}'}{f': {last}' if last else ''}")
        self.command = args
        self.status = status
        self.stdout = stdout
        self.stderr = stderr


class OutOfMemory(CommandFailed):
    """A command was killed by the kernel because its container was over its memory limit."""

    code: ClassVar[int] = Code.RESOURCE_EXHAUSTED


class TimedOut(CommandFailed):
    """A command was killed because it took longer than it was allowed to."""

    code: ClassVar[int] = Code.DEADLINE_EXCEEDED
