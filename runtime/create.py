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
    plan = Plan(made, config, config["process"])
    plan.no_pivot = request.no_pivot
    plan.no_new_keyring = request.no_new_keyring
    plan.preserve_fds = request.preserve_fds
    plan.stdio = request.stdio
    fresh_cgroup = False
    try:
        _describe(made, config, bundle, rootfs)
        plan.cgroup = _plan_cgroup(plan.linux.get("cgroupsPath") or "", request.id, systemd=request.systemd_cgroup)
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
        lock.close()
        _close(plan, request.console_fd)


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


def _plan_cgroup(path: str, container_id: str, *, systemd: bool) -> Any:
    """The cgroup of `cgroupsPath`. systemd's form SLICE:PREFIX:NAME means SLICE's path and the scope PREFIX-NAME."""
    from wherry.linux import cgroups

    if systemd or path.count(":") == 2:
        parts = path.split(":") if path else ["system.slice", "wherry", container_id]
        if len(parts) != 3:
            expected = 'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups'
            raise ContainerError(f'linux.cgroupsPath: {expected}, got "{path}" instead', INVALID)
        slice_name, prefix, name = parts
        unit = f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
        path = f"{_slice_path(slice_name or 'system.slice')}/{unit}"
    return cgroups.plan(path, container_id)


def _slice_path(name: str) -> str:
    """`a-b.slice` lies in `a.slice`: each dash is a level (systemd.slice(5))."""
    if name == "-.slice":
        return ""
    stem = name.removesuffix(".slice")
    if not stem or "/" in stem:
        raise ContainerError(f"linux.cgroupsPath: invalid slice name: {name}", INVALID)
    levels = stem.split("-")
    return "".join(f"/{'-'.join(levels[: n + 1])}.slice" for n in range(len(levels)))


def _fill_cgroup(plan: Plan) -> None:
    plan.cgroup.create()
    resources = dict(plan.linux.get("resources") or {})
    resources["devices"] = resources.get("devices") or []
    plan.cgroup.apply(resources)
    plan.cgroup_fd = plan.cgroup.clone_fd()


def _open_files(plan: Plan, request: CreateRequest) -> None:
    plan.fifo = os.open(plan.state.fifo, os.O_RDWR | os.O_CLOEXEC)
    plan.failure = os.open(plan.state.failure, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    _open_console(plan, request.console_socket, request.console_fd)
    _compile_seccomp(plan)
    if any("tmpcopyup" in (item.get("options") or ()) for item in plan.spec.get("mounts") or ()):
        from wherry.runtime import copyup  # noqa: F401


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
    if fresh_cgroup:
        try:
            plan.cgroup.kill()
            plan.cgroup.delete()
        except (OSError, WherryError) as problem:
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
            pid, channel = make.spawn(plan, execute.run)
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
