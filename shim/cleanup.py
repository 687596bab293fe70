"""What is left of a container when its shim is gone (SIGKILL, a crash): killed, unmounted, deleted, and accounted for.

An exit that the shim had already seen and kept is what is reported; else the container died of its shim's death, 137.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Final

from wherry.core.errors import WherryError
from wherry.core.failpoints import reach
from wherry.linux import mounts
from wherry.linux.process import is_alive
from wherry.shim import pinned
from wherry.shim.container import open_runtime
from wherry.shim.events import Publisher
from wherry.shim.log import log
from wherry.shim.loop import Children, Exit, Loop
from wherry.shim.oci_runtime import BUNDLED_ROOT
from wherry.shim.process import Shim
from wherry.shim.state_files import RuntimeSettings, read_exit, read_pid, read_settings, write_exit

KILLED: Final = 137
# what was killed gets so long to be gone before its root is unmounted under it
_GONE: Final = 3.0


@dataclass(frozen=True, slots=True)
class Remains:
    """What a dead shim's container came to; `exited_at_ns` since the epoch."""

    pid: int
    exit_status: int
    exited_at_ns: int
    reason: str


def clean_up(namespace: str, container_id: str, bundle: str, runtime_root: str = "") -> Remains:
    """Remove everything of the container but its bundle's files. May be called again."""
    loop = Loop()
    children = Children(loop)
    root = runtime_root or f"{BUNDLED_ROOT}/{namespace}"
    shim = Shim(loop, children, Publisher(loop, children))
    shim.namespace, shim.runtime_root = namespace, root
    settings = read_settings(bundle) or RuntimeSettings(root, bundle)
    reach("cleanup.begun")
    pid = read_pid(bundle)
    known = read_exit(bundle)
    try:
        loop.run_until(open_runtime(shim, settings).delete(container_id, force=True))
    except (WherryError, OSError) as error:
        log("warning", f"failed to remove the runtime's container: {error}", id=container_id)
    reach("cleanup.deleted")
    if known is None:
        _await_death(pid)
    with contextlib.suppress(OSError):
        mounts.unmount_all(f"{bundle}/rootfs")
    with contextlib.suppress(OSError):
        pinned.unpin(bundle)
    reach("cleanup.unmounted")
    children.close()
    loop.close()
    if known is not None:
        end, reason = known
        return Remains(end.pid, end.status, end.at_ns, reason)
    remains = Remains(pid, KILLED, time.time_ns(), "the shim of the container was killed")
    with contextlib.suppress(OSError):
        # whoever asks again, after a daemon that died over this, is told of the same end
        write_exit(bundle, "", Exit(pid, KILLED, remains.exited_at_ns), remains.reason)
    return remains


def _await_death(pid: int) -> None:
    deadline = time.monotonic() + _GONE
    while pid and is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.005)
