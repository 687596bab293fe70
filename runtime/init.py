"""The process that becomes the container's init, from its birth to the user's program.

::

    runtime                                         init
      │  fork (new pid namespace, its cgroup)        │
      ├─────────────────────────────────────────────▶│
      │◀─────────── cgroup ──────────────────────────┤ (only where systemd must move it, for an ordinary user)
      ├──── go ─────────────────────────────────────▶│
      │                                              │ joins its cgroup (v1), joins and makes namespaces
      │      (only with a user namespace:            │
      │◀──────────── map ────────────────────────────┤
      ├──── mapped ─────────────────────────────────▶│ becomes its root, forks once more: `child`)
      │◀─────────── network ─────────────────────────┤ (only with netDevices, which the runtime then moves here)
      ├──── go ─────────────────────────────────────▶│
      │                                              │ mounts
      │◀─────────── hooks ───────────────────────────┤ (only if there are any)
      │ prestart, createRuntime hooks                │
      ├──── go ─────────────────────────────────────▶│ createContainer hooks, terminal, pivot_root, …
      │◀─────────── ready ───────────────────────────┤
      │ rlimits, oom_score_adj                       │
      ├──── go ─────────────────────────────────────▶│ user, capabilities, seccomp; is the program there?
      │◀─────────── seccomp ─────────────────────────┤ (only with a listener: its descriptor's number)
      ├──── go ─────────────────────────────────────▶│
      │◀─────────── waiting ─────────────────────────┤
      │ writes state.json, pid file                  │
      ├──── recorded ───────────────────────────────▶│ waits at exec.fifo; the channel is closed
      ▼                                              │
    start: writes to exec.fifo ─────────────────────▶│ startContainer hooks, execve

At any point `error` may come up instead, with a text; and an end of file in either direction ends the other side, so
that neither outlives a SIGKILL of its partner before the container is recorded.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import os

from wherry.core.failpoints import reach
from wherry.linux import namespaces, process
from wherry.linux import syscalls as sc
from wherry.runtime import hooks, identity, kernel
from wherry.runtime.errors import ContainerError
from wherry.runtime.plan import Plan, close_others, reopen_null, take_streams
from wherry.runtime.root import Root
from wherry.runtime.rootfs import Rootfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from wherry.runtime.channel import Channel

DURING_INIT = "error during container init: "


def run(plan: Plan, channel: Channel) -> NoReturn:
    """The child's whole life before exec; never returns. Errors go up the channel as long as it is open."""
    phase = DURING_INIT
    try:
        isolate(plan, channel)
        if "user" in plan.kinds:
            enter_user_namespace(plan, channel)
        else:
            enter_namespaces(plan)
        reach("runtime.init.namespaces")
        build(plan, channel)
        channel.send("ready")
        channel.expect("go")
        phase = ""
        program, env = finish(plan, channel)
        channel.send("waiting")
        channel.expect("recorded")
        channel.close()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent has to say it: this process can't
        _report(channel, error, phase)
    _wait_and_execute(plan, program, env)


def _report(channel: Channel, error: BaseException, phase: str) -> NoReturn:
    try:
        channel.send("error", phase + describe(error))
    finally:
        os._exit(1)


def describe(error: BaseException) -> str:
    """The text of an error, with what it was about."""
    if isinstance(error, ContainerError):
        return error.message
    if isinstance(error, OSError) and error.filename and error.errno:
        return f"{error.filename}: {error.strerror}"
    return f"{error}" or type(error).__name__


# -- namespaces -------------------------------------------------------------------------------------------------------


def isolate(plan: Plan, channel: Channel) -> None:
    """Cut what ties this process to the caller's: descriptors, session, signals, traceability."""
    close_others(plan.kept(channel))
    take_streams(plan.stdio)
    sc.reset_signals()
    os.setsid()
    # Nobody in a namespace that we join may trace us or read our /proc before the program runs (CVE-2016-9962).
    process.set_dumpable(False)
    if plan.moved_by_systemd:
        channel.send("cgroup")
        channel.expect("go")
    elif plan.cgroup is not None and plan.cgroup_fd < 0:
        plan.cgroup.join()


def enter_namespaces(plan: Plan) -> None:
    """Join first, then make: what is made belongs to what was joined. The pid namespace was the fork's business."""
    plan.joined.pop("pid", None)
    namespaces.join(plan.joined)
    plan.joined = {}
    flags = plan.flags("pid", "user", "time")
    if flags:
        sc.unshare(flags)


def enter_user_namespace(plan: Plan, channel: Channel) -> None:
    """With a user namespace everything else is made within it, so that it is owned by it; the pid namespace too, which
    takes another fork. The caller of this function is then the process in between, and only its child returns."""
    pid_fd = plan.joined.get("pid", -1)
    if pid_fd >= 0:
        sc.setns(plan.joined.pop("pid"), sc.CLONE_NEWPID)
        os.close(pid_fd)
    namespaces.join(plan.joined)
    plan.joined = {}
    if "user" in plan.new:
        if os.geteuid():
            process.set_dumpable(True)  # else our /proc is root's, and the maps can't be written without rights
        sc.unshare(sc.CLONE_NEWUSER)
        channel.send("map")
        channel.expect("mapped")
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    process.set_dumpable(False)  # the change of user has set it anew
    flags = plan.flags("user")
    if flags:
        sc.unshare(flags)
    kernel.write_time_offsets(plan.linux, plan.new)
    pid = os.fork()
    if pid:
        channel.send("child", pid)
        os._exit(0)
    os.setsid()


# -- the container's world --------------------------------------------------------------------------------------------


def build(plan: Plan, channel: Channel) -> None:
    """Everything that needs the host's view or the container's full rights."""
    linux = plan.linux
    has_mounts = "mount" in plan.kinds
    if not plan.no_new_keyring:
        kernel.join_keyring(plan.state.id)
    if "network" in plan.new:
        kernel.loopback_up()
    if linux.get("netDevices"):
        channel.send("network")
        channel.expect("go")
    kernel.check_labels(plan.process, linux)
    rootfs = Rootfs(plan.state.rootfs, plan.spec, plan.state.bundle, plan.cgroup.paths if plan.cgroup else {})
    rootfs.trees = plan.trees
    if has_mounts:
        rootfs.prepare()
        rootfs.mount_all()
    else:
        rootfs.root = Root(plan.state.rootfs)
    if hooks.of(plan.spec, "prestart") or hooks.of(plan.spec, "createRuntime"):
        channel.send("hooks")
        channel.expect("go")
    hooks.run(plan.spec, "createContainer", _state(plan, "creating"))
    kernel.set_names(plan.spec)
    kernel.write_sysctls(linux.get("sysctl") or {})
    label = kernel.open_label(plan.process)
    if has_mounts:
        _make_directory(rootfs.root, plan.process["cwd"])
    if plan.console >= 0:
        from wherry.runtime import console

        console.set_up(rootfs.root, plan.process, plan.console, with_console=has_mounts)
    if has_mounts:
        rootfs.restrict()
    rootfs.enter(no_pivot=plan.no_pivot, has_mount_namespace=has_mounts)
    if has_mounts:
        reopen_null()
    kernel.write_label(label, plan.process)
    kernel.set_personality(linux)


def _make_directory(root: Root, cwd: str) -> None:
    """A working directory that the image lacks is made (runc does so); a read-only or odd place is left for chdir."""
    try:
        os.close(root.make_directory(cwd))
    except OSError:
        return


def _state(plan: Plan, status: str) -> dict[str, Any]:
    values = plan.state.oci(status)
    values["pid"] = os.getpid()
    return values


# -- the user's process -----------------------------------------------------------------------------------------------


def finish(plan: Plan, channel: Channel) -> tuple[str, list[str]]:
    """Give up what the configuration doesn't grant; returns the program's path and environment."""
    proc = plan.process
    kernel.set_rare(plan)
    if proc.get("noNewPrivileges"):
        sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
    elif plan.seccomp is not None:
        kernel.load_seccomp(plan, channel)  # without no_new_privs it takes the rights that `become` gives up
    if plan.console >= 0:
        os.close(plan.console)
        plan.console = -1
    env = identity.environment(proc)
    identity.become(proc, preserve_fds=plan.preserve_fds)
    program = identity.find_program(proc["args"][0], env)
    if proc.get("noNewPrivileges") and plan.seccomp is not None:
        kernel.load_seccomp(plan, channel)
    return program, env


def _wait_and_execute(plan: Plan, program: str, env: list[str]) -> NoReturn:
    """Wait at the fifo for one byte, then go. The fifo is open to read and write, so that a `start` or `state` which
    opens and closes it gives no end of file; execve closes it, which is what `start` waits for. What fails from here on
    goes to a file of the state folder, where `start` finds it."""
    code = 1
    try:
        while not os.read(plan.fifo, 1):
            pass
        hooks.run(plan.spec, "startContainer", _state(plan, "created"))
        sc.execve(program, plan.process["args"], env)
    except OSError as error:
        code = 255
        os.write(plan.failure, f"exec {program}: {(error.strerror or '').lower()}".encode())
    except ContainerError as error:
        os.write(plan.failure, error.message.encode())
    finally:
        os._exit(code)
