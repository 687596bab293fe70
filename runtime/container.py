"""The OCI runtime as a library: what the shim calls, and what the command `wherry-runtime` is made of.

All functions are plain and blocking, start no thread and import nothing late (call `preload()` once before forking, as
the fork server does). They raise `ContainerError` (`.message`, `.kind`), whose texts are runc's where callers look.

How a shim uses it::

    container.preload()                                   # fork server, once, after sealed.ensure_sealed()
    pid = container.forked(container.create, request)     # shim: forks, the child makes init and exits
    container.start(root, id)                             # init goes on and becomes the user's program
    ... waitpid(pid) ...                                  # the shim is a subreaper: init is its child now
    container.forked(container.delete, root, id)

An exec is `forked(exec_process, request)`, or `exec_quickly(request)`, which forks only where it must; `entering` is
that for a caller that doesn't wait (a shim).

`create` and `exec_process` may also be called without `forked`: init is then a direct child of the caller. They leave
the calling process as it was (its namespaces, cgroup, cwd, descriptors). With `forked` the caller must be a subreaper
(`wherry.linux.process.set_child_subreaper`) and init becomes its child by the time `forked` returns.

Standard streams: `stdio=(in, out, err)` are descriptors that become 0, 1, 2 of the container's process; None keeps the
caller's own. With `process.terminal` they are ignored: a pty is made inside, its master goes to `console_socket` (a
path, connected to; or `console_fd`, an already connected SOCK_STREAM socket) as SCM_RIGHTS, as runc does it.

Nothing else of the caller's descriptors reaches the container, save the `preserve_fds` that follow 2.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import os
import sys

from wherry.runtime import quickjson
from wherry.runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from wherry.runtime.checkpoint import Options
    from wherry.runtime.entering import Entering
    from wherry.runtime.lifecycle import Starting

    T = TypeVar("T")


class CreateRequest:
    """Parameters of `create`, never changed afterwards.

    root: folder of all states (`--root`); id: the container's; bundle: folder with config.json; spec: the parsed
    config.json, or None to read it from the bundle. notify: the caller is a service of systemd's (`notify.py`).
    rootless: do without a cgroup where none may be made (always so for another user than root).
    """

    __slots__ = (
        "bundle",
        "console_fd",
        "console_socket",
        "id",
        "no_new_keyring",
        "no_pivot",
        "notify",
        "pid_file",
        "preserve_fds",
        "root",
        "rootless",
        "spec",
        "stdio",
        "systemd_cgroup",
    )

    def __init__(
        self,
        root: str,
        id: str,  # noqa: A002
        bundle: str,
        *,
        spec: dict[str, Any] | None = None,
        stdio: tuple[int, int, int] | None = None,
        console_socket: str = "",
        console_fd: int = -1,
        pid_file: str = "",
        no_pivot: bool = False,
        no_new_keyring: bool = False,
        preserve_fds: int = 0,
        systemd_cgroup: bool = False,
        notify: bool = False,
        rootless: bool = False,
    ) -> None:
        self.root = root
        self.id = id
        self.bundle = bundle
        self.spec = spec
        self.stdio = stdio
        self.console_socket = console_socket
        self.console_fd = console_fd
        self.pid_file = pid_file
        self.no_pivot = no_pivot
        self.no_new_keyring = no_new_keyring
        self.preserve_fds = preserve_fds
        self.systemd_cgroup = systemd_cgroup
        self.notify = notify
        self.rootless = rootless


class ExecRequest:
    """Parameters of `exec_process`. process: an OCI `process` object (args, env, cwd, user, terminal, capabilities …).

    sub_cgroups: `[controller:]path` below the container's cgroup, as `runc exec --cgroup` takes them.
    """

    __slots__ = (
        "console_fd",
        "console_socket",
        "id",
        "ignore_paused",
        "pid_file",
        "preserve_fds",
        "process",
        "root",
        "stdio",
        "sub_cgroups",
    )

    def __init__(
        self,
        root: str,
        id: str,  # noqa: A002
        process: dict[str, Any],
        *,
        stdio: tuple[int, int, int] | None = None,
        console_socket: str = "",
        console_fd: int = -1,
        pid_file: str = "",
        preserve_fds: int = 0,
        ignore_paused: bool = False,
        sub_cgroups: list[str] | None = None,
    ) -> None:
        self.root = root
        self.id = id
        self.process = process
        self.stdio = stdio
        self.console_socket = console_socket
        self.console_fd = console_fd
        self.pid_file = pid_file
        self.preserve_fds = preserve_fds
        self.ignore_paused = ignore_paused
        self.sub_cgroups = sub_cgroups or []


def preload() -> None:
    """Import everything that any call of this module needs, so that nothing is imported after a fork."""
    import fcntl  # noqa: F401
    import math  # noqa: F401
    import select  # noqa: F401
    import signal  # noqa: F401

    from wherry.linux import cgroups
    from wherry.linux.cgroups import (  # noqa: F401
        systemd,
        v1,
        v2,
    )
    from wherry.runtime import (  # noqa: F401
        borrowed,
        borrowed_exec,
        cgroup,
        checkpoint,
        console,
        copyup,
        create,
        entering,
        execute,
        hook_process,
        idmap,
        lifecycle,
        listener,
        netdevices,
        prepare,
        rdt,
        restore,
        rootless,
        sealed,
        seccomp,
        settings,
        spec_rare,
    )

    cgroups.host()
    borrowed.prepare()
    entering.prepare()


def create(request: CreateRequest) -> int:
    """Make the container up to the point where only the user's program is missing; init waits for `start`.

    Returns init's pid (in the caller's pid namespace). Whatever fails is undone before the error is raised:
    `unable to start container process: exec: "nosuch": executable file not found in $PATH` and the like.
    """
    from wherry.runtime import create as implementation

    return implementation.create(request)


def creates_here(spec: dict[str, Any]) -> bool:
    """Whether `create` makes a container of this specification without a fork, in the time of a few system calls.

    True only after `preload`. It isn't where a child of the caller would talk to it, hooks run, or a seccomp filter has
    to be compiled first.
    """
    borrowed, seccomp = sys.modules.get("wherry.runtime.borrowed"), sys.modules.get("wherry.runtime.seccomp")
    try:
        if borrowed is None or seccomp is None or not borrowed.suits(spec):
            return False
        profile = (spec.get("linux") or {}).get("seccomp")
        return not profile or seccomp.kept_filter(profile) is not None
    except (AttributeError, KeyError, TypeError, ValueError):  # `create` says what is wrong with it
        return False


def start(root: str, id: str) -> None:  # noqa: A002
    """Let a created container's init execute the user's program; any process may call it.

    Returns when execve has happened (or raises with its error), after the poststart hooks.
    """
    from wherry.runtime import lifecycle

    lifecycle.start(root, id)


def starting(root: str, id: str) -> Starting:  # noqa: A002
    """`start` for a caller that must not block: tells init to go on; what comes back says how to wait for it."""
    from wherry.runtime import lifecycle

    return lifecycle.Starting(root, id)


def exec_process(request: ExecRequest) -> int:
    """Run another process in a running container's namespaces and cgroup; returns its pid once it executed its program.

    `unable to start container process: exec: "nosuch": executable file not found in $PATH` if it can't be.
    """
    from wherry.runtime import execute

    return execute.exec_process(request)


def entering(request: ExecRequest) -> Entering | None:
    """`exec_process` for a caller that must not block, and that is a subreaper: without a fork of this process.

    None where the container, the process or the host is too uncommon for it, or something is wrong: then
    `forked(exec_process, request)` does it, or says what is wrong.
    """
    from wherry.runtime import entering as implementation

    return implementation.begin(request)


def exec_quickly(request: ExecRequest) -> int:
    """`exec_process`, by `entering` where that can be and else `forked`; returns the pid of a child of this process."""
    begun = entering(request)
    if begun is None:
        return forked(exec_process, request)
    try:
        pid = begun.end(os.waitstatus_to_exitcode(os.waitpid(begun.helper, 0)[1]))
    finally:
        if begun.lost:
            os.waitpid(begun.lost, 0)
        begun.close()
    return pid or forked(exec_process, request)


def kill(root: str, id: str, signal: int, *, all: bool = False) -> None:  # noqa: A002
    """Signal init, or with `all` every process of the container's cgroup. Stopped: `container not running`."""
    from wherry.runtime import lifecycle

    lifecycle.kill(root, id, signal, everybody=all)


def delete(root: str, id: str, *, force: bool = False) -> None:  # noqa: A002
    """Remove a stopped (or only created) container: cgroup, state; runs poststop hooks. `force` kills it first.

    `cannot delete container x that is not stopped: running` otherwise. With `force` a missing container is no error.
    """
    from wherry.runtime import lifecycle

    lifecycle.delete(root, id, force=force)


def state(root: str, id: str) -> dict[str, Any]:  # noqa: A002
    """OCI state as `runc state` prints it: ociVersion, id, pid, status, bundle, rootfs, created, annotations, owner."""
    from wherry.runtime import state as states

    return states.load(root, id).described()


def checkpoint(root: str, id: str, options: Options) -> None:  # noqa: A002
    """Have criu write a running (or paused) container into `options.image_path`; then it is gone, state and all,
    unless `leave_running` or `pre_dump`. criu's own message if it can't, and the container runs on."""
    from wherry.runtime import checkpoint as implementation

    implementation.checkpoint(root, id, options)


def restore(request: CreateRequest, options: Options) -> int:
    """Make a container from what `checkpoint` wrote; it runs (or is paused) as it was. Returns its init's pid, which
    is a child of the caller. A terminal's master goes to the console socket, as with `create`."""
    from wherry.runtime import restore as implementation

    return implementation.restore(request, options)


def pause(root: str, id: str) -> None:  # noqa: A002
    """Freeze all processes of the container."""
    from wherry.runtime import lifecycle

    lifecycle.pause(root, id)


def resume(root: str, id: str) -> None:  # noqa: A002
    """Thaw them."""
    from wherry.runtime import lifecycle

    lifecycle.resume(root, id)


def update(root: str, id: str, resources: dict[str, Any], *, cache: str = "", bandwidth: str = "") -> None:  # noqa: A002
    """Apply an OCI `linux.resources` object (only the fields that are there) to the container's cgroup; cache and
    bandwidth: schemas for Intel RDT."""
    from wherry.runtime import lifecycle

    lifecycle.update(root, id, resources, cache=cache, bandwidth=bandwidth)


def pids(root: str, id: str) -> list[int]:  # noqa: A002
    """All processes in the container, by its cgroup (without one, by its pid namespace), as the caller numbers them."""
    from wherry.runtime import members, state

    found = state.load(root, id)
    if not found.cgroup_paths:
        return members.pids(found)
    pids_: list[int] = cgroup(root, id).pids()
    return pids_


def cgroup(root: str, id: str) -> Any:  # noqa: A002
    """The container's `wherry.linux.cgroups` object: statistics, OOM events."""
    from wherry.runtime import lifecycle

    return lifecycle.cgroup_of(root, id)


def forked(function: Callable[..., T], *args: object, **kwargs: object) -> T:
    """Call `function` in a forked child and give back its result, or raise its ContainerError here.

    The child is waited for. Only None, ints, strings and what JSON holds come back. A child that dies without a word
    raises ContainerError with its wait status.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _answer(writer, function, args, kwargs)
    os.close(writer)
    raw = b""
    try:
        while chunk := os.read(reader, 65536):
            raw += chunk
    finally:
        os.close(reader)
    _, status = os.waitpid(pid, 0)
    if not raw:
        raise ContainerError(f"the runtime died (wait status {status})")
    answer = quickjson.loads(raw)
    if "error" in answer:
        raise ContainerError(answer["error"], answer["kind"])
    return answer["result"]  # type: ignore[no-any-return]


def _answer(writer: int, function: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    import signal

    from wherry.linux import syscalls

    answer: dict[str, object]
    try:
        syscalls.reset_signals()
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as the interpreter has it: a pipe that nobody reads is an error
        answer = {"result": function(*args, **kwargs)}
    except ContainerError as error:
        answer = {"error": error.message, "kind": error.kind}
    except BaseException as error:  # noqa: BLE001 - the caller has to learn of it; this process ends here
        answer = {"error": f"{type(error).__name__}: {error}", "kind": "unknown"}
    try:
        os.write(writer, quickjson.dumps(answer).encode())
    finally:
        os._exit(0)
