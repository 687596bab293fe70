"""What is known of a container between two commands: ROOT/ID/.

    state.json   written atomically (rename): who init is, where bundle, rootfs and cgroup are
    config.json  the spec that the container was created with (exec and hooks need it; the bundle may change)
    exec.fifo    where init waits for `start`
    start.error  what init says when it can't execute the program after `start`

The folder itself is flock(2)ed by every command that changes something.

Whether a container is `created` isn't written down, it is asked of the kernel: init holds exec.fifo open until it
executes the user's program, and opening a fifo to write without blocking succeeds only while somebody has it open to
read. So whatever command is killed wherever it is, the answer is right.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import errno
import os

from wherry.linux import process
from wherry.linux import syscalls as sc
from wherry.runtime import quickjson
from wherry.runtime.errors import EXISTS, INVALID, NOT_FOUND, ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

CREATING, CREATED, RUNNING, PAUSED, STOPPED = "creating", "created", "running", "paused", "stopped"
FIFO = "exec.fifo"
FAILURE = "start.error"
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+-.")
_ID_LIMIT = 1024  # runc's
_LOCK_PATIENCE, _LOCK_STEP = 10.0, 0.005  # seconds


def check_id(container_id: str) -> None:
    """runc's rule for ids: letters, digits and _+-. only, neither "." nor ".."."""
    if not container_id:
        raise ContainerError("container id cannot be empty", INVALID)
    if container_id in (".", "..") or not _ID_CHARACTERS.issuperset(container_id) or len(container_id) > _ID_LIMIT:
        raise ContainerError(f"invalid container ID format: {container_id!r}"[:200], INVALID)


class State:
    """A container's folder, opened. Fields are those of state.json."""

    def __init__(self, root: str, container_id: str) -> None:
        self.root = root
        self.id = container_id
        self.pid = 0
        self.pid_started = 0
        self.bundle = ""
        self.rootfs = ""
        self.created = ""
        self.owner = ""
        self.oci_version = ""
        self.annotations: dict[str, str] = {}
        self.cgroup_paths: dict[str, str] = {}
        self.unit = ""  # systemd's, where it made the cgroup
        self.rdt_class = ""  # its directory in resctrl
        self.rdt: list[str] = []  # those that were made for it
        self.namespaces: dict[str, str] = {}
        self.creator = 0
        self.creator_started = 0

    @property
    def folder(self) -> str:
        return os.path.join(self.root, self.id)

    @property
    def fifo(self) -> str:
        return os.path.join(self.folder, FIFO)

    @property
    def failure(self) -> str:
        return os.path.join(self.folder, FAILURE)

    # -- the folder ---------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Make the folder and the fifo; the folder's existence is what makes an id taken."""
        check_id(self.id)
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        try:
            os.mkdir(self.folder, 0o711)
        except FileExistsError:
            raise ContainerError("container with given ID already exists", EXISTS) from None
        os.mkfifo(self.fifo, 0o600)

    def save_spec(self, spec: dict[str, Any]) -> None:
        _write(os.path.join(self.folder, "config.json"), quickjson.dumps(spec))

    def save(self) -> None:
        """Write state.json."""
        values = {key: value for key, value in self.__dict__.items() if key != "root"}
        _write(os.path.join(self.folder, "state.json"), quickjson.dumps(values))

    def remove(self) -> None:
        """Delete the folder with the few files that may be in it."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return
        # state.json goes last: a removal that was interrupted can be repeated
        for name in sorted(names, key="state.json".__eq__):
            try:
                os.unlink(os.path.join(self.folder, name))
            except FileNotFoundError:
                continue
            except IsADirectoryError:
                from wherry.runtime import notify

                notify.remove(self.folder)
        try:
            os.rmdir(self.folder)
        except FileNotFoundError:
            return

    def spec(self) -> dict[str, Any]:
        with open(os.path.join(self.folder, "config.json"), "rb") as file:
            return quickjson.loads(file.read())  # type: ignore[no-any-return]

    # -- what it does now -----------------------------------------------------------------------------------------

    def alive(self) -> bool:
        return process.is_alive(self.pid, self.pid_started)

    def waiting(self) -> bool:
        """Whether init waits for `start`."""
        try:
            fd = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                return False
            raise
        os.close(fd)
        return True

    def status(self) -> str:
        if not self.alive():
            being_made = not self.pid and process.is_alive(self.creator, self.creator_started)
            return CREATING if being_made else STOPPED
        if self.waiting():
            return CREATED
        return PAUSED if _frozen(self.cgroup_paths) else RUNNING

    def oci(self, status: str | None = None) -> dict[str, Any]:
        """State as the specification has it (runtime.md, State), and as hooks get it on their stdin."""
        status = status or self.status()
        values: dict[str, Any] = {"ociVersion": self.oci_version, "id": self.id}
        if status not in (STOPPED, CREATING):
            values["pid"] = self.pid
        values.update(status=status, bundle=self.bundle)
        if self.annotations:
            values["annotations"] = self.annotations
        return values

    def described(self) -> dict[str, Any]:
        """As `runc state` prints it, its additions included."""
        status = self.status()
        return {
            "ociVersion": self.oci_version,
            "id": self.id,
            "pid": 0 if status in (STOPPED, CREATING) else self.pid,
            "status": status,
            "bundle": self.bundle,
            "rootfs": self.rootfs,
            "created": self.created,
            **({"annotations": self.annotations} if self.annotations else {}),
            "owner": self.owner,
        }


def _frozen(paths: dict[str, str]) -> bool:
    """Whether the cgroup is frozen; read here, because `state` should not load all of `wherry.linux.cgroups`."""
    for folder, file, frozen in (
        (paths.get("freezer"), "freezer.state", ("FROZEN", "FREEZING")),
        (paths.get(""), "cgroup.freeze", ("1",)),
    ):
        if folder:
            try:
                with open(os.path.join(folder, file), encoding="utf-8") as handle:
                    return handle.read().strip() in frozen
            except OSError:
                return False
    return False


def _write(path: str, text: str) -> None:
    """Replace a file in one step. No fsync: a container doesn't survive what would lose the file."""
    temporary = f"{path}.{os.getpid()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode("utf-8", "surrogateescape"))
    finally:
        os.close(fd)
    os.rename(temporary, path)


def load(root: str, container_id: str) -> State:
    """The container's state; NOT_FOUND if there is none."""
    check_id(container_id)
    state = State(root, container_id)
    try:
        with open(os.path.join(state.folder, "state.json"), "rb") as file:
            values = quickjson.loads(file.read())
    except (FileNotFoundError, NotADirectoryError):
        if os.path.isdir(state.folder):
            return state  # `create` was killed before it wrote anything: stopped, and can be deleted
        raise ContainerError("container does not exist", NOT_FOUND) from None
    except ValueError as error:
        raise ContainerError(f"{state.folder}/state.json: not JSON: {error}") from None
    state.__dict__.update({key: value for key, value in values.items() if key in state.__dict__})
    return state


def now() -> str:
    """The time as Go's RFC3339Nano prints it: 2026-01-02T03:04:05.678901234Z."""
    import time

    nanoseconds = time.time_ns()
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(nanoseconds // 10**9))
    fraction = f"{nanoseconds % 10**9:09d}".rstrip("0")
    return f"{seconds}.{fraction}Z" if fraction else f"{seconds}Z"


class Lock:
    """flock(2) on the state's folder for the time of a command: two commands on a container wait for each other.

    The lock belongs to the open file: a forked child that inherits it must close it (it is close-on-exec, and a process
    that becomes a container closes all it doesn't need, `plan.close_others`). ContainerError after `_LOCK_PATIENCE`,
    and NOT_FOUND if another command was faster in removing it.
    """

    def __init__(self, state: State) -> None:
        try:
            self.fd = os.open(state.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ContainerError("container does not exist", NOT_FOUND) from None
        waited = 0.0
        while not sc.flock(self.fd):
            import time

            if waited >= _LOCK_PATIENCE:
                self.close()
                raise ContainerError(f"container {state.id} is busy: another command works on it")
            time.sleep(_LOCK_STEP)
            waited += _LOCK_STEP

    def close(self) -> None:
        """Give the lock up; may be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
