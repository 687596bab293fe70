"""What is said of pods: in lists, as a status, and at length for `crictl inspectp`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict

from wherry.core import typeurl
from wherry.core.errors import WherryError
from wherry.cri import netns
from wherry.cri.handlers import choose
from wherry.cri.pod_spec import on_host
from wherry.cri.records import READY, Pod
from wherry.proto import cri_pb2 as cri
from wherry.proto import sandbox_pb2

if TYPE_CHECKING:
    from wherry.cri.node import Node


def state(pod: Pod) -> cri.PodSandboxState:
    """Ready or not; there is nothing between for a kubelet."""
    return cri.SANDBOX_READY if pod.facts.state == READY else cri.SANDBOX_NOTREADY


def listed(pod: Pod) -> cri.PodSandbox:
    """As ListPodSandbox has it."""
    config = pod.config
    return cri.PodSandbox(
        id=pod.id,
        metadata=config.metadata,
        state=state(pod),
        created_at=pod.facts.created_at,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=pod.facts.handler,
    )


def status(pod: Pod) -> cri.PodSandboxStatus:
    """As PodSandboxStatus has it. A pod on the host's network has no address of its own."""
    config, facts = pod.config, pod.facts
    found = cri.PodSandboxStatus(
        id=pod.id,
        metadata=config.metadata,
        state=state(pod),
        created_at=facts.created_at,
        network=cri.PodSandboxNetworkStatus(),
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=facts.handler,
    )
    found.linux.namespaces.options.CopyFrom(config.linux.security_context.namespace_options)
    if not on_host(config) and facts.ips and facts.state == READY:
        found.network.ip = facts.ips[0]
        found.network.additional_ips.extend(cri.PodIP(ip=each) for each in facts.ips[1:])
    return found


async def verbose(pod: Pod, node: Node) -> str:
    """The JSON that containerd gives, with its names; what crictl and operators' tools read."""
    facts = pod.facts
    info: dict[str, Any] = {
        "pid": facts.pid,
        "processStatus": "running" if facts.state == READY else "deleted",
        "netNamespaceClosed": bool(facts.netns) and not netns.is_there(facts.netns),
        "image": node.settings.pause_image if facts.image else "",
        "snapshotKey": facts.snapshot,
        "snapshotter": facts.snapshotter if facts.image else "",
        "runtimeHandler": facts.handler,
        "runtimeType": facts.runtime,
        "runtimeOptions": None,
        "config": MessageToDict(pod.config, preserving_proto_field_name=True),
        "runtimeSpec": None,
        "cniResult": facts.cni or None,
        "namespaces": facts.namespaces,
        "cgroupParent": facts.cgroup,
    }
    try:
        chosen = choose(node.settings, facts.handler)
        info["runtimeOptions"] = dict(chosen.handler.options) or None
        request = sandbox_pb2.StoreGetRequest(sandbox_id=pod.id)
        path = "containerd.services.sandbox.v1.Store/Get"
        answer = await node.client.calls.unary(path, request, sandbox_pb2.StoreGetResponse)
        info["runtimeSpec"] = typeurl.unpack_json(answer.sandbox.spec)
    except WherryError as error:
        info["error"] = error.message
    return json.dumps(info)
