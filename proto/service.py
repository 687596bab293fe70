"""What a service is, without a transport: its methods as the descriptor declares them, and one call's context.

A service is written once, as a class whose attribute `SERVICE` is the full protobuf name and whose methods are the
service's methods in snake case:

- unary: `async def get(self, request, context) -> Response`
- server stream: `def list(self, request, context) -> AsyncIterator[Response]` (an async generator)
- client stream: `async def put(self, requests, context) -> Response`, `requests` an async iterator
- both: `def write(self, requests, context) -> AsyncIterator[Response]`

Errors are raised as `wherry.core.errors`; the door (`wherry.proto.grpc`, `wherry.proto.ttrpc`) turns them
into a status once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

# the metadata key that carries the namespace; ttrpc has its own spelling of it (containerd's namespaces package)
GRPC_NAMESPACE = "containerd-namespace"
TTRPC_NAMESPACE = "containerd-namespace-ttrpc"


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a service: its wire name, its Python name and its messages."""

    service: str
    name: str
    request: type[Message]
    response: type[Message]
    client_streaming: bool
    server_streaming: bool

    @property
    def attribute(self) -> str:
        """The name of the Python method: `ListPids` is `list_pids`, `CloseIO` is `close_io`."""
        return snake_case(self.name)

    @property
    def path(self) -> str:
        """The path of a gRPC call: `/package.Service/Method`."""
        return f"/{self.service}/{self.name}"


@dataclass(slots=True)
class Context:
    """What a call brings besides its request.

    `metadata` has lower-case keys; where one is repeated, the first value. `deadline` is in seconds of
    `time.monotonic()`, None without one. `transport` is "grpc", "ttrpc" or "local".
    """

    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    deadline: float | None = None
    transport: str = "local"

    @property
    def namespace(self) -> str | None:
        """The namespace as the caller sent it, unchecked; None where it sent none."""
        return self.metadata.get(GRPC_NAMESPACE) or self.metadata.get(TTRPC_NAMESPACE)

    @property
    def lease(self) -> str | None:
        """The id of the lease that the caller works under (`containerd-lease`), None without one."""
        return self.metadata.get("containerd-lease") or None

    def remaining(self) -> float | None:
        """Seconds until the deadline, at least 0; None without a deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


def snake_case(name: str) -> str:
    """`UpdateContainer` as `update_container`, `CloseIO` as `close_io`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@cache
def methods(service: str) -> Mapping[str, Method]:
    """The methods of a service by wire name.

    `service` is the full protobuf name; the `_pb2` module that declares it must have been imported. Raises KeyError
    where no imported module does.
    """
    descriptor = descriptor_pool.Default().FindServiceByName(service)
    return MappingProxyType(
        {
            method.name: Method(
                service=service,
                name=method.name,
                request=message_factory.GetMessageClass(method.input_type),
                response=message_factory.GetMessageClass(method.output_type),
                client_streaming=method.client_streaming,
                server_streaming=method.server_streaming,
            )
            for method in descriptor.methods
        }
    )
