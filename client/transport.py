"""How the client reaches a daemon, seen from the API's side: one contract, several doors.

The API (`wherry.client.containers` and its neighbours) is written once, in coroutines over a `Transport`:

- `wherry.client.grpc_async` for programs with asyncio,
- `wherry.client.ttrpc_blocking` and `wherry.client.grpc_blocking` for the command line, whose coroutines never suspend
  and are therefore run by `wherry.client.blocking.drive` without an event loop (importing asyncio takes longer than a
  whole command may).

Every call raises `wherry.core.errors` kinds and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping

from google.protobuf.message import Message

from wherry.core.hints import Generic, Protocol, TypeVar
from wherry.core.tuples import NamedTuple

Response = TypeVar("Response", bound=Message)
# an answer comes out of a call only: what is pending for a subclass may stand for what is pending for its base
Response_co = TypeVar("Response_co", bound=Message, covariant=True)

GRPC_NAMESPACE = "containerd-namespace"
TTRPC_NAMESPACE = "containerd-namespace-ttrpc"
LEASE = "containerd-lease"


class Pending(Protocol[Response_co]):
    """A call that was sent and whose answer is still to come."""

    async def result(self) -> Response_co:
        """Waits for the answer; raises what the call raises."""

    def cancel(self) -> None:
        """Gives the answer up. No harm when it is there already."""


class BlockingPending(Pending[Response_co], Protocol[Response_co]):
    """What a blocking transport's `begin` gives: an answer that one `select` can wait for beside other things."""

    def fileno(self) -> int:
        """A descriptor that becomes readable when something came; -1 where the connection is lost."""

    def ready(self) -> bool:
        """Takes in what came, without waiting; whether `result` would return (or raise) at once."""


class Stream(Protocol[Response_co]):
    """A call with several messages, in one or both directions."""

    async def send(self, message: Message) -> None:
        """Sends one message; waits while the other side is slow."""

    async def close_send(self) -> None:
        """Tells the other side that no more messages follow."""

    async def receive(self) -> Response_co | None:
        """The next message, None at the end; raises where the call failed."""

    def answer(self, respond: Callable[[Response_co], Message]) -> None:
        """From now on `respond` says what is sent back for each message, while other calls are waited for.

        Nobody calls `receive` then. `respond` may take its time, and raises nothing.
        """

    async def close(self) -> None:
        """Gives the call up where it isn't over, frees what it holds. May be called twice."""


class Call(NamedTuple, Generic[Response]):
    """A call as it is to be made.

    `path` is a method as gRPC spells it, without the first slash: `containerd.services.version.v1.Version/Version`.
    `request` is None for a stream in both directions. `timeout` is in seconds, None for no limit. `metadata` has
    lower-case keys.
    """

    path: str
    request: Message | None
    response: type[Response]
    metadata: Mapping[str, str]
    timeout: float | None = None

    @property
    def payload(self) -> bytes:
        """The request in bytes; none for None."""
        return b"" if self.request is None else self.request.SerializeToString()


class Transport(Protocol):
    """One connection (or pool of them) to a daemon."""

    async def unary(self, call: Call[Response]) -> Response:
        """One request, one answer."""

    def begin(self, call: Call[Response]) -> Pending[Response]:
        """Sends a request now; its answer is asked for later."""

    async def stream(self, call: Call[Response]) -> Stream[Response]:
        """A call that streams: with a `request` only the other side does, without one both do."""

    async def close(self) -> None:
        """Ends the connection and every call on it."""


class Calls:
    """A transport with what each call of one client carries: namespace, lease, deadline.

    Values, not state: `with_lease` makes another one over the same transport.
    """

    __slots__ = ("deadline", "lease", "namespace", "timeout", "transport")

    def __init__(
        self,
        transport: Transport,
        namespace: str,
        *,
        timeout: float | None = None,
        deadline: float | None = None,
        lease: str | None = None,
    ) -> None:
        """`timeout` holds for each call, `deadline` (of `time.monotonic()`) for all of them together."""
        self.transport = transport
        self.namespace = namespace
        self.timeout = timeout
        self.deadline = deadline
        self.lease = lease

    def with_lease(self, lease: str | None) -> Calls:
        """The same calls under a lease, or under none."""
        return Calls(self.transport, self.namespace, timeout=self.timeout, deadline=self.deadline, lease=lease)

    def with_namespace(self, namespace: str) -> Calls:
        """The same calls in another namespace; a lease belongs to its namespace and stays behind."""
        return Calls(self.transport, namespace, timeout=self.timeout, deadline=self.deadline)

    def with_seconds(self, seconds: float) -> Calls:
        """The same calls with this much time for all of them together, whatever the limits were."""
        return Calls(self.transport, self.namespace, deadline=time.monotonic() + seconds, lease=self.lease)

    def metadata(self) -> dict[str, str]:
        """The keys that a daemon reads, for both kinds of transport."""
        keys = {GRPC_NAMESPACE: self.namespace, TTRPC_NAMESPACE: self.namespace}
        if self.lease:
            keys[LEASE] = self.lease
        return keys

    def limit(self, *, endless: bool = False) -> float | None:
        """Seconds that a call may take; `endless` leaves the limit of a single call out (a wait, a subscription)."""
        left = None if self.deadline is None else max(0.001, self.deadline - time.monotonic())
        if endless or self.timeout is None:
            return left
        return self.timeout if left is None else min(left, self.timeout)

    async def unary(self, path: str, request: Message, response: type[Response], *, endless: bool = False) -> Response:
        """One request, one answer."""
        return await self.transport.unary(self._call(path, request, response, endless=endless))

    def begin(self, path: str, request: Message, response: type[Response]) -> Pending[Response]:
        """Sends a request whose answer may take long."""
        return self.transport.begin(self._call(path, request, response, endless=True))

    async def stream(self, path: str, request: Message | None, response: type[Response]) -> Stream[Response]:
        """A call that streams, without a limit of its own."""
        return await self.transport.stream(self._call(path, request, response, endless=True))

    def _call(self, path: str, request: Message | None, response: type[Response], *, endless: bool) -> Call[Response]:
        return Call(path, request, response, self.metadata(), self.limit(endless=endless))

    async def messages(self, path: str, request: Message, response: type[Response]) -> AsyncIterator[Response]:
        """Everything that a server stream brings."""
        stream = await self.stream(path, request, response)
        try:
            while (message := await stream.receive()) is not None:
                yield message
        finally:
            await stream.close()
