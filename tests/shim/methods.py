"""The shim's task service in each state: how a container gets there, and how each method is called.

`walk` calls every method in every state and gives what was answered, for ours and for containerd's shim alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from tests.shim.harness import Shim, process_spec
from wherry.core import typeurl
from wherry.core.errors import WherryError
from wherry.proto import runc_options_pb2
from wherry.proto import task_v2_pb2 as pb

ABSENT, CREATED, RUNNING, PAUSED, STOPPED, DELETED = "absent", "created", "running", "paused", "stopped", "deleted"
STATES = (ABSENT, CREATED, RUNNING, PAUSED, STOPPED, DELETED)
# an exec'd process: in a container that runs; `orphan` is a created one whose container has stopped
EXEC_STATES = (ABSENT, CREATED, RUNNING, STOPPED, DELETED, "orphan")
METHODS = (
    "Connect", "State", "Pids", "Stats", "CloseIO", "ResizePty", "Update", "Checkpoint", "Exec", "Create", "Wait",
    "Pause", "Resume", "Kill", "Kill all", "Start", "Delete", "Shutdown",
)  # fmt: skip
EXEC_METHODS = ("State", "CloseIO", "ResizePty", "Wait", "Exec", "Kill", "Start", "Delete")
# a call that waits for an end that doesn't come
WAITS = "waits"

Answer = tuple[int, str] | str
"""A code and its text, "ok" with what State says afterwards, or WAITS."""


def _requests(shim: Shim, exec_id: str) -> Mapping[str, tuple[str, Message]]:
    """What is sent for each method. Nothing of it fails where the state allows it, checkpoints apart."""
    id_ = shim.id
    process = typeurl.pack_json(typeurl.PROCESS, process_spec("/bin/sleep", "1000"))
    again = pb.CreateTaskRequest(id=id_, bundle=str(shim.bundle))
    again.options.CopyFrom(typeurl.pack(shim.lab.options))
    checkpoint = pb.CheckpointTaskRequest(id=id_, path=str(shim.bundle / "image"))
    checkpoint.options.CopyFrom(typeurl.pack(runc_options_pb2.CheckpointOptions()))
    limits = typeurl.pack_json(typeurl.LINUX_RESOURCES, {"cpu": {"shares": 512}})
    return {
        "Connect": ("Connect", pb.ConnectRequest(id=id_)),
        "State": ("State", pb.StateRequest(id=id_, exec_id=exec_id)),
        "Pids": ("Pids", pb.PidsRequest(id=id_)),
        "Stats": ("Stats", pb.StatsRequest(id=id_)),
        "CloseIO": ("CloseIO", pb.CloseIORequest(id=id_, exec_id=exec_id, stdin=True)),
        "ResizePty": ("ResizePty", pb.ResizePtyRequest(id=id_, exec_id=exec_id, width=80, height=24)),
        "Update": ("Update", pb.UpdateTaskRequest(id=id_, resources=limits)),
        "Checkpoint": ("Checkpoint", checkpoint),
        "Exec": ("Exec", pb.ExecProcessRequest(id=id_, exec_id=exec_id or "added", spec=process)),
        "Create": ("Create", again),
        "Wait": ("Wait", pb.WaitRequest(id=id_, exec_id=exec_id)),
        "Pause": ("Pause", pb.PauseRequest(id=id_)),
        "Resume": ("Resume", pb.ResumeRequest(id=id_)),
        "Kill": ("Kill", pb.KillRequest(id=id_, exec_id=exec_id, signal=28)),
        "Kill all": ("Kill", pb.KillRequest(id=id_, signal=28, all=True)),
        "Start": ("Start", pb.StartRequest(id=id_, exec_id=exec_id)),
        "Delete": ("Delete", pb.DeleteRequest(id=id_, exec_id=exec_id)),
        "Shutdown": ("Shutdown", pb.ShutdownRequest(id=id_)),
    }


async def reach(shim: Shim, state: str) -> None:
    """Bring a fresh shim's container into a state."""
    if state == ABSENT:
        return
    await shim.create("/bin/sleep", "1000", streams=False)
    if state == CREATED:
        return
    await shim.start()
    if state == PAUSED:
        await shim.call("Pause", pb.PauseRequest(id=shim.id))
    if state in (STOPPED, DELETED):
        await shim.kill(9)
        await shim.wait()
    if state == DELETED:
        await shim.delete()


async def reach_exec(shim: Shim, state: str) -> None:
    """Bring an exec'd process `x` into a state, in a container that runs."""
    await reach(shim, RUNNING)
    if state == ABSENT:
        return
    await shim.exec("x", "/bin/sleep", "1000", streams=False)
    if state == "orphan":
        await shim.kill(9)
        await shim.wait()
    if state in (CREATED, "orphan"):
        return
    await shim.start("x")
    if state in (STOPPED, DELETED):
        await shim.kill(9, "x")
        await shim.wait("x")
    if state == DELETED:
        await shim.delete("x")


async def ask(shim: Shim, method: str, exec_id: str, service: str) -> Answer:
    """Call a method; what was answered, and the state after it."""
    name, request = _requests(shim, exec_id)[method]
    call = asyncio.ensure_future(shim.call(name, request, service=service))
    done, _ = await asyncio.wait([call], timeout=0.4 if name == "Wait" else 60)
    if not done and name == "Wait":
        # a shim that is slow answers the later call later
        later, asked = _requests(shim, exec_id)["State"]
        with contextlib.suppress(WherryError):
            await shim.call(later, asked, service=service, timeout=60)
        done, _ = await asyncio.wait([call], timeout=0.4)
    if not done:
        call.cancel()
        return WAITS
    try:
        answer = call.result()
    except WherryError as error:
        return int(error.code), _plain(error.message, shim)
    return _shown(name, answer)


def _plain(text: str, shim: Shim) -> str:
    """A message without what differs from run to run."""
    return text.replace(str(shim.bundle), "BUNDLE").replace(shim.id, "ID")


def _shown(name: str, answer: Any) -> str:
    if name == "State":
        return f"ok {answer.status}"
    if name in ("Wait", "Delete"):
        return f"ok exit {answer.exit_status}"
    return "ok"


# what changes the state when it is allowed: each gets a container of its own
MOVES = frozenset({"Pause", "Resume", "Start", "Delete", "Exec", "Create", "Shutdown", "Checkpoint"})


Key = tuple[str, str, str]


async def walk(
    fresh: Callable[[], Awaitable[Shim]], release: Callable[[Shim], Awaitable[None]], service: str
) -> dict[Key, Answer]:
    """Every method in every state: (process, state, method) to the answer. `fresh` gives shims without a container."""
    found: dict[Key, Answer] = {}

    async def walk_state(kind: str, state: str) -> None:
        bring = reach if kind == "init" else reach_exec
        shared: Shim | None = None
        for method in METHODS if kind == "init" else EXEC_METHODS:
            if shared is None:
                shared = await fresh()
                await bring(shared, state)
            answer = await ask(shared, method, "x" if kind == "exec" else "", service)
            found[kind, state, method] = answer
            if method in MOVES and isinstance(answer, str):
                await release(shared)
                shared = None
        if shared is not None:
            await release(shared)

    pairs = [*(("init", state) for state in STATES), *(("exec", state) for state in EXEC_STATES)]
    await asyncio.gather(*(walk_state(*pair) for pair in pairs))
    return found


def table() -> dict[Key, list[str]]:
    """What is to be answered, from `methods.txt`: ours, and then what containerd's shims may answer instead."""
    found: dict[Key, list[str]] = {}
    kind = state = ""
    for line in Path(__file__).with_suffix(".txt").read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if not line.startswith(" "):
            kind, state = line.split()
            continue
        method, answers = line[4:16].strip(), line[16:]
        found[kind, state, method] = answers.split(" || ")
    return found


def is_as_told(answer: Answer, told: str) -> bool:
    """Whether an answer is the table's; `…` stands for anything."""
    text = answer if isinstance(answer, str) else f"{answer[0]} {answer[1]}"
    return re.fullmatch(re.escape(told).replace("…", ".*"), text, re.DOTALL) is not None
