"""`grpc.health.v1.Health`: what dockerd, kubelet and load balancers ask before they send work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from grpc_health.v1 import health_pb2 as pb

from wherry.core.errors import NotFound
from wherry.proto.service import Context


class HealthService:
    """One state for the whole daemon (service ""): NOT_SERVING until `serving(True)` and after `serving(False)`."""

    SERVICE = "grpc.health.v1.Health"

    def __init__(self) -> None:
        self._status = pb.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()

    def serving(self, yes: bool) -> None:
        """Change the state and tell who watches."""
        self._status = pb.HealthCheckResponse.SERVING if yes else pb.HealthCheckResponse.NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    async def check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        """The state now. Raises NotFound for the name of a service, as servers that know only "" do."""
        if request.service:
            raise NotFound("unknown service")
        return pb.HealthCheckResponse(status=self._status)

    async def list(self, request: pb.HealthListRequest, context: Context) -> pb.HealthListResponse:
        """The state of all there is: the daemon."""
        return pb.HealthListResponse(statuses={"": pb.HealthCheckResponse(status=self._status)})

    async def watch(self, request: pb.HealthCheckRequest, context: Context) -> AsyncIterator[pb.HealthCheckResponse]:
        """The state now and whenever it changes."""
        while True:
            changed = self._changed
            if request.service:
                yield pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN)
            else:
                yield pb.HealthCheckResponse(status=self._status)
            await changed.wait()
