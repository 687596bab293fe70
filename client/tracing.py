"""A container's start, watched from outside: calls, mounts, cgroup writes and processes in order, with times.

The fork server of a daemon, and the shims that are named, are watched by ptrace(2), and with them everything that they
fork: shim, runtime (ours or another), the container's init up to the moment in which it becomes the container's own
program. Nothing in the engine takes part, so what is seen is what happens, whatever runtime it is. A watched process is
several times slower: the order is exact, the times are not those of a start that nobody watches.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from wherry.client import syscall_names as names
from wherry.core.errors import FailedPrecondition, PermissionDenied
from wherry.linux import ptrace

# characters of a text or of what is written
TEXT = 120


class Call(NamedTuple):
    """Something that happened: `at` in seconds from the beginning, by whom, what, and what came of it.

    `kind` is `mount`, `cgroup`, `process`, `namespace`, `rights`, `file` or `other`.
    """

    at: float
    pid: int
    who: str
    kind: str
    text: str
    result: int = 0
    seconds: float = 0.0


class _Process:
    """A watched process, and the call that it is in."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.number = -1
        self.args: tuple[int, ...] = ()
        self.text = ""
        self.kind = ""
        self.began = 0.0
        self.who = name_of(pid)


class Tracer:
    """Watches processes; `tell` gets each call when it is over. One thread for all: that is ptrace's rule."""

    def __init__(self, tell: Callable[[Call], None]) -> None:
        self._tell = tell
        self._processes: dict[int, _Process] = {}
        self._began = time.monotonic()

    def watch(self, pids: Iterable[int]) -> None:
        """Begins; raises PermissionDenied, FailedPrecondition where nothing can be watched."""
        refused = 0
        for pid in pids:
            try:
                ptrace.seize(pid)
                ptrace.interrupt(pid)
            except PermissionError:
                # also the kernel's word for one that is ending
                refused = pid
                continue
            except ProcessLookupError:
                continue
            self._processes[pid] = _Process(pid)
        if refused and not self._processes:
            raise PermissionDenied(f"process {refused} can't be watched: that takes root, and nobody else watching it")
        if not self._processes:
            raise FailedPrecondition(
                "nothing to watch: the daemon has no fork server here (is it wherryd, on this host?)"
            )

    def run(self, child: int) -> int:
        """Follows until a child of this process, that isn't watched, ends: its wait status. Then nothing is watched."""
        try:
            while True:
                pid, status = os.waitpid(-1, ptrace.WALL)
                if pid == child:
                    return status
                # one that was killed meanwhile: its end is told next
                with contextlib.suppress(ProcessLookupError):
                    self._stopped(pid, status)
        finally:
            self._leave()

    def _stopped(self, pid: int, status: int) -> None:
        if not os.WIFSTOPPED(status):
            self._processes.pop(pid, None)
            return
        process = self._processes.get(pid)
        if process is None:
            process = self._processes[pid] = _Process(pid)
        number, event = os.WSTOPSIG(status), status >> 16
        if number == signal.SIGTRAP | 0x80:
            self._at_call(process)
            ptrace.resume(pid)
        elif event == ptrace.EVENT_EXEC and _in_container(pid):
            self._say(process, "process", f"becomes the container's program: {command_of(pid)}")
            self._processes.pop(pid, None)
            ptrace.detach(pid)
        elif event in {ptrace.EVENT_FORK, ptrace.EVENT_VFORK, ptrace.EVENT_CLONE}:
            # told now and not when the call returns, which for vfork is after all that the child did
            self._say(process, process.kind or "process", f"{process.text or 'fork()'} = {ptrace.event_message(pid)}")
            process.text = ""
            ptrace.resume(pid)
        elif event == ptrace.EVENT_EXIT:
            code = ptrace.event_message(pid)
            how = f"signal {code & 0x7F}" if code & 0x7F else f"code {code >> 8}"
            self._say(process, "process", f"ends, {how}")
            ptrace.resume(pid)
        elif event == ptrace.EVENT_STOP and number in {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}:
            ptrace.listen(pid)
        elif event:
            process.who = name_of(pid)
            ptrace.resume(pid)
        else:
            ptrace.resume(pid, number)

    def _at_call(self, process: _Process) -> None:
        info = ptrace.syscall_info(process.pid)
        if info is None:
            return
        if info.kind == ptrace.ENTRY:
            process.number, process.args, process.began = info.number, info.args, time.monotonic()
            # what pointers point to is read now: afterwards it may be gone
            process.kind, process.text = names.describe(process.pid, info.number, info.args, _Memory(process.pid))
            return
        if process.number < 0:
            # it was in a call when the watching began
            return
        who, process.who = process.who, name_of(process.pid)
        text, kind = process.text, process.kind
        process.number = -1
        if text:
            at = process.began - self._began
            seconds = time.monotonic() - process.began
            self._tell(Call(at, process.pid, who, kind, text, info.result, seconds))

    def _say(self, process: _Process, kind: str, text: str) -> None:
        self._tell(Call(time.monotonic() - self._began, process.pid, process.who, kind, text))

    def _leave(self) -> None:
        """Lets everything run on: each must be stopped for that."""
        for pid in list(self._processes):
            with contextlib.suppress(OSError):
                ptrace.interrupt(pid)
        deadline = time.monotonic() + 2.0
        while self._processes and time.monotonic() < deadline:
            try:
                pid, status = os.waitpid(-1, ptrace.WALL | os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                time.sleep(0.001)
                continue
            if os.WIFSTOPPED(status):
                number, event = os.WSTOPSIG(status), status >> 16
                sent = 0 if event or number == signal.SIGTRAP | 0x80 else number
                with contextlib.suppress(OSError):
                    ptrace.detach(pid, sent)
            self._processes.pop(pid, None)


class _Memory:
    """What a stopped process' pointers point to."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def read(self, address: int, length: int) -> bytes:
        """So many bytes, fewer where its memory ends."""
        try:
            with open(f"/proc/{self._pid}/mem", "rb", buffering=0) as file:
                file.seek(address)
                return file.read(length)
        except (OSError, ValueError, OverflowError):
            return b""

    def text(self, address: int) -> str:
        """A C string."""
        if not address:
            return ""
        # not over the end of its page, where what follows may not be readable
        data = self.read(address, min(4096, 4096 - address % 4096))
        if b"\0" not in data and len(data) < 4096:
            data += self.read(address + len(data), 4096)
        return data.partition(b"\0")[0].decode(errors="replace")[: TEXT * 4]


def name_of(pid: int) -> str:
    """What a process is called now."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"


def command_of(pid: int) -> str:
    """Its command line."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()[:TEXT]
    except OSError:
        return "?"


def _in_container(pid: int) -> bool:
    """Whether its root is another one than ours."""
    try:
        theirs, ours = os.stat(f"/proc/{pid}/root"), os.stat("/")
    except OSError:
        return False
    return (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino)


def fork_servers(daemon: int) -> list[int]:
    """The fork server of a daemon with what it has forked beforehand; [] where it isn't a process of this host."""
    found: list[int] = []
    for pid in _children(daemon):
        if "forkserver" in " ".join(command_of_full(pid)):
            found += [pid, *_descendants(pid)]
    return found


def shims_of(identity: str) -> list[int]:
    """The shims that serve a container."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            words = command_of_full(int(entry))
            if words[:1] and "shim" in words[0] and identity in words:
                found.append(int(entry))
    return found


def command_of_full(pid: int) -> list[str]:
    """Its arguments."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return [word.decode(errors="replace") for word in file.read().split(b"\0")]
    except OSError:
        return []


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    return found


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for child in _children(pid):
        found += [child, *_descendants(child)]
    return found
