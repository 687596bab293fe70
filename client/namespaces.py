"""Namespaces: the tenants of one daemon."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.empty_pb2 import Empty

from wherry.client.transport import Calls
from wherry.client.values import label_mask
from wherry.core.errors import NotFound
from wherry.core.labels import NAMESPACE_DEFAULT_SNAPSHOTTER
from wherry.core.tuples import NamedTuple
from wherry.proto import namespaces_pb2 as pb

_SERVICE = "containerd.services.namespaces.v1.Namespaces"
DEFAULT_SNAPSHOTTER = "overlayfs"


class Namespace(NamedTuple):
    """A namespace and its labels."""

    name: str
    labels: Mapping[str, str]


def _parse(message: pb.Namespace) -> Namespace:
    return Namespace(message.name, dict(message.labels))


class Namespaces:
    """The namespaces of a daemon."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def list(self, filter: str = "") -> list[Namespace]:  # noqa: A002 - the field's name
        """All namespaces that the filter lets through."""
        request = pb.ListNamespacesRequest(filter=filter)
        answer = await self._calls.unary(f"{_SERVICE}/List", request, pb.ListNamespacesResponse)
        return [_parse(item) for item in answer.namespaces]

    async def get(self, name: str) -> Namespace:
        """One namespace; raises NotFound."""
        request = pb.GetNamespaceRequest(name=name)
        answer = await self._calls.unary(f"{_SERVICE}/Get", request, pb.GetNamespaceResponse)
        return _parse(answer.namespace)

    async def create(self, name: str, labels: Mapping[str, str] | None = None) -> Namespace:
        """Makes a namespace; raises AlreadyExists."""
        request = pb.CreateNamespaceRequest(namespace=pb.Namespace(name=name, labels=dict(labels or {})))
        answer = await self._calls.unary(f"{_SERVICE}/Create", request, pb.CreateNamespaceResponse)
        return _parse(answer.namespace)

    async def label(self, name: str, labels: Mapping[str, str]) -> Namespace:
        """Sets labels of a namespace; an empty value takes the label away."""
        request = pb.UpdateNamespaceRequest(
            namespace=pb.Namespace(name=name, labels=dict(labels)), update_mask=label_mask(labels)
        )
        await self._calls.unary(f"{_SERVICE}/Update", request, pb.UpdateNamespaceResponse)
        # the answer to an update is empty in containerd
        return await self.get(name)

    async def delete(self, name: str) -> None:
        """Removes an empty namespace; raises FailedPrecondition where something is in it."""
        await self._calls.unary(f"{_SERVICE}/Delete", pb.DeleteNamespaceRequest(name=name), Empty)

    async def default_snapshotter(self) -> str:
        """The snapshotter that this client's namespace names in its labels, else containerd's default."""
        try:
            namespace = await self.get(self._calls.namespace)
        except NotFound:
            return DEFAULT_SNAPSHOTTER
        return namespace.labels.get(NAMESPACE_DEFAULT_SNAPSHOTTER) or DEFAULT_SNAPSHOTTER
