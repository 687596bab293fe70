"""How a shim comes to be, and what cleans up after one that died: ours by the fork server, a stranger's by its program.

Several containers may live in one shim: those of a sandbox, and those whose specification names a group (containerd's
annotations for it). Such a shim stands under the group's name: its socket follows from it, and `ps` shows it. A
stranger's shim groups by itself and gives one address to all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import structlog
from google.protobuf import any_pb2

from wherry.core.errors import Unavailable, WherryError
from wherry.core.failpoints import reach
from wherry.core.typeurl import is_a, unpack_as
from wherry.daemon.bundle import Bundle, Launch
from wherry.daemon.link import Key, Places, Shim, kill_remains
from wherry.daemon.vacant import Vacant
from wherry.proto import runc_options_pb2
from wherry.shim.client import (
    Bootstrap,
    DeadShim,
    ForeignShim,
    ForkServer,
    ShimLog,
    ShimRequest,
    delete_shim,
    start_foreign_shim,
)

log = structlog.get_logger(__name__)

SIGKILLED = 137  # the exit status of what was killed with its shim
CLEAN_UPS = 3  # how often a clean-up is tried before it is left to the next daemon
CONNECT = 5.0  # seconds until a socket that exists must have accepted us


class Starter:
    """Starts shims for one daemon, and keeps count of who uses which."""

    def __init__(self, places: Places, forks: ForkServer) -> None:
        self._places = places
        self._forks = forks
        self._users: dict[str, set[Key]] = {}
        self._vacant = Vacant()

    # -- who uses which

    def use(self, shim: Shim) -> None:
        """Note that a container's task is, or is to be, in the shim at this address."""
        self._users.setdefault(shim.bootstrap.address, set()).add(shim.key)

    def drop(self, shim: Shim) -> None:
        """It isn't any more."""
        users = self._users.get(shim.bootstrap.address)
        if users is not None:
            users.discard(shim.key)
            if not users:
                del self._users[shim.bootstrap.address]

    def shared(self, shim: Shim) -> bool:
        """Whether others use the same shim."""
        return bool(self._users.get(shim.bootstrap.address, set()) - {shim.key})

    def planned(self, bundle: Bundle, launch: Launch) -> Bootstrap:
        """Where our own shim for a task listens, or will."""
        return Bootstrap(f"unix://{self._socket(bundle, launch)}")

    def remove_socket(self, shim: Shim) -> None:
        """Remove what a shim of ours that is gone may have left."""
        if not shim.launch.binary and not self.shared(shim):
            try:
                os.unlink(self._socket(shim.bundle, shim.launch))
            except FileNotFoundError:
                return

    # -- start and clean-up

    async def start(
        self, shim: Shim, options: any_pb2.Any, on_close: Callable[[Shim], None], host: Shim | None = None
    ) -> Shim:
        """Start the process, or find the one that the task shares, and connect.

        `host` is the shim of the sandbox that the task belongs to. Raises what starting it ran into; what was started
        until then is for `delete`.
        """
        bundle, launch = shim.bundle, shim.launch
        if host is not None:
            shim = self._at(shim, host.bootstrap)
        elif launch.binary:
            shim_log = self.open_log(bundle)
            try:
                bootstrap = await start_foreign_shim(self._foreign(bundle, launch), options)
            except BaseException:
                shim_log.close()
                raise
            shim = self._at(shim, bootstrap)
            shim.shim_log = shim_log
        else:
            await self._begin(shim, options, on_close)
        self.use(shim)
        if not shim.connected:
            await shim.connect(CONNECT, on_close)
        reach("daemon.create.connected")
        return shim

    async def keep(self, shim: Shim, within: float) -> bool:
        """Have a shim whose task was deleted in reserve for the next one; False where it is to leave instead."""
        launch = shim.launch
        if launch.binary or launch.group or launch.host or launch.sandbox or shim.single_use:
            return False
        kept = await self._vacant.keep(shim, within)
        if kept:
            self.drop(shim)
            reach("daemon.end.vacant")
        return kept

    async def close(self) -> None:
        """Keep no shim in reserve any more."""
        await self._vacant.close()

    async def delete(self, shim: Shim, within: float) -> DeadShim:
        """Kill and remove what a dead shim left of a container. Raises Unavailable, OSError."""
        bundle, launch = shim.bundle, shim.launch
        if not launch.binary:
            if not (self.shared(shim) and shim.connected):
                self.kill(shim)
            return await self._clean_up(self._request(bundle, launch, any_pb2.Any(), bundle.id))
        answer = await delete_shim(self._foreign(bundle, launch), within=within)
        exited_at = answer.exited_at.ToNanoseconds() or time.time_ns()
        return DeadShim(answer.pid, answer.exit_status or SIGKILLED, exited_at, f"its shim {launch.binary} died")

    async def _clean_up(self, request: ShimRequest) -> DeadShim:
        """A clean-up may be repeated, and is where the process that did it was killed, too."""
        for _ in range(CLEAN_UPS - 1):
            try:
                return await self._forks.delete(request)
            except Unavailable as error:
                log.warning("clean-up is tried again", namespace=request.namespace, id=request.id, error=error.message)
        return await self._forks.delete(request)

    def kill(self, shim: Shim) -> None:
        """Kill a shim of ours, and what it had forked and would go on behind a clean-up's back."""
        kill_remains(shim.bundle.namespace, _name(shim.bundle, shim.launch), self._places.grpc_address)

    def open_log(self, bundle: Bundle) -> ShimLog:
        """Read a stranger's log into ours."""

        def sink(line: str) -> None:
            log.info("shim", namespace=bundle.namespace, id=bundle.id, line=line)

        return ShimLog(bundle.path, sink)

    # -- helpers

    def _at(self, shim: Shim, bootstrap: Bootstrap) -> Shim:
        shim.bundle.write_bootstrap(bootstrap)
        return Shim(shim.bundle, shim.launch, bootstrap, shim.limits)

    async def _begin(self, shim: Shim, options: any_pb2.Any, on_close: Callable[[Shim], None]) -> None:
        """Have a shim of ours for it: the group's, one in reserve (which is connected then), or a new one."""
        # recorded before there is one: a daemon that dies in between finds the shim at its planned address
        bundle, launch = shim.bundle, shim.launch
        bundle.write_bootstrap(shim.bootstrap)
        reach("daemon.create.planned")
        if launch.group and self.shared(shim):
            try:  # it is there, no doubt; where it has just left, the next one is made
                await shim.connect(CONNECT, lambda gone: None)
                await shim.hang_up()
                return
            except WherryError:
                log.info("a group's shim has left, another is made", namespace=bundle.namespace, group=launch.group)
        request = self._request(bundle, launch, options, _name(bundle, launch))
        shim.single_use = request.single_use
        if not (launch.group or shim.single_use or self._forks.watched()):
            vacancy = await self._vacant.give(request.in_bytes())
            if vacancy is not None:
                shim.take(vacancy.client, on_close)
                shim.bootstrap, shim.lives = replace(shim.bootstrap, pid=vacancy.pid), vacancy.lives
                reach("daemon.create.occupied")
                return
        # where one listens already, the fork server gives us that
        bootstrap = await self._forks.spawn(request)
        reach("daemon.create.spawned")
        shim.bootstrap = replace(shim.bootstrap, pid=bootstrap.pid)

    def _socket(self, bundle: Bundle, launch: Launch) -> str:
        return self._places.socket((bundle.namespace, _name(bundle, launch)))

    def _foreign(self, bundle: Bundle, launch: Launch) -> ForeignShim:
        return ForeignShim(
            binary=launch.binary,
            namespace=bundle.namespace,
            id=bundle.id,
            bundle=bundle.path,
            grpc_address=self._places.grpc_address,
            ttrpc_address=self._places.ttrpc_address,
            publish_binary=self._places.publish_binary,
            debug=self._places.log_level in ("debug", "trace"),
        )

    def _request(self, bundle: Bundle, launch: Launch, options: any_pb2.Any, name: str) -> ShimRequest:
        cgroup = ""
        if is_a(options, runc_options_pb2.Options):
            cgroup = unpack_as(options, runc_options_pb2.Options).shim_cgroup
        return ShimRequest(
            namespace=bundle.namespace,
            id=name,
            bundle=bundle.path,
            socket=self._socket(bundle, launch),
            ttrpc_address=self._places.ttrpc_address,
            grpc_address=self._places.grpc_address,
            log_level=self._places.log_level,
            shim_cgroup=cgroup,
            state=os.path.join(self._places.runtime, bundle.namespace),
        )


def _name(bundle: Bundle, launch: Launch) -> str:
    """A shim's name in its title and its socket: the container's id, or its group's, which no container's equals."""
    return f"{launch.group}/group" if launch.group else bundle.id
