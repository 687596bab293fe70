"""The node: its parts put together, and the two services of CRI in front of them.

    node = Node(client, Settings(), Places(root, state), Host("0.1.0", …))
    RuntimeService(node), ImageService(node)     # as wherry.proto.service describes services; any gRPC door serves them

A method of a service is one of the part that does it, under the same name. Each waits until the node has read what an
earlier daemon wrote (`Node.start`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import structlog

from wherry.client.api import Client
from wherry.client.transport import Transport
from wherry.cri.records import NAMESPACE, Records
from wherry.cri.settings import Settings
from wherry.proto import cri_pb2 as cri
from wherry.proto.service import Context

if TYPE_CHECKING:
    from wherry.cri.containers import Members
    from wherry.cri.events import Happenings
    from wherry.cri.images import Images
    from wherry.cri.pods import Pods
    from wherry.cri.status import NodeStatus
    from wherry.cri.streaming import Streaming

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the node keeps files. `root` lasts, `state` is gone with the machine's next start."""

    root: str
    state: str

    def pod(self, id: str) -> str:  # noqa: A002 -- what it is
        """The folder of a pod: `hostname`, `hosts`, `resolv.conf`, `shm`."""
        return os.path.join(self.state, "cri", "pods", id)

    def has_pod(self, id: str) -> bool:  # noqa: A002
        """Whether that folder is there."""
        return os.path.isdir(self.pod(id))

    def netns(self, id: str) -> str:  # noqa: A002
        """The file that keeps a pod's network namespace."""
        return os.path.join(self.state, "cri", "netns", id)

    @property
    def image_volumes(self) -> str:
        """The folder of images that are mounted as volumes, in a folder for each pod."""
        return os.path.join(self.state, "cri", "image-volumes")

    def has_image_volumes(self, pod: str) -> bool:
        """Whether there are such of a pod's."""
        return os.path.isdir(os.path.join(self.image_volumes, pod))

    def member(self, id: str) -> str:  # noqa: A002
        """The folder of a container, for whoever makes containers."""
        return os.path.join(self.state, "cri", "containers", id)


@dataclass(frozen=True, slots=True)
class Host:
    """What the node can't know by itself: the daemon's version, where it keeps snapshots, who it is."""

    version: str
    snapshots: Mapping[str, str] = field(default_factory=dict)
    content: str = ""
    socket: str = ""


class Node:
    """All parts of one node. They are made when they are first used."""

    def __init__(self, transport: Transport, settings: Settings, places: Places, host: Host) -> None:
        self.transport = transport
        self.client = Client.over(transport, NAMESPACE)
        self.settings = settings
        self.places = places
        self.host = host
        self.records = Records(self.client)
        self._started: asyncio.Task[None] | None = None
        self._closers: list[Callable[[], Any]] = []

    # -- the parts

    @cached_property
    def pods(self) -> Pods:
        """Pods."""
        from wherry.cri.pods import Pods

        return Pods(self)

    @cached_property
    def members(self) -> Members:
        """Containers."""
        from wherry.cri.containers import Members

        return Members(self)

    @cached_property
    def streaming(self) -> Streaming:
        """Exec, attach, port-forward."""
        from wherry.cri.streaming import Streaming

        return Streaming(self)

    @cached_property
    def images(self) -> Images:
        """Images."""
        from wherry.cri.images import Images

        return Images(self)

    @cached_property
    def events(self) -> Happenings:
        """What happens to pods and containers."""
        from wherry.cri.events import Happenings

        return Happenings(self)

    @cached_property
    def status(self) -> NodeStatus:
        """The node itself."""
        from wherry.cri.status import NodeStatus

        return NodeStatus(self)

    # -- its life

    async def start(self) -> None:
        """Read what an earlier daemon wrote, and find out what lives; done once, waited for by every call."""
        if self._started is None or (self._started.done() and self._started.exception() is not None):
            self._started = asyncio.get_running_loop().create_task(self._start())
        if not self._started.done():
            await asyncio.shield(self._started)

    async def _start(self) -> None:
        await self.records.load()
        await self.pods.recover()
        await self.members.recover()

    def on_close(self, closer: Callable[[], Any]) -> None:
        """A coroutine function that is to be called when the daemon stops."""
        self._closers.append(closer)

    async def close(self) -> None:
        """Let go of what the parts hold; pods and containers go on."""
        if self._started is not None:
            self._started.cancel()
            await asyncio.gather(self._started, return_exceptions=True)
        for closer in reversed(self._closers):
            await closer()


class RuntimeService:
    """runtime.v1.RuntimeService."""

    SERVICE = "runtime.v1.RuntimeService"

    def __init__(self, node: Node) -> None:
        self._node = node

    async def _ready(self) -> Node:
        await self._node.start()
        return self._node

    # -- the node

    async def version(self, request: cri.VersionRequest, context: Context) -> cri.VersionResponse:
        return (await self._ready()).status.version(request)

    async def status(self, request: cri.StatusRequest, context: Context) -> cri.StatusResponse:
        return await (await self._ready()).status.status(request)

    async def runtime_config(self, request: cri.RuntimeConfigRequest, context: Context) -> cri.RuntimeConfigResponse:
        return (await self._ready()).status.runtime_config(request)

    async def update_runtime_config(
        self, request: cri.UpdateRuntimeConfigRequest, context: Context
    ) -> cri.UpdateRuntimeConfigResponse:
        return await (await self._ready()).status.update_runtime_config(request)

    async def get_container_events(
        self, request: cri.GetEventsRequest, context: Context
    ) -> AsyncIterator[cri.ContainerEventResponse]:
        async for event in (await self._ready()).events.follow():
            yield event

    # -- pods

    async def run_pod_sandbox(self, request: cri.RunPodSandboxRequest, context: Context) -> cri.RunPodSandboxResponse:
        return await (await self._ready()).pods.run_pod_sandbox(request)

    async def stop_pod_sandbox(
        self, request: cri.StopPodSandboxRequest, context: Context
    ) -> cri.StopPodSandboxResponse:
        return await (await self._ready()).pods.stop_pod_sandbox(request)

    async def remove_pod_sandbox(
        self, request: cri.RemovePodSandboxRequest, context: Context
    ) -> cri.RemovePodSandboxResponse:
        return await (await self._ready()).pods.remove_pod_sandbox(request)

    async def pod_sandbox_status(
        self, request: cri.PodSandboxStatusRequest, context: Context
    ) -> cri.PodSandboxStatusResponse:
        return await (await self._ready()).pods.pod_sandbox_status(request)

    async def list_pod_sandbox(
        self, request: cri.ListPodSandboxRequest, context: Context
    ) -> cri.ListPodSandboxResponse:
        return await (await self._ready()).pods.list_pod_sandbox(request)

    async def stream_pod_sandboxes(
        self, request: cri.StreamPodSandboxesRequest, context: Context
    ) -> AsyncIterator[cri.StreamPodSandboxesResponse]:
        async for part in (await self._ready()).pods.stream_pod_sandboxes(request):
            yield part

    async def update_pod_sandbox_resources(
        self, request: cri.UpdatePodSandboxResourcesRequest, context: Context
    ) -> cri.UpdatePodSandboxResourcesResponse:
        return await (await self._ready()).pods.update_pod_sandbox_resources(request)

    # -- containers

    async def create_container(
        self, request: cri.CreateContainerRequest, context: Context
    ) -> cri.CreateContainerResponse:
        return await (await self._ready()).members.create_container(request)

    async def start_container(self, request: cri.StartContainerRequest, context: Context) -> cri.StartContainerResponse:
        return await (await self._ready()).members.start_container(request)

    async def stop_container(self, request: cri.StopContainerRequest, context: Context) -> cri.StopContainerResponse:
        return await (await self._ready()).members.stop_container(request)

    async def remove_container(
        self, request: cri.RemoveContainerRequest, context: Context
    ) -> cri.RemoveContainerResponse:
        return await (await self._ready()).members.remove_container(request)

    async def container_status(
        self, request: cri.ContainerStatusRequest, context: Context
    ) -> cri.ContainerStatusResponse:
        return await (await self._ready()).members.container_status(request)

    async def list_containers(self, request: cri.ListContainersRequest, context: Context) -> cri.ListContainersResponse:
        return await (await self._ready()).members.list_containers(request)

    async def stream_containers(
        self, request: cri.StreamContainersRequest, context: Context
    ) -> AsyncIterator[cri.StreamContainersResponse]:
        async for part in (await self._ready()).members.stream_containers(request):
            yield part

    async def update_container_resources(
        self, request: cri.UpdateContainerResourcesRequest, context: Context
    ) -> cri.UpdateContainerResourcesResponse:
        return await (await self._ready()).members.update_container_resources(request)

    async def checkpoint_container(
        self, request: cri.CheckpointContainerRequest, context: Context
    ) -> cri.CheckpointContainerResponse:
        return await (await self._ready()).members.checkpoint_container(request)

    async def exec_sync(self, request: cri.ExecSyncRequest, context: Context) -> cri.ExecSyncResponse:
        return await (await self._ready()).members.exec_sync(request)

    # -- figures

    async def container_stats(self, request: cri.ContainerStatsRequest, context: Context) -> cri.ContainerStatsResponse:
        return await (await self._ready()).members.stats.container_stats(request)

    async def list_container_stats(
        self, request: cri.ListContainerStatsRequest, context: Context
    ) -> cri.ListContainerStatsResponse:
        return await (await self._ready()).members.stats.list_container_stats(request)

    async def stream_container_stats(
        self, request: cri.StreamContainerStatsRequest, context: Context
    ) -> AsyncIterator[cri.StreamContainerStatsResponse]:
        async for part in (await self._ready()).members.stats.stream_container_stats(request):
            yield part

    async def pod_sandbox_stats(
        self, request: cri.PodSandboxStatsRequest, context: Context
    ) -> cri.PodSandboxStatsResponse:
        return await (await self._ready()).members.stats.pod_sandbox_stats(request)

    async def list_pod_sandbox_stats(
        self, request: cri.ListPodSandboxStatsRequest, context: Context
    ) -> cri.ListPodSandboxStatsResponse:
        return await (await self._ready()).members.stats.list_pod_sandbox_stats(request)

    async def stream_pod_sandbox_stats(
        self, request: cri.StreamPodSandboxStatsRequest, context: Context
    ) -> AsyncIterator[cri.StreamPodSandboxStatsResponse]:
        async for part in (await self._ready()).members.stats.stream_pod_sandbox_stats(request):
            yield part

    async def list_metric_descriptors(
        self, request: cri.ListMetricDescriptorsRequest, context: Context
    ) -> cri.ListMetricDescriptorsResponse:
        return await (await self._ready()).members.stats.list_metric_descriptors(request)

    async def list_pod_sandbox_metrics(
        self, request: cri.ListPodSandboxMetricsRequest, context: Context
    ) -> cri.ListPodSandboxMetricsResponse:
        return await (await self._ready()).members.stats.list_pod_sandbox_metrics(request)

    async def stream_pod_sandbox_metrics(
        self, request: cri.StreamPodSandboxMetricsRequest, context: Context
    ) -> AsyncIterator[cri.StreamPodSandboxMetricsResponse]:
        async for part in (await self._ready()).members.stats.stream_pod_sandbox_metrics(request):
            yield part

    # -- streams and logs

    async def exec(self, request: cri.ExecRequest, context: Context) -> cri.ExecResponse:
        return cri.ExecResponse(url=await (await self._ready()).streaming.exec_url(request))

    async def attach(self, request: cri.AttachRequest, context: Context) -> cri.AttachResponse:
        return cri.AttachResponse(url=await (await self._ready()).streaming.attach_url(request))

    async def port_forward(self, request: cri.PortForwardRequest, context: Context) -> cri.PortForwardResponse:
        return cri.PortForwardResponse(url=await (await self._ready()).streaming.port_forward_url(request))

    async def reopen_container_log(
        self, request: cri.ReopenContainerLogRequest, context: Context
    ) -> cri.ReopenContainerLogResponse:
        return await (await self._ready()).members.reopen_container_log(request)


class ImageService:
    """runtime.v1.ImageService."""

    SERVICE = "runtime.v1.ImageService"

    def __init__(self, node: Node) -> None:
        self._node = node

    async def _ready(self) -> Node:
        await self._node.start()
        return self._node

    async def list_images(self, request: cri.ListImagesRequest, context: Context) -> cri.ListImagesResponse:
        return await (await self._ready()).images.list_images(request)

    async def stream_images(
        self, request: cri.StreamImagesRequest, context: Context
    ) -> AsyncIterator[cri.StreamImagesResponse]:
        async for part in (await self._ready()).images.stream_images(request):
            yield part

    async def image_status(self, request: cri.ImageStatusRequest, context: Context) -> cri.ImageStatusResponse:
        return await (await self._ready()).images.image_status(request)

    async def pull_image(self, request: cri.PullImageRequest, context: Context) -> cri.PullImageResponse:
        return await (await self._ready()).images.pull_image(request)

    async def remove_image(self, request: cri.RemoveImageRequest, context: Context) -> cri.RemoveImageResponse:
        return await (await self._ready()).images.remove_image(request)

    async def image_fs_info(self, request: cri.ImageFsInfoRequest, context: Context) -> cri.ImageFsInfoResponse:
        return await (await self._ready()).images.image_fs_info(request)
