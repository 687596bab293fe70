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
from typing import Final

from wherry.core.failpoints import reach
from wherry.linux import cgroups
from wherry.linux.process import set_child_subreaper, set_process_title
from wherry.shim.birth import NAME, Parameters, show
from wherry.shim.events import Publisher
from wherry.shim.log import log
from wherry.shim.loop import Children, Loop, Timer, ignore
from wherry.shim.oci_runtime import BUNDLED_ROOT
from wherry.shim.process import Shim
from wherry.shim.reuse import ReuseService
from wherry.shim.sandbox import SandboxService
from wherry.shim.server import Server
from wherry.shim.streams import StreamService
from wherry.shim.task import TaskService
from wherry.shim.template import Template

# events that the daemon doesn't take hold up the end of a shim for so long (containerd's shim: 5 s)
FLUSH: Final = 5.0
# a shim whose daemon died between starting it and using it ends by itself after so many seconds
UNUSED: Final = 120.0
# seconds after a call that most short-lived containers don't live to see
REST: Final = 0.4
_MAX_OOM_SCORE: Final = 1000
# a terminal that goes away or a service manager's SIGTERM don't end a container
IGNORED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def install_signals() -> None:
    """Handlers that a shim has, and that forks of this process inherit."""
    for number in IGNORED:
        signal.signal(number, ignore)
    signal.signal(signal.SIGUSR1, _describe)


def become_shim(parameters: Parameters) -> None:
    """Make this process one that outlives its parent and whose orphans come to it; before it serves."""
    set_child_subreaper()
    show(parameters)
    if parameters.oom_score_adj is not None:
        _write_oom_score(parameters.oom_score_adj)
    if parameters.shim_cgroup:
        cgroup = cgroups.plan(parameters.shim_cgroup, parameters.id)
        if not cgroup.exists():
            cgroup.create()
        if cgroup.version == 1:
            cgroup.join()
        else:
            cgroup.add(os.getpid())


def raise_oom_score() -> None:
    """Shims, forks of this process, are killed sooner than the daemon, by one point (containerd's AdjustOOMScore)."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/oom_score_adj") as file:
        _write_oom_score(int(file.read()) + 1)


def _write_oom_score(score: int) -> None:
    if score <= _MAX_OOM_SCORE:
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(score))


def _describe(number: int, frame: object) -> None:
    """SIGUSR1: what this shim is made of goes to its log, as other shims dump their stacks."""
    log("warning", "asked by SIGUSR1", objects=len(gc.get_objects()), modules=" ".join(sorted(sys.modules)))


class Life:
    """A shim's objects. The fork server makes them once, before it knows whose they will be; `begin` tells."""

    def __init__(self) -> None:
        self.loop = Loop(opened=False)
        self.children = Children(self.loop, opened=False)
        self.publisher = Publisher(self.loop, self.children)
        self.shim = Shim(self.loop, self.children, self.publisher)
        self.service = TaskService(self.shim, self._shut_down)
        self.sandbox = SandboxService(self.shim, self.service, self._shut_down)
        parts = (self.service, self.sandbox, StreamService(self.service), ReuseService(self))
        services = {name: methods for part in parts for name, methods in part.services().items()}
        self.server = Server(self.loop, services, self.publisher.retry_now, self._left, self._answered)
        self.template: Template | None = None
        self.vacant = False
        """It has no container, and waits for the next one."""
        self._socket = ""
        self._daemon = ""
        self._resting = False
        self._ending = False
        self._overdue: Timer | None = None
        self._vacated = -1

    def begin(self, parameters: Parameters) -> None:
        """Get what can't be shared with other shims, and take up the parameters."""
        self.loop.open()
        self.children.open()
        self._take_up(parameters)

    def _take_up(self, parameters: Parameters) -> None:
        self.publisher.address(
            parameters.namespace,
            parameters.ttrpc_address,
            binary=parameters.publish_binary,
            grpc_address=parameters.grpc_address,
        )
        self._daemon = parameters.grpc_address
        self.shim.namespace = parameters.namespace
        self.shim.runtime_root = parameters.runtime_root or f"{BUNDLED_ROOT}/{parameters.namespace}"

    def serve(self, listener: socket.SocketType, parameters: Parameters) -> None:
        """Serve the task API until Shutdown; then remove the socket."""
        self.begin(parameters)
        self._listen(listener, parameters)
        try:
            self.loop.run()
        finally:
            self.server.close()
            self._unlink()
            reach("shim.shutdown.unlinked")

    def _listen(self, listener: socket.SocketType, parameters: Parameters) -> None:
        self._socket = parameters.socket
        self.server.listen(listener)
        self._overdue = self.loop.later(UNUSED, self._unused)

    def _unlink(self) -> None:
        path, self._socket = self._socket, ""
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)

    # -- from one container to the next (`reuse.py`)

    @property
    def can_vacate(self) -> bool:
        """Whether nothing is left of the containers that it had, and the daemon that asks is the only one here."""
        return (
            self.service.idle
            and not self._ending
            and not self.vacant
            and not self.publisher.queue
            and self.server.lone
            and self.children.none_left()
        )

    def vacate(self) -> None:
        """Let go of what belonged to the container, its name last."""
        if self._overdue is not None:
            self._overdue.cancel()
        self.server.stop_listening()
        self._unlink()
        os.chdir("/")
        null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(null, 2)
        os.close(null)
        set_process_title([NAME, "-vacant", "-address", self._daemon], NAME)
        self.vacant = self.shim.warm = True
        self._vacated = self.service.begun

    def occupy(self, listener: socket.SocketType, parameters: Parameters) -> None:
        """Serve on, for another container."""
        self._take_up(parameters)
        self._listen(listener, parameters)
        self.vacant = False

    def _left(self) -> None:
        """A connection has ended: who had this shim in reserve is gone, perhaps while it gave it a container.

        The daemon that comes next may have looked for that container's shim before there was one.
        """
        if self._vacated == self.service.begun and not self.server.connected:
            self.loop.stop()

    # -- its ends

    def _answered(self) -> None:
        """After a burst of calls, what they wrote to and left as it was is given back."""
        if self.template is not None and not self._resting:
            self._resting = True
            self.loop.later(REST, self._rest)

    def _rest(self) -> None:
        self._resting = False
        if self.template is not None:
            self.template.give_back()

    def _shut_down(self) -> None:
        if not self._ending:
            self._ending = True
            reach("shim.shutdown.asked")
            self.loop.soon(self._end_soon)

    def _end_soon(self) -> None:
        self.loop.spawn(self._end())

    async def _end(self) -> None:
        emptied = self.publisher.emptied()
        if not emptied.done:
            self.loop.later(FLUSH, lambda: emptied.set(None))
            await emptied
        reach("shim.shutdown.emptied")
        for _ in range(100):
            if not self.server.unsent:
                break
            await self.loop.sleep(0.01)
        self.loop.stop()

    def _unused(self) -> None:
        if not self.service.idle:
            return
        if self.server.connected:
            self._overdue = self.loop.later(UNUSED, self._unused)
        else:
            log("warning", "nobody used this shim")
            self.loop.stop()
