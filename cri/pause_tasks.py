"""Pods in somebody else's shims: a pause container's task, as containerd runs them, in place of a sandbox of ours.

Such shims keep a pod's containers together by an annotation of their specifications, which they read by themselves; so
the pod is a container's record and a task beside the record of the sandbox. Same methods as `Sandboxes`.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from wherry.client.api import Client
from wherry.client.containers import Container
from wherry.client.tasks import Stdio
from wherry.client.values import Mount
from wherry.core.errors import AlreadyExists, NotFound
from wherry.cri.handlers import Chosen
from wherry.cri.records import KIND, Pod
from wherry.cri.sandboxes import Started
from wherry.linux.namespaces import path_of

_RUNNING = frozenset({"RUNNING", "PAUSED", "PAUSING"})


class PauseTasks:
    """Pause containers by their pods' ids."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def run(self, pod: Pod, chosen: Chosen, spec: Mapping[str, Any], mounts: Sequence[Mount]) -> Started:
        """Make and start it. Raises what its shim ran into."""
        record = Container(
            id=pod.id,
            image=pod.facts.image,
            labels={KIND: "sandbox"},
            runtime=chosen.runtime,
            runtime_options=chosen.options,
            spec=spec,
            snapshotter=pod.facts.snapshotter,
            snapshot_key=pod.facts.snapshot,
        )
        with contextlib.suppress(AlreadyExists):
            await self._client.containers.create(record)
        pid = await self._client.tasks.create(pod.id, mounts, Stdio())
        await self._client.tasks.start(pod.id)
        kinds = {str(entry.get("type")) for entry in spec["linux"]["namespaces"]} - {"mount", "cgroup"}
        return Started(pid, {kind: path_of(kind, pid) for kind in kinds})

    async def lives(self, identity: str) -> bool:
        """Whether it runs."""
        try:
            return (await self._client.tasks.get(identity)).status in _RUNNING
        except NotFound:
            return False

    async def wait(self, identity: str) -> int:
        """Its exit status, as soon as it has ended."""
        return (await self._client.tasks.wait(identity)).status

    async def shut_down(self, identity: str) -> None:
        """End it and remove its record; fine where it is gone."""
        tasks = self._client.tasks
        with contextlib.suppress(NotFound):
            ended = tasks.waiting(identity)
            with contextlib.suppress(NotFound):
                await tasks.kill(identity, signal.SIGKILL, every=True)
            await ended.result()
            await tasks.delete(identity)
        with contextlib.suppress(NotFound):
            await self._client.containers.delete(identity)
