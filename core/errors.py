"""The kinds of errors that Wherry speaks of, one class each, with the status code they have on the wire.

They are raised where something goes wrong, with what was wrong and where in the message; the edge turns them into a
gRPC or ttrpc status, the client turns the status back into the same class. The codes are gRPC's
(https://grpc.io/docs/guides/status-codes/), the kinds are containerd's errdefs.
"""

from __future__ import annotations

TYPE_CHECKING = False  # without typing's import; type checkers know the name
if TYPE_CHECKING:
    from typing import ClassVar


class Code:
    """Status codes of gRPC and of `google.rpc.Status`: plain numbers, because the runtime's command line, which needs
    these errors, can't afford to import `enum`."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class WherryError(Exception):
    """The base of all; by itself an error of unknown kind."""

    code: ClassVar[int] = Code.UNKNOWN

    @property
    def message(self) -> str:
        """The text without the class, as it goes on the wire."""
        return str(self.args[0]) if self.args else ""


class Cancelled(WherryError):
    """The caller went away or withdrew the call."""

    code = Code.CANCELLED


class InvalidArgument(WherryError):
    """The request is wrong whatever the state of the system."""

    code = Code.INVALID_ARGUMENT


class DeadlineExceeded(WherryError):
    """It was not done in the time that the caller or a limit of ours allowed."""

    code = Code.DEADLINE_EXCEEDED


class NotFound(WherryError):
    """What the request names isn't there."""

    code = Code.NOT_FOUND


class AlreadyExists(WherryError):
    """What the request would make is there."""

    code = Code.ALREADY_EXISTS


class PermissionDenied(WherryError):
    """The caller or this process may not do that."""

    code = Code.PERMISSION_DENIED


class ResourceExhausted(WherryError):
    """Disk, memory or a limit is used up."""

    code = Code.RESOURCE_EXHAUSTED


class FailedPrecondition(WherryError):
    """The state of what is named doesn't allow it (a task that runs can't be deleted)."""

    code = Code.FAILED_PRECONDITION


class Aborted(WherryError):
    """Lost against somebody else at the same time; trying again may work."""

    code = Code.ABORTED


class OutOfRange(WherryError):
    """An offset or a position that isn't there."""

    code = Code.OUT_OF_RANGE


class Unimplemented(WherryError):
    """No such service, method or feature here."""

    code = Code.UNIMPLEMENTED


class Internal(WherryError):
    """A bug of ours."""

    code = Code.INTERNAL


class Unavailable(WherryError):
    """The other side isn't there now; trying again may work."""

    code = Code.UNAVAILABLE


class DataLoss(WherryError):
    """Stored data is damaged."""

    code = Code.DATA_LOSS


class Unauthenticated(WherryError):
    """The caller didn't say who it is, or wasn't believed."""

    code = Code.UNAUTHENTICATED


_KINDS: dict[int, type[WherryError]] = {kind.code: kind for kind in WherryError.__subclasses__()}


def from_code(code: int, message: str) -> WherryError:
    """The error for a status from the wire; a code that nobody knows becomes a plain WherryError."""
    return _KINDS.get(code, WherryError)(message)
