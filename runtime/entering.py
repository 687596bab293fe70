"""A further process in a container, made by a list of system calls: no fork of the interpreter, and nothing waits.

What `execute.py` does, written down by the caller as `wherry.linux.calls`, and done by two processes that borrow the
caller's memory and run no Python. So the caller may be the shim itself: it goes on while the process enters the
container, and neither a frozen cgroup, nor a file system that hangs, nor somebody who kills the process there can do it
any harm. (A runtime that lends its whole interpreter, `borrowed_exec.py`, is lost in such a case.)

    caller                         helper                          process
      validates, looks for the
      program, writes the calls
      start ────────────────────────▶ enters the pid namespace (for
      (goes on)                       its children)
                                      vfork ────────────────────────▶ streams, session, signals, cgroups, oom_score_adj,
                                                                      namespaces, limits, user, capabilities, seccomp
                                      ◀──────────────────────────────── execve
      `end` ◀─────────────── exits                                  a child of the caller, which is a subreaper

It is for the common process in the common container. What is uncommon, and what fails in any call, is left to
`execute.py`, which does it over again: nothing was executed then, and the errors are told there.

The calls are in `entering_calls.py`. Two things are read in the container's root before, from outside, where nothing
can make the caller wait (`entering_look.py`): whether the program is there, and the user's home.
"""

from __future__ import annotations

import contextlib
import os
import struct

from wherry.core.failpoints import reach
from wherry.linux import calls, cgroups, process
from wherry.linux.cgroups.files import read_or_empty
from wherry.linux.cgroups.layout import host
from wherry.runtime import entering_calls as steps
from wherry.runtime import identity, kernel, make, seccomp, spec, state
from wherry.runtime.entering_look import Uncommon, look
from wherry.runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from wherry.runtime.container import ExecRequest
    from wherry.runtime.state import State

# fields of a process that few have, and that aren't done here
_UNCOMMON = ("terminal", "scheduler", "ioPriority", "execCPUAffinity")
_LABELS = ("apparmorProfile", "selinuxLabel")

# how many processes are in somebody's namespaces with this process's memory
_entering = 0
# configurations that were read: few, a shim has few containers
_known: dict[str, _Container] = {}
_KNOWN = 16


def prepare() -> None:
    """Once, before forking."""
    calls.prepare()
    steps.prepare()


class _Container:
    """What of a container's configuration matters here: whether it is a common one, and its seccomp filter."""

    __slots__ = ("common", "filter", "signature")

    def __init__(self, signature: tuple[int, int, int], linux: dict[str, Any]) -> None:
        self.signature = signature
        profile = linux.get("seccomp")
        self.common = not linux.get("personality") and not linux.get("memoryPolicy")
        self.filter = b"", 0
        if profile:
            kept = None if seccomp.uses_notify(profile) else seccomp.kept_filter(profile)
            self.common = self.common and kept is not None
            self.filter = kept or b"", seccomp.filter_flags(profile)


def _container(found: State) -> _Container:
    path = os.path.join(found.folder, "config.json")
    about = os.stat(path)
    signature = about.st_ino, about.st_mtime_ns, about.st_size
    known = _known.get(path)
    if known is None or known.signature != signature:
        if len(_known) >= _KNOWN:
            _known.clear()
        known = _known[path] = _Container(signature, found.spec().get("linux") or {})
    return known


class Entering:
    """A process on its way into a container. Wait for the `helper`'s end, a child of this process; then `end`."""

    def __init__(self, request: ExecRequest, made: calls.Calls, helper: int) -> None:
        self._request = request
        self._calls = made
        self.helper = helper
        self.lost = 0
        """After `end`: a child that executed nothing and has to be waited for, before `close`."""

    def end(self, status: int) -> int:
        """The process's pid, once it executed its program; 0 where it can't be done this way, and nothing was done.

        `status` is 0 or 1 if the helper exited with that, anything else if not. Raises ContainerError where somebody
        killed the helper.
        """
        pid, (number, _) = self._calls.pid, self._calls.failure
        if status not in (0, 1):
            if pid:
                self.lost = pid
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            raise ContainerError(f"{make.FAILED_START}the runtime was killed", exit_code=255)
        if number:
            self.lost = pid
            return 0
        if self._request.pid_file:
            make.write_pid_file(self._request.pid_file, pid)
        return pid

    def close(self) -> None:
        """Free what both shared with this process: neither runs any more, or executes a program of its own."""
        global _entering  # noqa: PLW0603 - as above
        self._calls.close()
        _entering -= 1
        if not _entering:
            process.set_dumpable(True)


def begin(request: ExecRequest) -> Entering | None:
    """Let a process enter; None where that is left to `execute.exec_process`, which then says what is wrong, if it is.

    The caller is a subreaper, has one thread, and stays in its namespaces and cgroups as the container's maker was.
    """
    if not calls.ready() or request.stdio is None or min(request.stdio) < steps.INIT or request.console_socket:
        return None
    if request.preserve_fds or request.sub_cgroups or os.geteuid() or host().user_namespace:
        return None
    fds: list[int] = []
    try:
        return _begin(request, request.stdio, fds)
    except (Uncommon, OSError, ValueError, KeyError, struct.error, ContainerError):
        return None
    finally:
        for fd in fds:
            os.close(fd)


def _begin(request: ExecRequest, stdio: tuple[int, int, int], fds: list[int]) -> Entering:
    asked = request.process
    spec.validate_process(asked)
    labelled = any(asked.get(name) for name in _LABELS)
    if any(asked.get(name) for name in _UNCOMMON) or (labelled and not kernel.label_path(asked)):
        raise Uncommon
    found = state.load(request.root, request.id)
    init = _open(request, found, fds)
    container = _container(found)
    if not container.common or _dies_together(found.cgroup_paths.get("", "")):
        raise Uncommon
    program, env = look(found.pid, asked)
    cgroup = cgroups.restore(found.cgroup_paths)
    cgroup_fd = cgroup.clone_fd()
    if cgroup_fd >= 0:
        fds.append(cgroup_fd)
    identity.own_streams(stdio, (asked.get("user") or {}).get("uid") or 0)
    made = calls.Calls()
    try:
        steps.isolate(made, stdio, init)
        steps.settle(made, asked, [] if cgroup_fd >= 0 else list(dict.fromkeys(cgroup.paths.values())))
        steps.enter(made, found.namespaces, asked)
        steps.limit(made, asked)
        steps.join_keyring(made, found.id)
        steps.become(made, asked, container.filter)
        steps.execute(made, program, asked, env)
        helper = steps.help_with([*stdio, *fds], init, shares_pids="pid" not in found.namespaces)
        entering = Entering(request, made, _started(made, helper, cgroup_fd))
    except BaseException:
        made.close()
        raise
    reach("runtime.entering.started")
    return entering


def _open(request: ExecRequest, found: State, fds: list[int]) -> int:
    """The init of a container that runs, and is a common one, as a descriptor."""
    kinds = found.namespaces.keys()
    if found.rdt_class or not found.cgroup_paths or "mount" not in kinds or not kinds.isdisjoint(("user", "time")):
        raise Uncommon
    init = os.pidfd_open(found.pid)
    fds.append(init)
    # asked after it was opened: the pid is still the container's
    status = found.status()
    if status != state.RUNNING and not (status == state.PAUSED and request.ignore_paused):
        raise Uncommon
    return init


def _started(made: calls.Calls, helper: Sequence[tuple[int, ...]], cgroup_fd: int) -> int:
    """The helper's pid. Nobody in the namespaces may look into the memory, from before somebody with it is there until
    nobody is: see `Entering.close`."""
    global _entering  # noqa: PLW0603 - as above
    process.set_dumpable(False)
    _entering += 1
    try:
        return made.start(helper, cgroup_fd)
    except BaseException:
        _entering -= 1
        if not _entering:
            process.set_dumpable(True)
        raise


def _dies_together(path: str) -> bool:
    """Whether the kernel may kill all of a v2 cgroup for lack of memory ("" for none): who is in vfork(2) isn't spared
    then, nor is who has the same memory."""
    unified = host().v2
    while path and unified is not None and path.startswith(f"{unified.mountpoint}/"):
        if read_or_empty(f"{path}/memory.oom.group").strip() == "1":
            return True
        path = os.path.dirname(path)
    return False
