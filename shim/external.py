"""Any OCI runtime behind a container, by its command line, which is runc's (crun, youki, runsc and others have it too).

Containerd's way of calling it: `--root ROOT/NAMESPACE --log BUNDLE/log.json --log-format json`, the container's streams
as those of `create` and `exec`, so that what went wrong is read from the log.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from typing import TYPE_CHECKING, Any, Final

from wherry.core import errors
from wherry.shim.log import log
from wherry.shim.loop import DEFAULT_SIGNALS
from wherry.shim.oci_runtime import (
    Checkpoint,
    Created,
    RuntimeDied,
    end_child,
    kill_error,
    mount_rootfs,
    read_spec,
    shares_pids,
    unmount_rootfs,
)
from wherry.shim.state_files import RuntimeSettings, write_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wherry.linux.mounts import Mount
    from wherry.shim.loop import Children, Loop
    from wherry.shim.stdio import ProcessIO

# of what a runtime prints, as much goes into an error
_SAID: Final = 4096


class External:
    """A runtime's binary, named by path or looked for on PATH."""

    def __init__(self, loop: Loop, children: Children, settings: RuntimeSettings) -> None:
        self._loop = loop
        self._children = children
        self._settings = settings
        self._log = f"{settings.bundle}/log.json"

    async def create(self, container: str, io: ProcessIO, rootfs: Sequence[Mount]) -> Created:
        settings = self._settings
        spec = read_spec(settings.bundle)
        mount_rootfs(settings.bundle, rootfs)
        pid_file = f"{settings.bundle}/init.pid"
        command = ["create", "--bundle", settings.bundle, "--pid-file", pid_file]
        command += self._console(io)
        if settings.no_pivot:
            command.append("--no-pivot")
        if settings.no_new_keyring:
            command.append("--no-new-keyring")
        try:
            await self._run("OCI runtime create failed", [*command, container], io=io)
        except RuntimeDied:
            try:
                await self.delete(container, force=True)
            except errors.WherryError as error:
                log("error", f"cleaning up after a runtime that died: {error.message}", id=container)
            raise
        return Created(_pid(pid_file), shares_pids(spec), bool(spec.get("hooks")))

    async def start(self, container: str) -> None:
        await self._run("OCI runtime start failed", ["start", container])

    async def exec(self, container: str, exec_id: str, process: dict[str, Any], io: ProcessIO) -> int:
        settings = self._settings
        pid_file = f"{settings.bundle}/{exec_id}.pid"
        spec = f"{settings.bundle}/.{exec_id}.process.json"
        write_file(spec, json.dumps(process).encode())
        command = ["exec", "--process", spec, "--pid-file", pid_file, "--detach", *self._console(io), container]
        try:
            await self._run("OCI runtime exec failed", command, io=io)
            return _pid(pid_file)
        except RuntimeDied:
            end_child(pid_file)
            raise
        finally:
            os.unlink(spec)

    async def kill(self, container: str, number: int, *, everyone: bool = False) -> None:
        command = ["kill", *(["--all"] if everyone else []), container, str(number)]
        try:
            await self._run("", command)
        except errors.WherryError as error:
            raise kill_error(error) from error

    async def delete(self, container: str, *, force: bool = False) -> None:
        try:
            await self._run("failed to delete task", ["delete", *(["--force"] if force else []), container])
        except errors.WherryError as error:
            if "does not exist" not in error.message:
                raise
        unmount_rootfs(self._settings.bundle)

    async def pause(self, container: str) -> None:
        await self._run("OCI runtime pause failed", ["pause", container])

    async def resume(self, container: str) -> None:
        await self._run("OCI runtime resume failed", ["resume", container])

    async def update(self, container: str, resources: dict[str, Any]) -> None:
        data = json.dumps(resources).encode()
        await self._run("OCI runtime update failed", ["update", "--resources=-", container], stdin=data)

    async def pids(self, container: str) -> list[int]:
        output = await self._run("OCI runtime ps failed", ["ps", "--format", "json", container])
        try:
            return [int(pid) for pid in json.loads(output) or []]
        except (ValueError, TypeError) as error:
            raise errors.Internal(f"{self._settings.binary} ps printed no pids: {output[:200]!r}") from error

    async def checkpoint(self, container: str, to: Checkpoint) -> None:
        command = ["checkpoint", "--image-path", to.image, "--work-path", to.work]
        command += [] if not to.leave_running else ["--leave-running"]
        await self._run("", [*command, *_criu(to), container])

    async def restore(self, container: str, source: Checkpoint, io: ProcessIO, rootfs: Sequence[Mount]) -> Created:
        settings = self._settings
        pid_file = f"{settings.bundle}/init.pid"
        command = ["restore", "--image-path", source.image, "--work-path", source.work, "--bundle", settings.bundle]
        command += ["--pid-file", pid_file, "--detach", "--no-subreaper", *self._console(io), *_criu(source)]
        if settings.no_pivot:
            command.append("--no-pivot")
        spec = read_spec(settings.bundle)
        mount_rootfs(settings.bundle, rootfs)
        await self._run("OCI runtime restore failed", [*command, container], io=io)
        return Created(_pid(pid_file), shares_pids(spec), bool(spec.get("hooks")))

    # -- running it ------------------------------------------------------------------------------------------------

    def _console(self, io: ProcessIO) -> list[str]:
        return ["--console-socket", io.console.path()] if io.console is not None else []

    async def _run(self, failed: str, command: list[str], *, io: ProcessIO | None = None, stdin: bytes = b"") -> bytes:
        settings = self._settings
        binary = which(settings.binary)
        if binary is None:
            raise errors.WherryError(f"{failed or command[0]}: {_missing(settings.binary)}")
        line = [binary, "--root", settings.root, "--log", self._log, "--log-format", "json"]
        if settings.systemd_cgroup:
            line.append("--systemd-cgroup")
        logged = _size(self._log)
        output = os.memfd_create("output", os.MFD_CLOEXEC)
        try:
            given = _given(stdin) if stdin else os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            try:
                streams = io.child if io is not None and io.child is not None else (given, output, output)
                with self._children:
                    ended = self._children.exited(_spawn([*line, *command], streams))
                end = await ended
            finally:
                os.close(given)
            said = os.pread(output, 1 << 20, 0)
        finally:
            os.close(output)
        if end.status == 0:
            return said
        reason = _last_error(self._log, logged)
        if not reason and end.status == 128 + signal.SIGKILL:
            raise RuntimeDied(f"{failed}: {binary} was killed" if failed else f"{binary} was killed")
        if not reason:
            printed = said[-_SAID:].decode(errors="replace").strip()
            reason = f"{binary} did not terminate successfully: exit status {end.status}: {printed}"
        raise errors.WherryError(f"{failed}: {reason}" if failed else reason)


def which(name: str) -> str | None:
    """A program by path, or looked for on PATH as execvp does."""
    folders = [""] if "/" in name else os.environ.get("PATH", os.defpath).split(os.pathsep)
    for folder in folders:
        path = os.path.join(folder, name)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    return None


def _missing(name: str) -> str:
    """That a runtime isn't there, in the words of Go's exec, and where it was looked for."""
    if "/" in name:
        return f'exec: "{name}": no such executable file'
    return f'exec: "{name}": executable file not found in $PATH ({os.environ.get("PATH", os.defpath)})'


def _spawn(line: list[str], streams: tuple[int, int, int]) -> int:
    """Start a program with these streams. None of them is 0, 1 or 2 itself."""
    environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(streams)]
    return os.posix_spawn(line[0], line, environment, file_actions=actions, setsigdef=DEFAULT_SIGNALS)


def _given(data: bytes) -> int:
    fd = os.memfd_create("input", os.MFD_CLOEXEC)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _criu(options: Checkpoint) -> list[str]:
    flags = {
        "--tcp-established": options.open_tcp,
        "--ext-unix-sk": options.unix_sockets,
        "--shell-job": options.terminal,
        "--file-locks": options.file_locks,
    }
    line = [flag for flag, on in flags.items() if on]
    for namespace in options.empty_namespaces:
        line += ["--empty-ns", namespace]
    return [*line, *(["--parent-path", options.parent] if options.parent else [])]


def _pid(path: str) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError) as error:
        raise errors.Internal(f"failed to retrieve OCI runtime container pid: {error}") from error


def _size(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.stat(path).st_size
    return 0


def _last_error(path: str, offset: int) -> str:
    """The last error that a runtime logged after `offset`, "" for none."""
    found = ""
    with contextlib.suppress(OSError), open(path, errors="replace") as file:
        file.seek(offset)
        for line in file:
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("level") == "error":
                    found = str(entry.get("msg", "")).strip()
    return found
