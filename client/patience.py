"""A transport that outlasts a restart of the daemon: calls wait for it to be back, where that can do no harm.

A daemon that is restarted (an upgrade, a crash) is back within a second, and its containers never noticed. A call that
found nobody to talk to was never made, and is made again. One that was under way when the daemon went is repeated only
where it changes nothing: whether the other kind was done, nobody knows, and `Unavailable` is the honest answer.
"""

from __future__ import annotations

import asyncio
import time
from typing import Generic, TypeVar

from google.protobuf.message import Message

from wherry.client.grpc_async import AsyncPending, AsyncStream, GrpcTransport
from wherry.client.transport import Call, Response
from wherry.core.errors import Unavailable

R = TypeVar("R", bound=Message)

# methods that change nothing, by the last part of their path
_READS = frozenset({"Check", "Get", "Info", "List", "ListPids", "ListResources", "ListStatuses", "Metrics", "Mounts"})
_READS |= {
    "Pids",
    "Plugins",
    "PodSandboxStatus",
    "Server",
    "Stat",
    "State",
    "Stats",
    "Status",
    "Usage",
    "Version",
    "Wait",
}
# what grpc says of a call for which it had no connection
_NEVER_SENT = ("failed to connect", "connections to all backends failing", "no daemon answers")
# seconds between two tries
PAUSE = 0.05


def may_repeat(path: str, error: Unavailable) -> bool:
    """Whether a call can be made again after this error."""
    return path.rpartition("/")[2] in _READS or any(part in error.message.lower() for part in _NEVER_SENT)


class PatientPending(Generic[R]):
    """A call on its way that is sent again where it may be."""

    def __init__(self, transport: PatientTransport, call: Call[R]) -> None:
        self._transport = transport
        self._sending = call
        self._deadline = None if call.timeout is None else time.monotonic() + call.timeout
        self._call: AsyncPending[R] = self._send()

    def _send(self) -> AsyncPending[R]:
        left = None if self._deadline is None else max(0.001, self._deadline - time.monotonic())
        return self._transport.inner.begin(self._sending._replace(timeout=left))

    async def result(self) -> R:
        """Waits for the answer; raises Unavailable when the daemon stays away."""
        end = None
        while True:
            try:
                return await self._call.result()
            except Unavailable as error:
                # the time counts from the first try that failed: a wait may have lasted for days before
                end = end or time.monotonic() + self._transport.patience
                last = end if self._deadline is None else min(end, self._deadline)
                if time.monotonic() >= last or not may_repeat(self._sending.path, error):
                    raise
            await asyncio.sleep(PAUSE)
            self._call = self._send()

    def cancel(self) -> None:
        """Gives it up."""
        self._call.cancel()


class PatientTransport:
    """A `Transport` over another one of gRPC."""

    def __init__(self, inner: GrpcTransport, patience: float) -> None:
        """`patience` is for how many seconds the daemon may be away."""
        self.inner = inner
        self.patience = patience

    async def unary(self, call: Call[Response]) -> Response:
        """One request, one answer."""
        return await self.begin(call).result()

    def begin(self, call: Call[Response]) -> PatientPending[Response]:
        """Sends a request now; its answer is asked for later."""
        return PatientPending(self, call)

    async def stream(self, call: Call[Response]) -> AsyncStream[Response]:
        """A call that streams; it begins when the daemon is there, and isn't repeated."""
        await self.inner.ready(self.patience)
        return await self.inner.stream(call)

    async def close(self) -> None:
        """Closes the channel and cancels what runs on it."""
        await self.inner.close()
