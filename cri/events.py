"""GetContainerEvents: what happens to pods and containers, for kubelets that listen instead of asking again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import structlog

from wherry.core.errors import NotFound
from wherry.cri import pod_status
from wherry.cri.records import Pod
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from wherry.cri.node import Node

log = structlog.get_logger(__name__)

# events that wait for one listener; beyond it the oldest go: a kubelet lists everything from time to time anyway
_WAITING = 1000


class Happenings:
    """The events of a node. Where nobody listens, nothing is made."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._listeners: set[asyncio.Queue[cri.ContainerEventResponse]] = set()

    def tell(self, id: str, kind: cri.ContainerEventType, pod_id: str = "") -> None:  # noqa: A002 -- as above
        """Something happened to a container or a pod; `pod_id` is that of a container which isn't in the records.

        A kubelet reads nothing of an event without the pod's status in it.
        """
        if not self._listeners:
            return
        event = cri.ContainerEventResponse(container_id=id, container_event_type=kind, created_at=time.time_ns())
        records = self._node.records
        member = records.members.get(id)
        try:
            pod = records.pod(member.facts.pod if member is not None else pod_id or id)
        except NotFound:
            self._send(event)
            return
        event.pod_sandbox_status.CopyFrom(pod_status.status(pod))
        members = records.members_of(pod.id)
        event.containers_statuses.extend(self._node.members.status_of(each) for each in members)
        self._send(event)

    def removed(self, pod: Pod) -> None:
        """A pod is gone."""
        if self._listeners:
            event = cri.ContainerEventResponse(
                container_id=pod.id,
                container_event_type=cri.CONTAINER_DELETED_EVENT,
                created_at=time.time_ns(),
                pod_sandbox_status=pod_status.status(pod),
            )
            self._send(event)

    def _send(self, event: cri.ContainerEventResponse) -> None:
        for queue in self._listeners:
            if queue.full():
                queue.get_nowait()
                log.warning("a listener to the CRI's events is slow, the oldest event is dropped")
            queue.put_nowait(event)

    async def follow(self) -> AsyncIterator[cri.ContainerEventResponse]:
        """What happens from now on."""
        queue: asyncio.Queue[cri.ContainerEventResponse] = asyncio.Queue(_WAITING)
        self._listeners.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._listeners.discard(queue)
