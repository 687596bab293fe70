"""Bundles: the folder of a task, which the daemon makes, the shim works in, and a restarted daemon finds again.

    STATE/tasks/NAMESPACE/ID/
      config.json       the OCI spec, as the container's record has it
      rootfs/           where the shim mounts the root
      work/             the runtime's scratch (criu's logs)
      bootstrap.json    how to reach the shim; written before the shim is started
      launch.json      which shim it is: its binary ("" for ours), and the names it was asked for by
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
from dataclasses import asdict, dataclass

from wherry.core.errors import AlreadyExists, InvalidArgument
from wherry.linux.mounts import unmount_all
from wherry.shim.client import Bootstrap

_HIDDEN = "."


@dataclass(frozen=True, slots=True)
class Launch:
    """What the daemon must know to clean up after a shim: `binary` is a stranger's absolute path, "" for our own."""

    runtime: str
    binary: str = ""


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
            self._write("launch.json", json.dumps(asdict(launch)).encode())
        except BaseException:
            self.delete()
            raise

    def write_bootstrap(self, bootstrap: Bootstrap) -> None:
        """Record how the shim is reached."""
        self._write("bootstrap.json", json.dumps(asdict(bootstrap)).encode())

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
        """Which shim it is; our own where the daemon died before it was written."""
        try:
            value = json.loads(self._read("launch.json"))
            return Launch(str(value["runtime"]), str(value["binary"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Launch("")

    def delete(self) -> None:
        """Unmount and remove it; one that isn't there is fine. Raises OSError for a mount that can't be detached."""
        unmount_all(os.path.join(self.path, "rootfs"))
        hidden = os.path.join(os.path.dirname(self.path), _HIDDEN + self.id)
        with contextlib.suppress(FileNotFoundError):
            if os.path.lexists(hidden):
                shutil.rmtree(hidden)
            os.rename(self.path, hidden)
            shutil.rmtree(hidden)

    def _write(self, name: str, data: bytes) -> None:
        path = os.path.join(self.path, name)
        with open(os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
        os.rename(f"{path}.new", path)

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
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            else:
                yield Bundle(tasks, namespace, name)


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _checked(spec: bytes, id: str) -> bytes:  # noqa: A002
    """The spec's bytes, seen to be a JSON object: a shim's own message would name a file nobody knows."""
    try:
        value = json.loads(spec)
    except ValueError as error:
        raise InvalidArgument(f'spec of container "{id}" is not JSON: {error}: invalid argument') from error
    if not isinstance(value, dict):
        raise InvalidArgument(f'spec of container "{id}" is no JSON object: invalid argument')
    return spec
