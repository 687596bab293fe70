"""What a shim keeps in the bundle for the day that it is gone: how each process ended, which runtime to clean up with.

    BUNDLE/exits/init.json, BUNDLE/exits/exec-ID.json    {"pid": …, "exit_status": …, "exited_at_ns": …, "reason": …}
    BUNDLE/runtime.json                                  the `Settings` of the runtime

Written beside and renamed, so that a reader never sees half of one; not synced, the bundle lives in /run.
"""

from __future__ import annotations

import json
import os
from typing import Any

from wherry.shim.loop import Exit


class RuntimeSettings:
    """How a runtime is used for one container; a value.

    `root` is the folder of its states, with the namespace; `binary` "" is the bundled one. (No dataclass, as elsewhere
    in what every shim runs: a frozen one's `__init__` touches three objects for each field, and what is touched isn't
    shared any more.)
    """

    __slots__ = ("binary", "bundle", "no_new_keyring", "no_pivot", "root", "systemd_cgroup")

    def __init__(
        self,
        root: str,
        bundle: str,
        binary: str = "",
        *,
        systemd_cgroup: bool = False,
        no_pivot: bool = False,
        no_new_keyring: bool = False,
    ) -> None:
        self.root = root
        self.bundle = bundle
        self.binary = binary
        self.systemd_cgroup = systemd_cgroup
        self.no_pivot = no_pivot
        self.no_new_keyring = no_new_keyring


def write_file(path: str, data: bytes, mode: int = 0o600) -> None:
    """Replace a file's content at once."""
    beside = f"{path}.{os.getpid()}.tmp"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
    os.rename(beside, path)


def exit_path(bundle: str, exec_id: str) -> str:
    """Where the exit of the init (`exec_id` "") or of an exec'd process is kept."""
    return f"{bundle}/exits/exec-{exec_id}.json" if exec_id else f"{bundle}/exits/init.json"


def write_exit(bundle: str, exec_id: str, end: Exit, reason: str = "") -> None:
    """Keep how a process ended."""
    path = exit_path(bundle, exec_id)
    value = {"pid": end.pid, "exit_status": end.status, "exited_at_ns": end.at_ns, "reason": reason}
    data = json.dumps(value).encode()
    try:
        write_file(path, data)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), 0o711, exist_ok=True)
        write_file(path, data)


def read_exit(bundle: str, exec_id: str = "") -> tuple[Exit, str] | None:
    """How a process ended and why, None where that was not written (or not by us)."""
    value = _read(exit_path(bundle, exec_id))
    try:
        end = Exit(int(value["pid"]), int(value["exit_status"]), int(value["exited_at_ns"]))
    except (KeyError, TypeError, ValueError):
        return None
    return end, str(value.get("reason", ""))


def write_settings(settings: RuntimeSettings) -> None:
    """Keep which runtime the container was made with."""
    write_file(
        f"{settings.bundle}/runtime.json",
        json.dumps({name: getattr(settings, name) for name in settings.__slots__}).encode(),
    )


def read_settings(bundle: str) -> RuntimeSettings | None:
    """The runtime that the container was made with, None where that was not written."""
    value = _read(f"{bundle}/runtime.json")
    try:
        return RuntimeSettings(**value)
    except TypeError:
        return None


def read_pid(bundle: str) -> int:
    """The pid of the container's init, 0 where it is unknown."""
    try:
        with open(f"{bundle}/init.pid") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            value = json.load(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
