"""The runtime's side of making a process: fork it into its namespaces, answer it, undo what failed.

`init.py` draws the handshake. Two kinds of process are made here: a container's init, and one that `exec` adds.
"""

from __future__ import annotations

import os

from wherry.core.failpoints import reach
from wherry.linux import process
from wherry.linux import syscalls as sc
from wherry.linux.cgroups.layout import host
from wherry.linux.namespaces import path_of
from wherry.runtime import channel as channels
from wherry.runtime import hooks, kernel
from wherry.runtime.errors import ContainerError
from wherry.runtime.spec import RLIMITS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from wherry.runtime.channel import Channel
    from wherry.runtime.plan import Plan

FAILED_START = "unable to start container process: "


def spawn(plan: Plan, body: Callable[[Plan, Channel], Any]) -> tuple[int, Channel]:
    """Fork into the pid (and time) namespace and the cgroup; the child runs `body`, which never returns.

    With a user namespace the child is the process in between (`init.enter_user_namespace`), forked plainly.
    The caller's own namespaces are as they were when this returns.
    """
    ours, theirs = channels.pair()
    restore: list[tuple[int, int]] = []
    # root may join a container's pid namespace before its user namespace, another user only after it
    in_between = "user" in plan.kinds and (not plan.is_exec or os.geteuid() != 0)
    flags = 0
    try:
        if not in_between:
            flags = _choose_pid_namespace(plan, restore)
        if "time" in plan.new and not in_between:
            restore.append((os.open("/proc/self/ns/time", os.O_RDONLY | os.O_CLOEXEC), sc.CLONE_NEWTIME))
            sc.unshare(sc.CLONE_NEWTIME)
            kernel.write_time_offsets(plan.linux, plan.new)
        pid = _fork(plan, flags)
        if pid == 0:
            ours.close()
            reach("runtime.child.born")
            body(plan, theirs)
            os._exit(70)  # never reached: EX_SOFTWARE
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        for fd, kind in restore:
            _go_back(fd, kind)
            os.close(fd)
    return pid, ours


def _fork(plan: Plan, flags: int) -> int:
    try:
        return sc.fork(flags, plan.cgroup_fd)
    except PermissionError:
        if plan.unit is None or plan.cgroup_fd < 0:
            raise
    # An ordinary user may move nobody out of the cgroup that we are in, and systemd may: the child asks for it.
    os.close(plan.cgroup_fd)
    plan.cgroup_fd = -1
    plan.moved_by_systemd = True
    return sc.fork(flags)


def _go_back(fd: int, kind: int) -> None:
    try:
        sc.setns(fd, kind)
    except PermissionError:
        # in a user namespace there is no way back up; such a process has no further children
        if not host().user_namespace:
            raise


def _choose_pid_namespace(plan: Plan, restore: list[tuple[int, int]]) -> int:
    """Flags for the fork; entering an existing pid namespace instead moves this process's future children."""
    fd = plan.joined.pop("pid", -1)
    if fd < 0:
        return sc.CLONE_NEWPID if "pid" in plan.new else 0
    try:
        restore.append((os.open("/proc/self/ns/pid_for_children", os.O_RDONLY | os.O_CLOEXEC), sc.CLONE_NEWPID))
        sc.setns(fd, sc.CLONE_NEWPID)
    finally:
        os.close(fd)
    return 0


def converse(plan: Plan, pid: int, channel: Channel, recorded: Callable[[int], None]) -> int:
    """Answer the child until it waits (init) or has gone (exec); returns the pid of the container's process.

    `recorded` is called with it when nothing can fail any more. On an error the child is killed and reaped.
    """
    reach("runtime.forked")
    child, settled = pid, False
    try:
        while True:
            kind, value = channel.receive()
            if kind == "error":
                raise ContainerError(FAILED_START + value)
            if kind == "":
                if settled:
                    return child
                raise ContainerError(FAILED_START + _death(child))
            if kind == "child":
                os.waitpid(child, 0)
                child = int(value)
            elif kind == "ready":
                reach("runtime.child.ready")
                limit(plan, child)
                limit_score(plan, child)
                channel.send("go")
            elif kind in ("cgroup", "map", "hooks", "network", "seccomp"):
                _serve(plan, child, kind, value)
                channel.send("mapped" if kind == "map" else "go")
            elif kind == "waiting":
                recorded(child)
                channel.send("recorded")
                reach("runtime.recorded")
                if not plan.is_exec:
                    return child
                settled = True  # what comes now is the end of file that a successful execve makes, or its error
    except BaseException:
        kill(child)
        raise
    finally:
        channel.close()


def _serve(plan: Plan, pid: int, kind: str, value: Any) -> None:
    """What a child asks for that not every configuration has."""
    if kind == "cgroup":
        _move_by_systemd(plan, pid)
        return
    if kind == "map":
        _write_mappings(pid, plan.linux)
        return
    if kind == "hooks":
        _run_host_hooks(plan, pid)
        return
    from wherry.runtime import listener, netdevices  # noqa: PLC0415

    try:
        if kind == "network":
            netdevices.move(plan.linux["netDevices"], pid)
        else:
            listener.send(plan, pid, int(value))
    except ContainerError as error:
        raise ContainerError(FAILED_START + error.message) from None


def _join_classes(plan: Plan, pid: int) -> None:
    from wherry.runtime import rdt  # noqa: PLC0415

    rdt.join(plan.rdt, pid)


def _move_by_systemd(plan: Plan, pid: int) -> None:
    from wherry.linux.dbus import DBusError  # noqa: PLC0415

    try:
        plan.unit.attach(pid)
    except DBusError as error:
        raise ContainerError(f"{FAILED_START}unable to attach to unit {plan.unit.name!r}: {error}") from None


def abandon(pid: int, channel: Channel) -> None:
    """Give up a child that nobody will talk to."""
    channel.close()
    kill(pid)


def _death(pid: int) -> str:
    """Why the child died without a word."""
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return "container init died"
    code = os.waitstatus_to_exitcode(status)
    if code == -9:
        return "container init was OOM-killed (memory limit too low?)"
    return f"container init died ({'signal ' + str(-code) if code < 0 else 'exit status ' + str(code)})"


def kill(pid: int) -> None:
    """End the child and reap it, if it is our child; a grandchild is reaped by whoever adopted it."""
    try:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def _write_mappings(pid: int, linux: dict[str, Any]) -> None:
    if os.geteuid():
        from wherry.runtime import rootless  # noqa: PLC0415

        try:
            rootless.write_mappings(pid, linux)
        except ContainerError as error:
            raise ContainerError(FAILED_START + error.message) from None
        return
    for key, file in (("gidMappings", "gid_map"), ("uidMappings", "uid_map")):
        lines = [
            f"{item.get('containerID') or 0} {item.get('hostID') or 0} {item['size']}\n"
            for item in linux.get(key) or ()
        ]
        try:
            fd = os.open(f"/proc/{pid}/{file}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, "".join(lines).encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise ContainerError(
                f"{FAILED_START}failed to write {file} of the user namespace: {error.strerror}"
            ) from None


def _run_host_hooks(plan: Plan, pid: int) -> None:
    state = plan.state.oci("creating")
    state["pid"] = pid
    try:
        hooks.run(plan.spec, "prestart", state)
        hooks.run(plan.spec, "createRuntime", state)
    except ContainerError as error:
        raise ContainerError(f"{FAILED_START}error during container init: {error.message}") from None


def limit(plan: Plan, pid: int) -> None:
    """What this process has the right to set and the container's hasn't, when the container is in a user namespace.

    pid 0 is the caller."""
    for item in plan.process.get("rlimits") or ():
        number = RLIMITS[item["type"]]
        try:
            sc.prlimit(pid, number, item.get("soft") or 0, item.get("hard") or 0)
        except OSError as error:
            text = (error.strerror or "").lower()
            what = f"error setting rlimits for ready process: error setting rlimit type {number}: {text}"
            prefix = "" if plan.is_exec else "error during container init: "
            raise ContainerError(f"{FAILED_START}{prefix}{what}") from None


def limit_score(plan: Plan, pid: int | str) -> None:
    """`process.oomScoreAdj`, for a pid or "self": the same rights."""
    score = plan.process.get("oomScoreAdj")
    if score is not None:
        try:
            fd = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, str(score).encode())
            finally:
                os.close(fd)
        except OSError as error:
            if plan.rootless:
                return  # below the user's own is for root
            what = f"failed to update /proc/self/oom_score_adj: {error.strerror}"
            raise ContainerError(f"{FAILED_START}{what}") from None


def record(plan: Plan, pid: int) -> None:
    plan.state.pid = pid
    plan.state.pid_started = process.start_time(pid)
    plan.state.namespaces = {kind: path_of(kind, pid) for kind in plan.kinds}
    plan.state.save()


def write_pid_file(path: str, pid: int) -> None:
    """Atomically: who waits for the file may read it at once."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.write(fd, str(pid).encode())
    finally:
        os.close(fd)
    os.rename(temporary, path)
