"""A host that was rebooted: what the state folder still tells of the time before is no longer true, and goes.

The state lies on a tmpfs as a rule, and is gone then. Where it doesn't (`--state`, a container of a host), its bundles,
sockets and records name processes, mounts and cgroups that don't exist any more, and process ids that may be somebody
else's by now: nothing may be signalled by them. The kernel's boot id (random(4)) beside them tells the times apart.
"""

from __future__ import annotations

import contextlib
import os
import shutil

import structlog

from wherry.linux.mounts import unmount_all

log = structlog.get_logger(__name__)

_KERNEL = "/proc/sys/kernel/random/boot_id"
_FILE = "boot_id"
# what holds for one boot only, below the state folder
STALE = ("tasks", "s", "runtime")


def clean(state: str) -> list[str]:
    """Remove what an earlier boot left in the state folder; the bundles that were there, as `NAMESPACE/ID`.

    To be called under the state's lock, before anything there is looked at. What can't be removed is logged.
    """
    now = _read(_KERNEL)
    path = os.path.join(state, _FILE)
    before = _read(path)
    if before == now or not now:
        return []
    found: list[str] = []
    if before:
        found = _bundles(os.path.join(state, "tasks"))
        for name in STALE:
            _empty(os.path.join(state, name))
        log.info("the host was rebooted: stale state is removed", tasks=len(found), boot=now, before=before)
    # beside and renamed, and last: who is killed here begins again
    with open(f"{path}.new", "w") as file:
        file.write(now)
    os.rename(f"{path}.new", path)
    return found


def _bundles(tasks: str) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return sorted(
            f"{namespace.name}/{bundle.name}"
            for namespace in os.scandir(tasks)
            if namespace.is_dir()
            for bundle in os.scandir(namespace.path)
            if not bundle.name.startswith(".")
        )
    return []


def _empty(folder: str) -> None:
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        try:
            if os.path.isdir(path) and not os.path.islink(path):
                _unmount(path)
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except OSError as error:
            log.error("stale state can't be removed", path=path, error=str(error))


def _unmount(folder: str) -> None:
    """Nothing is mounted there after a reboot; where something is all the same, it isn't to be emptied."""
    for top, folders, _ in os.walk(folder):
        if "rootfs" in folders:
            unmount_all(os.path.join(top, "rootfs"))
            folders.remove("rootfs")


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""
