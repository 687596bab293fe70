"""The event bus: what happened, as it happens."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from wherry.client.transport import Calls
from wherry.client.values import seconds
from wherry.core import typeurl
from wherry.core.errors import NotFound, Unavailable, Unimplemented
from wherry.core.tuples import NamedTuple
from wherry.proto import events_pb2, images_pb2, runc_options_pb2, types_pb2  # noqa: F401 - declares what events hold
from wherry.proto import events_service_pb2 as pb
from wherry.proto import wherry_events_pb2 as kept_pb

_SERVICE = "containerd.services.events.v1.Events"
_KEPT = "wherry.events.v1.Events"


class Event(NamedTuple):
    """Something that happened: when, in which namespace, under which topic (`/tasks/exit`), and what.

    `sequence` is its number in `wherryd`'s journal, 0 where it came by the standard subscription, which has none.
    """

    at: float
    namespace: str
    topic: str
    packed: Packed
    sequence: int = 0

    def message(self) -> Message | None:
        """The event itself, None for a type that nobody here knows."""
        try:
            return typeurl.unpack(self.packed)
        except NotFound:
            return None

    def fields(self) -> dict[str, Any]:
        """The event as a dictionary for JSON, with the fields' names of the wire; `type_url` alone where unknown."""
        message = self.message()
        if message is None:
            return {"type_url": self.packed.type_url}
        from google.protobuf.json_format import MessageToDict

        return MessageToDict(message, preserving_proto_field_name=True)


class Kept(NamedTuple):
    """What a daemon's journal holds: numbers of the first and last event (0: none), when the first one happened (0.0),
    and the smallest number that `follow` may go on after."""

    oldest: int
    newest: int
    oldest_at: float
    resume_from: int


def _parse(message: types_pb2.Envelope, sequence: int = 0) -> Event:
    return Event(seconds(message.timestamp), message.namespace, message.topic, message.event, sequence)


def _begin_at(request: kept_pb.SubscribeRequest, after: int | None, since: float | None) -> None:
    if after is not None:
        request.after = after
    elif since is not None:
        request.since.FromNanoseconds(int(since * 1e9))


class Events:
    """The bus; events of all namespaces come by unless a filter says otherwise."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def subscribe(self, filters: Iterable[str] = ()) -> AsyncIterator[Event]:
        """What happens from now on and passes one of the filters (`topic~="/tasks/.+",namespace==default`)."""
        request = pb.SubscribeRequest(filters=filters)
        async for message in self._calls.messages(f"{_SERVICE}/Subscribe", request, types_pb2.Envelope):
            yield _parse(message)

    async def follow(
        self,
        filters: Iterable[str] = (),
        *,
        after: int | None = None,
        since: float | None = None,
        until: float | None = None,
        lost: Callable[[Unavailable], Calls | None] | None = None,
    ) -> AsyncIterator[Event]:
        """Events with their numbers, in order and each once: those kept after number `after`, or since a time, and then
        what comes; with neither, what comes from now on. `until` (a time) ends it.

        When the connection breaks, `lost` is asked for another one, on which it goes on where it was: nothing is missed
        as long as the daemon keeps events. It answers None, or isn't given: the error is raised.
        Raises OutOfRange where what followed `after` is kept no more, Unimplemented where the daemon keeps no events.
        """
        calls = self._calls
        request = kept_pb.SubscribeRequest(filters=filters, bookmarks=True)
        _begin_at(request, after, since)
        if until is not None:
            request.until.FromNanoseconds(int(until * 1e9))
        while True:
            try:
                async for message in calls.messages(f"{_KEPT}/Subscribe", request, kept_pb.Event):
                    request.after = message.sequence
                    if message.HasField("envelope"):
                        yield _parse(message.envelope, message.sequence)
                if until is not None and time.time() >= until:
                    return
                broken = Unavailable("the daemon ended the subscription: unavailable")
            except Unavailable as error:
                broken = error
            except Unimplemented:
                raise Unimplemented(
                    "this daemon keeps no events (containerd shows them as they happen only): not implemented"
                ) from None
            other = lost(broken) if lost is not None else None
            if other is None:
                raise broken
            calls = other

    async def kept(self) -> Kept:
        """What the daemon's journal holds. Raises Unimplemented where it has none."""
        answer = await self._calls.unary(f"{_KEPT}/Range", kept_pb.RangeRequest(), kept_pb.RangeResponse)
        return Kept(answer.oldest, answer.newest, seconds(answer.oldest_at), answer.resume_from)

    async def publish(self, topic: str, event: Message) -> None:
        """Puts an event on the bus, in this client's namespace."""
        request = pb.PublishRequest(topic=topic, event=typeurl.pack(event))
        await self._calls.unary(f"{_SERVICE}/Publish", request, Empty)
