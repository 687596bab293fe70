"""`create`: from a bundle to a process that only waits to become the user's program.

Here are the steps and their order; each is explained where it is done. The child's part of the story is `init.py`.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import os
import sys

from wherry.core.errors import WherryError
from wherry.core.failpoints import reach
from wherry.linux import process
from wherry.linux.cgroups.layout import host
from wherry.runtime import cgroup, hooks, init, make, prepare, spec, state
from wherry.runtime.errors import INVALID, ContainerError
from wherry.runtime.plan import Plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from wherry.runtime.container import CreateRequest


def create(request: CreateRequest, meanwhile: Callable[[], None] | None = None) -> int:
    """See `container.create`. meanwhile: called once while the child builds the container on another processor; the
    command line loads there what it needs next."""
    plan = begin(request)
    try:
        reach("runtime.create.taken")
        make_cgroup(plan, request)
        reach("runtime.create.cgroup")
        plan.open_namespaces()
        prepare.open_start_files(plan)
        prepare.open_console(plan, request.console_socket, request.console_fd)
        prepare.compile_seccomp(plan)
        prepare.open_mounts(plan)
        hooks.preload(plan.spec)

        def recorded(pid: int) -> None:
            make.record(plan, pid)
            reach("runtime.create.recorded")
            if request.pid_file:
                make.write_pid_file(request.pid_file, pid)

        # loaded only where many containers are made: in a fork server (`container.preload`)
        borrowed = sys.modules.get("wherry.runtime.borrowed")
        if borrowed is not None and borrowed.serves(plan):
            plan.state.save_spec(plan.spec)
            return int(borrowed.spawn(plan, recorded))
        pid, channel = make.spawn(plan, init.run)
        try:
            plan.state.save_spec(plan.spec)
            if meanwhile:
                meanwhile()
        except BaseException:
            make.abandon(pid, channel)
            raise
        return make.converse(plan, pid, channel, recorded)
    except BaseException as error:
        undo(plan, error)
        if isinstance(error, (OSError, WherryError, ValueError)):
            raise ContainerError(make.FAILED_START + text_of(error)) from error
        raise
    finally:
        end(plan, request)


# -- the steps --------------------------------------------------------------------------------------------------------


def begin(request: CreateRequest) -> Plan:
    """Read and check what is wanted, then take the id. Before this returns nothing has to be undone; after it the
    caller must `undo` what fails, and `end` in any case: the state folder is there, and locked."""
    bundle = os.path.abspath(request.bundle)
    config = request.spec
    if config is None:
        config = spec.load(bundle)
    else:
        spec.validate(config)
    if not config.get("process"):
        raise ContainerError("process: is missing: process property must not be empty", INVALID)
    rootfs = _rootfs(bundle, config)
    made = state.State(request.root, request.id)
    made.make()
    plan = Plan(made, config, config["process"])
    plan.lock = state.Lock(made)
    try:
        if request.notify:
            plan.use(_with_notify(made, config))
        _describe(made, config, bundle, rootfs)
    except BaseException as error:
        undo(plan, error)
        plan.lock.close()
        raise
    plan.no_pivot = request.no_pivot
    plan.no_new_keyring = request.no_new_keyring
    plan.preserve_fds = request.preserve_fds
    plan.stdio = request.stdio
    plan.rootless = request.rootless or os.geteuid() != 0 or host().user_namespace
    return plan


def make_cgroup(plan: Plan, request: CreateRequest) -> None:
    """The state names the cgroup before it is made, so that whoever finds the folder can remove both."""
    cgroup.find(plan, systemd=request.systemd_cgroup)
    plan.state.save()
    cgroup.make(plan)
    if plan.linux.get("intelRdt"):
        from wherry.runtime import rdt

        rdt.make(plan)


def undo(plan: Plan, error: BaseException) -> None:
    """Cgroup and state folder go; the process is gone already. What can't be undone is added to the error."""
    cgroup.undo(plan, error)
    try:
        if plan.state.rdt:
            from wherry.runtime import rdt

            rdt.remove(plan.state.rdt)
        plan.state.remove()
    except OSError as problem:
        error.add_note(f"the state folder could not be removed: {problem}")


def end(plan: Plan, request: CreateRequest) -> None:
    """However it went: what this process holds for it is let go."""
    if plan.unit is not None:
        plan.unit.settle()
    if plan.lock is not None:
        plan.lock.close()
    prepare.close(plan, request.console_fd)


# -- what they are made of --------------------------------------------------------------------------------------------


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


def _with_notify(made: state.State, config: dict[str, Any]) -> dict[str, Any]:
    from wherry.runtime import notify

    notify.make_folder(made.folder)
    return notify.prepare(config, made.folder)


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


def text_of(error: BaseException) -> str:
    """What an error says, without its type."""
    return error.message if isinstance(error, WherryError) else init.describe(error)
