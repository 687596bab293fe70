"""The runtime's one kind of error, told apart by `kind`.

`wherry.core.errors` has a class for each kind, but costs `enum` and `typing`, which the command line can't afford; the
shim translates with `kind`, whose values are those of `wherry.core.errors` spelled in snake case.
"""

from __future__ import annotations

INVALID = "invalid_argument"
NOT_FOUND = "not_found"
EXISTS = "already_exists"
PRECONDITION = "failed_precondition"
UNKNOWN = "unknown"


class ContainerError(Exception):
    """What went wrong, in the words callers know from runc.

    kind: one of the constants above. exit_code: what the command line exits with (runc: 1; `exec` and `run` report 255
    for a process that never began, as runc does).
    """

    def __init__(self, message: str, kind: str = UNKNOWN, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.exit_code = exit_code


def invalid(path: str, problem: str) -> ContainerError:
    """A configuration that the specification forbids; `path` is the field's, e.g. `linux.namespaces[2].type`."""
    return ContainerError(f"{path}: {problem}", INVALID)
