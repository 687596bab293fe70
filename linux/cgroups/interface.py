"""What a container's cgroup can do, whatever the version of the hierarchy: the contract of `v1.py` and `v2.py`.

The life of a cgroup: `plan` computes its directories (nothing is made), `create` makes them, `apply` sets limits, the
container's init goes in (`clone_fd` or `join`, both much cheaper than `add`), `delete` removes them after the last
process is gone. `restore` gets the same object back from the directories that a state file kept.

Everything here is for single-threaded processes after fork: no threads, no subprocesses, no asyncio, and no global
state but the host's layout, which is read once (`layout.host`), best before the fork.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

TYPE_CHECKING = False  # typing alone would cost as much as a container's cgroups; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, ClassVar, Literal


class Stats:
    """One reading of a cgroup's counters (a plain class: `dataclasses` alone costs 9 ms to import).

    `values` has the shape of `io.containerd.cgroups.v1.Metrics` (version 1) or `…v2.Metrics` (version 2): nested
    dicts and lists of dicts with the field names of the proto, so that `Metrics(**stats.values)` is the message.
    Counters keep the unit of the proto (v1: nanoseconds, v2: microseconds; bytes). What the kernel doesn't offer is
    left out, except that a limit of "max" is 2**64 - 1.
    """

    __slots__ = ("values", "version")

    def __init__(self, version: Literal[1, 2], values: dict[str, Any]) -> None:
        self.version = version
        self.values = values


class OomWatch(ABC):
    """Tells of OOM events in the memory cgroup. Register `fileno()` for reading, then call `read`."""

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor that becomes readable when something happened; -1 after `close`."""

    @abstractmethod
    def read(self) -> bool:
        """Take what is pending, without blocking; True if it was an OOM (kill) that was not told before.

        False means another event of the memory cgroup, or that the cgroup has been removed. On v1 removal makes the
        descriptor readable too; `gone` is then True and the watch should be closed.
        """

    @property
    @abstractmethod
    def gone(self) -> bool:
        """The cgroup was removed (nothing more will come)."""

    @abstractmethod
    def close(self) -> None:
        """Free the descriptors; may be called twice."""


class Cgroup(ABC):
    """The cgroup of one container.

    Methods raise OSError with the file's name in it where the kernel refuses, FileNotFoundError where the cgroup is
    gone, TimeoutError where it didn't freeze in time, and ValueError for resources that make no sense here (with
    runc's words where clients look at them). Whoever speaks to a client turns them into its kinds of errors.
    """

    version: ClassVar[Literal[1, 2]]
    #: Directory of each controller, as runc keeps them in state.json (`cgroup_paths`): on v1 controller → directory,
    #: on v2 one entry with the key "".
    paths: dict[str, str]

    @abstractmethod
    def exists(self) -> bool:
        """True if the cgroup's directories are there."""

    @abstractmethod
    def create(self) -> None:
        """Make the directories, with parents, controllers enabled (v2) and cpusets inherited (v1).

        Directories that are there already are used (`cgroupsPath` may name an existing cgroup); `created` tells.
        """

    @abstractmethod
    def apply(self, resources: Mapping[str, Any]) -> None:
        """Set the limits of `linux.resources` of the OCI runtime specification, device rules included.

        Absent keys are left alone, so the same call updates. Without a `devices` key no device filter is set: the
        caller that creates a container passes `devices` (an empty list means: the rules that every container gets,
        which allow the standard devices and deny nothing else; see `devices.effective_rules`).
        """

    @abstractmethod
    def clone_fd(self) -> int:
        """A descriptor for clone3's CLONE_INTO_CGROUP (close-on-exec, the caller closes it), or -1 on v1."""

    @abstractmethod
    def join(self) -> None:
        """Move the calling process, which must have one thread, into the cgroup.

        On v1 this costs 0.1 ms a hierarchy where moving by pid costs about 7 ms: a thread that moves itself needs no
        global lock (kernel 5.10 and later). On v2 prefer `clone_fd`.
        """

    @abstractmethod
    def add(self, pid: int, init_pid: int = 0) -> None:
        """Move a process into the cgroup. `init_pid`: where the cgroup itself may hold no processes (v2, EBUSY, the
        container manages its own subtree), use the cgroup that this process is in, as runc's exec does."""

    @abstractmethod
    def pids(self, recursive: bool = True) -> list[int]:
        """The pids in the cgroup, as seen from the caller's pid namespace; empty if the cgroup is gone."""

    @abstractmethod
    def stats(self) -> Stats:
        """Read the counters. Files that aren't there are left out; FileNotFoundError if the cgroup itself is gone."""

    @abstractmethod
    def freeze(self, timeout: float = 10.0) -> None:
        """Stop every process and wait until the kernel says so; thaws and raises TimeoutError after `timeout` s."""

    @abstractmethod
    def thaw(self, timeout: float = 10.0) -> None:
        """Let frozen processes run on, and wait until the kernel says so."""

    @abstractmethod
    def frozen(self) -> bool:
        """True if the cgroup is frozen or freezing ("paused" in the state of a container)."""

    @abstractmethod
    def kill(self, signal: int = 9) -> None:
        """Send a signal to every process of the cgroup and below. SIGKILL is complete: nothing that forks escapes."""

    @abstractmethod
    def delete(self, timeout: float = 2.0) -> None:
        """Remove the directories and those below, retrying while the kernel still says busy; fine if they are gone.

        Raises OSError(EBUSY) when processes are left after `timeout` seconds.
        """

    @abstractmethod
    def oom_kills(self) -> int:
        """How many processes of this cgroup the OOM killer has taken so far; 0 if unknown."""

    @abstractmethod
    def watch_oom(self) -> OomWatch | None:
        """Start to watch for OOM; None where the memory controller isn't there."""
