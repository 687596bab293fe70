"""A pod with one container as a kubelet asks for it: RunPodSandbox, CreateContainer, StartContainer, beside containerd.

Both have their image before, nothing is pulled. containerd's pods need a process of their own: theirs is the same
busybox, sleeping. With a network of the node, both ask the same CNI plugins of Debian's for it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from bench import measure
from bench.api import Failed
from bench.daemons import Daemon, Lab, busybox_layout
from wherry.proto import cri_pb2 as pb
from wherry.proto import service

CNI_PLUGINS = "/usr/lib/cni"
PODS, WARM_UPS = 30, 3
SLEEPING = 50
_SERVICES = ("runtime.v1.RuntimeService", "runtime.v1.ImageService")
# a machine whose root lacks CAP_SYS_RESOURCE (a container, some VMs) can't lower what the OOM killer thinks of a pod
_CONFIG = """
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
{pause}
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{folder}"
"""


class Node:
    """A daemon's CRI over one channel of grpcio; a context manager."""

    def __init__(self, daemon: Daemon, image: str) -> None:
        self._daemon = daemon
        self._image = image
        self._logs = daemon.folder / "logs"
        self._logs.mkdir(exist_ok=True)

    def __enter__(self) -> Self:
        self._channel = grpc.insecure_channel(f"unix://{self._daemon.address}")
        self._calls: dict[str, Any] = {
            name: self._channel.unary_unary(
                method.path,
                request_serializer=method.request.SerializeToString,
                response_deserializer=method.response.FromString,
            )
            for each in _SERVICES
            for name, method in service.methods(each).items()
            if not method.server_streaming
        }
        self._call("PullImage", pb.PullImageRequest(image=pb.ImageSpec(image=self._image)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def _call(self, method: str, request: Any) -> Any:
        try:
            return self._calls[method](request, timeout=60)
        except grpc.RpcError as error:
            raise Failed(f"{method} on {self._daemon.kind}: {error}") from None

    def pod(self, name: str, *, host_network: bool) -> float:
        """Seconds until a pod's container runs; afterwards all of it is removed."""
        seconds, pod, container = self.start(name, host_network=host_network)
        self._call("StopContainer", pb.StopContainerRequest(container_id=container, timeout=0))
        self.remove(pod)
        return seconds

    def start(self, name: str, *, host_network: bool) -> tuple[float, str, str]:
        """Seconds until a pod's container runs, the pod and the container."""
        sandbox, container = self._configs(name, host_network=host_network)
        begun = time.perf_counter()
        pod = self._call("RunPodSandbox", pb.RunPodSandboxRequest(config=sandbox)).pod_sandbox_id
        create = pb.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=sandbox)
        made = self._call("CreateContainer", create).container_id
        self._call("StartContainer", pb.StartContainerRequest(container_id=made))
        seconds = time.perf_counter() - begun
        status = self._call("ContainerStatus", pb.ContainerStatusRequest(container_id=made)).status
        if status.state != pb.CONTAINER_RUNNING:
            raise Failed(f"the container on {self._daemon.kind} doesn't run: {status}")
        return seconds, pod, made

    def remove(self, pod: str) -> None:
        """The pod goes with all that is in it."""
        self._call("StopPodSandbox", pb.StopPodSandboxRequest(pod_sandbox_id=pod))
        self._call("RemovePodSandbox", pb.RemovePodSandboxRequest(pod_sandbox_id=pod))

    def weight(self, count: int) -> int:
        """kB of PSS of the daemon, its helpers, shims and what holds pods, while so many pods sleep."""
        pods = [self.start(f"weight{number}", host_network=True) for number in range(count)]
        time.sleep(2)
        rows = [line.split() for line in self._daemon.ctr("-n", "k8s.io", "task", "ls").splitlines()[1:]]
        containers = {container for _, _, container in pods}
        pids = {row[0]: int(row[1]) for row in rows if row[2] == "RUNNING"}
        pauses = {pid for name, pid in pids.items() if name not in containers}
        shims = {measure.parent(pid) for pid in pids.values()}
        if self._daemon.process is None:
            raise Failed(f"{self._daemon.kind} doesn't run")
        found = sum(map(measure.pss, measure.descendants(self._daemon.process.pid) | shims | pauses))
        for _, pod, _ in pods:
            self.remove(pod)
        return found

    def _configs(self, name: str, *, host_network: bool) -> tuple[pb.PodSandboxConfig, pb.ContainerConfig]:
        """What a kubelet sends for a pod that asks for little: labels, a cgroup, a log, a default seccomp profile."""
        labels = {"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "bench", "io.kubernetes.pod.uid": name}
        sandbox = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=name, namespace="bench"),
            hostname="" if host_network else name,
            log_directory=str(self._logs),
            labels=labels,
        )
        sandbox.dns_config.servers.append("10.96.0.10")
        sandbox.linux.cgroup_parent = f"/{self._daemon.kind}-bench/{name}"
        security = sandbox.linux.security_context
        security.namespace_options.network = pb.NODE if host_network else pb.POD
        security.namespace_options.pid = pb.CONTAINER
        security.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
        container = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name="main"),
            image=pb.ImageSpec(image=self._image),
            command=["sleep", "100000"],
            labels={**labels, "io.kubernetes.container.name": "main"},
            log_path=f"{name}.log",
        )
        container.linux.resources.cpu_shares = 102
        container.linux.security_context.namespace_options.CopyFrom(security.namespace_options)
        container.linux.security_context.seccomp.profile_type = pb.SecurityProfile.RuntimeDefault
        return sandbox, container


def pods_by_turns(lab: Lab, *, pods: int = PODS) -> dict[str, list[float]]:
    """Figures of each daemon (ours, containerd).

    Median milliseconds for pods on the host's network (`host`) and on one by CNI (`cni`), kB of PSS with 50 (`weight`).
    """
    if not Path(CNI_PLUGINS, "bridge").exists():
        raise SystemExit("bench: CNI's plugins are missing; .ci/run says which Debian packages the peers are in")
    bridges = {"wherry": "wherry-bench0", "containerd": "wherry-bench1"}
    pause = _pause(lab)
    daemons = []
    try:
        for number, (kind, bridge) in enumerate(bridges.items()):
            folder = _network(lab, kind, bridge, f"10.2{number}7.0.0/16")
            line = f'  sandbox_image = "{pause}"' if kind == "containerd" else ""
            daemons.append(
                lab.add(kind, name=f"{kind}-cri", config=_CONFIG.format(pause=line, plugins=CNI_PLUGINS, folder=folder))
            )
        found = {what: _turns(daemons, lab.image, pods, host=what == "host") for what in ("host", "cni")}
        found["weight"] = [_weight(daemon, lab.image) for daemon in daemons]
        return found
    finally:
        for bridge in bridges.values():
            subprocess.run(["ip", "link", "del", bridge], capture_output=True)


def _turns(daemons: Sequence[Daemon], image: str, pods: int, *, host: bool) -> list[float]:
    times: list[list[float]] = [[] for _ in daemons]
    nodes = [Node(daemon, image).__enter__() for daemon in daemons]
    for number in range(-WARM_UPS, pods):
        for node, row in zip(nodes, times, strict=True):
            seconds = node.pod(f"{'host' if host else 'cni'}{number + WARM_UPS}", host_network=host)
            if number >= 0:
                row.append(seconds * 1000)
    for node in nodes:
        node.__exit__(None, None, None)
    return [statistics.median(row) for row in times]


def _weight(daemon: Daemon, image: str) -> float:
    with Node(daemon, image) as node:
        return node.weight(SLEEPING)


def _pause(lab: Lab) -> str:
    """An image that holds a pod: busybox that sleeps."""
    layout = lab.folder / "pause"
    busybox_layout(layout, ["sleep", "1000000"])
    return lab.publish(layout, "pause")


def _network(lab: Lab, kind: str, bridge: str, subnet: str) -> Path:
    """A conflist with a bridge; the plugins keep their state beside it."""
    folder = lab.folder / f"{kind}-cni"
    folder.mkdir()
    ipam = {"type": "host-local", "dataDir": f"{folder}/leases", "ranges": [[{"subnet": subnet}]]}
    plugin = {"type": "bridge", "bridge": bridge, "isGateway": True, "ipMasq": False, "ipam": ipam}
    conflist = {"cniVersion": "1.0.0", "name": f"bench-{kind}", "plugins": [plugin]}
    (folder / "10-bench.conflist").write_text(json.dumps(conflist))
    return folder
