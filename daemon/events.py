"""The event bus: what happens in the daemon and in its shims, for whoever subscribes.

Three ways in, one way out:

- a service of the daemon calls `Exchange.publish(namespace, topic, event)`;
- a shim calls `Forward` on the ttrpc door, with the envelope it made (containerd.services.events.ttrpc.v1);
- a client calls `Publish` or `Forward` (containerd.services.events.v1);
- `Exchange.subscribe(filters)` gives each subscriber its own queue; who wants memory reads the journal
  (`events_journal.py`, `events_kept.py`), which gets every event, too.

Publishing never waits: a subscriber that reads too slowly is cut off with an error that says so, and harms nobody else.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Self

import structlog
from google.protobuf import any_pb2, empty_pb2, timestamp_pb2
from google.protobuf.message import Message

from wherry.core.errors import InvalidArgument, ResourceExhausted, WherryError
from wherry.core.failpoints import reach
from wherry.core.filters import Adaptor, Filter, compile_filters
from wherry.core.names import check_identifier, require_namespace
from wherry.core.topics import check_topic
from wherry.core.typeurl import pack, unpack
from wherry.daemon import logs
from wherry.daemon.events_journal import MATTER, Journal, key_of
from wherry.proto import events_pb2 as _events  # noqa: F401  # registers the events' types for unpacking
from wherry.proto import events_service_pb2, events_ttrpc_pb2
from wherry.proto.service import Context
from wherry.proto.types_pb2 import Envelope

log = structlog.get_logger(__name__)

# A subscriber that is this many envelopes behind is cut off: at about 300 bytes each that is some 5 MB.
QUEUE_LIMIT = 16384
# nanoseconds; a forwarded event that is older than this was perhaps told before: to an earlier daemon, or the answer
# didn't reach the shim in time
_PERHAPS_TOLD = 10**9


class Subscription:
    """One subscriber's queue: an async iterator of envelopes in the order of publication.

    Use it as a context manager, so that it leaves the exchange when its reader goes. Raises ResourceExhausted to a
    reader that fell `QUEUE_LIMIT` envelopes behind. Not to be shared between tasks.
    """

    def __init__(self, exchange: Exchange, matches: Filter) -> None:
        self._exchange = exchange
        self._matches = matches
        self._queue: deque[Envelope] = deque()
        self._wake = asyncio.Event()
        self._error: WherryError | None = None
        self._closed = False

    def offer(self, envelope: Envelope) -> None:
        """Queue an envelope if the filters let it through; in the loop's thread, never waits."""
        if self._error is not None or not self._matches(adaptor(envelope)):
            return
        if len(self._queue) >= QUEUE_LIMIT:
            self._queue.clear()
            self._error = ResourceExhausted(f"subscriber is too slow: more than {QUEUE_LIMIT} events wait for it")
        else:
            self._queue.append(envelope)
        self._wake.set()

    def close(self) -> None:
        """Leave the exchange; what waits in the queue is dropped, the reader's iteration ends."""
        self._closed = True
        self._exchange.unsubscribe(self)
        self._wake.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Envelope:
        while not self._queue:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._queue.popleft()


class Exchange:
    """The bus. Belongs to the event loop in whose thread it was made."""

    def __init__(self) -> None:
        self.journal: Journal | None = None
        """Where events are kept; None until the metadata is open."""
        self._subscriptions: set[Subscription] = set()
        self._watchers: dict[str, list[Callable[[Envelope], None]]] = {}
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def publish(self, namespace: str, topic: str, event: Message) -> None:
        """Send an event of the daemon's own to all subscribers; from any thread, never waits.

        `topic` is a path as in wherry.core.topics ("/tasks/exit"); `event` a message or an Any that already holds one.
        Raises InvalidArgument for a malformed namespace or topic.
        """
        _check(namespace, topic)
        held = event if isinstance(event, any_pb2.Any) else pack(event)
        self._send(Envelope(timestamp=_now(), namespace=namespace, topic=topic, event=held))

    async def publish_kept(self, namespace: str, topic: str, event: Message) -> None:
        """`publish`, and return when the journal has it; an event that was told before (`key_of`) goes nowhere.

        In the loop's thread. What can't be written now (a full disk) waits in memory for the next try.
        """
        _check(namespace, topic)
        envelope = Envelope(timestamp=_now(), namespace=namespace, topic=topic, event=pack(event))
        try:
            await self._send_kept(envelope, new=False)
        except WherryError as error:
            log.error("an event is not kept yet", topic=topic, error=error.message)
            if self.journal is not None:
                self.journal.add(envelope, key=key_of(envelope))

    async def forward(self, envelope: Envelope) -> None:
        """Send an envelope that somebody else made (a shim), and return when the journal has it; in the loop's thread.

        Raises InvalidArgument for a malformed namespace or topic, or one without a timestamp, and what the journal ran
        into (a full disk: the shim keeps the event and tells it again).
        """
        _check(envelope.namespace, envelope.topic)
        if not envelope.HasField("timestamp") or not (envelope.timestamp.seconds or envelope.timestamp.nanos):
            raise InvalidArgument("timestamp must be set on forwarded event: invalid argument")
        reach("daemon.event.received")
        # an end may have been told by the daemon in the place of a shim that was thought dead
        fresh = envelope.timestamp.ToNanoseconds() > time.time_ns() - _PERHAPS_TOLD
        new = fresh and envelope.topic not in MATTER
        await self._send_kept(envelope, new=new)
        reach("daemon.event.kept")

    def subscribe(self, filters: Sequence[str] = ()) -> Subscription:
        """A new subscriber, who sees what is published from now on; in the loop's thread.

        `filters` are in containerd's filter language over `topic`, `namespace` and `event.FIELD`; an envelope that one
        of them matches goes through, without filters every one. Raises InvalidArgument for a filter that doesn't parse.
        """
        subscription = Subscription(self, compile_filters(list(filters)))
        self._subscriptions.add(subscription)
        return subscription

    def watch(self, topic: str, watcher: Callable[[Envelope], None]) -> None:
        """Call `watcher` at once with each envelope of a topic, in the loop's thread: for the daemon's own services."""
        self._watchers.setdefault(topic, []).append(watcher)

    def unsubscribe(self, subscription: Subscription) -> None:
        """Forget a subscriber; called by `Subscription.close`."""
        self._subscriptions.discard(subscription)

    async def _send_kept(self, envelope: Envelope, *, new: bool) -> None:
        journal = self.journal
        if journal is None:
            self._offer(envelope)
            return
        key = key_of(envelope)
        if not new and journal.knows(key):
            return
        written = journal.add(envelope, key=key, confirm=True)
        self._offer(envelope)
        if written is not None:
            await written

    def _send(self, envelope: Envelope) -> None:
        if threading.get_ident() != self._thread:
            self._loop.call_soon_threadsafe(self._send, envelope)
            return
        if self.journal is not None:
            self.journal.add(envelope)
        self._offer(envelope)

    def _offer(self, envelope: Envelope) -> None:
        if logs.is_debug():
            log.debug("event", namespace=envelope.namespace, topic=envelope.topic, type=envelope.event.type_url)
        for watcher in self._watchers.get(envelope.topic, ()):
            watcher(envelope)
        for subscription in tuple(self._subscriptions):
            subscription.offer(envelope)


class EventsService:
    """`containerd.services.events.v1.Events`: the bus for clients."""

    SERVICE = "containerd.services.events.v1.Events"

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def publish(self, request: events_service_pb2.PublishRequest, context: Context) -> empty_pb2.Empty:
        """Publish an event in the caller's namespace."""
        namespace = require_namespace(context.namespace)
        self._exchange.publish(namespace, request.topic, request.event)
        return empty_pb2.Empty()

    async def forward(self, request: events_service_pb2.ForwardRequest, context: Context) -> empty_pb2.Empty:
        """Publish an envelope as it is."""
        await self._exchange.forward(request.envelope)
        return empty_pb2.Empty()

    async def subscribe(
        self, request: events_service_pb2.SubscribeRequest, context: Context
    ) -> AsyncIterator[Envelope]:
        """Stream envelopes until the caller goes away; of all namespaces, as containerd does."""
        with self._exchange.subscribe(request.filters) as subscription:
            async for envelope in subscription:
                yield envelope


class EventsTtrpcService:
    """`containerd.services.events.ttrpc.v1.Events`: the bus for shims."""

    SERVICE = "containerd.services.events.ttrpc.v1.Events"

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    async def forward(self, request: events_ttrpc_pb2.ForwardRequest, context: Context) -> empty_pb2.Empty:
        """Publish a shim's envelope as it is."""
        await self._exchange.forward(request.envelope)
        return empty_pb2.Empty()


def _check(namespace: str, topic: str) -> None:
    """Raise InvalidArgument where an envelope's namespace or topic is malformed (containerd's exchange does so)."""
    try:
        check_identifier("namespace", namespace)
    except InvalidArgument as error:
        raise InvalidArgument(f"event envelope has invalid namespace: {error.message}") from error
    try:
        check_topic(topic)
    except InvalidArgument as error:
        raise InvalidArgument(f"envelope topic: {error.message}") from error


def _now() -> timestamp_pb2.Timestamp:
    nanoseconds = time.time_ns()
    return timestamp_pb2.Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)


def adaptor(envelope: Envelope) -> Adaptor:
    """The field lookup that a filter asks: `topic`, `namespace`, `event.FIELD…`; None where there is no such value."""
    event: Message | None = None

    def look_up(path: Sequence[str]) -> str | None:
        nonlocal event
        if len(path) == 1 and path[0] in ("topic", "namespace"):
            return getattr(envelope, path[0]) or None
        if len(path) < 2 or path[0] != "event":
            return None
        if event is None:
            try:
                event = unpack(envelope.event)
            except WherryError:
                return None  # a type that this daemon doesn't know has no fields to ask for
        return _value(event, path[1:])

    return look_up


def _value(message: Message, path: Sequence[str]) -> str | None:
    """A field of an event by its path, as text; a map takes the rest of the path as its key (labels have dots)."""
    field = message.DESCRIPTOR.fields_by_name.get(path[0])
    if field is None:
        return None
    value = getattr(message, path[0])
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return value.get(".".join(path[1:])) or None
    if isinstance(value, Message):
        return _value(value, path[1:]) if len(path) > 1 else None
    if len(path) > 1 or field.is_repeated:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) or None
