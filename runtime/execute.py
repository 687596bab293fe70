"""A further process in a running container: `exec`.

It is forked into the container's pid namespace and cgroup, enters the other namespaces through descriptors that were
opened while init was known to live, and gives up rights as init did. What enters runs from the sealed executable and
can't be traced (`sealed.py`, `init.isolate`), because here somebody is already inside who might try.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import contextlib
import errno
import os
import sys

from wherry.core.errors import WherryError
from wherry.linux import namespaces, process
from wherry.linux import syscalls as sc
from wherry.runtime import create, init, kernel, make, prepare, spec, state
from wherry.runtime.errors import INVALID, PRECONDITION, ContainerError
from wherry.runtime.plan import Plan
from wherry.runtime.root import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from wherry.runtime.channel import Channel
    from wherry.runtime.container import ExecRequest
    from wherry.runtime.state import State


def exec_process(request: ExecRequest) -> int:
    """See `container.exec_process`."""
    from wherry.linux import cgroups

    spec.validate_process(request.process)
    found = _running(request)
    plan = Plan(found, found.spec(), request.process)
    plan.is_exec = True
    plan.stdio = request.stdio
    plan.preserve_fds = request.preserve_fds
    try:
        plan.joined = open_namespaces(found)
        plan.kinds = dict.fromkeys(plan.joined, "")
        paths = _sub_cgroups(found.cgroup_paths, request.sub_cgroups)
        plan.cgroup = cgroups.restore(paths) if paths else None
        plan.cgroup_fd = plan.cgroup.clone_fd() if plan.cgroup else -1
        plan.rdt = [found.rdt_class] if found.rdt_class else []
        if found.unit and os.geteuid():
            from wherry.linux.cgroups import systemd

            plan.unit = systemd.Unit(found.unit, user=True)
        prepare.open_console(plan, request.console_socket, request.console_fd)
        prepare.compile_seccomp(plan)

        return _make(plan, request.pid_file)
    except (OSError, WherryError, ValueError) as error:
        raise ContainerError(make.FAILED_START + create.text_of(error), exit_code=255) from error
    finally:
        prepare.close(plan, request.console_fd)


def _make(plan: Plan, pid_file: str) -> int:
    """The process, which has executed its program; its pid."""

    def recorded(pid: int) -> None:
        if pid_file:
            make.write_pid_file(pid_file, pid)

    def forget() -> None:
        if pid_file:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(pid_file)

    borrowed = sys.modules.get("wherry.runtime.borrowed_exec")
    if borrowed is not None and borrowed.serves(plan):
        try:
            return int(borrowed.spawn(plan, recorded, forget))
        except OSError as error:
            if error.errno != errno.EBUSY:  # its cgroup may hold no process: see `_spawn`
                raise
    pid, channel = _spawn(plan)
    return make.converse(plan, pid, channel, recorded)


# -- the runtime's part -----------------------------------------------------------------------------------------------


def _running(request: ExecRequest) -> State:
    found = state.load(request.root, request.id)
    status = found.status()
    if status in (state.STOPPED, state.CREATING):
        raise ContainerError("cannot exec in a stopped container", PRECONDITION, exit_code=255)
    if status == state.PAUSED and not request.ignore_paused:
        message = "cannot exec in a paused container (use --ignore-paused to override)"
        raise ContainerError(message, PRECONDITION, exit_code=255)
    return found


def _spawn(plan: Plan) -> tuple[int, Channel]:
    try:
        return _spawn_on(plan, run)
    except OSError as error:
        if error.errno != errno.EBUSY or plan.cgroup_fd < 0:
            raise
    # The container has made cgroups of its own below, so that this one may hold no process: init's it is.
    plan.close()
    plan.cgroup_fd = open_cgroup_of(plan.state.pid)
    plan.joined = open_namespaces(plan.state)
    return make.spawn(plan, run)


def _spawn_on(plan: Plan, body: Callable[[Plan, Channel], Any]) -> tuple[int, Channel]:
    """`make.spawn` with `execCPUAffinity.initial`: the CPUs until the process is in its cgroup."""
    if not plan.process.get("execCPUAffinity"):
        return make.spawn(plan, body)
    from wherry.runtime import settings

    before = os.sched_getaffinity(0)
    try:
        settings.set_affinity(plan.process, "initial")
        return make.spawn(plan, body)
    finally:
        os.sched_setaffinity(0, before)


def _sub_cgroups(paths: dict[str, str], wanted: list[str]) -> dict[str, str]:
    """The container's cgroup directories, with those that `--cgroup` names replaced by ones below them."""
    chosen = dict(paths)
    for item in wanted:
        controllers, colon, below = item.rpartition(":")
        names = controllers.split(",") if colon else list(paths)
        for name in names:
            if name not in paths:
                raise ContainerError(f"bad --cgroup argument: unknown controller {name}", INVALID)
            path = os.path.normpath(f"{paths[name]}/{below}")
            if path != paths[name] and not path.startswith(paths[name] + "/"):
                raise ContainerError(f"bad --cgroup argument: {below} is not a sub-cgroup path", INVALID)
            chosen[name] = path
    return chosen


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


# -- the child's part -------------------------------------------------------------------------------------------------


def run(plan: Plan, channel: Channel) -> NoReturn:
    """The child's life; never returns. `error` is followed by exec's end, success by execve closing the channel."""
    try:
        init.isolate(plan, channel)
        if "user" in plan.joined and os.geteuid():
            _enter_user_namespace(plan, channel)
        label = open_label(plan)
        namespaces.join(plan.joined)
        plan.joined = {}
        if "user" in plan.kinds:
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            process.set_dumpable(False)
        channel.send("ready")
        channel.expect("go")
        settle_in(plan, label)
        program, env = init.finish(plan, channel)
        channel.send("waiting")
        channel.expect("recorded")
        sc.execve(program, plan.process["args"], env)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent has to say it: this process can't
        try:
            channel.send("error", said_of(error, plan))
        finally:
            os._exit(255)
    os._exit(255)  # execve returns only by raising


def open_label(plan: Plan) -> int:
    """Where the label is written, of the host's /proc: the container's could be a fake. Before it joins namespaces."""
    return kernel.open_label(plan.process)


def settle_in(plan: Plan, label: int) -> None:
    """What is done in the container with the host's rights: keyring, terminal, label, personality."""
    if not plan.no_new_keyring:
        kernel.join_keyring(plan.state.id)
    if plan.console >= 0:
        from wherry.runtime import console

        root = Root("/")
        console.set_up(root, plan.process, plan.console, with_console=False)
        os.close(root.fd)
    kernel.write_label(label, plan.process)
    kernel.set_personality(plan.linux)


def said_of(error: BaseException, plan: Plan) -> str:
    """The text of what went wrong in the child; a program that can't be executed is told as runc tells it."""
    if isinstance(error, OSError) and error.filename == plan.process["args"][0]:
        return f"exec {error.filename}: {(error.strerror or '').lower()}"
    return init.describe(error)


def _enter_user_namespace(plan: Plan, channel: Channel) -> None:
    """An ordinary user's way: who has joined the user namespace has the right to join the pid namespace, which is then
    the next child's. So this process is one in between, and only its child returns."""
    namespaces.join({"user": plan.joined.pop("user")})
    pid_fd = plan.joined.pop("pid", -1)
    if pid_fd >= 0:
        sc.setns(pid_fd, sc.CLONE_NEWPID)
        os.close(pid_fd)
    pid = os.fork()
    if pid:
        channel.send("child", pid)
        os._exit(0)
    os.setsid()
