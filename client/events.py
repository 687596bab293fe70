"""The event bus: what happened, as it happens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, NamedTuple

from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from wherry.client.transport import Calls
from wherry.client.values import seconds
from wherry.core import typeurl
from wherry.core.errors import NotFound
from wherry.proto import events_pb2, images_pb2, runc_options_pb2, types_pb2  # noqa: F401 - declares what events hold
from wherry.proto import events_service_pb2 as pb

_SERVICE = "containerd.services.events.v1.Events"


class Event(NamedTuple):
    """Something that happened: when, in which namespace, under which topic (`/tasks/exit`), and what."""

    at: float
    namespace: str
    topic: str
    packed: Packed

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
        from google.protobuf.json_format import MessageToDict  # noqa: PLC0415 - slow to load, only for people

        return MessageToDict(message, preserving_proto_field_name=True)


def _parse(message: types_pb2.Envelope) -> Event:
    return Event(seconds(message.timestamp), message.namespace, message.topic, message.event)


class Events:
    """The bus; events of all namespaces come by unless a filter says otherwise."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def subscribe(self, filters: Iterable[str] = ()) -> AsyncIterator[Event]:
        """What happens from now on and passes one of the filters (`topic~="/tasks/.+",namespace==default`)."""
        request = pb.SubscribeRequest(filters=filters)
        async for message in self._calls.messages(f"{_SERVICE}/Subscribe", request, types_pb2.Envelope):
            yield _parse(message)

    async def publish(self, topic: str, event: Message) -> None:
        """Puts an event on the bus, in this client's namespace."""
        request = pb.PublishRequest(topic=topic, event=typeurl.pack(event))
        await self._calls.unary(f"{_SERVICE}/Publish", request, Empty)
