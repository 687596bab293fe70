"""The processes of a container that has no cgroup: those in its pid namespace, where it has one of its own."""

from __future__ import annotations

import os

from wherry.linux import syscalls as sc
from wherry.runtime.errors import PRECONDITION, ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from wherry.runtime.state import State

_ROUNDS = 20  # a process that forks while it is looked for is found in the next round


def pids(found: State) -> list[int]:
    """As the caller's namespace numbers them, the init first. Raises ContainerError without a namespace to go by."""
    if "pid" not in found.namespaces:
        raise ContainerError("the container has neither a cgroup nor a pid namespace of its own", PRECONDITION)
    try:
        own = os.stat(f"/proc/{found.pid}/ns/pid")
    except OSError:
        return []
    members = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            other = os.stat(f"/proc/{name}/ns/pid")
        except OSError:
            continue  # gone, or nothing of ours
        if (other.st_dev, other.st_ino) == (own.st_dev, own.st_ino):
            members.append(int(name))
    return sorted(members, key=lambda pid: pid != found.pid)


def signal(found: State, number: int) -> None:
    """Send a signal to all of them; SIGKILL to the init is one to all (pid_namespaces(7))."""
    reached: set[int] = set()
    for _ in range(_ROUNDS):
        new = [pid for pid in pids(found) if pid not in reached]
        if not new:
            return
        for pid in new:
            reached.add(pid)
            try:
                fd = os.pidfd_open(pid)
            except OSError:
                continue
            try:
                sc.pidfd_send_signal(fd, number)
            except OSError:
                continue  # gone meanwhile
            finally:
                os.close(fd)
