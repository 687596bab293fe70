"""A further process in a running container: `exec`.

It is forked into the container's pid namespace and cgroup, enters the other namespaces through descriptors that were
opened while init was known to live, and gives up rights as init did. What enters runs from the sealed executable and
can't be traced (`sealed.py`, `init.isolate`), because here somebody is already inside who might try.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import os

from wherry.linux import namespaces, process
from wherry.linux import syscalls as sc
from wherry.runtime import init, kernel
from wherry.runtime.errors import PRECONDITION, ContainerError
from wherry.runtime.root import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from wherry.runtime.channel import Channel
    from wherry.runtime.plan import Plan
    from wherry.runtime.state import State


def open_namespaces(state: State) -> dict[str, int]:
    """Descriptors of those namespaces of init's that aren't ours (kind → fd)."""
    fds: dict[str, int] = {}
    try:
        for kind in namespaces.FLAGS:
            theirs = namespaces.path_of(kind, state.pid)
            if os.path.exists(theirs) and not namespaces.same(theirs, namespaces.path_of(kind)):
                fds[kind] = namespaces.open_namespace(theirs)
        if not process.is_alive(state.pid, state.pid_started):  # the pid could be another process's by now
            raise ContainerError("cannot exec in a stopped container", PRECONDITION)
    except BaseException:
        for fd in fds.values():
            os.close(fd)
        raise
    return fds


def open_cgroup_of(pid: int) -> int:
    """The v2 cgroup that a process is in now, as a descriptor for clone3."""
    from wherry.linux import cgroups

    hierarchy = cgroups.host().v2
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
        path = next((line[3:].rstrip("\n") for line in file if line.startswith("0::")), "")
    if hierarchy is None or not path:
        raise ContainerError("the container's cgroup can't be found")
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    return os.open(hierarchy.mountpoint + path, flags)


def run(plan: Plan, channel: Channel) -> NoReturn:
    """The child's life; never returns. `error` is followed by exec's end, success by execve closing the channel."""
    try:
        init.isolate(plan, channel)
        label = kernel.open_label(plan.process)  # of the host's /proc: the container's could be a fake
        namespaces.join(plan.joined)
        plan.joined = {}
        if "user" in plan.kinds:
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            process.set_dumpable(False)
        channel.send("ready")
        channel.expect("go")
        if not plan.no_new_keyring:
            kernel.join_keyring(plan.state.id)
        if plan.console >= 0:
            from wherry.runtime import console

            root = Root("/")
            console.set_up(root, plan.process, plan.console, with_console=False)
            os.close(root.fd)
        kernel.write_label(label, plan.process)
        kernel.set_personality(plan.linux)
        program, env = init.finish(plan, channel)
        channel.send("waiting")
        channel.expect("recorded")
        sc.execve(program, plan.process["args"], env)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent has to say it: this process can't
        text = init.describe(error)
        if isinstance(error, OSError) and error.filename == plan.process["args"][0]:
            text = f"exec {error.filename}: {(error.strerror or '').lower()}"
        try:
            channel.send("error", text)
        finally:
            os._exit(255)
    os._exit(255)  # execve returns only by raising
