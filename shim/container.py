"""One container in a shim: its root filesystem, its runtime, its processes and its cgroup."""

from __future__ import annotations

import contextlib
import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from wherry.core import errors, typeurl
from wherry.core.failpoints import reach
from wherry.core.names import check_identifier
from wherry.linux import cgroups, mounts
from wherry.linux.cgroups.layout import V1_CONTROLLERS, Mode, own_cgroups
from wherry.proto import cgroups_v1_pb2, cgroups_v2_pb2, events_pb2, runc_options_pb2, task_v2_pb2
from wherry.runtime import quickjson
from wherry.shim import oom
from wherry.shim.external import External
from wherry.shim.log import log
from wherry.shim.oci_runtime import (
    BUNDLED_NAMES,
    EXTERNAL_ROOT,
    Bundled,
    Checkpoint,
    Created,
    OciRuntime,
    unmount_rootfs,
)
from wherry.shim.process import Process, Shim
from wherry.shim.state_files import RuntimeSettings, exit_path, write_file, write_settings
from wherry.shim.states import Operation, State
from wherry.shim.stdio import Owner, Stdio

if TYPE_CHECKING:
    from collections.abc import Iterable

    from google.protobuf.any_pb2 import Any as AnyMessage

    from wherry.proto import types_pb2
    from wherry.shim.loop import Exit

# how long the init of a container that never started may take to die of SIGKILL
_KILL_WAIT: Final = 5.0


def read_options(packed: AnyMessage) -> runc_options_pb2.Options:
    """The runtime's options; those of another runtime's type are none. Raises InvalidArgument for damaged ones."""
    if packed.value and typeurl.is_a(packed, runc_options_pb2.Options):
        return typeurl.unpack_as(packed, runc_options_pb2.Options)
    return runc_options_pb2.Options()


def runtime_settings(shim: Shim, bundle: str, options: runc_options_pb2.Options) -> RuntimeSettings:
    """Which runtime the options mean, and where it keeps its state."""
    binary = "" if options.binary_name in BUNDLED_NAMES else options.binary_name
    root = shim.runtime_root if not binary else f"{EXTERNAL_ROOT}/{shim.namespace}"
    if options.root:
        root = os.path.join(options.root, shim.namespace)
    return RuntimeSettings(
        root,
        bundle,
        binary,
        systemd_cgroup=options.systemd_cgroup,
        no_pivot=options.no_pivot_root,
        no_new_keyring=options.no_new_keyring,
    )


def open_runtime(shim: Shim, settings: RuntimeSettings) -> OciRuntime:
    """The runtime behind the interface."""
    if settings.binary:
        return External(shim.loop, shim.children, settings)
    return Bundled(shim.loop, shim.children, settings, warm=shim.warm)


class Container:
    """Made by `create`; the operations are named as the task API's, and raise what it answers."""

    def __init__(self, shim: Shim, request: task_v2_pb2.CreateTaskRequest) -> None:
        self.id = request.id
        self.bundle = request.bundle or os.getcwd()
        self.options = read_options(request.options)
        self.settings = runtime_settings(shim, self.bundle, self.options)
        self.runtime = open_runtime(shim, self.settings)
        self.execs: dict[str, Process] = {}
        self._specs: dict[str, dict[str, Any]] = {}
        self.init_gone = False
        self.pausing = False
        self._shim = shim
        self._cgroup: cgroups.Cgroup | None = None
        self._oom: cgroups.OomWatch | None = None
        self._oom_told = False
        self._kill_rest = False
        self._rootfs: list[mounts.Mount] = []
        self._restore: Checkpoint | None = None
        stdio = Stdio(request.stdin, request.stdout, request.stderr, request.terminal)
        self._owner = Owner(shim.namespace, self.id, self.options.io_uid, self.options.io_gid)
        self.init = Process(shim, self.bundle, "", stdio, self._owner)

    # -- create ----------------------------------------------------------------------------------------------------

    async def create(self, request: task_v2_pb2.CreateTaskRequest) -> None:
        """Mount, open the streams, let the runtime make the container. What was done is undone if it fails."""
        self._rootfs = self.mounts_of(request.rootfs)
        try:
            if self.settings.binary or self.options.root:
                write_settings(self.settings)
            await self.init.io.prepare()
            reach("shim.create.streams")
            if request.checkpoint:
                self._prepare_restore(request)
                return
            with self._shim.children:
                self._made(await self.runtime.create(self.id, self.init.io, self._rootfs))
            reach("shim.create.made")
            self.init.io.started()
        except BaseException as error:
            await self._undo()
            if isinstance(error, OSError):
                raise errors.WherryError(f"failed to create task: {error}") from error
            raise

    @staticmethod
    def mounts_of(messages: Iterable[types_pb2.Mount]) -> list[mounts.Mount]:
        """Mounts as the API has them."""
        return [mounts.Mount(m.type, m.source, m.target, tuple(m.options)) for m in messages]

    def _made(self, created: Created) -> None:
        self._kill_rest = created.shares_pids
        self.init.born(created.pid, self._init_exited)

    async def _undo(self) -> None:
        self.init.io.close()
        if self.init.pid:
            self._shim.children.keep(self.init.pid, lambda end: None)  # nobody was told of it, so nobody is of its end
            try:
                await self.runtime.delete(self.id, force=True)
            except errors.WherryError as error:
                log("error", f"cleaning up after a failed create: {error.message}", id=self.id)
        if self._rootfs:
            unmount_rootfs(self.bundle)

    def _prepare_restore(self, request: task_v2_pb2.CreateTaskRequest) -> None:
        work = self.options.criu_work_path or f"{self.bundle}/work"
        self._restore = Checkpoint(request.checkpoint, work, request.parent_checkpoint)
        self.init.machine.state = State.RESTORING

    # -- start -----------------------------------------------------------------------------------------------------

    async def start(self, exec_id: str) -> Process:
        """Start the init or an exec'd process; the events of it are published."""
        process = self.process(exec_id)
        async with process.lock:
            process.machine.check(Operation.START)
            if exec_id and self.init_gone:
                text = f"container {self.id} init process is not running: failed precondition"
                raise errors.FailedPrecondition(text)
            process.starting()
            reach("shim.start.asked")
            try:
                if exec_id:
                    await self._start_exec(process)
                else:
                    await self._start_init()
                reach("shim.start.executed")
                process.machine.move(Operation.START)
                self._publish_start(process)
                reach("shim.start.told")
            finally:
                process.started()
        return process

    def _publish_start(self, process: Process) -> None:
        if process.exec_id:
            event = events_pb2.TaskExecStarted(container_id=self.id, exec_id=process.exec_id, pid=process.pid)
            self._shim.publisher.publish(event)
        else:
            self._shim.publisher.publish(events_pb2.TaskStart(container_id=self.id, pid=process.pid))
            self._shim.loop.soon(self._watch_oom)

    async def _start_init(self) -> None:
        if self._restore is None:
            await self.runtime.start(self.id)
            return
        with self._shim.children:
            self._made(await self.runtime.restore(self.id, self._restore, self.init.io, self._rootfs))
        self.init.io.started()

    async def _start_exec(self, process: Process) -> None:
        try:
            await process.io.prepare()
            reach("shim.exec.streams")
            with self._shim.children:
                pid = await self.runtime.exec(self.id, process.exec_id, self._specs[process.exec_id], process.io)
                process.born(pid, partial(self._exec_exited, process))
            reach("shim.exec.born")
            process.io.started()
        except OSError as error:
            process.failed()
            raise errors.WherryError(f"failed to create init process I/O: {error}") from error
        except BaseException:
            process.failed()
            raise

    # -- exec ------------------------------------------------------------------------------------------------------

    def add_exec(self, request: task_v2_pb2.ExecProcessRequest) -> Process:
        """Keep what is to be run; it is by `start`."""
        exec_id = request.exec_id
        check_identifier("exec id", exec_id)
        if exec_id in self.execs:
            raise errors.AlreadyExists(f"id {exec_id}: already exists")
        self.init.machine.check(Operation.EXEC)
        spec = typeurl.unpack_json(request.spec)
        if not isinstance(spec, dict):
            raise errors.InvalidArgument(f"process of exec {exec_id} is no JSON object: invalid argument")
        spec["terminal"] = request.terminal
        stdio = Stdio(request.stdin, request.stdout, request.stderr, request.terminal)
        process = Process(self._shim, self.bundle, exec_id, stdio, self._owner)
        self.execs[exec_id] = process
        self._specs[exec_id] = spec
        return process

    def process(self, exec_id: str) -> Process:
        """The init for "", else an exec'd process. Raises NotFound."""
        if not exec_id:
            return self.init
        process = self.execs.get(exec_id)
        if process is None:
            raise errors.NotFound(f"process does not exist {exec_id}: not found")
        return process

    # -- exit ------------------------------------------------------------------------------------------------------

    def _init_exited(self, end: Exit) -> None:
        self.init_gone = True
        self._shim.loop.spawn(self._end_init(end))

    async def _end_init(self, end: Exit) -> None:
        """The init's exit is the last one told: what shares the host's pids is killed, the kernel did the others."""
        if self.init.machine.state is State.PAUSED:
            await self._attempt("resuming a container that exited while paused", Operation.RESUME)
        if self._kill_rest:
            await self._attempt("killing what the init left behind", Operation.KILL)
        for process in list(self.execs.values()):
            if process.active:
                await process.ended
        self._tell_oom()
        self._explain(self.init, end)
        self.init.settle(end)

    def _exec_exited(self, process: Process, end: Exit) -> None:
        self._tell_oom()
        self._explain(process, end)
        process.settle(end)

    def _explain(self, process: Process, end: Exit) -> None:
        """Why a process was killed, where that was for lack of memory; another one's death is not an exec's reason."""
        cgroup = self._own_cgroup() if end.status == 128 + signal.SIGKILL else None
        if cgroup is None:
            return
        # systemd removes the scope of a process that ended, and its counters with it; the kernel's log stays
        gone = not cgroup.exists()
        if not gone and not cgroup.oom_kills():
            return
        reason, victim = oom.explain(cgroup)
        if victim == process.pid or not (gone or process.exec_id):
            process.reason = reason
            if not self._oom_told:  # it came before the watch, or went with the cgroup
                self._publish_oom()

    async def _attempt(self, what: str, operation: Operation) -> None:
        try:
            if operation is Operation.RESUME:
                await self.runtime.resume(self.id)
            else:
                await self.runtime.kill(self.id, signal.SIGKILL, everyone=True)
        except errors.NotFound:
            return
        except errors.WherryError as error:
            log("error", f"{what}: {error.message}", id=self.id)

    # -- operations on the whole -----------------------------------------------------------------------------------

    async def kill(self, exec_id: str, number: int, *, everyone: bool) -> None:
        """Signal a process, or all of the container's. Not behind the lock: a start that hangs can be killed."""
        process = self.process(exec_id)
        if not exec_id and everyone and process.pid:
            await self.runtime.kill(self.id, number, everyone=True)
            return
        process.check_killable()
        if not exec_id:
            await self.runtime.kill(self.id, number)
            return
        try:
            os.kill(process.pid, number)
        except ProcessLookupError as error:
            raise errors.NotFound("exec kill error: process already finished: not found") from error
        except OSError as error:
            raise errors.WherryError(f"exec kill error: unknown error after kill: {error}") from error

    async def pause(self) -> None:
        """Freeze all processes."""
        async with self.init.lock:
            self.init.machine.check(Operation.PAUSE)
            self.pausing = True
            try:
                await self.runtime.pause(self.id)
            finally:
                self.pausing = False
            self.init.machine.move(Operation.PAUSE)

    async def resume(self) -> None:
        """Thaw them."""
        async with self.init.lock:
            self.init.machine.check(Operation.RESUME)
            await self.runtime.resume(self.id)
            self.init.machine.move(Operation.RESUME)

    async def update(self, packed: AnyMessage) -> None:
        """Set limits, `linux.resources` as JSON."""
        async with self.init.lock:
            self.init.machine.check(Operation.UPDATE)
            resources = typeurl.unpack_json(packed)
            if not isinstance(resources, dict):
                raise errors.InvalidArgument("resources are no JSON object: invalid argument")
            await self.runtime.update(self.id, resources)

    async def checkpoint(self, request: task_v2_pb2.CheckpointTaskRequest) -> None:
        """Save the processes with criu, by an external runtime."""
        async with self.init.lock:
            self.init.machine.check(Operation.CHECKPOINT)
            options = runc_options_pb2.CheckpointOptions()
            if request.options.value:
                options = typeurl.unpack_as(request.options, runc_options_pb2.CheckpointOptions)
            to = Checkpoint(
                request.path,
                options.work_path or f"{self.bundle}/work/criu-work",
                leave_running=not options.exit,
                open_tcp=options.open_tcp,
                unix_sockets=options.external_unix_sockets,
                terminal=options.terminal,
                file_locks=options.file_locks,
                empty_namespaces=tuple(options.empty_namespaces),
            )
            os.makedirs(to.work, 0o711, exist_ok=True)
            try:
                await self.runtime.checkpoint(self.id, to)
            except errors.WherryError as error:
                raise errors.from_code(error.code, f"{error.message}{self._keep_criu_log(to.work)}") from error

    def _keep_criu_log(self, work: str) -> str:
        """Put criu's log into the bundle, where containerd's shim has it; the words that say so."""
        kept = f"{self.bundle}/criu-dump.log"
        try:
            with open(f"{work}/dump.log", "rb") as source:
                write_file(kept, source.read())
        except OSError:
            return ""
        return f" path= {kept}"

    # -- delete ----------------------------------------------------------------------------------------------------

    async def delete(self, exec_id: str) -> Process:
        """Remove an exec'd process, or the container with all that belongs to it."""
        process = self.process(exec_id)
        async with process.lock:
            process.machine.check(Operation.DELETE)
            if exec_id:
                await self._delete_exec(process)
            else:
                await self._delete_init()
            process.machine.move(Operation.DELETE)
        return process

    async def _delete_exec(self, process: Process) -> None:
        await process.drain()
        process.io.close()
        self.execs.pop(process.exec_id, None)
        self._specs.pop(process.exec_id, None)
        for path in (f"{self.bundle}/{process.exec_id}.pid", exit_path(self.bundle, process.exec_id)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        reach("shim.exec.deleted")

    async def _delete_init(self) -> None:
        init = self.init
        reach("shim.delete.asked")
        if init.active:  # created and never started: its init is there and waits
            await self.runtime.delete(self.id, force=True)
            await self._shim.loop.within(_KILL_WAIT, init.ended, f"the end of {self.id}")
        await init.drain()
        reach("shim.delete.drained")
        for process in self.execs.values():
            process.io.close()
        init.io.close()
        await self.runtime.delete(self.id)
        reach("shim.delete.deleted")
        self._close_oom()

    # -- cgroup ----------------------------------------------------------------------------------------------------

    def _find_cgroup(self) -> cgroups.Cgroup | None:
        """The container's cgroup, looked up when it is first needed: by the init, or where the runtime noted it."""
        if self._cgroup is None and self.init.pid:
            if self.init.reaped:  # the number may be another process's by now
                self._cgroup = noted_cgroup(self.settings.root, self.id)
                return self._cgroup
            try:
                self._cgroup = cgroup_of(self.init.pid)
            except (OSError, errors.WherryError) as error:
                log("error", f"loading cgroup for {self.init.pid}: {error}", id=self.id)
        return self._cgroup

    def _own_cgroup(self) -> cgroups.Cgroup | None:
        """The same, if it is the container's: a user whom nothing is delegated runs containers in that of the session,
        where others run out of memory, too."""
        cgroup = self._find_cgroup()
        if cgroup is not None and cgroups.host().user_namespace and cgroup.paths == cgroup_of(os.getpid()).paths:
            return None
        return cgroup

    def stats(self) -> AnyMessage:
        """Its metrics, in the message of the host's cgroup version. Raises NotFound."""
        cgroup = self._find_cgroup()
        if cgroup is None:
            raise errors.NotFound("cgroup does not exist: not found")
        stats = cgroup.stats()
        kind = cgroups_v1_pb2.Metrics if stats.version == 1 else cgroups_v2_pb2.Metrics
        return typeurl.pack(kind(**stats.values))

    def _watch_oom(self) -> None:
        if self.init.end is not None or self.init.reaped:
            return
        cgroup = self._own_cgroup()
        try:
            self._oom = cgroup.watch_oom() if cgroup is not None else None
            if self._oom is not None:
                self._shim.loop.on_read(self._oom.fileno(), self._tell_oom)
        except OSError as error:
            log("error", f"add cg to OOM monitor: {error}", id=self.id)

    def _tell_oom(self) -> None:
        if self._oom is None:
            return
        if self._oom.read():
            self._publish_oom()
        if self._oom.gone:
            self._close_oom()

    def _publish_oom(self) -> None:
        self._oom_told = True
        self._shim.publisher.publish(events_pb2.TaskOOM(container_id=self.id))

    def _close_oom(self) -> None:
        if self._oom is not None:
            self._shim.loop.forget(self._oom.fileno())
            self._oom.close()
            self._oom = None


def cgroup_of(pid: int) -> cgroups.Cgroup:
    """The cgroup that a process is in, whichever runtime put it there."""
    layout = cgroups.host()
    own = own_cgroups(pid)
    if layout.mode is Mode.V2 and layout.v2 is not None:
        return cgroups.restore({"": layout.v2.mountpoint + own.get("", "/")})
    return cgroups.restore(
        {name: layout.v1[name].mountpoint + own[name] for name in V1_CONTROLLERS if name in layout.v1 and name in own}
    )


def noted_cgroup(root: str, container: str) -> cgroups.Cgroup | None:
    """The cgroup that a runtime's state.json names (`cgroup_paths`, ours as runc's); None where there is no such."""
    try:
        with open(f"{root}/{container}/state.json", "rb") as file:
            paths = quickjson.loads(file.read())["cgroup_paths"]
        return cgroups.restore(paths) if paths else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
