"""What the CRI knows: pods and containers, in memory for the questions, in the daemon's records for the next start.

A pod is a record in the sandbox store, a member a record of a container, both in the namespace `k8s.io`. Each has two
extensions: one with the configuration as the kubelet gave it (`runtime.v1.PodSandboxConfig` or `ContainerConfig`, in
bytes), one with what became of it (JSON: the fields of `PodFacts`, `MemberFacts`).

    records = Records(client)
    await records.load()                       # at the start
    records.reserve_pod(name, id)              # raises AlreadyExists where somebody has the name
    await records.add_pod(pod); pod.facts.state = READY; await records.put_pod(pod); await records.drop_pod(pod)
    records.member("0a1b2c")                   # by id or by a prefix that is unique; raises NotFound
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
from google.protobuf.any_pb2 import Any as Packed

from wherry.client.api import Client
from wherry.client.containers import Container
from wherry.core import typeurl
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound, WherryError
from wherry.core.names import quote
from wherry.proto import cri_pb2 as cri
from wherry.proto import sandbox_pb2, types_pb2
from wherry.proto.containers_pb2 import UpdateContainerRequest, UpdateContainerResponse

log = structlog.get_logger(__name__)

NAMESPACE = "k8s.io"
KIND = "io.cri-containerd.kind"
"""The label that says what a record is: `container` or `sandbox`."""
POD = "io.wherry.cri.pod"
POD_CONFIG = "io.wherry.cri.pod-config"
MEMBER = "io.wherry.cri.container"
MEMBER_CONFIG = "io.wherry.cri.container-config"
# states of a pod
MAKING, READY, NOT_READY = "making", "ready", "notready"

_STORE = "containerd.services.sandbox.v1.Store"
_CONTAINERS = "containerd.services.containers.v1.Containers"

F = TypeVar("F", "PodFacts", "MemberFacts")
T = TypeVar("T")


@dataclass(slots=True)
class PodFacts:
    """What became of a pod.

    Times in nanoseconds since the epoch. `namespaces` are the paths that its containers join, by the kinds of the OCI
    specification. `netns` is "" on the host's network, or where nothing was made yet. `ips`: the first is the pod's
    address. `cgroup` is the pod's cgroup parent as the kubelet gave it. `cni` is what the plugins answered last.
    `uid_map`, `gid_map`: (container, host, length) each; empty without a user namespace. `more` is for whoever makes
    pods: `networks` (of CNI, until they are given back), `apart` (it runs in another's shim), `chain`, `lost`.
    """

    name: str = ""
    state: str = MAKING
    created_at: int = 0
    handler: str = ""
    runtime: str = ""
    snapshotter: str = ""
    pid: int = 0
    netns: str = ""
    ips: list[str] = field(default_factory=list)
    network: str = ""
    cni: dict[str, Any] = field(default_factory=dict)
    namespaces: dict[str, str] = field(default_factory=dict)
    cgroup: str = ""
    image: str = ""
    snapshot: str = ""
    uid_map: list[list[int]] = field(default_factory=list)
    gid_map: list[list[int]] = field(default_factory=list)
    selinux: str = ""
    privileged: bool = False
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Pod:
    """A pod."""

    id: str
    config: cri.PodSandboxConfig
    facts: PodFacts = field(default_factory=PodFacts)


@dataclass(slots=True)
class MemberFacts:
    """What became of a container. Times in nanoseconds since the epoch, 0: not yet.

    `image` is what the kubelet named, `image_ref` and `image_id` are what its status says. `more` is for whoever makes
    containers: anything that JSON holds.
    """

    name: str = ""
    pod: str = ""
    image: str = ""
    image_ref: str = ""
    image_id: str = ""
    created_at: int = 0
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    pid: int = 0
    log_path: str = ""
    stop_signal: str = ""
    snapshotter: str = ""
    snapshot: str = ""
    unknown: bool = False
    removing: bool = False
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Member:
    """A container of a pod. `transient` is what a restart of the daemon may forget (never persisted)."""

    id: str
    config: cri.ContainerConfig
    facts: MemberFacts = field(default_factory=MemberFacts)
    transient: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> cri.ContainerState:
        """As containerd derives it from the times."""
        facts = self.facts
        if facts.unknown:
            return cri.CONTAINER_UNKNOWN
        if facts.finished_at:
            return cri.CONTAINER_EXITED
        if facts.started_at:
            return cri.CONTAINER_RUNNING
        return cri.CONTAINER_CREATED if facts.created_at else cri.CONTAINER_UNKNOWN

    def extensions(self) -> dict[str, Packed]:
        """For the container's record when it is made."""
        return {MEMBER: _pack(MEMBER, self.facts), MEMBER_CONFIG: typeurl.pack(self.config)}


class Records:
    """The pods and containers of the node."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.pods: dict[str, Pod] = {}
        self.members: dict[str, Member] = {}
        self._pod_names: dict[str, str] = {}
        self._member_names: dict[str, str] = {}

    # -- names

    def reserve_pod(self, name: str, id: str) -> None:  # noqa: A002 -- what it is
        """Keep a pod's name for an id. Raises AlreadyExists where another has it."""
        _reserve(self._pod_names, "sandbox", name, id)

    def reserve_member(self, name: str, id: str) -> None:  # noqa: A002
        """Keep a container's name for an id. Raises AlreadyExists where another has it."""
        _reserve(self._member_names, "container", name, id)

    def release_pod(self, name: str, id: str) -> None:  # noqa: A002
        """Give a pod's name up; fine where the id hasn't it."""
        if self._pod_names.get(name) == id:
            del self._pod_names[name]

    def release_member(self, name: str, id: str) -> None:  # noqa: A002
        """Give a container's name up; fine where the id hasn't it."""
        if self._member_names.get(name) == id:
            del self._member_names[name]

    # -- questions

    def pod(self, id: str) -> Pod:  # noqa: A002
        """By id or a unique prefix. Raises NotFound, InvalidArgument for a prefix of several."""
        return _find(self.pods, id, "sandbox")

    def member(self, id: str) -> Member:  # noqa: A002
        """By id or a unique prefix. Raises NotFound, InvalidArgument for a prefix of several."""
        return _find(self.members, id, "container")

    def members_of(self, pod: str) -> list[Member]:
        """The containers of a pod, by its whole id, oldest first."""
        return [member for member in self.members.values() if member.facts.pod == pod]

    def find_pods(self, chosen: cri.PodSandboxFilter) -> list[Pod]:
        """Those that a filter lets through: id (a prefix will do), labels. The state is the caller's to compare."""
        return [pod for pod in _narrow(self.pods, chosen.id) if chosen_by(chosen.label_selector, pod.config.labels)]

    def find_members(self, chosen: cri.ContainerFilter) -> list[Member]:
        """Those that a filter lets through: id and pod (prefixes will do), state, labels."""
        found = _narrow(self.members, chosen.id)
        if chosen.pod_sandbox_id:
            pods = {pod.id for pod in _narrow(self.pods, chosen.pod_sandbox_id)} or {chosen.pod_sandbox_id}
            found = [member for member in found if member.facts.pod in pods]
        if chosen.HasField("state"):
            found = [member for member in found if member.state == chosen.state.state]
        return [member for member in found if chosen_by(chosen.label_selector, member.config.labels)]

    # -- pods

    async def add_pod(self, pod: Pod, sandbox: types_pb2.Sandbox) -> None:
        """Write the record of a new pod; `sandbox` has its runtime, specification and labels."""
        sandbox.sandbox_id = pod.id
        sandbox.extensions[POD].CopyFrom(_pack(POD, pod.facts))
        sandbox.extensions[POD_CONFIG].CopyFrom(typeurl.pack(pod.config))
        request = sandbox_pb2.StoreCreateRequest(sandbox=sandbox)
        await self._client.calls.unary(f"{_STORE}/Create", request, sandbox_pb2.StoreCreateResponse)
        self.pods[pod.id] = pod

    async def put_pod(self, pod: Pod, *, config: bool = False) -> None:
        """Write what became of a pod, and with `config` its configuration. Raises NotFound."""
        sandbox = types_pb2.Sandbox(sandbox_id=pod.id, extensions={POD: _pack(POD, pod.facts)})
        fields = [f"extensions.{POD}"]
        if config:
            sandbox.extensions[POD_CONFIG].CopyFrom(typeurl.pack(pod.config))
            fields.append(f"extensions.{POD_CONFIG}")
        request = sandbox_pb2.StoreUpdateRequest(sandbox=sandbox, fields=fields)
        await self._client.calls.unary(f"{_STORE}/Update", request, sandbox_pb2.StoreUpdateResponse)

    async def drop_pod(self, pod: Pod) -> None:
        """Remove a pod's record and its name; fine where it is gone."""
        request = sandbox_pb2.StoreDeleteRequest(sandbox_id=pod.id)
        with contextlib.suppress(NotFound):
            await self._client.calls.unary(f"{_STORE}/Delete", request, sandbox_pb2.StoreDeleteResponse)
        self.pods.pop(pod.id, None)
        self.release_pod(pod.facts.name, pod.id)

    # -- containers

    def add_member(self, member: Member) -> None:
        """A container whose record is written (with `Member.extensions` in it) is there from now on."""
        self.members[member.id] = member

    async def put_member(self, member: Member, *, config: bool = False) -> None:
        """Write what became of a container, and with `config` its configuration. Raises NotFound."""
        request = UpdateContainerRequest()
        request.container.id = member.id
        for name, packed in member.extensions().items():
            if config or name == MEMBER:
                request.container.extensions[name].CopyFrom(packed)
                request.update_mask.paths.append(f"extensions.{name}")
        await self._client.calls.unary(f"{_CONTAINERS}/Update", request, UpdateContainerResponse)

    def drop_member(self, member: Member) -> None:
        """Forget a container whose record is gone, and its name."""
        self.members.pop(member.id, None)
        self.release_member(member.facts.name, member.id)

    # -- the start

    async def load(self) -> None:
        """Read all that an earlier daemon wrote. What can't be read is logged and left out."""
        request = sandbox_pb2.StoreListRequest(filters=[f'labels."{KIND}"==sandbox'])
        answer = await self._client.calls.unary(f"{_STORE}/List", request, sandbox_pb2.StoreListResponse)
        for sandbox in answer.list:
            try:
                self._load_pod(sandbox)
            except (WherryError, ValueError, TypeError) as error:
                log.error("a pod's record can't be read", id=sandbox.sandbox_id, error=str(error))
        for container in await self._client.containers.list([f'labels."{KIND}"==container']):
            if MEMBER not in container.extensions:
                continue
            try:
                self._load_member(container)
            except (WherryError, ValueError, TypeError) as error:
                log.error("a container's record can't be read", id=container.id, error=str(error))
        self.members = dict(sorted(self.members.items(), key=lambda item: item[1].facts.created_at))

    def _load_pod(self, sandbox: types_pb2.Sandbox) -> None:
        if POD not in sandbox.extensions:
            return  # a sandbox that somebody else made by containerd's API
        config = typeurl.unpack_as(sandbox.extensions[POD_CONFIG], cri.PodSandboxConfig)
        pod = Pod(sandbox.sandbox_id, config, _unpack(PodFacts, sandbox.extensions[POD]))
        self.pods[pod.id] = pod
        self._pod_names[pod.facts.name] = pod.id

    def _load_member(self, container: Container) -> None:
        config = typeurl.unpack_as(container.extensions[MEMBER_CONFIG], cri.ContainerConfig)
        member = Member(container.id, config, _unpack(MemberFacts, container.extensions[MEMBER]))
        self.members[member.id] = member
        self._member_names[member.facts.name] = member.id


def pod_name(metadata: cri.PodSandboxMetadata) -> str:
    """The name under which a pod is there once: `NAME_NAMESPACE_UID_ATTEMPT`, as containerd builds it."""
    return "_".join((metadata.name, metadata.namespace, metadata.uid, str(metadata.attempt)))


def member_name(metadata: cri.ContainerMetadata, pod: cri.PodSandboxMetadata) -> str:
    """The name under which a container is there once: `NAME_PODNAME_PODNAMESPACE_PODUID_ATTEMPT`."""
    return "_".join((metadata.name, pod.name, pod.namespace, pod.uid, str(metadata.attempt)))


def chosen_by(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether labels have all that a selector names."""
    return all(labels.get(name) == value for name, value in selector.items())


def _reserve(names: dict[str, str], what: str, name: str, identity: str) -> None:
    owner = names.setdefault(name, identity)
    if owner != identity:
        raise AlreadyExists(
            f"failed to reserve {what} name {quote(name)}: name {quote(name)} is reserved for {quote(owner)}: "
            "already exists"
        )


def _find(items: Mapping[str, T], identity: str, what: str) -> T:
    if (found := items.get(identity)) is not None:
        return found
    matching = [item for key, item in items.items() if identity and key.startswith(identity)]
    if len(matching) > 1:
        raise InvalidArgument(f"{what} {quote(identity)}: there are several whose id begins so: invalid argument")
    if not matching:
        raise NotFound(f"an error occurred when try to find {what}: {quote(identity)}: not found")
    return matching[0]


def _narrow(items: Mapping[str, T], identity: str) -> Iterable[T]:
    """All, or the one that an id or a unique prefix names."""
    if not identity:
        return list(items.values())
    try:
        return [_find(items, identity, "")]
    except (NotFound, InvalidArgument):
        return []


def _pack(url: str, facts: PodFacts | MemberFacts) -> Packed:
    values = {item.name: value for item in dataclasses.fields(facts) if (value := getattr(facts, item.name))}
    return Packed(type_url=url, value=json.dumps(values, separators=(",", ":")).encode())


def _unpack(kind: type[F], packed: Packed) -> F:
    values = typeurl.unpack_json(packed)
    known = {item.name for item in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})
