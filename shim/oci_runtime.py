"""The low-level runtime behind a container: one interface, whichever runtime the options name.

`Bundled` runs `wherry.runtime` in a forked child of the shim, `external.External` runs any OCI runtime's command line.
Both raise `wherry.core.errors`, with texts that begin as containerd's do (`OCI runtime create failed: …`).
"""

from __future__ import annotations

import json
import marshal
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from wherry.core import errors
from wherry.core.failpoints import reach
from wherry.linux import mounts
from wherry.linux.namespaces import FLAGS
from wherry.runtime import container as bundled
from wherry.runtime.checkpoint import Options as CriuOptions
from wherry.runtime.errors import ContainerError
from wherry.shim.log import log

if TYPE_CHECKING:
    from wherry.linux.mounts import Mount
    from wherry.shim.loop import Children, Loop
    from wherry.shim.state_files import RuntimeSettings
    from wherry.shim.stdio import ProcessIO

# where runtimes keep their states, a folder for each namespace below it
EXTERNAL_ROOT: Final = "/run/containerd/runc"
BUNDLED_ROOT: Final = "/run/wherry/runtime"
# names for the runtime that comes with Wherry
BUNDLED_NAMES: Final = frozenset({"", "wherry-runtime"})

# says that an answer from a forked child is complete
_END: Final = b"\0end"
_KINDS: Final[dict[str, type[errors.WherryError]]] = {
    "invalid_argument": errors.InvalidArgument,
    "not_found": errors.NotFound,
    "already_exists": errors.AlreadyExists,
    "failed_precondition": errors.FailedPrecondition,
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where and how a container's processes are saved or brought back (criu)."""

    image: str
    work: str
    parent: str = ""
    leave_running: bool = False
    open_tcp: bool = False
    unix_sockets: bool = False
    terminal: bool = False
    file_locks: bool = False
    empty_namespaces: tuple[str, ...] = ()


class Created(NamedTuple):
    """A container that was made.

    `shares_pids`: it has no pid namespace of its own, so that its init doesn't take the other processes along.
    `hooks`: its config.json has any, which may take as long as they like.
    """

    pid: int
    shares_pids: bool
    hooks: bool


class OciRuntime(Protocol):
    """What the shim asks of a runtime. The caller is the subreaper of all that it starts."""

    async def create(self, container: str, io: ProcessIO, rootfs: Sequence[Mount]) -> Created:
        """Mount the root filesystem (nothing for an empty list) and make the container of the bundle.

        Its init waits for `start`. Undoes what it did when it fails.
        """

    async def start(self, container: str) -> None:
        """Let init go on."""

    async def exec(self, container: str, exec_id: str, process: dict[str, Any], io: ProcessIO) -> int:
        """Run another process in the container; its pid."""

    async def kill(self, container: str, number: int, *, everyone: bool = False) -> None:
        """Signal init, or all processes. Raises NotFound when there is none."""

    async def delete(self, container: str, *, force: bool = False) -> None:
        """Remove what the runtime keeps, and the mounted root; fine if there is nothing. `force` kills first."""

    async def pause(self, container: str) -> None:
        """Freeze."""

    async def resume(self, container: str) -> None:
        """Thaw."""

    async def update(self, container: str, resources: dict[str, Any]) -> None:
        """Set limits (`linux.resources` of the specification)."""

    async def pids(self, container: str) -> list[int]:
        """All processes of the container, as this process sees them."""

    async def checkpoint(self, container: str, to: Checkpoint) -> None:
        """Save the processes. Raises Unimplemented where the runtime can't."""

    async def restore(self, container: str, source: Checkpoint, io: ProcessIO, rootfs: Sequence[Mount]) -> Created:
        """Make the container from saved processes and let them go on."""


def kill_error(error: errors.WherryError) -> errors.WherryError:
    """What a runtime says of a failed kill, as containerd tells it on."""
    text = error.message
    if "not running" in text or "already finished" in text or "no such process" in text.lower():
        return errors.NotFound("process already finished: not found")
    if "does not exist" in text:
        return errors.NotFound("no such container: not found")
    return errors.WherryError(f"unknown error after kill: {text}")


class Bundled:
    """`wherry.runtime`, in a forked child for what may take long, directly for what is a few system calls, and by a
    child that only makes system calls where that is enough (exec).

    A fork of the shim costs about 2 ms (pages that are copied, a process that ends), more than all that a start or a
    delete does; they are forked only where hooks run, which may take as long as they like. A create writes to more
    memory than a shim is to have of its own, so it is forked, too, but for a `warm` shim, which has that memory.
    """

    def __init__(self, loop: Loop, children: Children, settings: RuntimeSettings, *, warm: bool = False) -> None:
        self._loop = loop
        self._children = children
        self._settings = settings
        self._warm = warm
        self._hooks = True  # until the specification is known to have none

    async def create(self, container: str, io: ProcessIO, rootfs: Sequence[Mount]) -> Created:
        failed = "OCI runtime create failed"
        created = self._created_here(failed, container, io, rootfs) if self._warm else None
        if created is None:
            try:
                created = Created(*await self._forked(failed, self._create, container, io, rootfs, None))
            except RuntimeDied:
                await self._undo_create(container)
                raise
        self._hooks = created.hooks
        return created

    def _created_here(self, failed: str, container: str, io: ProcessIO, rootfs: Sequence[Mount]) -> Created | None:
        """Made without a fork; None where that isn't for this process."""
        if self._settings.systemd_cgroup:
            return None
        try:
            spec = read_spec(self._settings.bundle)
            return Created(*self._create(container, io, rootfs, spec)) if bundled.creates_here(spec) else None
        except (ContainerError, OSError) as error:
            raise told_as(failed, error) from error

    def _create(
        self, container: str, io: ProcessIO, rootfs: Sequence[Mount], spec: dict[str, Any] | None
    ) -> tuple[int, bool, bool]:
        """In a child, mostly: what the shim doesn't do itself leaves its memory shared."""
        if spec is None:
            spec = read_spec(self._settings.bundle)
        request = self._request(container, io, rootfs, spec)
        try:
            pid = bundled.create(request)
        except BaseException:
            unmount_rootfs(self._settings.bundle)
            raise
        return pid, shares_pids(spec), bool(spec.get("hooks"))

    def _request(
        self, container: str, io: ProcessIO, rootfs: Sequence[Mount], spec: dict[str, Any]
    ) -> bundled.CreateRequest:
        """What the runtime is asked; the root is mounted."""
        settings = self._settings
        mount_rootfs(settings.bundle, rootfs)
        reach("runtime.create.mounted")
        return bundled.CreateRequest(
            settings.root,
            container,
            settings.bundle,
            spec=spec,
            stdio=io.child,
            console_fd=io.console.child_fd if io.console is not None else -1,
            pid_file=f"{settings.bundle}/init.pid",
            no_pivot=settings.no_pivot,
            no_new_keyring=settings.no_new_keyring,
            systemd_cgroup=settings.systemd_cgroup,
        )

    async def _undo_create(self, container: str) -> None:
        """The runtime was killed (for lack of memory, perhaps) and couldn't take back what it had done."""
        try:
            if bundled.state(self._settings.root, container)["bundle"] not in ("", self._settings.bundle):
                return  # a container of the same name that isn't ours
        except ContainerError:
            pass  # it got nowhere, or not far enough to be read
        try:
            await self.delete(container, force=True)
        except errors.WherryError as error:
            log("error", f"cleaning up after a runtime that died: {error.message}", id=container)

    async def start(self, container: str) -> None:
        failed = "OCI runtime start failed"
        if self._hooks:
            await self._forked(failed, bundled.start, self._settings.root, container)
            return
        try:
            starting = bundled.starting(self._settings.root, container)
            try:
                executed = self._loop.future()
                # a fifo's writing end is never readable: what is told is the error that nobody reads it any more
                self._loop.on_read(starting.fd, lambda: executed.set(None))
                await executed
                starting.finish()
            finally:
                self._loop.forget(starting.fd)
                starting.close()
        except (ContainerError, OSError) as error:
            raise told_as(failed, error) from error

    async def exec(self, container: str, exec_id: str, process: dict[str, Any], io: ProcessIO) -> int:
        settings = self._settings
        request = bundled.ExecRequest(
            settings.root,
            container,
            process,
            stdio=io.child,
            console_fd=io.console.child_fd if io.console is not None else -1,
            pid_file=f"{settings.bundle}/{exec_id}.pid",
        )
        failed = "OCI runtime exec failed"
        try:
            pid: int = await self._entered(request)
        except ContainerError as error:
            raise told_as(failed, error) from error
        if pid:
            return pid
        try:
            pid = await self._forked(failed, bundled.exec_process, request)
        except RuntimeDied:
            # nobody would know of a process that it had made already
            end_child(f"{settings.bundle}/{exec_id}.pid")
            raise
        return pid

    async def _entered(self, request: bundled.ExecRequest) -> int:
        """The process's pid; 0 where the runtime has to be forked for it (or to say what is wrong)."""
        with self._children:
            entering = bundled.entering(request)
            if entering is None:
                return 0
            ended = await self._children.exited(entering.helper)
            try:
                return entering.end(ended.status)
            finally:
                if entering.lost:
                    await self._children.exited(entering.lost)
                entering.close()

    async def kill(self, container: str, number: int, *, everyone: bool = False) -> None:
        try:
            bundled.kill(self._settings.root, container, number, all=everyone)
        except ContainerError as error:
            raise kill_error(errors.WherryError(error.message)) from error
        except OSError as error:
            raise kill_error(errors.WherryError(str(error))) from error

    async def delete(self, container: str, *, force: bool = False) -> None:
        failed = "failed to delete task"
        try:
            if self._hooks or force:
                await self._forked(failed, bundled.delete, self._settings.root, container, force=force)
            else:
                try:
                    bundled.delete(self._settings.root, container)
                except (ContainerError, OSError) as error:
                    raise told_as(failed, error) from error
        except errors.WherryError as error:
            if not isinstance(error, errors.NotFound) and "does not exist" not in error.message:
                raise
        unmount_rootfs(self._settings.bundle)

    async def pause(self, container: str) -> None:
        await self._forked("OCI runtime pause failed", bundled.pause, self._settings.root, container)

    async def resume(self, container: str) -> None:
        await self._forked("OCI runtime resume failed", bundled.resume, self._settings.root, container)

    async def update(self, container: str, resources: dict[str, Any]) -> None:
        await self._forked("OCI runtime update failed", bundled.update, self._settings.root, container, resources)

    async def pids(self, container: str) -> list[int]:
        try:
            return bundled.pids(self._settings.root, container)
        except ContainerError as error:
            raise _KINDS.get(error.kind, errors.WherryError)(error.message) from error

    async def checkpoint(self, container: str, to: Checkpoint) -> None:
        await self._forked("", bundled.checkpoint, self._settings.root, container, _criu_options(to))

    async def restore(self, container: str, source: Checkpoint, io: ProcessIO, rootfs: Sequence[Mount]) -> Created:
        created = Created(
            *await self._forked("OCI runtime restore failed", self._restore, container, source, io, rootfs)
        )
        self._hooks = created.hooks
        return created

    def _restore(
        self, container: str, source: Checkpoint, io: ProcessIO, rootfs: Sequence[Mount]
    ) -> tuple[int, bool, bool]:
        """In the child, as `_create`."""
        spec = read_spec(self._settings.bundle)
        request = self._request(container, io, rootfs, spec)
        try:
            pid = bundled.restore(request, _criu_options(source))
        except BaseException:
            unmount_rootfs(self._settings.bundle)
            raise
        return pid, shares_pids(spec), bool(spec.get("hooks"))

    async def _forked(self, failed: str, function: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        try:
            return await in_child(self._loop, self._children, function, *args, **kwargs)
        except (ContainerError, OSError) as error:
            raise told_as(failed, error) from error


class RuntimeDied(errors.Internal):
    """The process in which the runtime ran ended without a word."""


def end_child(pid_file: str) -> None:
    """SIGKILL for the process of a pid file where it is a child of ours, and the file's removal."""
    try:
        with open(pid_file) as file:
            pid = int(file.read())
        os.unlink(pid_file)
        with open(f"/proc/{pid}/stat") as file:
            parent = int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return
    if parent == os.getpid():
        os.kill(pid, signal.SIGKILL)


def _criu_options(of: Checkpoint) -> CriuOptions:
    options = CriuOptions(of.image)
    options.work_path = of.work
    options.parent_path = of.parent
    options.leave_running = of.leave_running
    options.tcp_established = of.open_tcp
    options.ext_unix_sk = of.unix_sockets
    options.shell_job = of.terminal
    options.file_locks = of.file_locks
    for namespace in of.empty_namespaces:
        options.empty_ns |= FLAGS.get(namespace, 0)
    return options


def read_spec(bundle: str) -> dict[str, Any]:
    """The bundle's config.json. Raises InvalidArgument where it is no JSON object."""
    path = f"{bundle}/config.json"
    with open(path, "rb") as file:
        try:
            spec = json.load(file)
        except ValueError as error:
            raise errors.InvalidArgument(f"{path} is not JSON: {error}: invalid argument") from error
    if not isinstance(spec, dict):
        raise errors.InvalidArgument(f"{path} is no JSON object: invalid argument")
    return spec


def shares_pids(spec: dict[str, Any]) -> bool:
    """Whether the container has no pid namespace of its own."""
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    return not any(namespace.get("type") == "pid" and not namespace.get("path") for namespace in namespaces)


def mount_rootfs(bundle: str, rootfs: Sequence[Mount]) -> None:
    """Mount a snapshot at the bundle's `rootfs`; nothing for an empty list."""
    if not rootfs:
        return
    target = f"{bundle}/rootfs"
    os.makedirs(target, 0o711, exist_ok=True)
    try:
        mounts.mount_all(rootfs, target)
    except OSError as error:
        raise errors.WherryError(f"failed to mount rootfs component: {error}") from error


def unmount_rootfs(bundle: str) -> None:
    """Take the root away; what isn't mounted is no error, what can't be is told in the log."""
    try:
        mounts.unmount_all(f"{bundle}/rootfs")
    except OSError as error:
        log("error", f"failed to cleanup rootfs mount: {error}", bundle=bundle)


def told_as(failed: str, error: ContainerError | OSError) -> errors.WherryError:
    """The runtime's error as one of the task API, with what failed before it."""
    if isinstance(error, ContainerError):
        kind = _KINDS.get(error.kind, errors.WherryError)
        return kind(f"{failed}: {error.message}" if failed else error.message)
    return errors.WherryError(f"{failed}: {error}" if failed else str(error))


async def in_child(
    loop: Loop, children: Children, function: Callable[..., Any], *args: object, **kwargs: object
) -> Any:
    """Call a blocking function in a forked child while the loop goes on; what it returns or raises.

    It may return None, numbers, strings and lists. What the child's own children leave behind becomes the shim's.
    Raises RuntimeDied when the child dies without a word.
    """
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    with children:
        pid = os.fork()
        if not pid:
            _child(write, function, args, kwargs)
        os.close(write)
        ended = children.exited(pid)
    received = bytearray()
    answered = loop.future()

    def readable() -> None:
        try:
            data = os.read(read, 65536)
        except BlockingIOError:
            return
        received.extend(data)
        # a whole answer is enough: the process that gave it takes another millisecond to end
        if not data or data.endswith(_END):
            loop.forget(read)
            os.close(read)
            answered.set(None)

    loop.on_read(read, readable)
    await answered
    if not received.endswith(_END):
        raise RuntimeDied(f"the runtime died with exit status {(await ended).status}")
    kind, value = marshal.loads(received)  # noqa: S302  # from our own fork, and a tenth of what json touches
    if kind == "result":
        return value
    if isinstance(kind, int):
        raise errors.from_code(kind, value)
    raise ContainerError(value, kind)


def _child(write: int, function: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    status = 1
    try:
        signal.set_wakeup_fd(-1)  # it belongs to the shim
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            answer: tuple[str | int, Any] = ("result", function(*args, **kwargs))
        except ContainerError as error:
            answer = (error.kind, error.message)
        except errors.WherryError as error:
            answer = (int(error.code), error.message)
        except OSError as error:
            answer = ("unknown", str(error))
        reach("runtime.answering")
        data = marshal.dumps(answer) + _END
        os.set_blocking(write, True)
        while data:
            data = data[os.write(write, data) :]
        status = 0
    except BaseException:  # noqa: BLE001  # nothing may get past here into the shim's own code
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(status)
