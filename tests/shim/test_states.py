"""Every state with every operation, against what containerd answers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest

from wherry.core.errors import NotFound, WherryError
from wherry.shim.states import EXEC, INIT, STATUS, Machine, Operation, State

Table = Mapping[State, Mapping[Operation, State | str]]

# containerd-shim-runc-v2, process/init_state.go and exec_state.go: what is allowed in each state
ALLOWED = {
    "init": {
        State.CREATED: "start delete update exec kill resize exit",
        State.RESTORING: "start delete update kill resize exit",
        State.RUNNING: "pause update checkpoint exec kill resize exit",
        State.PAUSED: "resume update checkpoint kill resize exit",
        State.STOPPED: "delete kill resize exit",
        State.DELETED: "exit",
    },
    "exec": {
        State.CREATED: "start delete kill resize exit",
        State.RUNNING: "kill resize exit",
        State.STOPPED: "delete kill exit",
        State.DELETED: "exit",
    },
}
PAIRS = [
    (name, table, state, operation)
    for name, table in (("init", INIT), ("exec", EXEC))
    for state, operation in itertools.product(State, Operation)
    if state in table and operation in table[state]
]


@pytest.mark.parametrize(("name", "table", "state", "operation"), PAIRS)
def test_every_pair(
    name: str, table: dict[State, dict[Operation, State | str]], state: State, operation: Operation
) -> None:
    machine = Machine(table, state)
    if operation.value in ALLOWED[name][state].split():
        machine.move(operation)
        assert machine.state in table
    else:
        with pytest.raises(WherryError) as caught:
            machine.move(operation)
        assert operation.value in caught.value.message
        assert isinstance(caught.value, NotFound) == caught.value.message.endswith(": not found")
        assert machine.state is state


def test_the_tables_are_complete() -> None:
    assert set(INIT) == set(State)
    assert all(set(row) == set(Operation) for row in INIT.values())
    assert set(STATUS) == set(State)
    rows = [set(row) for row in EXEC.values()]
    assert all(row == rows[0] for row in rows)


def test_texts_that_clients_know() -> None:
    for state, operation, text in (
        (State.RUNNING, Operation.DELETE, "cannot delete a running process"),
        (State.CREATED, Operation.PAUSE, "cannot pause task in created state"),
        (State.STOPPED, Operation.EXEC, "cannot exec in a stopped state"),
        (State.DELETED, Operation.KILL, "cannot kill a deleted process: not found"),
    ):
        with pytest.raises(WherryError, match=f"^{text}$"):
            Machine(INIT, state).check(operation)
