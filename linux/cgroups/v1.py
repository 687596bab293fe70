"""A container's cgroups in the v1 hierarchies: one directory for each controller (admin-guide/cgroup-v1)."""

from __future__ import annotations

import errno
import os
import posixpath
import time

from wherry.linux.cgroups import devices, resources_v1, stats_v1
from wherry.linux.cgroups.files import key_values, list_pids, read, read_or_empty, signal_all, try_write, write
from wherry.linux.cgroups.interface import Cgroup, OomWatch, Stats
from wherry.linux.cgroups.layout import V1_CONTROLLERS, Layout, host, inner_path, own_cgroups
from wherry.linux.cgroups.oom import EventfdWatch
from wherry.linux.cgroups.remove import remove_tree

TYPE_CHECKING = False  # typing alone would cost as much as a container's cgroups; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

SIGKILL = 9
#: Which hierarchy answers for the container's processes; every host has one of them.
_PROCESS_CONTROLLERS = ("devices", "pids", "freezer", "memory", "name=systemd")
_FREEZE_STEP = 0.001  # seconds between looks at freezer.state, which can't be polled


class CgroupV1(Cgroup):
    """`paths`: controller → directory; controllers that are mounted together share one."""

    version = 1

    def __init__(self, paths: dict[str, str]) -> None:
        self.paths = paths
        self._directories = list(dict.fromkeys(paths.values()))
        self._created: set[str] = set()

    @classmethod
    def plan(cls, layout: Layout, cgroups_path: str, container_id: str) -> CgroupV1:
        """See `cgroups.plan`."""
        path = inner_path(cgroups_path, container_id)
        mounted = [(name, layout.v1[name]) for name in V1_CONTROLLERS if name in layout.v1]
        if path.startswith("/"):
            return cls({name: hierarchy.mountpoint + path for name, hierarchy in mounted})
        own = own_cgroups()
        return cls({name: hierarchy.below(own.get(name, "/"), path) for name, hierarchy in mounted})

    def exists(self) -> bool:
        return os.path.isdir(self._process_directory())

    def create(self) -> None:
        for directory in self._directories:
            self._make(directory)
        if cpuset := self.paths.get("cpuset"):
            _inherit_cpuset(cpuset)

    def _make(self, directory: str) -> None:
        try:
            os.mkdir(directory, 0o755)
        except FileExistsError:
            return
        except FileNotFoundError:
            os.makedirs(directory, 0o755, exist_ok=True)
        self._created.add(directory)

    def apply(self, resources: Mapping[str, Any]) -> None:
        resources_v1.apply(self.paths, resources)
        rules = resources.get("devices")
        directory = self.paths.get("devices")
        if rules is not None and directory is not None and not host().user_namespace:
            devices.write_v1(directory, devices.effective_rules(rules), fresh=directory in self._created)
            self._created.discard(directory)

    def clone_fd(self) -> int:
        return -1

    def join(self) -> None:
        for directory in self._directories:
            # tasks takes one thread: the caller's, which is all there is of it
            write(f"{directory}/tasks", "0")

    def add(self, pid: int, init_pid: int = 0) -> None:
        for directory in self._directories:
            for attempt in range(5):
                try:
                    write(f"{directory}/cgroup.procs", str(pid))
                    break
                except OSError as error:
                    # a process that is just being forked or scheduled by rt can be refused for an instant
                    if error.errno != errno.EINVAL or attempt == 4:
                        raise
                    time.sleep(0.03)

    def _process_directory(self) -> str:
        for name in _PROCESS_CONTROLLERS:
            if name in self.paths:
                return self.paths[name]
        return self._directories[0]

    def pids(self, recursive: bool = True) -> list[int]:
        return list_pids(self._process_directory(), recursive)

    def stats(self) -> Stats:
        if not self.exists():
            msg = f"cgroup {self._process_directory()}: not found"
            raise FileNotFoundError(errno.ENOENT, msg)
        return Stats(1, stats_v1.collect(self.paths))

    def freeze(self, timeout: float = 10.0) -> None:
        """Freezing may hang at FREEZING while processes fork; a short thaw in between lets them get on (as in runc)."""
        path = f"{self._freezer()}/freezer.state"
        deadline, looks = time.monotonic() + timeout, 0
        write(path, "FROZEN")
        while (state := read(path).strip()) != "FROZEN":
            if state != "FREEZING" and looks > 0 and state != "THAWED":
                msg = f"unexpected state {state} while freezing"
                raise OSError(errno.EOPNOTSUPP, msg)
            if time.monotonic() >= deadline:
                write(path, "THAWED")
                msg = f"timeout of {timeout} s reached while waiting for the cgroup to freeze"
                raise TimeoutError(msg)
            looks += 1
            if looks % 50 == 0:
                write(path, "THAWED")
                time.sleep(_FREEZE_STEP)
            time.sleep(_FREEZE_STEP)
            write(path, "FROZEN")

    def thaw(self, timeout: float = 10.0) -> None:
        path = f"{self._freezer()}/freezer.state"
        deadline = time.monotonic() + timeout
        write(path, "THAWED")
        while read(path).strip() != "THAWED":
            if time.monotonic() >= deadline:
                msg = f"timeout of {timeout} s reached while waiting for the cgroup to thaw"
                raise TimeoutError(msg)
            time.sleep(_FREEZE_STEP)

    def _freezer(self) -> str:
        directory = self.paths.get("freezer")
        if directory is None:
            msg = "the freezer controller is not available on this host"
            raise OSError(errno.EOPNOTSUPP, msg)
        return directory

    def frozen(self) -> bool:
        """The container's own state; a frozen parent doesn't count, its owner thaws it."""
        directory = self.paths.get("freezer")
        if directory is None:
            return False
        return read_or_empty(f"{directory}/freezer.self_freezing").strip() == "1"

    def kill(self, signal: int = SIGKILL) -> None:
        """All are frozen while they are signalled, so that nothing forks on and no pid is reused meanwhile."""
        freezes = signal == SIGKILL and "freezer" in self.paths and self.exists()
        if freezes:
            self._try_freeze(2.0)
        try:
            signal_all(self.pids(), signal)
        finally:
            if freezes:
                try_write(f"{self.paths['freezer']}/freezer.state", "THAWED")

    def _try_freeze(self, timeout: float) -> None:
        try:
            self.freeze(timeout)
        except OSError:
            return  # it went meanwhile, or something in it can't freeze: signal what there is

    def delete(self, timeout: float = 2.0) -> None:
        deadline = time.monotonic() + timeout
        for directory in self._directories:
            remove_tree(directory, max(0.0, deadline - time.monotonic()))

    def oom_kills(self) -> int:
        directory = self.paths.get("memory")
        if directory is None:
            return 0
        return dict(key_values(read_or_empty(f"{directory}/memory.oom_control"))).get("oom_kill", 0)

    def watch_oom(self) -> OomWatch | None:
        directory = self.paths.get("memory")
        if directory is None:
            return None
        try:
            return EventfdWatch(directory)
        except FileNotFoundError:
            return None


def _inherit_cpuset(directory: str) -> None:
    """A new cpuset is empty, and nothing may enter it: copy the nearest ancestor's that isn't, from the top down."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        path = f"{directory}/{name}"
        if read(path).strip():
            continue
        parent = posixpath.dirname(directory)
        value = read(f"{parent}/{name}").strip()
        if not value:
            _inherit_cpuset(parent)
            value = read(f"{parent}/{name}").strip()
        write(path, value)
