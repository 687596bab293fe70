"""Pods: RunPodSandbox, Stop, Remove, Status, List.

A pod is a sandbox of the daemon's, made of namespaces alone where no pause image is configured. What is made, in the
order in which a sudden end is harmless:

    the name, the record (state `making`)  ──►  network namespace, files, shim, CNI  ──►  the record (`ready`)

What fails in between is taken back. What an end of the daemon interrupts is found again as a pod that isn't ready,
which the kubelet stops and removes. Stop ends the shim with all that is in it, then the network; the record stays until
Remove. Both are fine with what isn't there any more.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any

import structlog
from google.protobuf.any_pb2 import Any as Packed

from wherry.core.errors import InvalidArgument, NotFound, WherryError
from wherry.core.failpoints import reach
from wherry.cri import netns, pod_files, pod_status
from wherry.cri.batches import batches
from wherry.cri.handlers import choose
from wherry.cri.pause_tasks import PauseTasks
from wherry.cri.pod_making import Making
from wherry.cri.pod_network import PodNetwork
from wherry.cri.pod_spec import user_mappings
from wherry.cri.records import MAKING, NOT_READY, READY, Pod, PodFacts, pod_name
from wherry.cri.sandboxes import Sandboxes
from wherry.cri.selinux import has_selinux, pod_label
from wherry.cri.settings import UNTRUSTED
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from wherry.cri.node import Node

log = structlog.get_logger(__name__)

# an annotation by which a pod asked for the handler `untrusted`, from before there were RuntimeClasses
_UNTRUSTED = "io.kubernetes.cri.untrusted-workload"


class Pods:
    """The pods of a node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._records = node.records
        self.network = PodNetwork(node.settings, os.path.join(node.places.root, "cri", "cni"))
        self.sandboxes = Sandboxes(node.client.calls)
        self.pauses = PauseTasks(node.client)
        self._making = Making(node, self.network, self.sandboxes, self.pauses)
        self._unborn: set[str] = set()
        self._locks: dict[str, asyncio.Lock] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._work: set[asyncio.Task[None]] = set()
        node.on_close(self._close)

    # -- run

    async def run_pod_sandbox(self, request: cri.RunPodSandboxRequest) -> cri.RunPodSandboxResponse:
        """Make a pod and let it run. Raises AlreadyExists for a name that is taken, and what went wrong."""
        config = request.config
        _check(config)
        handler = request.runtime_handler
        if not handler and config.annotations.get(_UNTRUSTED) == "true":
            handler = UNTRUSTED
        chosen = choose(self._node.settings, handler)
        uids, gids = user_mappings(config)
        facts = PodFacts(
            name=pod_name(config.metadata),
            created_at=time.time_ns(),
            handler=handler,
            runtime=chosen.runtime,
            snapshotter=self._node.settings.snapshotter_of(chosen.name),
            cgroup=config.linux.cgroup_parent,
            uid_map=uids,
            gid_map=gids,
            privileged=config.linux.security_context.privileged,
        )
        if self._node.settings.enable_selinux and has_selinux():
            taken = [other.facts.selinux for other in self._records.pods.values()]
            options = config.linux.security_context.selinux_options
            facts.selinux = pod_label(options, taken, self._node.settings.selinux_category_range)
        pod = Pod(secrets.token_hex(32), config, facts)
        self._records.reserve_pod(facts.name, pod.id)
        self._unborn.add(pod.id)
        try:
            await self._making.make(pod, chosen)
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                log.warning("a pod can't be made", name=facts.name, error=str(error))
            await asyncio.shield(self._spawn(self._take_back(pod)))
            raise
        self._unborn.discard(pod.id)
        self._watch(pod)
        for kind in (cri.CONTAINER_CREATED_EVENT, cri.CONTAINER_STARTED_EVENT):
            self._node.events.tell(pod.id, kind)
        return cri.RunPodSandboxResponse(pod_sandbox_id=pod.id)

    async def _take_back(self, pod: Pod) -> None:
        """Undo a pod that was not made. What can't be undone now is a pod that isn't ready, for the kubelet to stop."""
        try:
            await self._tear_down(pod)
            await self._forget(pod)
        except (WherryError, OSError) as error:
            log.error("what was made of a pod is still there", pod=pod.id, error=str(error))
            pod.facts.state = NOT_READY
            if pod.id in self._records.pods:
                await self._records.put_pod(pod)
            else:
                self._records.release_pod(pod.facts.name, pod.id)
        finally:
            self._unborn.discard(pod.id)

    # -- stop and remove

    async def stop_pod_sandbox(self, request: cri.StopPodSandboxRequest) -> cri.StopPodSandboxResponse:
        """End a pod with its containers and give its network back; fine where that was done."""
        try:
            pod = self._records.pod(request.pod_sandbox_id)
        except NotFound:
            return cri.StopPodSandboxResponse()
        async with self._alone(pod):
            await self._stop(pod)
        return cri.StopPodSandboxResponse()

    async def _stop(self, pod: Pod) -> None:
        if self._records.members_of(pod.id):
            await self._node.members.stop_all(pod.id)
        await self._tear_down(pod)

    async def _tear_down(self, pod: Pod) -> None:
        """End what runs, then take the network away. May be done again where it failed."""
        was = pod.facts.state
        self._unwatch(pod)
        await self._life(pod).shut_down(pod.id)
        reach("cri.pod.ended")
        if was != NOT_READY:
            pod.facts.state = NOT_READY
            pod.facts.pid = 0
            if pod.id in self._records.pods:
                await self._records.put_pod(pod)
        if was == READY:
            self._node.events.tell(pod.id, cri.CONTAINER_STOPPED_EVENT)
        folder = self._node.places.pod(pod.id)
        pod_files.free(folder)
        if pod.facts.more.get("networks"):
            await self.network.delete(pod)
            reach("cri.pod.detached")
            if pod.id in self._records.pods:
                await self._records.put_pod(pod)
        if pod.facts.netns == self._node.places.netns(pod.id):  # others go with what made them
            netns.remove(pod.facts.netns)

    async def remove_pod_sandbox(self, request: cri.RemovePodSandboxRequest) -> cri.RemovePodSandboxResponse:
        """Remove a pod with its containers, stopped or not; fine where there is none."""
        try:
            pod = self._records.pod(request.pod_sandbox_id)
        except NotFound:
            return cri.RemovePodSandboxResponse()
        async with self._alone(pod):
            if pod.id in self._records.pods:
                await self._stop(pod)
                if self._records.members_of(pod.id):
                    await self._node.members.remove_all(pod.id)
                await self._forget(pod)
                self._node.events.removed(pod)
        self._locks.pop(pod.id, None)
        return cri.RemovePodSandboxResponse()

    async def _forget(self, pod: Pod) -> None:
        """Remove what is left of a pod that has ended: snapshot, files, record, name."""
        if pod.facts.more.get("lost") or self._node.places.has_image_volumes(pod.id):
            await self._node.images.volumes.release(pod.id)
        await self._making.remove_snapshot(pod)
        pod_files.remove(self._node.places.pod(pod.id))
        reach("cri.pod.emptied")
        if pod.id in self._records.pods:
            await self._records.drop_pod(pod)
            reach("cri.pod.forgotten")
        else:
            self._records.release_pod(pod.facts.name, pod.id)

    # -- questions

    def living(self) -> list[Pod]:
        """All but those that are being made."""
        return [pod for pod in self._records.pods.values() if pod.id not in self._unborn]

    def _chosen(self, asked: cri.PodSandboxFilter) -> list[Pod]:
        found = [pod for pod in self._records.find_pods(asked) if pod.id not in self._unborn]
        if asked.HasField("state"):
            found = [pod for pod in found if pod_status.state(pod) == asked.state.state]
        return found

    async def list_pod_sandbox(self, request: cri.ListPodSandboxRequest) -> cri.ListPodSandboxResponse:
        """Those that the filter lets through."""
        return cri.ListPodSandboxResponse(items=[pod_status.listed(pod) for pod in self._chosen(request.filter)])

    async def stream_pod_sandboxes(
        self, request: cri.StreamPodSandboxesRequest
    ) -> AsyncIterator[cri.StreamPodSandboxesResponse]:
        """The same, in pieces."""
        found = self._chosen(request.filter)
        for piece in batches(found):
            yield cri.StreamPodSandboxesResponse(pod_sandboxes=[pod_status.listed(pod) for pod in piece])

    async def pod_sandbox_status(self, request: cri.PodSandboxStatusRequest) -> cri.PodSandboxStatusResponse:
        """What a pod is. Raises NotFound."""
        pod = self._records.pod(request.pod_sandbox_id)
        if pod.id in self._unborn:
            raise NotFound(f'an error occurred when try to find sandbox: "{pod.id}": not found')
        response = cri.PodSandboxStatusResponse(status=pod_status.status(pod), timestamp=time.time_ns())
        if members := self._records.members_of(pod.id):
            response.containers_statuses.extend(self._node.members.status_of(member) for member in members)
        if request.verbose:
            response.info["info"] = await pod_status.verbose(pod, self._node)
        return response

    async def update_pod_sandbox_resources(
        self, request: cri.UpdatePodSandboxResourcesRequest
    ) -> cri.UpdatePodSandboxResourcesResponse:
        """Note what a pod's resources are from now on; its cgroup is the kubelet's. Raises NotFound."""
        pod = self._records.pod(request.pod_sandbox_id)
        async with self._alone(pod):
            for name in ("overhead", "resources"):
                if request.HasField(name):
                    getattr(pod.config.linux, name).CopyFrom(getattr(request, name))
            await self._records.put_pod(pod, config=True)
        return cri.UpdatePodSandboxResourcesResponse()

    def runtime_options(self, pod: Pod) -> Packed | None:
        """The options of a pod's runtime handler, as its containers' records have them."""
        return choose(self._node.settings, pod.facts.handler).options

    # -- the start

    async def recover(self) -> None:
        """Find out which pods live, and remove what belongs to none."""
        await asyncio.gather(*(self._find_again(pod) for pod in self._records.pods.values()))
        self._sweep()
        if self._records.pods:
            await self.network.collect(self._records.pods.values())

    async def _find_again(self, pod: Pod) -> None:
        try:
            if pod.facts.state == MAKING:
                log.info("a pod was being made when the daemon ended", pod=pod.id, name=pod.facts.name)
                await self._life(pod).shut_down(pod.id)
            elif pod.facts.state == READY and await self._life(pod).lives(pod.id):
                self._watch(pod)
                return
            elif pod.facts.state == NOT_READY:
                return
        except WherryError as error:
            log.warning("a pod's shim doesn't answer", pod=pod.id, error=error.message)
            if pod.facts.state == READY:
                self._watch(pod)
                return
        pod.facts.state, pod.facts.pid = NOT_READY, 0
        if not self._node.places.has_pod(pod.id):  # the machine was started anew meanwhile
            pod.facts.more["lost"] = True
        await self._records.put_pod(pod)

    def _sweep(self) -> None:
        """Files of pods that nobody knows."""
        for name in _names(self._node.places.netns("")):
            if name not in self._records.pods:
                netns.remove(self._node.places.netns(name))
        for name in _names(self._node.places.pod("")):
            if name not in self._records.pods:
                pod_files.remove(self._node.places.pod(name))

    # -- who ends by himself

    def _watch(self, pod: Pod) -> None:
        if pod.id not in self._watching:
            self._watching[pod.id] = self._spawn(self._until_its_end(pod))

    def _unwatch(self, pod: Pod) -> None:
        if (task := self._watching.pop(pod.id, None)) is not None:
            task.cancel()

    async def _until_its_end(self, pod: Pod) -> None:
        try:
            status = await self._life(pod).wait(pod.id)
        except NotFound:
            status = 0
        except WherryError:
            return  # the daemon goes down
        self._watching.pop(pod.id, None)
        if pod.facts.state != READY:
            return
        log.warning("a pod ended by itself", pod=pod.id, name=pod.facts.name, status=status)
        pod.facts.state, pod.facts.pid = NOT_READY, 0
        await self._records.put_pod(pod)
        self._node.events.tell(pod.id, cri.CONTAINER_STOPPED_EVENT)

    # -- helpers

    def _life(self, pod: Pod) -> Sandboxes | PauseTasks:
        """Who has what runs of a pod."""
        return self.pauses if pod.facts.more.get("apart") else self.sandboxes

    def _alone(self, pod: Pod) -> asyncio.Lock:
        """Changes of one pod come one after the other."""
        return self._locks.setdefault(pod.id, asyncio.Lock())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._work.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work on a pod failed", exc_info=error)

    async def _close(self) -> None:
        for task in tuple(self._work):
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)


def _check(config: cri.PodSandboxConfig) -> None:
    """What a pod must have. Raises InvalidArgument."""
    if not config.HasField("metadata") or not config.metadata.name:
        raise InvalidArgument("sandbox config must include metadata with a name: invalid argument")
    if config.linux.security_context.namespace_options.network not in (cri.POD, cri.NODE):
        raise InvalidArgument("a sandbox's network is POD or NODE: invalid argument")
    if len(config.hostname) > 64:
        raise InvalidArgument(f"hostname {config.hostname!r} is longer than 64 characters: invalid argument")


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
