"""The states of a container's init and of an exec'd process, as tables.

The states, what is allowed in each and the words of each refusal are containerd's (`process/init_state.go`,
`exec_state.go`, `deleted_state.go`): clients match on them. A refusal has the code UNKNOWN there, except where it ends
in "not found".
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from wherry.core.errors import NotFound, WherryError
from wherry.proto import task_types_pb2


class State(Enum):
    """Where a process is in its life."""

    CREATED = "created"
    # a container that will be made from a checkpoint when it is started: created, but there is no process yet
    RESTORING = "restoring"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    DELETED = "deleted"


class Operation(Enum):
    """What may be asked of a process."""

    START = "start"
    DELETE = "delete"
    PAUSE = "pause"
    RESUME = "resume"
    UPDATE = "update"
    CHECKPOINT = "checkpoint"
    EXEC = "exec"
    KILL = "kill"
    RESIZE = "resize"
    # not asked, it happens
    EXIT = "exit"


_S, _O = State, Operation
_GONE: Final = ": not found"

_NEVER_RAN: Mapping[Operation, State | str] = {
    _O.START: _S.RUNNING,
    _O.DELETE: _S.DELETED,
    _O.PAUSE: "cannot pause task in created state",
    _O.RESUME: "cannot resume task in created state",
    _O.CHECKPOINT: "cannot checkpoint a task in created state",
    _O.EXIT: _S.STOPPED,
}
_DELETED: Mapping[Operation, State | str] = {
    **{
        operation: f"cannot {operation.value} a deleted process"
        for operation in (_O.START, _O.PAUSE, _O.RESUME, _O.UPDATE, _O.CHECKPOINT, _O.RESIZE)
    },
    _O.DELETE: f"cannot delete a deleted process{_GONE}",
    _O.KILL: f"cannot kill a deleted process{_GONE}",
    _O.EXEC: "cannot exec in a deleted state",
    _O.EXIT: _S.DELETED,
}

INIT: Final[Mapping[State, Mapping[Operation, State | str]]] = {
    _S.CREATED: {
        **_NEVER_RAN,
        _O.UPDATE: _S.CREATED,
        _O.EXEC: _S.CREATED,
        _O.KILL: _S.CREATED,
        _O.RESIZE: _S.CREATED,
    },
    _S.RESTORING: {
        **_NEVER_RAN,
        _O.UPDATE: _S.RESTORING,
        _O.EXEC: "cannot exec in a created state",
        _O.KILL: _S.RESTORING,
        _O.RESIZE: _S.RESTORING,
    },
    _S.RUNNING: {
        _O.START: "cannot start a running process",
        _O.DELETE: "cannot delete a running process",
        _O.PAUSE: _S.PAUSED,
        _O.RESUME: "cannot resume a running process",
        _O.UPDATE: _S.RUNNING,
        _O.CHECKPOINT: _S.RUNNING,
        _O.EXEC: _S.RUNNING,
        _O.KILL: _S.RUNNING,
        _O.RESIZE: _S.RUNNING,
        _O.EXIT: _S.STOPPED,
    },
    _S.PAUSED: {
        _O.START: "cannot start a paused process",
        _O.DELETE: "cannot delete a paused process",
        _O.PAUSE: "cannot pause a paused container",
        _O.RESUME: _S.RUNNING,
        _O.UPDATE: _S.PAUSED,
        _O.CHECKPOINT: _S.PAUSED,
        _O.EXEC: "cannot exec in a paused state",
        _O.KILL: _S.PAUSED,
        _O.RESIZE: _S.PAUSED,
        _O.EXIT: _S.STOPPED,
    },
    _S.STOPPED: {
        _O.START: "cannot start a stopped process",
        _O.DELETE: _S.DELETED,
        _O.PAUSE: "cannot pause a stopped container",
        _O.RESUME: "cannot resume a stopped container",
        _O.UPDATE: "cannot update a stopped container",
        _O.CHECKPOINT: "cannot checkpoint a stopped container",
        _O.EXEC: "cannot exec in a stopped state",
        _O.KILL: _S.STOPPED,
        _O.RESIZE: _S.STOPPED,
        _O.EXIT: _S.STOPPED,
    },
    _S.DELETED: _DELETED,
}

EXEC: Final[Mapping[State, Mapping[Operation, State | str]]] = {
    _S.CREATED: {
        _O.START: _S.RUNNING,
        _O.DELETE: _S.DELETED,
        _O.KILL: _S.CREATED,
        _O.RESIZE: _S.CREATED,
        _O.EXIT: _S.STOPPED,
    },
    _S.RUNNING: {
        _O.START: "cannot start a running process",
        _O.DELETE: "cannot delete a running process",
        _O.KILL: _S.RUNNING,
        _O.RESIZE: _S.RUNNING,
        _O.EXIT: _S.STOPPED,
    },
    _S.STOPPED: {
        _O.START: "cannot start a stopped process",
        _O.DELETE: _S.DELETED,
        _O.KILL: _S.STOPPED,
        _O.RESIZE: "cannot resize a stopped container",
        _O.EXIT: _S.STOPPED,
    },
    _S.DELETED: {operation: _DELETED[operation] for operation in (_O.START, _O.DELETE, _O.KILL, _O.RESIZE, _O.EXIT)},
}

STATUS: Final[Mapping[State, task_types_pb2.Status]] = {
    _S.CREATED: task_types_pb2.CREATED,
    _S.RESTORING: task_types_pb2.CREATED,
    _S.RUNNING: task_types_pb2.RUNNING,
    _S.PAUSED: task_types_pb2.PAUSED,
    _S.STOPPED: task_types_pb2.STOPPED,
    _S.DELETED: task_types_pb2.STOPPED,
}


class Machine:
    """The state of one process, moved by operations of its table."""

    __slots__ = ("_table", "state")

    def __init__(self, table: Mapping[State, Mapping[Operation, State | str]], state: State = State.CREATED) -> None:
        self._table = table
        self.state = state

    def check(self, operation: Operation) -> State:
        """The state that the operation leads to; raises the table's refusal."""
        following = self._table[self.state][operation]
        if isinstance(following, State):
            return following
        raise NotFound(following) if following.endswith(_GONE) else WherryError(following)

    def move(self, operation: Operation) -> None:
        """Enter the state that the operation, which was done, leads to."""
        self.state = self.check(operation)
