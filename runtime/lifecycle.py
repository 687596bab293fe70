"""start, kill, delete, pause, resume, update: what happens to a container that was created."""

from __future__ import annotations

import errno
import os
import select

from wherry.core.errors import WherryError
from wherry.core.failpoints import reach
from wherry.linux import cgroups
from wherry.linux import syscalls as sc
from wherry.runtime import hooks, members, state
from wherry.runtime.errors import NOT_FOUND, PRECONDITION, ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SIGKILL = 9
_KILL_PATIENCE = 10.0  # seconds that `delete --force` waits for a killed init (runc: 10 s)


def cgroup_of(root: str, container_id: str) -> Any:
    return _cgroup(state.load(root, container_id))


def _cgroup(found: state.State) -> Any:
    if not found.cgroup_paths:
        raise ContainerError("the container has no cgroup", PRECONDITION)
    return cgroups.restore(found.cgroup_paths)


def _cgroup_failure(what: str, error: BaseException) -> ContainerError:
    text = error.message if isinstance(error, WherryError) else str(error)
    return ContainerError(f"{what}: {text}")


def stop_unit(found: state.State) -> None:
    """Take systemd's unit of a container away. ContainerError."""
    from wherry.linux.cgroups import systemd  # noqa: PLC0415 - most cgroups aren't systemd's
    from wherry.linux.dbus import DBusError  # noqa: PLC0415

    try:
        systemd.Unit(found.unit, user=os.geteuid() != 0).stop()
    except (DBusError, OSError) as error:
        raise ContainerError(f"unable to stop unit {found.unit!r}: {error}") from None


def _update_unit(found: state.State, resources: dict[str, Any]) -> None:
    from wherry.linux.cgroups import systemd  # noqa: PLC0415
    from wherry.linux.dbus import DBusError  # noqa: PLC0415

    try:
        systemd.Unit(found.unit, user=os.geteuid() != 0).update(resources)
    except (DBusError, ValueError) as error:
        raise ContainerError(f"unable to update unit {found.unit!r}: {error}") from None


# -- start ------------------------------------------------------------------------------------------------------------


class Starting:
    """A start that is under way: init was told to go on, and `fd` polls POLLERR once it has executed the program.

    For callers with a loop of their own, who wait for `fd` there; then `finish`, or `close` to give it up.
    """

    def __init__(self, root: str, container_id: str) -> None:
        self._found = state.load(root, container_id)
        self._lock = state.Lock(self._found)
        self.fd = -1
        try:
            self.fd = _open_fifo(self._found)
            os.write(self.fd, b"\0")
        except BaseException:
            self.close()
            raise

    def finish(self) -> None:
        """Raise the error of a program that couldn't be executed, else run the poststart hooks."""
        failure = _read_failure(self._found)
        if failure:
            raise ContainerError(failure)
        spec = self._found.spec()
        hooks.run(spec, "poststart", {**self._found.oci(state.RUNNING), "pid": self._found.pid})

    def close(self) -> None:
        """Free what it holds."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._lock.close()


def start(root: str, container_id: str) -> None:
    """See `container.start`."""
    proxy = _notify_proxy(root, container_id) if os.environ.get("NOTIFY_SOCKET") else None
    try:
        starting = Starting(root, container_id)
        try:
            _wait_for_exec(starting.fd)
            starting.finish()
        finally:
            starting.close()
        if proxy:
            proxy.relay()
    finally:
        if proxy:
            proxy.close()


def _notify_proxy(root: str, container_id: str) -> Any:
    from wherry.runtime import notify  # noqa: PLC0415 - few containers are services of systemd's

    found = state.load(root, container_id)
    host = notify.wanted(found)
    return notify.Proxy(found, host) if host else None


def _open_fifo(found: state.State) -> int:
    try:
        return os.open(found.fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENOENT):
            raise
        if found.alive():
            raise ContainerError("cannot start an already running container", PRECONDITION) from None
        raise ContainerError("cannot start a container that has stopped", PRECONDITION) from None


def _wait_for_exec(fifo: int) -> None:
    """Until nobody reads the fifo any more: execve closed it, or the process died. A writer's end reports that as an
    error of the descriptor (poll(2), POLLERR)."""
    poller = select.poll()
    poller.register(fifo, 0)
    while not poller.poll():
        pass


def _read_failure(found: state.State) -> str:
    """What start.error says; a waiter (`borrowed.py`) ends it with a zero byte and an errno."""
    try:
        with open(found.failure, encoding="utf-8", errors="replace") as file:
            text, _, number = file.read().partition("\0")
    except FileNotFoundError:
        return ""
    return text + os.strerror(ord(number[0])).lower() if number else text


# -- kill -------------------------------------------------------------------------------------------------------------


def kill(root: str, container_id: str, signal: int, *, everybody: bool = False) -> None:
    """See `container.kill`."""
    found = state.load(root, container_id)
    alive = found.alive()
    if everybody or (signal == _SIGKILL and not _has_own_pids(found)):
        # Without a pid namespace of its own the container outlives its init; all of it is meant.
        if not found.cgroup_paths:
            members.signal(found, signal)
            return
        try:
            _cgroup(found).kill(signal)
        except (OSError, WherryError) as error:
            raise _cgroup_failure("unable to signal all", error) from error
        return
    if not alive:
        raise ContainerError("container not running", PRECONDITION)
    try:
        fd = os.pidfd_open(found.pid)
    except ProcessLookupError:
        raise ContainerError("container not running", PRECONDITION) from None
    try:
        if not found.alive():  # looked at again under the pidfd: this is the process that we mean
            raise ContainerError("container not running", PRECONDITION)
        sc.pidfd_send_signal(fd, signal)
    except ProcessLookupError:
        raise ContainerError("container not running", PRECONDITION) from None
    except OSError as error:
        raise ContainerError(f"unable to signal init: {(error.strerror or '').lower()}") from None
    finally:
        os.close(fd)


def _has_own_pids(found: state.State) -> bool:
    return "pid" in found.namespaces


# -- delete -----------------------------------------------------------------------------------------------------------


def delete(root: str, container_id: str, *, force: bool = False) -> None:
    """See `container.delete`."""
    try:
        _delete(root, container_id, force=force)
    except ContainerError as error:
        if not force or error.kind != NOT_FOUND:
            raise


def _delete(root: str, container_id: str, *, force: bool) -> None:
    found = state.load(root, container_id)
    if force and found.pid and found.status() != state.STOPPED:
        _end(found)  # before the lock: a `start` may hold it that waits for a hook in the container
    with state.Lock(found):
        found = state.load(root, container_id)  # a command that held the lock has written more by now, or removed it
        status = found.status()
        if status not in (state.STOPPED, state.CREATED) and not force:
            text = f"cannot delete container {container_id} that is not stopped: {status}"
            raise ContainerError(text, PRECONDITION)
        if status != state.STOPPED:
            _end(found)
        destroy(found)


def _end(found: state.State) -> None:
    """SIGKILL for all of it, and wait until init is gone (a zombie is gone)."""
    try:
        fd = os.pidfd_open(found.pid)
    except ProcessLookupError:
        return
    try:
        if found.cgroup_paths:
            _try_to_kill_all(found)
        if found.alive():
            sc.pidfd_send_signal(fd, _SIGKILL)
        if not select.select([fd], [], [], _KILL_PATIENCE)[0]:
            raise ContainerError("container init still running")
    except ProcessLookupError:
        return
    finally:
        os.close(fd)


def _try_to_kill_all(found: state.State) -> None:
    try:
        _cgroup(found).kill()
    except (OSError, WherryError):
        return  # init itself is next, and the cgroup's removal says what is left


def destroy(found: state.State) -> None:
    """Take away what a stopped container has left. The state folder goes last, so that a `delete` that is killed half
    way can be said again."""
    try:
        spec = found.spec()
    except (OSError, ValueError):
        spec = {}
    if found.cgroup_paths:
        try:
            cgroup = _cgroup(found)
            if not _has_own_pids(found):  # or not known: then nobody took init away with its namespace
                cgroup.kill()
            if found.unit:
                stop_unit(found)
            cgroup.delete()
            reach("runtime.delete.cgroup")
        except (OSError, WherryError) as error:
            raise _cgroup_failure("unable to remove the container's cgroup", error) from error
    if found.rdt:
        from wherry.runtime import rdt  # noqa: PLC0415 - few containers have one

        rdt.remove(found.rdt)
    payload = found.oci(state.STOPPED)
    found.remove()
    reach("runtime.delete.removed")
    hooks.run(spec, "poststop", payload)


# -- the cgroup -------------------------------------------------------------------------------------------------------


def pause(root: str, container_id: str) -> None:
    found = state.load(root, container_id)
    status = found.status()
    if status not in (state.RUNNING, state.CREATED):
        raise ContainerError("container not running or created: " + status, PRECONDITION)
    try:
        _cgroup(found).freeze()
    except (OSError, WherryError) as error:
        raise _cgroup_failure("unable to freeze", error) from error


def resume(root: str, container_id: str) -> None:
    found = state.load(root, container_id)
    if found.status() != state.PAUSED:
        raise ContainerError("container not paused", PRECONDITION)
    try:
        _cgroup(found).thaw()
    except (OSError, WherryError) as error:
        raise _cgroup_failure("unable to thaw", error) from error


def update(root: str, container_id: str, resources: dict[str, Any], *, cache: str = "", bandwidth: str = "") -> None:
    found = state.load(root, container_id)
    if found.status() == state.STOPPED:
        raise ContainerError("container not running", PRECONDITION)
    if cache or bandwidth:
        from wherry.runtime import rdt  # noqa: PLC0415 - few containers have one

        rdt.update(found.rdt_class, cache, bandwidth)
    try:
        if found.unit:
            _update_unit(found, resources)
        _cgroup(found).apply(resources)
    except (OSError, WherryError) as error:
        raise _cgroup_failure("unable to update", error) from error
