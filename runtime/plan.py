"""What the runtime knows before it forks, shared by memory with the process that becomes the container."""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import os
import stat

from wherry.linux import syscalls as sc
from wherry.linux.namespaces import FLAGS, open_namespace
from wherry.runtime.errors import ContainerError
from wherry.runtime.spec import namespaces_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from wherry.runtime.channel import Channel
    from wherry.runtime.state import State


class Plan:
    """One process to be made: its spec, descriptors, namespaces.

    new: kinds of namespaces to make; joined: kind → descriptor of one to enter. fifo: where init waits for `start`;
    failure: where it says why it couldn't go on then (both -1 for exec). seccomp: the compiled program, or None.
    """

    def __init__(self, state: State, spec: dict[str, Any], process: dict[str, Any]) -> None:
        self.state = state
        self.process = process
        self.spec = spec
        self.linux: dict[str, Any] = spec.get("linux") or {}
        self.new: list[str] = []
        self.joined: dict[str, int] = {}
        self.cgroup: Any = None
        self.cgroup_fd = -1
        self.unit: Any = None  # `cgroups.systemd.Unit`, where systemd makes the cgroup, in this slice
        self.slice = ""
        self.moved_by_systemd = False  # the child can't be born into the cgroup, nor enter it by itself
        self.fresh_cgroup = False  # made by us: to be removed if the container can't be made
        self.rdt: list[str] = []  # directories of resctrl that the process goes into
        self.lock: Any = None  # `state.Lock`, held while the container is made
        self.fifo = -1
        self.failure = -1
        self.console = -1
        self.stdio: tuple[int, int, int] | None = None
        self.trees: dict[int, int] = {}  # number of an idmapped mount → its detached tree
        self.preserve_fds = 0
        self.rootless = False
        self.no_pivot = False
        self.no_new_keyring = False
        self.seccomp: bytes | None = None
        self.seccomp_flags = 0
        self.is_exec = False
        self.kinds: dict[str, str] = {}

    def use(self, spec: dict[str, Any]) -> None:
        """Another configuration than the bundle's, before anything was made from it."""
        self.spec, self.process, self.linux = spec, spec["process"], spec.get("linux") or {}

    def open_namespaces(self) -> None:
        """Sort the configured namespaces into those to make and those to join, which are opened."""
        self.kinds = namespaces_of(self.spec)
        for kind, path in self.kinds.items():
            if not path:
                self.new.append(kind)
                continue
            try:
                self.joined[kind] = open_namespace(path)
            except OSError as error:
                raise ContainerError(f"failed to open {path}: {error.strerror}") from None

    def flags(self, *but: str) -> int:
        """CLONE_ flags of the namespaces to make, without some."""
        return sum(FLAGS[kind] for kind in self.new if kind not in but)

    def close(self) -> None:
        """Close what was opened for the child."""
        for fd in (*self.joined.values(), *self.trees.values(), self.cgroup_fd, self.fifo, self.failure):
            if fd >= 0:
                os.close(fd)
        self.joined = {}
        self.trees = {}
        self.cgroup_fd = self.fifo = self.failure = -1

    def kept(self, channel: Channel) -> list[int]:
        """The descriptors that the child still needs."""
        fds = {0, 1, 2, *range(3, 3 + self.preserve_fds), *channel.fds(), *self.joined.values(), *self.trees.values()}
        # not the cgroup's: it is a folder of the host, and a way there for who names it as a cwd (CVE-2024-21626)
        fds |= {self.fifo, self.failure, self.console, *(self.stdio or ())}
        return sorted(fd for fd in fds if fd >= 0)


def close_others(kept: list[int]) -> None:
    """Close every descriptor that isn't in `kept` (sorted): what the caller had open is not the container's business,
    not even while it is being made."""
    first = 0
    for fd in kept:
        if fd > first:
            sc.close_range(first, fd - 1)
        first = fd + 1
    sc.close_range(first)


def take_streams(stdio: tuple[int, int, int] | None) -> None:
    """Make these descriptors 0, 1 and 2, whatever order they come in."""
    if stdio is None:
        return
    import fcntl

    safe = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in stdio]
    for number, fd in enumerate(safe):
        os.dup2(fd, number)
        os.close(fd)


def reopen_null() -> None:
    """Streams that are the host's null device become the container's own, so that nothing of the host's /dev is open in
    it (runc's reOpenDevNull). Called in the container's root; one without a null device keeps what it has."""
    for fd in (0, 1, 2):
        try:
            known = os.fstat(fd)
            if stat.S_ISCHR(known.st_mode) and known.st_rdev == os.makedev(1, 3):
                null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                os.dup2(null, fd)
                os.close(null)
        except OSError:
            continue
