"""Bundles: the folder of a task, which the daemon makes, the shim works in, and a restarted daemon finds again.

    STATE/tasks/NAMESPACE/ID/
      config.json       the OCI spec, as the container's record has it
      rootfs/           where the shim mounts the root
      work/             the runtime's scratch (criu's logs)
      bootstrap.json    how to reach the shim; written before the shim is started
      launch.json       which shim it is, where it is somebody else's
      …                 what the shim keeps (exits, options, init.pid)

A bundle that is being removed has a dot before its name, so that a crash in the middle is seen. Nothing here is synced:
after a power loss there is no task either (STATE is a tmpfs).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

from wherry.core.errors import AlreadyExists, InvalidArgument
from wherry.core.failpoints import reach
from wherry.linux.mounts import unmount_all
from wherry.shim.client import Bootstrap

_HIDDEN = "."
_CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True)
class Launch:
    """What the daemon must know to clean up after a shim.

    `binary` is a stranger's absolute path, "" for our own. `group` names those that share a shim of ours. `sandbox`:
    what is in the bundle is a sandbox, no task; `host` is the sandbox that a task belongs to.
    """

    runtime: str
    binary: str = ""
    group: str = ""
    sandbox: bool = False
    host: str = ""


@dataclass(frozen=True, slots=True)
class NotedExit:
    """How a process ended, as its shim noted it: `exec_id` "" for the init, nanoseconds since the epoch."""

    exec_id: str
    pid: int
    exit_status: int
    exited_at_ns: int
    reason: str = ""


class Bundle:
    """One bundle by its path; making the object touches nothing."""

    def __init__(self, tasks: str, namespace: str, id: str) -> None:  # noqa: A002 -- the field's name
        self.namespace = namespace
        self.id = id
        self.path = os.path.join(tasks, namespace, id)

    def create(self, spec: bytes, launch: Launch) -> None:
        """Make it on disk. Raises AlreadyExists, InvalidArgument for a spec that is no JSON object."""
        spec = _checked(spec, self.id)
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(self.path), 0o711)
        try:
            os.mkdir(self.path, 0o711)
        except FileExistsError:
            raise AlreadyExists(f"bundle {self.path}: already exists") from None
        try:
            os.mkdir(os.path.join(self.path, "rootfs"), 0o711)
            os.mkdir(os.path.join(self.path, "work"), 0o711)
            self._write("config.json", spec)
            if launch.binary or launch.group:
                self._write("launch.json", json.dumps(asdict(launch)).encode())
        except BaseException:
            self.delete()
            raise

    def write_bootstrap(self, bootstrap: Bootstrap) -> None:
        """Record how the shim is reached."""
        self._write("bootstrap.json.new", json.dumps(asdict(bootstrap)).encode())
        os.rename(os.path.join(self.path, "bootstrap.json.new"), os.path.join(self.path, "bootstrap.json"))

    def bootstrap(self) -> Bootstrap | None:
        """How the shim is reached; None where the daemon died before it was written."""
        try:
            value = json.loads(self._read("bootstrap.json"))
            return Bootstrap(
                str(value["address"]), str(value["protocol"]), int(value["version"]), int(value.get("pid", 0))
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def launch(self) -> Launch:
        """Which shim it is; our own where nothing else is recorded."""
        try:
            value = json.loads(self._read("launch.json"))
            # what a newer daemon may have added is not for this one
            return Launch(**{field.name: value[field.name] for field in fields(Launch) if field.name in value})
        except (OSError, ValueError, KeyError, TypeError):
            return Launch("")

    def exits(self) -> list[NotedExit]:
        """The ends that our shim noted (`shim/state_files.py`); none of a stranger's."""
        found = []
        for name in _listed(os.path.join(self.path, "exits")):
            kind, dash, exec_id = name.removesuffix(".json").partition("-")
            if (kind, dash) not in (("init", ""), ("exec", "-")) or not name.endswith(".json"):
                continue
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                value = json.loads(self._read(f"exits/{name}"))
                numbers = int(value["pid"]), int(value["exit_status"]), int(value["exited_at_ns"])
                found.append(NotedExit(exec_id, *numbers, str(value.get("reason", ""))))
        return found

    def keep(self, checkpoint: str) -> None:
        """Own a folder that the task is restored from: it goes with the bundle."""
        os.symlink(checkpoint, os.path.join(self.path, _CHECKPOINT))

    def checkpoint(self) -> str:
        """The folder that `keep` was given, "" for none."""
        try:
            return os.readlink(os.path.join(self.path, _CHECKPOINT))
        except OSError:
            return ""

    def delete(self) -> None:
        """Unmount and remove it; one that isn't there is fine. Raises OSError for a mount that can't be detached."""
        unmount_all(os.path.join(self.path, "rootfs"))
        for name in _listed(os.path.join(self.path, "ns")):  # a sandbox's namespaces
            unmount_all(os.path.join(self.path, "ns", name))
        if kept := self.checkpoint():
            shutil.rmtree(kept, ignore_errors=True)
        hidden = os.path.join(os.path.dirname(self.path), _HIDDEN + self.id)
        if os.path.lexists(hidden):
            _remove(hidden)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, hidden)
            reach("daemon.end.hidden")
            _remove(hidden)

    def _write(self, name: str, data: bytes) -> None:
        path = os.path.join(self.path, name)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)

    def _read(self, name: str) -> bytes:
        with open(os.path.join(self.path, name), "rb") as file:
            return file.read()


def find(tasks: str) -> Iterator[Bundle]:
    """All bundles on disk; what was being removed when a daemon died is removed on the way."""
    for namespace in _listed(tasks):
        folder = os.path.join(tasks, namespace)
        for name in _listed(folder):
            if name.startswith(_HIDDEN):
                unmount_all(os.path.join(folder, name, "rootfs"))
                with contextlib.suppress(OSError):
                    _remove(os.path.join(folder, name))
            else:
                yield Bundle(tasks, namespace, name)


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(folder: str) -> None:
    """Remove a folder and what is in it; a fifth of shutil.rmtree's time, on the path of each container.

    Symlinks are not followed; that nobody swaps a folder for one meanwhile is as sure as that only root can write here.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _remove(entry.path)
            else:
                os.unlink(entry.path)
    os.rmdir(folder)


def _checked(spec: bytes, id: str) -> bytes:  # noqa: A002
    """The spec's bytes, seen to be a JSON object: a shim's own message would name a file nobody knows."""
    try:
        value = json.loads(spec)
    except ValueError as error:
        raise InvalidArgument(f'spec of container "{id}" is not JSON: {error}: invalid argument') from error
    if not isinstance(value, dict):
        raise InvalidArgument(f'spec of container "{id}" is no JSON object: invalid argument')
    return spec
