"""A container's cgroup in the unified hierarchy (Documentation/admin-guide/cgroup-v2.rst)."""

from __future__ import annotations

import errno
import os
import posixpath
import select
import time

from wherry.linux.cgroups import device_filter, devices, resources_v2, stats_v2
from wherry.linux.cgroups.files import (
    key_values,
    list_pids,
    read,
    read_or_empty,
    signal_all,
    subdirectories,
    try_write,
    write,
)
from wherry.linux.cgroups.interface import Cgroup, OomWatch, Stats
from wherry.linux.cgroups.layout import Layout, host, inner_path, own_cgroups
from wherry.linux.cgroups.oom import EventsWatch
from wherry.linux.cgroups.remove import remove_tree

TYPE_CHECKING = False  # typing alone would cost as much as a container's cgroups; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

SIGKILL = 9
_KILL_ROUNDS = 3


class CgroupV2(Cgroup):
    """One directory; `root` is the mount point above which nothing is made, `top` the highest one that is ours."""

    version = 2

    def __init__(self, directory: str, root: str = "/sys/fs/cgroup", top: str = "") -> None:
        self.paths = {"": directory}
        self._directory = directory
        self._root = root
        self._top = top or root
        self._fresh = False  # made by us, and without a filter yet

    @classmethod
    def plan(cls, layout: Layout, cgroups_path: str, container_id: str, *, exact: bool = False) -> CgroupV2:
        """See `cgroups.plan`."""
        hierarchy = layout.v2
        if hierarchy is None:
            msg = "cgroup v2 is not mounted on this host"
            raise FileNotFoundError(errno.ENOENT, msg)
        path = inner_path(cgroups_path, container_id)
        if layout.delegated and not exact:
            top = hierarchy.mountpoint + layout.delegated
            return cls(posixpath.join(top, path.lstrip("/")), hierarchy.mountpoint, top)
        if path.startswith("/"):
            return cls(hierarchy.mountpoint + path, hierarchy.mountpoint)
        # The caller's cgroup holds the caller, so controllers can't be enabled below it: go beside it, as runc does.
        own = posixpath.dirname(own_cgroups().get("", "/"))
        return cls(hierarchy.below(own, path), hierarchy.mountpoint)

    def exists(self) -> bool:
        return os.path.isdir(self._directory)

    def create(self) -> None:
        if not self._mkdir(self._directory):
            os.makedirs(posixpath.dirname(self._directory), 0o755, exist_ok=True)
            self._mkdir(self._directory)
        wanted = read(f"{self._top}/cgroup.controllers").split()
        if not set(wanted) <= set(read(f"{self._directory}/cgroup.controllers").split()):
            self._enable(wanted)

    def _mkdir(self, directory: str) -> bool:
        """False if the parent is missing."""
        try:
            os.mkdir(directory, 0o755)
        except FileExistsError:
            return True
        except FileNotFoundError:
            return False
        self._fresh = True
        return True

    def _enable(self, controllers: list[str]) -> None:
        """Enable the controllers from the top down to the parent, as far as the kernel lets us.

        A cgroup between that holds processes refuses domain controllers (EBUSY, or ENOTSUP where threads live): what
        is missing shows when a limit of it is asked for. One refused controller must not cost the others, so on
        failure each is tried alone.
        """
        inner = posixpath.relpath(self._directory, self._top).split("/")
        for depth in range(len(inner)):
            target = posixpath.join(self._top, *inner[:depth], "cgroup.subtree_control")
            enabled = read(target).split()
            missing = [name for name in controllers if name not in enabled]
            if not missing:
                continue
            try:
                write(target, " ".join(f"+{name}" for name in missing))
            except OSError:
                for name in missing:
                    try_write(target, f"+{name}")

    def apply(self, resources: Mapping[str, Any]) -> None:
        try:
            resources_v2.apply(self._directory, resources)
        except FileNotFoundError as error:
            self._explain(error)
            raise
        rules = resources.get("devices")
        # An ordinary user may not load programs, and has no devices to lose that the filter could keep from it.
        if rules is not None and not host().user_namespace and os.geteuid() == 0:
            device_filter.attach(self._directory, devices.effective_rules(rules), fresh=self._fresh)
            self._fresh = False

    def _explain(self, error: OSError) -> None:
        """Say so where a file is missing because its controller is."""
        name = posixpath.basename(str(error.filename)).partition(".")[0]
        available = read_or_empty(f"{self._directory}/cgroup.controllers").split()
        if name not in available:
            error.add_note(
                f"the {name} controller is not available in {self._directory} (it has: {' '.join(available)})"
            )

    def clone_fd(self) -> int:
        return os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def join(self) -> None:
        write(f"{self._directory}/cgroup.procs", "0")

    def add(self, pid: int, init_pid: int = 0) -> None:
        try:
            write(f"{self._directory}/cgroup.procs", str(pid))
        except OSError as error:
            if init_pid <= 0 or error.errno not in {errno.EBUSY, errno.EOPNOTSUPP}:
                raise
            # the container enabled controllers in its own cgroup and lives below it (systemd, docker in docker)
            own = own_cgroups(init_pid).get("", "")
            if not own.startswith("/"):
                raise
            write(f"{self._root}{own}/cgroup.procs", str(pid))

    def pids(self, recursive: bool = True) -> list[int]:
        return list_pids(self._directory, recursive)

    def stats(self) -> Stats:
        if not self.exists():
            msg = f"cgroup {self._directory}: not found"
            raise FileNotFoundError(errno.ENOENT, msg)
        return Stats(2, stats_v2.collect(self._directory))

    def freeze(self, timeout: float = 10.0) -> None:
        try:
            self._set_frozen(True, timeout)
        except TimeoutError:
            write(f"{self._directory}/cgroup.freeze", "0")
            raise

    def thaw(self, timeout: float = 10.0) -> None:
        self._set_frozen(False, timeout)

    def frozen(self) -> bool:
        return read_or_empty(f"{self._directory}/cgroup.freeze").strip() == "1"

    def _set_frozen(self, frozen: bool, timeout: float) -> None:
        """Write the wish, then wait for `frozen` in cgroup.events, which wakes pollers with POLLPRI."""
        path = f"{self._directory}/cgroup.events"
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            write(f"{self._directory}/cgroup.freeze", "1" if frozen else "0")
            poll = select.poll()
            poll.register(fd, select.POLLPRI)
            deadline = time.monotonic() + timeout
            while dict(key_values(os.pread(fd, 4096, 0).decode())).get("frozen") != int(frozen):
                left = deadline - time.monotonic()
                if left <= 0:
                    verb = "freeze" if frozen else "thaw"
                    msg = f"timeout of {timeout} s reached while waiting for the cgroup to {verb}"
                    raise TimeoutError(msg)
                poll.poll(left * 1000)
        finally:
            os.close(fd)

    def kill(self, signal: int = SIGKILL) -> None:
        if signal == SIGKILL:
            try:
                write(f"{self._directory}/cgroup.kill", "1")
            except FileNotFoundError:
                if not self.exists():
                    return
                self._kill_frozen()  # before 5.14
            return
        signal_all(self.pids(), signal)

    def _kill_frozen(self) -> None:
        """Freeze, so that nothing forks on, signal all, thaw: on v2 frozen processes die of SIGKILL at once."""
        freezer = f"{self._directory}/cgroup.freeze"
        try_write(freezer, "1")
        for _ in range(_KILL_ROUNDS):  # those that forked before they froze
            signal_all(self.pids(), SIGKILL)
        try_write(freezer, "0")

    def delete(self, timeout: float = 2.0) -> None:
        remove_tree(self._directory, timeout)

    def oom_kills(self) -> int:
        return dict(key_values(read_or_empty(f"{self._directory}/memory.events"))).get("oom_kill", 0)

    def watch_oom(self) -> OomWatch | None:
        try:
            return EventsWatch(f"{self._directory}/memory.events")
        except FileNotFoundError:
            return None

    def children(self) -> list[str]:
        """The directories of the cgroups that the container made below its own."""
        return subdirectories(self._directory)
