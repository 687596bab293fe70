"""How a container ended, told to those who subscribe: by the daemon, where its shim may not have come to it.

The journal knows what was told before (`events_journal.key_of`), so telling it once more than needed tells nothing.
"""

from __future__ import annotations

import structlog
from google.protobuf import timestamp_pb2

from wherry.core import topics
from wherry.daemon.events import Exchange
from wherry.daemon.link import Shim
from wherry.proto import events_pb2
from wherry.shim.client import DeadShim

log = structlog.get_logger(__name__)


class Ends:
    """The ends of containers of our own shims (a stranger's tells by itself, and notes nothing that we could read)."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def with_its_shim(self, shim: Shim, dead: DeadShim) -> None:
        """A shim died, and its container with it."""
        namespace, identity = shim.key
        log.warning(
            "container ended with its shim",
            namespace=namespace,
            id=identity,
            pid=dead.pid or shim.pid,
            exit_status=dead.exit_status,
            reason=dead.reason,
        )
        await self.tell(shim, dead)

    async def tell(self, shim: Shim, dead: DeadShim) -> None:
        """Publish the ends of a container's processes and its deletion, unless that was told before."""
        namespace, identity = shim.key
        pid = dead.pid or shim.pid
        at = timestamp(dead.exited_at_ns)
        ends = [
            (end.exec_id, end.pid, end.exit_status, timestamp(end.exited_at_ns))
            for end in shim.bundle.exits()
            if end.exec_id
        ]
        if not shim.exit_published:
            ends.append((identity, pid, dead.exit_status, at))
        for name, process, status, exited_at in ends:
            event = events_pb2.TaskExit(
                container_id=identity, id=name, pid=process, exit_status=status, exited_at=exited_at
            )
            await self._exchange.publish_kept(namespace, topics.TASK_EXIT, event)
        gone = events_pb2.TaskDelete(
            container_id=identity, id=identity, pid=pid, exit_status=dead.exit_status, exited_at=at
        )
        await self._exchange.publish_kept(namespace, topics.TASK_DELETE, gone)

    async def tell_noted(self, shim: Shim) -> None:
        """Tell the end that a shim noted before it deleted its task, should it not have come to it."""
        if shim.launch.binary or shim.launch.sandbox:
            return
        for end in shim.bundle.exits():
            if not end.exec_id:
                await self.tell(shim, DeadShim(end.pid, end.exit_status, end.exited_at_ns))


def timestamp(nanoseconds: int) -> timestamp_pb2.Timestamp:
    """The message for nanoseconds since the epoch."""
    return timestamp_pb2.Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)
