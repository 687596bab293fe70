"""Namespaces, the tenants: their store, their service, and the check that every call goes through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from google.protobuf.message import Message

from wherry.daemon.metadata import Metadata
from wherry.proto import namespaces_pb2 as pb
from wherry.proto.service import Context

# publish(namespace, topic, message): hands an event to the bus at once (`events.Exchange.publish`)
Publish = Callable[[str, str, Message], None]


def require_namespace(context: Context) -> str:
    """The call's namespace, checked. Raises FailedPrecondition where it is missing, InvalidArgument where malformed."""
    raise NotImplementedError


class NamespaceStore:
    """Namespaces and their labels. Every store's first write into a namespace makes it."""

    def __init__(self, metadata: Metadata, publish: Publish | None = None) -> None:
        raise NotImplementedError

    def labels(self, name: str) -> dict[str, str]:
        """The labels of a namespace; empty for an unknown one (cheap: for defaults such as the runtime)."""
        raise NotImplementedError

    def get(self, name: str) -> pb.Namespace:
        """Raises NotFound."""
        raise NotImplementedError

    async def list(self) -> list[pb.Namespace]:
        raise NotImplementedError

    async def create(self, name: str, labels: Mapping[str, str]) -> pb.Namespace:
        """Raises InvalidArgument, AlreadyExists."""
        raise NotImplementedError

    async def update(self, namespace: pb.Namespace, paths: Sequence[str] = ()) -> pb.Namespace:
        raise NotImplementedError

    async def delete(self, name: str) -> None:
        """Raises NotFound, FailedPrecondition for one that still has something."""
        raise NotImplementedError


class NamespaceService:
    SERVICE = "containerd.services.namespaces.v1.Namespaces"

    def __init__(self, store: NamespaceStore) -> None:
        raise NotImplementedError
