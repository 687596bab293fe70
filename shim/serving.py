"""A shim's life, once it is a process of its own with a socket that listens: serve until it is shut down.

Nothing is imported from here on: the files of this version may be gone tomorrow while the container runs on.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Final

from wherry.linux import cgroups
from wherry.linux.process import set_child_subreaper, set_process_title
from wherry.shim.events import Publisher
from wherry.shim.log import log
from wherry.shim.loop import Children, Loop
from wherry.shim.oci_runtime import BUNDLED_ROOT
from wherry.shim.process import Shim
from wherry.shim.server import Server
from wherry.shim.task import TaskService

NAME: Final = "containerd-shim-wherry-v1"
# events that the daemon doesn't take hold up the end of a shim for so long (containerd's shim: 5 s)
FLUSH: Final = 5.0
# a shim whose daemon died between starting it and using it ends by itself after so many seconds
UNUSED: Final = 120.0
_MAX_OOM_SCORE: Final = 1000


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a shim is told at its start. `bundle` is also its working directory; `socket` the path it listens on."""

    namespace: str
    id: str
    bundle: str
    socket: str
    ttrpc_address: str = ""
    grpc_address: str = ""
    publish_binary: str = ""
    runtime_root: str = ""
    shim_cgroup: str = ""
    oom_score_adj: int | None = None


def become_shim(parameters: Parameters) -> None:
    """Make this process one that outlives its parent and whose orphans come to it; before it serves."""
    set_child_subreaper()
    title = [NAME, "-namespace", parameters.namespace, "-id", parameters.id, "-address", parameters.grpc_address]
    set_process_title(title, NAME)
    # a terminal that goes away or a service manager's SIGTERM don't end a container; a handler, unlike SIG_IGN, isn't
    # inherited by what is executed
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: None)
    signal.signal(signal.SIGUSR1, _describe)
    _adjust_oom_score(parameters.oom_score_adj)
    if parameters.shim_cgroup:
        cgroup = cgroups.plan(parameters.shim_cgroup, parameters.id)
        if not cgroup.exists():
            cgroup.create()
        cgroup.join() if cgroup.version == 1 else cgroup.add(os.getpid())


def _describe(number: int, frame: object) -> None:
    """SIGUSR1: what this shim is made of goes to its log, as other shims dump their stacks."""
    log("warning", "asked by SIGUSR1", objects=len(gc.get_objects()), modules=" ".join(sorted(sys.modules)))


def _adjust_oom_score(wanted: int | None) -> None:
    """A shim is killed sooner than the daemon, its parent, but not by much (containerd's AdjustOOMScore)."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/oom_score_adj", "r+") as file:
        score = int(file.read()) + 1 if wanted is None else wanted
        if score <= _MAX_OOM_SCORE:
            file.seek(0)
            file.write(str(score))


def serve(listener: socket.socket, parameters: Parameters) -> None:
    """Serve the task API until Shutdown; then remove the socket."""
    loop = Loop()
    children = Children(loop)
    publisher = Publisher(
        loop,
        children,
        parameters.namespace,
        parameters.ttrpc_address,
        binary=parameters.publish_binary,
        grpc_address=parameters.grpc_address,
    )
    root = parameters.runtime_root or f"{BUNDLED_ROOT}/{parameters.namespace}"
    shim = Shim(loop, children, publisher, parameters.namespace, root)

    async def end() -> None:
        emptied = publisher.emptied()
        if not emptied.done:
            loop.later(FLUSH, lambda: emptied.set(None))
            await emptied
        for _ in range(100):
            if not server.unsent:
                break
            await loop.sleep(0.01)
        loop.stop()

    def unused() -> None:
        if service.idle and not server.connected:
            log("warning", "nobody used this shim", id=parameters.id)
            loop.stop()
        elif service.idle:
            loop.later(UNUSED, unused)

    def shut_down() -> None:
        loop.spawn(end())

    service = TaskService(shim, lambda: loop.soon(shut_down))
    server = Server(loop, service.services(), listener, publisher.retry_now)
    loop.later(UNUSED, unused)
    try:
        loop.run()
    finally:
        server.close()
        with contextlib.suppress(OSError):
            os.unlink(parameters.socket)
