"""What takes the host's rights or the host's files is opened here, before the fork; the child only uses it.

A mistake in it (a wrong seccomp profile, a console socket that nobody listens on) so stops a container before there is
a process that would have to be killed.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import os

from wherry.runtime.errors import INVALID, ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from wherry.runtime.plan import Plan


def open_start_files(plan: Plan) -> None:
    """The fifo at which init waits for `start`, and the file for what it has to say then."""
    plan.fifo = os.open(plan.state.fifo, os.O_RDWR | os.O_CLOEXEC)
    plan.failure = os.open(plan.state.failure, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def open_mounts(plan: Plan) -> None:
    """Detached trees of the idmapped mounts; and the code for what few mounts ask for is loaded while it can be."""
    for number, item in enumerate(plan.spec.get("mounts") or ()):
        options = item.get("options") or ()
        if "tmpcopyup" in options:
            from wherry.runtime import copyup  # noqa: F401
        if "idmap" in options or "ridmap" in options or item.get("uidMappings"):
            from wherry.runtime import idmap

            plan.trees[number] = idmap.prepare(plan, item)


def open_console(plan: Plan, path: str, fd: int) -> None:
    """Connect to who takes the terminal's master: a console socket's path, or a socket `fd` that the caller has."""
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


def compile_seccomp(plan: Plan) -> None:
    """The filter's program: kept for the next container, too."""
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


def close(plan: Plan, console_fd: int) -> None:
    """The descriptors that only the child needed; the caller's own console socket stays the caller's."""
    plan.close()
    if plan.console >= 0 and plan.console != console_fd:
        os.close(plan.console)
        plan.console = -1
