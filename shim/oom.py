"""Why a container ran out of memory, from the kernel's log: which cgroup's limit it was, and whom the kernel killed.

The cgroup's own counters say that something was killed; only the log says what, and whether the limit was the
container's or that of a pod or a slice around it (`oom-kill:constraint=CONSTRAINT_MEMCG,…,oom_memcg=…,task_memcg=…,
task=…,pid=…`, mm/oom_kill.c:dump_oom_victim, since Linux 5.0).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from wherry.linux.cgroups.layout import host

if TYPE_CHECKING:
    from wherry.linux.cgroups import Cgroup

_MARK: Final = b"oom-kill:constraint="
# a record is at most 8 KiB (CONSOLE_EXT_LOG_MAX)
_RECORD: Final = 8192


class Victim(NamedTuple):
    """One line of the kernel's: the cgroup whose limit was reached ("" for the whole machine), and who was killed."""

    limited: str
    cgroup: str
    command: str
    pid: int


def victims(kmsg: str = "/dev/kmsg") -> list[Victim]:
    """All that the kernel still has in its log, oldest first; none where it may not be read."""
    found: list[Victim] = []
    with contextlib.suppress(OSError):
        fd = os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while True:
                try:
                    record = os.read(fd, _RECORD)
                except BrokenPipeError:  # it was overwritten meanwhile; the next one is there
                    continue
                if not record:
                    break
                if _MARK in record:
                    found += _parse(record)
        except BlockingIOError:
            return found
        finally:
            os.close(fd)
    return found


def _parse(record: bytes) -> list[Victim]:
    line = record[record.index(_MARK) :].split(b"\n", 1)[0].decode(errors="replace")
    # a command may contain anything, commas, too: it stands between ",task=" and the last ",pid="
    head, _, rest = line.partition(",task=")
    command, _, tail = rest.rpartition(",pid=")
    fields = dict(pair.split("=", 1) for pair in head.split(",") if "=" in pair)
    pid = tail.split(",")[0]
    if not pid.isdigit() or "task_memcg" not in fields:
        return []
    return [Victim(fields.get("oom_memcg", ""), fields["task_memcg"], command, int(pid))]


def explain(cgroup: Cgroup) -> tuple[str, int]:
    """Say why the kernel killed in a container's cgroup, and whom it killed last (0 where nobody knows)."""
    directory = cgroup.paths.get("memory") or next(iter(cgroup.paths.values()), "")
    path = _as_the_kernel_says(directory)
    for victim in reversed(victims()) if path else ():
        # the kernel's path may begin further up than what is mounted here
        if f"{path}/" in f"{victim.cgroup}/":
            killed = f"the kernel killed {victim.command} (pid {victim.pid})"
            if not victim.limited:
                return f"out of memory: the machine had none left, {killed}", victim.pid
            whose = "" if f"{path}/" in f"{victim.limited}/" else ", which the container is in,"
            return f"out of memory: the limit of cgroup {victim.limited}{whose} was reached, {killed}", victim.pid
    return f"out of memory: the kernel killed in {directory}", 0


def _as_the_kernel_says(directory: str) -> str:
    """A cgroup's path below where its hierarchy is mounted; "" for the root."""
    layout = host()
    hierarchy = layout.v1.get("memory") or layout.v2
    return directory.removeprefix(hierarchy.mountpoint).rstrip("/") if hierarchy is not None else ""
