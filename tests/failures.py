"""Kills a process at a place of `core/failpoints.py` while a container lives its life, and looks at what is left.

One daemon serves many runs; a container that stays (`stays`) runs beside all of them. The client is as stubborn as a
good client is: it asks again when the daemon is back, and goes on from the state that it finds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from tests.failpoints import EITHER, GONE, KEPT, LOST, POINTS, Point
from tests.wherryd import BUSYBOX, Wherryd
from wherry.client.address import connect_blocking
from wherry.client.api import Client
from wherry.client.blocking import drive, iterate
from wherry.client.containers import Container
from wherry.client.launch import Launch, create, remove
from wherry.client.spec import SpecOptions
from wherry.client.tasks import Stdio
from wherry.core.errors import AlreadyExists, NotFound, WherryError

T = TypeVar("T")

STAYS = "stays"
TRUE = shutil.which("true") or "/bin/true"
OWN, EXEC, KILLED = 7, 5, 137
# ends when the file /stop is there, which the test puts into its root
PROGRAM = ("sh", "-c", f"while [ ! -e /stop ]; do sleep 0.02; done; exit {OWN}")
# where the end of the exec'd process is noted already
EXEC_NOTED = ("shim.exit.reaped", "shim.exit.written", "shim.exit.published", "shim.exit.told")
# seconds: for a life with everything that is restarted in it, and for what is left to go
LIFE, SETTLE = 60.0, 8.0
# what comes after a life (the shim leaves) comes within
REACH = 5.0


@dataclass
class Life:
    """What the client saw of one container."""

    name: str
    created: bool = False
    started: bool = False
    waited: int | None = None
    exec_waited: int | None = None
    deleted: int | None = None
    errors: list[str] = field(default_factory=list)


class Rig:
    """A daemon whose processes die where a file says, and the checks. Use as a context manager."""

    def __init__(self) -> None:
        self.daemon = Wherryd(config="")
        self.fail = self.daemon.folder / "fail"
        self.daemon.env["WHERRY_FAIL_FILE"] = str(self.fail)
        self._client: Client | None = None
        self._stays = 0
        self._number = 0
        self._held: list[socket.socket] = []

    def __enter__(self) -> Self:
        self.daemon.start()
        self.daemon.import_busybox()
        self.call(lambda client: self._begin(client, STAYS, ("sleep", "100000")))
        self._stays = self.call(lambda client: client.tasks.start(STAYS))
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()
        self.daemon.close()

    # -- calls

    def call(self, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        """One call, on a daemon that runs."""
        if self.daemon.process is None or self.daemon.process.poll() is not None:
            self._drop()
            self.daemon.process = None
            self.daemon.start()
        if self._client is None:
            transport = connect_blocking(self.daemon.address, 10.0)
            self._client = Client.over(transport, "default", timeout=25.0, deadline=time.monotonic() + 600)
        try:
            return drive(work(self._client))
        except WherryError as error:
            if not isinstance(error, NotFound | AlreadyExists):
                self._drop()
            raise

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(WherryError, OSError):
                drive(client.close())

    async def _begin(self, client: Client, name: str, args: tuple[str, ...], *, hooks: bool = False) -> int:
        launched = await create(client, Launch(name, BUSYBOX, SpecOptions(args=args)))
        if hooks:
            spec = {**(launched.container.spec or {}), "hooks": {"createRuntime": [{"path": TRUE}]}}
            await client.containers.update(Container(id=name, spec=spec), ["spec"])
        return await client.tasks.create(name, launched.mounts, Stdio())

    # -- one run

    def run(self, point: Point, *, also: bool = False) -> list[str]:
        """Live a life with a process killed at a place; what was wrong then, nothing is right.

        `also`: another process is killed with it: the daemon, or where that is the one that dies, the shim.
        """
        self._number += 1
        life = Life(f"c{self._number}")
        self._await_fork_server()
        self._await_vacant(wanted=point.warm)
        self.fail.write_text(f"{point.name}:{point.nth}")
        second = threading.Thread(target=self._kill_also, args=(point, life.name), daemon=True)
        if also:
            second.start()
        self._live(life, point)
        deadline = time.monotonic() + REACH
        while self.fail.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        reached = not self.fail.exists()
        self.fail.unlink(missing_ok=True)
        while self._held:
            self._held.pop().close()
        if also:
            second.join(LIFE)
        self._await_daemon()
        problems = [] if reached else ["the place was not reached"]
        problems += self._check(point, life, also=also)
        return [f"{point.title}{' and another' if also else ''}: {problem} {life}" for problem in problems]

    def _await_daemon(self) -> None:
        """It may be about to die, or be dead."""
        deadline = time.monotonic() + LIFE
        while time.monotonic() < deadline:
            with contextlib.suppress(WherryError):
                self.call(lambda client: client.tasks.list())
                return
            time.sleep(0.05)

    def _await_fork_server(self) -> None:
        """While it warms up it goes through a shim's places, too."""
        deadline = time.monotonic() + LIFE
        while time.monotonic() < deadline:
            for pid in self.daemon.processes():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"wherry-forkserver\0"):
                        return
            time.sleep(0.02)

    def _await_vacant(self, *, wanted: bool) -> None:
        """Have a shim without a container, or none."""
        deadline = time.monotonic() + LIFE
        while bool(self.daemon.vacant()) is not wanted and time.monotonic() < deadline:
            if wanted:
                before = Life("before")
                self._live(before, Point("", "", KEPT))
                if before.errors:
                    raise AssertionError(f"a life before: {before}")
            time.sleep(0.02)

    def _hold(self) -> None:
        """Be connected to every shim."""
        for path in (self.daemon.state / "s").glob("*"):
            peer = socket.socket(socket.AF_UNIX)
            self._held.append(peer)
            with contextlib.suppress(OSError):
                peer.connect(str(path))

    def _kill_also(self, point: Point, name: str) -> None:
        deadline = time.monotonic() + LIFE
        while self.fail.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        if point.dies == "daemon":
            self._kill_shim(name)
        elif self.daemon.process is not None:
            self.daemon.process.send_signal(signal.SIGKILL)

    def _kill_shim(self, name: str) -> None:
        for pid in self.daemon.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").split()
                if words[:1] == [b"containerd-shim-wherry-v1"] and words[3:5] == [b"-id", name.encode()]:
                    os.kill(pid, signal.SIGKILL)

    def _live(self, life: Life, point: Point) -> None:
        deadline = time.monotonic() + LIFE
        stages = iter(range(1_000_000))
        tried = False
        while time.monotonic() < deadline:
            next(stages)
            try:
                if not tried:
                    tried = True
                    life.created = (
                        self.call(lambda client: self._begin(client, life.name, PROGRAM, hooks=point.hooks)) > 0
                    )
                if not self._advance(life, point):
                    return
            except WherryError as error:
                life.errors.append(f"{type(error).__name__}: {error.message}")
                time.sleep(0.02)
        life.errors.append("its time is over")

    def _advance(self, life: Life, point: Point) -> bool:
        """The next step of a life, by the state that it is in; False at its end."""
        name = life.name
        try:
            task = self.call(lambda client: client.tasks.get(name))
        except NotFound:
            self._forget(name)
            return False
        if task.status == "CREATED":
            self.call(lambda client: client.tasks.start(name))
            life.started = True
        elif task.status == "RUNNING":
            life.started = True
            self._while_it_runs(life, point, task.pid)
        elif task.status == "STOPPED":
            if life.waited is None:
                life.waited = self.call(lambda client: client.tasks.wait(name)).status
            life.deleted = self.call(lambda client: client.tasks.delete(name)).status
        else:
            time.sleep(0.05)
        return True

    def _while_it_runs(self, life: Life, point: Point, pid: int) -> None:
        name = life.name
        if point.held:
            self._hold()
        if life.exec_waited is None:
            self._exec(life, borrowed=point.name.startswith("runtime.borrowed."))
        if point.kill_shim:
            self._kill_shim(name)
        else:
            Path(f"/proc/{pid}/root/stop").touch()
        life.waited = self.call(lambda client: client.tasks.wait(name)).status

    def _exec(self, life: Life, *, borrowed: bool) -> None:
        name = life.name
        # a program whose path isn't absolute is not for `runtime/entering.py`
        program = "./bin/sh" if borrowed else "sh"
        process = {
            "args": [program, "-c", f"exit {EXEC}"],
            "cwd": "/",
            "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
        }
        with contextlib.suppress(AlreadyExists):
            self.call(lambda client: client.tasks.exec(name, "e", process, Stdio()))
        found = self.call(lambda client: client.tasks.get(name, "e"))
        if found.status == "CREATED":
            self.call(lambda client: client.tasks.start(name, "e"))
        life.exec_waited = self.call(lambda client: client.tasks.wait(name, "e")).status
        self.call(lambda client: client.tasks.delete(name, "e"))

    def _forget(self, name: str) -> None:
        try:
            container = self.call(lambda client: client.containers.get(name))
        except NotFound:
            # its snapshot is garbage; gone is what nothing references
            with contextlib.suppress(NotFound):
                self.call(lambda client: client.snapshots().remove(name))
            return
        self.call(lambda client: remove(client, container))

    # -- what must be true

    def _check(self, point: Point, life: Life, *, also: bool) -> list[str]:
        problems = []
        deadline = time.monotonic() + SETTLE
        while (left := self._left(life.name)) and time.monotonic() < deadline:
            time.sleep(0.05)
        problems += left
        if "its time is over" in life.errors:
            problems.append("the life did not come to its end")
        ends, gone, execs = self._told(life.name)
        expected = {KEPT: {OWN}, LOST: {KILLED}, EITHER: {OWN, KILLED}, GONE: {OWN}}[point.end]
        if also:
            expected = {OWN, KILLED}
        if len(ends) > 1 or len(gone) > 1:
            problems.append(f"its end was told more than once: {ends} {gone}")
        if (life.created or life.started) and len(ends) != 1:
            problems.append(f"its end was told {len(ends)} times")
        if not set(ends) <= expected:
            problems.append(f"its exit status is {ends}, not one of {expected}")
        for said in (life.waited, life.deleted):
            if said is not None and ends and said != ends[0]:
                problems.append(f"the client was told {said}, the subscribers {ends}")
        if len(execs) > 1 or not set(execs) <= {EXEC, KILLED}:
            problems.append(f"the end of the exec was told as {execs}")
        if point.name in EXEC_NOTED and point.nth == 1 and execs != [EXEC]:
            problems.append(f"the end of the exec was noted and told as {execs}")
        problems += self._beside()
        return problems

    def _told(self, name: str) -> tuple[list[int], list[int], list[int]]:
        """The exits and deletes of a container that the journal has, and the exits of what was exec'd in it."""

        async def read(client: Client) -> tuple[list[int], list[int], list[int]]:
            ends, gone, execs = [], [], []
            for event in iterate(client.events.follow(["topic~=|/tasks/|"], after=0, until=time.time())):
                message: Any = event.message()
                if message.container_id != name:
                    continue
                if event.topic == "/tasks/exit" and message.id == name:
                    ends.append(message.exit_status)
                elif event.topic == "/tasks/exit":
                    execs.append(message.exit_status)
                elif event.topic == "/tasks/delete":
                    gone.append(message.exit_status)
            return ends, gone, execs

        return self.call(read)

    def _left(self, name: str) -> list[str]:
        """What a container may have left on the host."""
        found = []
        state = self.daemon.state
        paths = (
            state / "tasks" / "default" / name,
            state / "tasks" / "default" / f".{name}",
            state / "runtime" / "default" / name,
            *Path("/sys/fs/cgroup").glob(f"*/default/{name}"),
        )
        found += [f"left over: {path}" for path in paths if os.path.lexists(path)]
        if len(sockets := list((state / "s").glob("*"))) > 1:
            found.append(f"left over: {len(sockets) - 1} sockets")
        found += [f"left over: mount {target}" for target in self.daemon.mounts() if f"/{name}/" in f"{target}/"]
        for pid in self.daemon.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                cgroup = Path(f"/proc/{pid}/cgroup").read_text()
                if f" -id {name} " in words or f"/default/{name}\n" in cgroup:
                    found.append(f"left over: process {pid} {words}")
        return found

    def _beside(self) -> list[str]:
        """The other container, and the daemon's records."""
        problems = []
        tasks = {task.container_id: task.pid for task in self.call(lambda client: client.tasks.list())}
        if tasks != {STAYS: self._stays}:
            problems.append(f"the tasks are {tasks}, not {STAYS} with pid {self._stays}")
        containers = [container.id for container in self.call(lambda client: client.containers.list())]
        if containers != [STAYS]:
            problems.append(f"the containers are {containers}")
        connection = sqlite3.connect(f"file:{self.daemon.root}/metadata.db?mode=ro", uri=True)
        with contextlib.closing(connection):
            said = connection.execute("PRAGMA integrity_check").fetchone()[0]
            rows = connection.execute("SELECT key FROM snapshots WHERE key = ? OR key LIKE 'c%'", (STAYS,)).fetchall()
        if said != "ok":
            problems.append(f"the metadata is damaged: {said}")
        if [row[0] for row in rows] != [STAYS]:
            problems.append(f"the snapshots are {rows}")
        return problems


def main() -> None:
    """All places, alone and with a second process, so many rounds; a table at the end."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    bad: list[str] = []
    runs: dict[str, int] = {}
    began = time.monotonic()
    for _ in range(rounds):
        with Rig() as rig:
            for point in POINTS:
                for also in (False, True):
                    problems = rig.run(point, also=also)
                    runs[point.dies] = runs.get(point.dies, 0) + 1
                    bad += problems
                    print("".join(f"{problem}\n" for problem in problems), end="", flush=True)
    print(
        f"{len({point.name for point in POINTS})} places, {len(POINTS)} ways to come there, {sum(runs.values())} runs"
    )
    print(", ".join(f"{dies}: {count}" for dies, count in runs.items()))
    print(f"{len(bad)} wrong, {time.monotonic() - began:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
