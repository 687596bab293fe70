"""What programs leave that were killed: processes, mounts and cgroups, found by the folder that they work in.

For fixtures, whose tests may have failed half way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path


def processes(folder: Path) -> list[int]:
    """The pids of everything that names a folder, with its descendants; children before parents.

    In its command line, its working directory, its open files, or its mounts where it has a mount namespace of its own.
    """
    ours, parents = set(), {}
    forbidden = _ancestors(os.getpid())
    for pid in sorted((int(name) for name in os.listdir("/proc") if name.isdigit()), reverse=True):
        if pid in forbidden:
            continue
        with contextlib.suppress(OSError):
            parents[pid] = _parent(pid)
            if _names(pid, str(folder)):
                ours.add(pid)
    grown = True
    while grown:
        new = {pid for pid, parent in parents.items() if parent in ours and pid not in ours}
        ours |= new
        grown = bool(new)
    return sorted(ours, reverse=True)


def mounts(folder: Path) -> list[str]:
    """The mount points under a folder in the tests' mount namespace, deepest first."""
    with open("/proc/self/mountinfo") as file:
        targets = [line.split()[4] for line in file]
    return [target for target in reversed(targets) if target.startswith(f"{folder}/")]


def unmount(folder: Path) -> None:
    """Take off what is mounted under a folder."""
    for target in mounts(folder):
        subprocess.run(["umount", "-l", target], check=False, capture_output=True)


def end(folder: Path, cgroups: Iterable[str] = ()) -> None:
    """Kill the processes that name a folder, take off its mounts, remove their cgroups and `cgroups` (directories)."""
    emptied = set(cgroups)
    for _ in range(50):
        pids = processes(folder)
        if not pids:
            break
        for pid in pids:
            emptied |= cgroups_of(pid)
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    unmount(folder)
    _remove(emptied - cgroups_of(os.getpid()))


def _remove(cgroups: set[str]) -> None:
    """Those that have nothing in them. A process that was just killed may take a moment to be out."""
    for path in sorted(cgroups, key=len, reverse=True):
        for _ in range(10):
            with contextlib.suppress(OSError):
                os.rmdir(path)
            if not os.path.isdir(path) or any(item.is_dir() for item in os.scandir(path)):
                break
            time.sleep(0.02)


def command_line(pid: int) -> str:
    """Its words with spaces between them; "" where it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().replace(b"\0", b" ").decode(errors="replace")
    return ""


def tree(pid: int) -> set[int]:
    """A process and all that descend from it."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parents[int(name)] = _parent(int(name))
    found = {pid}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return found


def cgroups_of(pid: int) -> set[str]:
    """The directories of a process's cgroups, of all hierarchies; roots left out."""
    found = set()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cgroup") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if path == "/":
                continue
            for base in (controllers.removeprefix("name="), "unified", ""):
                found.add(os.path.normpath(f"/sys/fs/cgroup/{base}{path}"))
    return {path for path in found if os.path.isdir(path)}


def _names(pid: int, folder: str) -> bool:
    """Whether a process has to do with a folder; OSError where it is gone."""
    if folder in command_line(pid) or os.readlink(f"/proc/{pid}/cwd").startswith(folder):
        return True
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith(folder):
                return True
    if os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt"):
        return False
    with open(f"/proc/{pid}/mountinfo", errors="replace") as file:
        return folder in file.read()


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def _ancestors(pid: int) -> set[int]:
    found = {0, 1}
    while pid > 1:
        found.add(pid)
        pid = _parent(pid)
    return found
