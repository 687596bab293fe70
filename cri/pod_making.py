"""How a pod comes to be: everything that RunPodSandbox makes, as much of it at once as can be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from wherry.client.values import Mount
from wherry.core import typeurl
from wherry.core.errors import AlreadyExists, NotFound
from wherry.core.failpoints import reach
from wherry.cri import netns, pod_files, pod_spec
from wherry.cri.handlers import Chosen
from wherry.cri.pause_tasks import PauseTasks
from wherry.cri.pod_network import PodNetwork
from wherry.cri.records import KIND, READY, Pod
from wherry.cri.sandboxes import Sandboxes
from wherry.proto import cri_pb2 as cri
from wherry.proto import types_pb2

if TYPE_CHECKING:
    from wherry.cri.node import Node

# labels of the sandbox's record, of more than this many characters with their keys they are left out
_LABEL_LIMIT = 4096
_ROOT = "containerd.io/gc.root"


class Making:
    """Makes pods; what is to be undone is its caller's."""

    def __init__(self, node: Node, network: PodNetwork, sandboxes: Sandboxes, pauses: PauseTasks) -> None:
        self._node = node
        self._network = network
        self._sandboxes = sandboxes
        self._pauses = pauses

    async def make(self, pod: Pod, chosen: Chosen) -> None:
        """All of it; the pod is ready then. Raises what went wrong."""
        config, facts = pod.config, pod.facts
        on_host = pod_spec.on_host(config)
        maps = facts.uid_map, facts.gid_map
        if not on_host:
            # before anything is made: where there is no network there is no pod
            facts.more["networks"] = [network.name for network in self._network.usable(facts.handler)]
            if not maps[0]:
                facts.netns = self._node.places.netns(pod.id)
        if not chosen.ours:
            facts.more["apart"] = True
        spec = pod_spec.namespaces_only(config, self._node.settings, facts.netns, maps)
        folder = self._node.places.pod(pod.id)
        rootfs: Sequence[Mount] = ()
        sandbox = types_pb2.Sandbox(labels=_labels(pod))
        sandbox.runtime.name = chosen.runtime
        if chosen.options is not None:
            sandbox.runtime.options.CopyFrom(chosen.options)
        if self._node.settings.pause_image:
            spec = await self._pause_spec(pod, spec, folder)
        sandbox.spec.CopyFrom(typeurl.pack_json(typeurl.SPEC, spec))
        if facts.netns:
            await _both(self._node.records.add_pod(pod, sandbox), netns.make(facts.netns))
        else:
            await self._node.records.add_pod(pod, sandbox)
        reach("cri.pod.recorded")
        pod_files.make(folder, config)
        if facts.image:
            rootfs = await self._rootfs(pod)
        await self._bring_up(pod, chosen, spec, rootfs)
        reach("cri.pod.made")
        facts.state = READY
        await self._node.records.put_pod(pod)
        reach("cri.pod.ready")

    async def _bring_up(self, pod: Pod, chosen: Chosen, spec: dict[str, Any], rootfs: Sequence[Mount]) -> None:
        """The shim and the network, at once where neither needs the other."""
        config, facts = pod.config, pod.facts

        async def run() -> None:
            if chosen.ours:
                mounts = [mount.message() for mount in rootfs]
                started = await self._sandboxes.run(pod.id, mounts, dict(config.annotations), facts.netns)
            else:
                started = await self._pauses.run(pod, chosen, spec, rootfs)
            facts.pid, facts.namespaces = started.pid, dict(started.namespaces)
            if config.linux.security_context.namespace_options.pid != cri.POD:
                facts.namespaces.pop("pid", None)  # the pause container's own
            reach("cri.pod.running")

        if pod_spec.on_host(config):
            await run()
        elif facts.uid_map:
            await run()
            facts.netns = facts.namespaces["network"]
            await self._network.add(pod)
        elif not chosen.ours or pod_spec.waits_for_network(config.linux.sysctls):
            await self._network.add(pod)  # a virtual machine takes the interfaces that it finds
            await run()
        else:
            await _both(run(), self._network.add(pod))

    # -- with a pause image

    async def _pause_spec(self, pod: Pod, spec: dict[str, Any], folder: str) -> dict[str, Any]:
        """The specification with the image's process; the image is pulled where it isn't there."""
        from wherry.cri.container_spec import cgroup_path, oom_score

        image = await self._node.images.ensure(self._node.settings.pause_image)
        pod.facts.image = image.id
        pod.facts.more["chain"] = await self._node.images.unpacked(image, pod.facts.snapshotter)
        host_ipc = pod.config.linux.security_context.namespace_options.ipc == cri.NODE
        return pod_spec.with_pause(
            spec,
            pod.config,
            identity=pod.id,
            image=image.picture.settings,
            shm="/dev/shm" if host_ipc else f"{folder}/shm",
            resolv_conf=f"{folder}/resolv.conf",
            cgroups_path=cgroup_path(pod.facts.cgroup, pod.id),
            oom_score=oom_score(pod_spec.OOM_SCORE, self._node.settings),
        )

    async def _rootfs(self, pod: Pod) -> list[Mount]:
        snapshots = self._node.client.snapshots(pod.facts.snapshotter)
        pod.facts.snapshot = pod.id
        labels = _snapshot_labels(pod)
        with contextlib.suppress(AlreadyExists):
            return await snapshots.prepare(pod.id, str(pod.facts.more["chain"]), labels)
        return await snapshots.mounts(pod.id)

    async def remove_snapshot(self, pod: Pod) -> None:
        """Remove what the pause container's files were in; fine where there is nothing."""
        if pod.facts.image:
            with contextlib.suppress(NotFound):
                await self._node.client.snapshots(pod.facts.snapshotter).remove(pod.id)


def _labels(pod: Pod) -> dict[str, str]:
    """The pod's own labels, for whoever looks at records, and the one that says what it is."""
    own = {key: value for key, value in pod.config.labels.items() if value and len(key) + len(value) <= _LABEL_LIMIT}
    return {**own, KIND: "sandbox"}


def _snapshot_labels(pod: Pod) -> dict[str, str]:
    # no container's record names it: it stays until its pod is removed
    labels = {_ROOT: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    if not pod.facts.uid_map:
        return labels
    # how containerd asks a snapshotter for files of other owners
    uid, gid = pod.facts.uid_map[0], pod.facts.gid_map[0]
    return labels | {
        "containerd.io/snapshot/uidmapping": ":".join(map(str, uid)),
        "containerd.io/snapshot/gidmapping": ":".join(map(str, gid)),
    }


async def _both(one: Coroutine[Any, Any, None], other: Coroutine[Any, Any, None]) -> None:
    """Do both at once; where one fails, the other is ended, too, before this raises."""
    tasks = [asyncio.ensure_future(one), asyncio.ensure_future(other)]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
