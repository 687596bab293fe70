"""A further process in a container, made without a fork: by a child that borrows the runtime's memory.

As `borrowed.py` makes an init, but there is nothing to wait for: the child ends by executing the program itself::

    runtime                            child
      opens namespaces
      vfork ───────────────────────────▶ cgroup, oom_score_adj, pid file, namespaces, limits, terminal, user, …
      (stopped)                          executes the program
      ◀──────────────────────────────────┘

The child is in a pid namespace with strangers. They can't look into the memory that it borrows for the same reason for
which they can't look into that of a forked child, which has as many rights: it isn't dumpable (ptrace(2)). From before
it is born, here.

Not for a container with a user or time namespace, nor for a filter whose agent has to be told.
"""

from __future__ import annotations

import os

from wherry.core.failpoints import reach
from wherry.linux import namespaces, process, vfork
from wherry.linux import syscalls as sc
from wherry.linux.cgroups.layout import host
from wherry.runtime import borrowed, execute, init, make
from wherry.runtime.channel import Channel
from wherry.runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from wherry.runtime.plan import Plan


class _Nobody(Channel):
    """Where `init.py` has the channel to the runtime."""

    def fds(self) -> tuple[int, int]:
        return -1, -1


def serves(plan: Plan) -> bool:
    """Whether a process for this container can be made this way."""
    if host().user_namespace:
        return False  # the way back to the host's pid namespace takes rights on the host (setns(2))
    if borrowed.machine() is None or "user" in plan.kinds or "time" in plan.kinds or plan.unit is not None:
        return False
    if plan.rdt or any(plan.process.get(name) for name in ("scheduler", "ioPriority", "execCPUAffinity")):
        return False
    profile = plan.linux.get("seccomp") or {}
    if any(rule.get("action") == "SCMP_ACT_NOTIFY" for rule in profile.get("syscalls") or ()):
        return False
    return profile.get("defaultAction") != "SCMP_ACT_NOTIFY" and borrowed.enough_memory(plan.linux)


def spawn(plan: Plan, recorded: Callable[[int], None], forget: Callable[[], None]) -> int:
    """Run the process; its pid, once it executed its program. `recorded` is called with the pid before it does, in the
    child, `forget` where it then couldn't. Raises ContainerError, and the child is gone; OSError where it never was."""
    problems: list[str] = []
    before = -1
    pid_fd = plan.joined.get("pid", -1)
    # what is shared can't be looked into from the moment on in which a stranger could see the child
    process.set_dumpable(False)
    try:
        if pid_fd >= 0:
            before = os.open("/proc/self/ns/pid_for_children", os.O_RDONLY | os.O_CLOEXEC)
            sc.setns(pid_fd, sc.CLONE_NEWPID)
        pid = borrowed.lend(plan, lambda: _spawn(plan, recorded, problems))
    finally:
        process.set_dumpable(True)
        if before >= 0:
            sc.setns(before, sc.CLONE_NEWPID)
            os.close(before)
    if problems:
        forget()
        make.kill(pid)
        raise ContainerError(make.FAILED_START + problems[0].removeprefix(make.FAILED_START), exit_code=255)
    reach("runtime.borrowed.executed")
    return pid


def _spawn(plan: Plan, recorded: Callable[[int], None], problems: list[str]) -> int:
    found = ""

    def body(number: int) -> vfork.Program | None:
        nonlocal found
        try:
            if number:
                raise OSError(number, os.strerror(number), found)
            channel = _Nobody(-1, -1)
            init.isolate(plan, channel)
            make.limit_score(plan, "self")
            # of the host's /proc, in which the runtime's numbers count
            recorded(int(os.readlink("/proc/self")))
            reach("runtime.borrowed.entering")
            label = execute.open_label(plan)
            plan.joined.pop("pid", None)
            namespaces.join(plan.joined)
            plan.joined = {}
            make.limit(plan, 0)
            execute.settle_in(plan, label)
            found, env = init.finish(plan, channel)
            argv = [os.fsencode(item) for item in plan.process["args"]]
            return vfork.Program(os.fsencode(found), argv, [os.fsencode(item) for item in env])
        except BaseException as error:  # noqa: BLE001 - nothing may get out of here, see `vfork`
            problems.append(execute.said_of(error, plan))
            return None

    lender = borrowed.machine()
    if lender is None:
        raise ContainerError("nothing is prepared for this")
    return lender.spawn(0, plan.cgroup_fd, body)
