"""`create` and `exec`: what is decided before the fork, and what is undone when something fails."""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import errno
import os

from wherry.core.errors import WherryError
from wherry.linux import process
from wherry.runtime import hooks, init, make, spec, state
from wherry.runtime.errors import INVALID, PRECONDITION, ContainerError
from wherry.runtime.plan import Plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from wherry.runtime.channel import Channel
    from wherry.runtime.container import CreateRequest, ExecRequest


def create(request: CreateRequest, meanwhile: Callable[[], None] | None = None) -> int:
    """See `container.create`. meanwhile: called once while the child builds the container on another processor; the
    command line loads there what it needs next."""
    bundle = os.path.abspath(request.bundle)
    if request.spec is None:
        config = spec.load(bundle)
    else:
        config = request.spec
        spec.validate(config)
    if not config.get("process"):
        raise ContainerError("process: is missing: process property must not be empty", INVALID)
    rootfs = _rootfs(bundle, config)
    made = state.State(request.root, request.id)
    made.make()
    lock = state.Lock(made)
    if request.notify:
        config = _with_notify(made, config)
    plan = _plan(request, made, config)
    fresh_cgroup = False
    try:
        _describe(made, config, bundle, rootfs)
        plan.cgroup = _plan_cgroup(plan, plan.linux.get("cgroupsPath") or "", systemd=request.systemd_cgroup)
        made.cgroup_paths = plan.cgroup.paths
        made.save()
        fresh_cgroup = not plan.cgroup.exists()
        _fill_cgroup(plan)
        plan.open_namespaces()
        _open_files(plan, request)

        def recorded(pid: int) -> None:
            make.record(plan, pid)
            if request.pid_file:
                make.write_pid_file(request.pid_file, pid)

        hooks.preload(config)
        pid, channel = make.spawn(plan, init.run)
        try:
            made.save_spec(config)
            if meanwhile:
                meanwhile()
        except BaseException:
            make.abandon(pid, channel)
            raise
        return make.converse(plan, pid, channel, recorded)
    except BaseException as error:
        _undo(plan, error, fresh_cgroup=fresh_cgroup)
        if isinstance(error, (OSError, WherryError, ValueError)):
            raise ContainerError(make.FAILED_START + _text(error)) from error
        raise
    finally:
        if plan.unit is not None:
            plan.unit.settle()
        lock.close()
        _close(plan, request.console_fd)


def _plan(request: CreateRequest, made: state.State, config: dict[str, Any]) -> Plan:
    plan = Plan(made, config, config["process"])
    plan.no_pivot = request.no_pivot
    plan.no_new_keyring = request.no_new_keyring
    plan.preserve_fds = request.preserve_fds
    plan.stdio = request.stdio
    plan.rootless = request.rootless or os.geteuid() != 0
    return plan


def _with_notify(made: state.State, config: dict[str, Any]) -> dict[str, Any]:
    from wherry.runtime import notify

    notify.make_folder(made.folder)
    return notify.prepare(config, made.folder)


def _text(error: BaseException) -> str:
    return error.message if isinstance(error, WherryError) else init.describe(error)


def _rootfs(bundle: str, config: dict[str, Any]) -> str:
    """The root's real path; it must be a folder, and no symlink may be part of it (runc's rule)."""
    path = os.path.join(bundle, config["root"]["path"])
    path = os.path.normpath(path)
    if not os.path.isdir(path):
        raise ContainerError(f"invalid rootfs: stat {path}: no such file or directory", INVALID)
    # A bundle may be reached through symlinks, as its owner likes; the last part is the image's and may not be one.
    if os.path.islink(path):
        raise ContainerError("invalid rootfs: not an absolute path, or a symlink", INVALID)
    return os.path.realpath(path)


def _describe(made: state.State, config: dict[str, Any], bundle: str, rootfs: str) -> None:
    made.bundle = bundle
    made.rootfs = rootfs
    made.oci_version = config["ociVersion"]
    made.annotations = config.get("annotations") or {}
    made.created = state.now()
    made.creator = os.getpid()
    made.creator_started = process.start_time(made.creator)
    uid = os.geteuid()
    if uid:
        import pwd

        try:
            made.owner = pwd.getpwuid(uid).pw_name
        except KeyError:
            made.owner = str(uid)


def _plan_cgroup(plan: Plan, path: str, *, systemd: bool) -> Any:
    """The cgroup of `cgroupsPath`; with `--systemd-cgroup` that of a unit, which `_fill_cgroup` has systemd make.

    systemd's form SLICE:PREFIX:NAME without the flag means the same directories, made without asking anybody.
    """
    from wherry.linux import cgroups

    if not systemd and path.count(":") != 2:
        return cgroups.plan(path, plan.state.id)
    from wherry.linux.cgroups import systemd as units

    user = os.geteuid() != 0
    if systemd and not units.running():
        raise ContainerError("systemd not running on this host, cannot use systemd cgroups manager", PRECONDITION)
    try:
        slice_name, unit = units.split_path(path, plan.state.id, user=user)
        directory = f"{units.slice_path(slice_name)}/{unit}"
    except ValueError as error:
        raise ContainerError(f"linux.cgroupsPath: {error}", INVALID) from None
    if systemd:
        plan.unit = units.Unit(unit, user=user)
        plan.slice = slice_name
        plan.state.unit = unit
        directory = units.manager_cgroup(user=user) + directory
    return cgroups.plan(directory, plan.state.id)


def _fill_cgroup(plan: Plan) -> None:
    if plan.unit is not None:
        from wherry.linux.dbus import DBusError

        about = f"wherry container {plan.state.id}"
        try:
            plan.unit.start(plan.slice, about, plan.linux.get("resources") or {}, plan.state.annotations)
        except DBusError as error:
            raise ContainerError(f"unable to start unit {plan.unit.name!r}: {error}") from None
    try:
        plan.cgroup.create()
    except OSError as error:
        if not plan.rootless:
            raise
        from wherry.runtime import rootless

        if rootless.forgo_cgroup(plan, error):
            plan.cgroup = None
            plan.state.cgroup_paths = {}
            return
        raise
    resources = dict(plan.linux.get("resources") or {})
    resources["devices"] = resources.get("devices") or []
    plan.cgroup.apply(resources)
    plan.cgroup_fd = plan.cgroup.clone_fd()


def _open_files(plan: Plan, request: CreateRequest) -> None:
    plan.fifo = os.open(plan.state.fifo, os.O_RDWR | os.O_CLOEXEC)
    plan.failure = os.open(plan.state.failure, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    _open_console(plan, request.console_socket, request.console_fd)
    _compile_seccomp(plan)
    for number, item in enumerate(plan.spec.get("mounts") or ()):
        options = item.get("options") or ()
        if "tmpcopyup" in options:
            from wherry.runtime import copyup  # noqa: F401
        if "idmap" in options or "ridmap" in options or item.get("uidMappings"):
            from wherry.runtime import idmap

            plan.trees[number] = idmap.prepare(plan, item)


def _open_console(plan: Plan, path: str, fd: int) -> None:
    if not plan.process.get("terminal"):
        if path:
            raise ContainerError("cannot use console socket if runc will not detach or allocate tty", INVALID)
        return
    from wherry.runtime import console

    if path:
        plan.console = console.connect(path)
    elif fd >= 0:
        plan.console = fd
    else:
        raise ContainerError("cannot allocate tty if runc will detach without setting console socket", INVALID)


def _compile_seccomp(plan: Plan) -> None:
    """Before the fork: the program is kept for the next container, and a wrong profile stops here."""
    profile = plan.linux.get("seccomp")
    if not profile:
        return
    from wherry.runtime import seccomp

    try:
        plan.seccomp = seccomp.compile_filter(profile)
        plan.seccomp_flags = seccomp.filter_flags(profile)
        if seccomp.uses_notify(profile) and not profile.get("listenerPath"):
            raise ValueError("linux.seccomp.listenerPath: is missing: SCMP_ACT_NOTIFY needs an agent")
    except ValueError as error:
        raise ContainerError(str(error), INVALID) from None


def _close(plan: Plan, console_fd: int) -> None:
    """The descriptors that only the child needed; the caller's own console socket stays the caller's."""
    plan.close()
    if plan.console >= 0 and plan.console != console_fd:
        os.close(plan.console)
        plan.console = -1


def _undo(plan: Plan, error: BaseException, *, fresh_cgroup: bool) -> None:
    """Cgroup and state folder go; the process is gone already. What can't be undone is added to the error."""
    if fresh_cgroup and plan.cgroup is not None:
        try:
            if plan.unit is not None:
                plan.unit.settle()
            plan.cgroup.kill()
            if plan.unit is not None:
                from wherry.runtime import lifecycle

                lifecycle.stop_unit(plan.state)
            plan.cgroup.delete()
        except (OSError, WherryError, ContainerError) as problem:
            error.add_note(f"the cgroup could not be removed: {problem}")
    try:
        plan.state.remove()
    except OSError as problem:
        error.add_note(f"the state folder could not be removed: {problem}")


# -- exec -------------------------------------------------------------------------------------------------------------


def exec_process(request: ExecRequest) -> int:
    """See `container.exec_process`."""
    from wherry.linux import cgroups
    from wherry.runtime import execute

    spec.validate_process(request.process)
    found = state.load(request.root, request.id)
    status = found.status()
    if status in (state.STOPPED, state.CREATING):
        raise ContainerError("cannot exec in a stopped container", PRECONDITION, exit_code=255)
    if status == state.PAUSED and not request.ignore_paused:
        message = "cannot exec in a paused container (use --ignore-paused to override)"
        raise ContainerError(message, PRECONDITION, exit_code=255)
    plan = Plan(found, found.spec(), request.process)
    plan.is_exec = True
    plan.stdio = request.stdio
    plan.preserve_fds = request.preserve_fds
    try:
        plan.joined = execute.open_namespaces(found)
        plan.kinds = dict.fromkeys(plan.joined, "")
        paths = _sub_cgroups(found.cgroup_paths, request.sub_cgroups)
        plan.cgroup = cgroups.restore(paths) if paths else None
        plan.cgroup_fd = plan.cgroup.clone_fd() if plan.cgroup else -1
        _open_console(plan, request.console_socket, request.console_fd)
        _compile_seccomp(plan)

        def recorded(pid: int) -> None:
            if request.pid_file:
                make.write_pid_file(request.pid_file, pid)

        try:
            pid, channel = _spawn_on(plan, execute.run)
        except OSError as error:
            if error.errno != errno.EBUSY or plan.cgroup_fd < 0:
                raise
            # The container has made cgroups of its own below, so that this one may hold no process: init's it is.
            plan.close()
            plan.cgroup_fd = execute.open_cgroup_of(found.pid)
            plan.joined = execute.open_namespaces(found)
            pid, channel = make.spawn(plan, execute.run)
        return make.converse(plan, pid, channel, recorded)
    except (OSError, WherryError, ValueError) as error:
        raise ContainerError(make.FAILED_START + _text(error), exit_code=255) from error
    finally:
        _close(plan, request.console_fd)


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
