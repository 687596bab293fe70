"""The life of a container that people made: started, stopped, started again, removed.

What the daemon has to know to go on with it alone (its restart policy, whether a person stopped it, where its output
goes) is in labels of the record; containerd's restart monitor reads the same ones.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from wherry.client.fifos import discard, lone_stdin
from wherry.client.finding import check_free, name_of
from wherry.client.states import State, inspect_state, label_json
from wherry.client.tasks import Exit, Stdio
from wherry.core import container_logs, quickjson
from wherry.core.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unimplemented,
    WherryError,
)
from wherry.core.labels import (
    CONFIG,
    CONTAINER_NAME,
    LAST_RUN,
    LOG_URI,
    MOUNTS,
    RESTART_COUNT,
    RESTART_EXPLICITLY_STOPPED,
    RESTART_POLICY,
    RESTART_STATUS,
    STDIN_OPEN,
    STOP_SIGNAL,
    STOP_TIMEOUT,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wherry.client.api import Client
    from wherry.client.containers import Container
    from wherry.client.values import Mount

# seconds between the stop signal and SIGKILL, where neither container nor caller says (docker's)
STOP_SECONDS = 10.0
# for processes that were sent SIGKILL to be gone
KILL_SECONDS = 20.0
SIGKILL = 9


async def mounts_of(client: Client, container: Container) -> list[Mount]:
    """The mounts of a container's root, for its task."""
    if not container.snapshot_key:
        return []
    return await client.snapshots(container.snapshotter).mounts(container.snapshot_key)


def passing(mounts: Sequence[Mount]) -> list[Mount]:
    """The mounts of a container that is removed when it ends, and never started a second time.

    The kernel writes the whole file system below an overlay to the disk when that is unmounted; nothing of this one is
    to outlive a crash, so it waits for no disk (overlayfs' `volatile`, Linux 5.10; podman does so, too).
    """
    if tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2]) < (5, 10):
        return list(mounts)
    return [
        mount._replace(options=(*mount.options, "volatile")) if mount.type == "overlay" and _writable(mount) else mount
        for mount in mounts
    ]


def _writable(mount: Mount) -> bool:
    return any(option.startswith("upperdir=") for option in mount.options)


def stdio_of(container: Container) -> Stdio:
    """The streams of a container that runs without anybody attached: its log, or nothing."""
    process = (container.spec or {}).get("process") or {}
    uri = container.labels.get(LOG_URI, "")
    stdin = lone_stdin(container.id) if keeps_stdin(container) else ""
    return Stdio(stdin, uri, "" if process.get("terminal") else uri, bool(process.get("terminal")))


def default_log(namespace: str) -> str:
    """Where a container's output goes that nobody follows; `{id}` stands for its id."""
    return container_logs.uri_of(namespace, "{id}", {})


def keeps_stdin(container: Container) -> bool:
    """Whether its input stays open while nobody is attached (`run -di`)."""
    return container.labels.get(STDIN_OPEN) == "true"


async def clear_task(client: Client, container: Container) -> None:
    """Removes the task of the last run where there is one; raises FailedPrecondition while it runs."""
    try:
        task = await client.tasks.get(container.id)
    except NotFound:
        return
    if task.status in {"RUNNING", "PAUSED", "PAUSING"}:
        raise FailedPrecondition(f"container {name_of(container)} is already {task.status.lower()}")
    with contextlib.suppress(NotFound):
        await client.tasks.delete(container.id)
    discard(task.stdio)


async def meant_to(client: Client, container: Container, status: str) -> None:
    """Notes for the daemon's restarts what a person wants the container to be: `running` or `stopped`."""
    if container.labels.get(RESTART_POLICY, "no") in {"", "no"}:
        return
    explicitly = "true" if status == "stopped" else ""
    labels = {RESTART_STATUS: status, RESTART_EXPLICITLY_STOPPED: explicitly}
    if status == "running":
        # the last run is over and done with, its restarts too
        labels |= {LAST_RUN: "", RESTART_COUNT: ""}
    await client.containers.label(container.id, labels)


async def start(client: Client, container: Container, stdio: Stdio | None = None) -> int:
    """Starts a container in the background and returns its pid; one that runs already is left alone (0).

    Raises what the runtime says; then no task is left.
    """
    state = await inspect_state(client, container)
    if state.status == "running":
        return 0
    if state.status == "paused":
        raise FailedPrecondition(
            f"container {name_of(container)} is paused: 'wherry unpause {name_of(container)}' lets it go on"
        )
    await clear_task(client, container)
    await meant_to(client, container, "running")
    container = await joined(client, container)
    return await start_new(client, container, await mounts_of(client, container), stdio)


async def joined(client: Client, container: Container) -> Container:
    """The container with the namespaces of others (`--pid container:NAME`) as they are now, should they be new ones.

    Raises NotFound, InvalidArgument where such a one doesn't run.
    """
    modes = label_json(container, CONFIG).get("Namespaces") or {}
    if not any(str(mode).startswith("container:") for mode in modes.values()):
        return container
    from wherry.client.recipe import namespace_path, set_namespace

    spec = _plain(container.spec)
    for kind, mode in modes.items():
        if kind == "userns" and str(mode).startswith("container:"):
            from wherry.client import userns

            # its files have the owners of the mapping with which it was made
            users = await userns.users_for(client, mode)
            if users is not None and _plain(userns.mappings(users)) != spec["linux"]["uidMappings"]:
                raise FailedPrecondition(
                    f"container {name_of(container)}: the user namespace of {mode.partition(':')[2]} has other ids now"
                )
            if users is not None:
                users.put(spec)
        elif str(mode).startswith("container:"):
            set_namespace(spec, kind, mode, await namespace_path(client, kind, mode))
    return await client.containers.update(container._replace(spec=spec), ["spec"])


def _plain(value: Any) -> Any:
    """A copy, as it would be read from JSON."""
    return quickjson.loads(quickjson.dumps(value).encode())


async def start_new(client: Client, container: Container, mounts: Sequence[Mount], stdio: Stdio | None = None) -> int:
    """Starts a container that has no task, in the background, and returns its pid; no task is left when this raises."""
    made = stdio or stdio_of(container)
    try:
        pid = await _create_task(client, container.id, mounts, made)
    except BaseException:
        discard(made)
        raise
    try:
        await client.tasks.start(container.id)
    except BaseException:
        with contextlib.suppress(WherryError):
            await client.tidying().tasks.delete(container.id)
        discard(made)
        raise
    return pid


async def _create_task(client: Client, container: str, mounts: Sequence[Mount], stdio: Stdio) -> int:
    """Our logs are written by our shim; to others (containerd's) a plain file is named instead."""
    try:
        return await client.tasks.create(container, mounts, stdio)
    except WherryError as error:
        if not container_logs.folder_of(stdio.stdout) or "STDIO scheme" not in error.message:
            raise
    plain = container_logs.plain_of(stdio.stdout), container_logs.plain_of(stdio.stderr)
    return await client.tasks.create(container, mounts, Stdio(stdio.stdin, *plain, stdio.terminal))


def stop_signal(container: Container) -> str:
    """The name or number of the signal that ends it."""
    return container.labels.get(STOP_SIGNAL) or "SIGTERM"


def stop_seconds(container: Container) -> float:
    """How long it may take to end after its stop signal."""
    try:
        return float(container.labels.get(STOP_TIMEOUT) or STOP_SECONDS)
    except ValueError:
        return STOP_SECONDS


async def stop(client: Client, container: Container, *, signal: int, seconds: float) -> None:
    """Ends a container: `signal`, and SIGKILL after `seconds` (-1: never). One that doesn't run is left alone."""
    await meant_to(client, container, "stopped")
    state = await inspect_state(client, container)
    if not state.running:
        return
    if state.status == "paused":
        # frozen processes take no signal
        await client.tasks.resume(container.id)
    with contextlib.suppress(NotFound):
        if seconds:
            await client.tasks.kill(container.id, signal)
            if await ended(client, container.id, seconds if seconds > 0 else None) is not None:
                return
        await kill(client, container.id)


async def kill(client: Client, identity: str) -> Exit | None:
    """SIGKILL to every process of a container, and the wait for its end. Raises NotFound when it is over."""
    await client.tasks.kill(identity, SIGKILL, every=True)
    exit_ = await ended(client, identity, KILL_SECONDS)
    if exit_ is None:
        raise DeadlineExceeded(
            f"container {identity}: its processes are still there {KILL_SECONDS:.0f} s after SIGKILL "
            "(a system call that can't be interrupted?)"
        )
    return exit_


async def ended(client: Client, identity: str, seconds: float | None) -> Exit | None:
    """How the container ended, None where it still runs after `seconds`."""
    limited = client if seconds is None else type(client)(client.calls.with_seconds(seconds))
    try:
        return await limited.tasks.wait(identity)
    except DeadlineExceeded:
        return None


async def remove(client: Client, container: Container, *, force: bool = False, volumes: bool = False) -> None:
    """Removes a container with its task, file system and log; with `volumes` its nameless volumes too.

    Raises FailedPrecondition where it runs and `force` isn't given.
    """
    client = client.tidying()
    state = await inspect_state(client, container)
    if state.running and not force:
        raise FailedPrecondition(
            f"cannot remove container {name_of(container)}: it is {state.status}; stop it first "
            f"('wherry stop {name_of(container)}') or use -f"
        )
    if state.status == "restarting" or container.labels.get(RESTART_POLICY, "no") not in {"", "no"}:
        await meant_to(client, container, "stopped")
        # the daemon may just have started it again
        state = await inspect_state(client, container)
    if state.running:
        if state.status == "paused":
            await client.tasks.resume(container.id)
        with contextlib.suppress(NotFound):
            await kill(client, container.id)
    await clear_task(client, container)
    await remove_record(client, container, volumes=volumes)


async def remove_ended(client: Client, container: Container, *, volumes: bool = False) -> None:
    """As `remove` with `force`, for one whose end was just seen: its task goes without being asked how it is."""
    try:
        await client.tidying().tasks.delete(container.id)
    except WherryError:
        # the daemon was quicker or is away, or somebody has started it again
        await remove(client, container, force=True, volumes=volumes)
        return
    await remove_record(client.tidying(), container, volumes=volumes)


async def remove_record(client: Client, container: Container, *, volumes: bool = False) -> None:
    """Removes a container that has no task: its network, snapshot, record, log and, if asked for, nameless volumes."""
    if container.snapshot_key and container.snapshotter:
        with contextlib.suppress(NotFound):
            await client.snapshots(container.snapshotter).remove(container.snapshot_key)
    with contextlib.suppress(NotFound):
        await client.containers.delete(container.id)
    if volumes:
        for name in nameless_volumes(container):
            # another container uses it by its long name, or the daemon was quicker
            with contextlib.suppress(NotFound, FailedPrecondition):
                await client.volumes.remove(name)


def nameless_volumes(container: Container) -> list[str]:
    """The volumes that were made for this container alone."""
    mounts = label_json(container, MOUNTS).get("mounts") or ()
    return [str(mount["Name"]) for mount in mounts if mount.get("Anonymous") and mount.get("Name")]


async def rename(client: Client, container: Container, name: str) -> None:
    """Gives a container another name; raises AlreadyExists."""
    if name == name_of(container):
        raise InvalidArgument(f"container {name} has this name already")
    await check_free(client, name)
    await client.containers.label(container.id, {CONTAINER_NAME: name})
    from wherry.client.network import read_extensions

    asked = read_extensions(container.extensions)
    if asked is not None:  # others find it by its new name from now on
        names = [other for other in asked.names if other != name_of(container)]
        # a daemon without networks keeps what was asked for, and nothing more
        with contextlib.suppress(Unimplemented):
            await client.networks.rename(container.id, [name, *names])


async def pause(client: Client, container: Container) -> None:
    """Freezes a container; raises FailedPrecondition where it doesn't run."""
    await require(client, container, {"running"}, "is {status}, only a running container can be paused")
    await client.tasks.pause(container.id)


async def unpause(client: Client, container: Container) -> None:
    """Lets a paused container go on; raises FailedPrecondition where it isn't paused."""
    await require(client, container, {"paused"}, "is not paused, but {status}")
    await client.tasks.resume(container.id)


async def require(client: Client, container: Container, statuses: set[str], text: str) -> State:
    """The container's state, when it is one of these; raises FailedPrecondition with the text.

    `{status}` is filled in, and `{help}` with the command that brings it to run.
    """
    state = await inspect_state(client, container)
    if state.status not in statuses:
        name = name_of(container)
        verb = "unpause" if state.status == "paused" else "start"
        help_ = f" ('wherry {verb} {name}')"
        raise FailedPrecondition(f"container {name} {text.format(status=state.status, help=help_)}")
    return state


async def wait(client: Client, container: Container) -> int:
    """The exit code of a container, when it has ended; at once for one that doesn't run."""
    state = await inspect_state(client, container)
    if not state.running:
        return state.exit_code
    try:
        return (await client.tasks.wait(container.id)).status
    except NotFound:
        # removed when it ended
        return label_int(container)


def label_int(container: Container) -> int:
    """The exit code that the daemon noted last."""
    return int(label_json(container, LAST_RUN).get("code") or 0)


def policy_labels(policy: str) -> Mapping[str, str]:
    """The labels that keep a restart policy (`no`, `always`, `unless-stopped`, `on-failure[:N]`); {} for none.

    Raises InvalidArgument.
    """
    name, colon, count = policy.partition(":")
    if name not in {"no", "", "always", "unless-stopped", "on-failure"}:
        raise InvalidArgument(
            f"invalid restart policy {policy!r}: it is 'no', 'always', 'unless-stopped' or 'on-failure[:N]'"
        )
    if colon and (name != "on-failure" or not count.isdigit()):
        raise InvalidArgument(f"invalid restart policy {policy!r}: only on-failure has a count of tries (on-failure:3)")
    if name in {"no", ""}:
        return {}
    return {RESTART_POLICY: policy if colon and int(count) else name}
