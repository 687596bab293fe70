"""`wherry.events.v1.Events`: subscribing with memory; containerd's own `Subscribe` begins with what comes next."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from wherry.core.filters import compile_filters
from wherry.daemon.events import adaptor
from wherry.daemon.events_journal import Journal
from wherry.proto import wherry_events_pb2 as pb
from wherry.proto.service import Context
from wherry.proto.types_pb2 import Envelope

# events that the filters held back until a bookmark says how far the subscriber has come
BOOKMARK_AFTER = 1000


class KeptEventsService:
    """The journal for clients; like containerd's, it shows the events of all namespaces."""

    SERVICE = "wherry.events.v1.Events"

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    async def subscribe(self, request: pb.SubscribeRequest, context: Context) -> AsyncIterator[pb.Event]:
        """Stream from where the request says; see the contract. A reader that is too slow gets OUT_OF_RANGE at last."""
        matches = compile_filters(list(request.filters))
        place = await self._place(request)
        if request.bookmarks:
            yield pb.Event(sequence=place)
        until = request.until.ToNanoseconds() if request.HasField("until") else None
        passed = 0
        while True:
            left = None if until is None else max(0.0, (until - time.time_ns()) / 1e9)
            kept = await self._journal.after(place, left)
            if not kept and left is not None:
                return
            for place, serialized in kept:
                envelope = Envelope.FromString(serialized)
                if (until is None or envelope.timestamp.ToNanoseconds() <= until) and matches(adaptor(envelope)):
                    passed = 0
                    yield pb.Event(sequence=place, envelope=envelope)
                    continue
                passed += 1
                if request.bookmarks and passed >= BOOKMARK_AFTER:
                    passed = 0
                    yield pb.Event(sequence=place)

    async def range(self, request: pb.RangeRequest, context: Context) -> pb.RangeResponse:
        """What is kept."""
        oldest = await self._journal.oldest()
        response = pb.RangeResponse(resume_from=self._journal.dropped)
        if oldest is not None:
            response.oldest, response.newest = oldest[0], self._journal.newest
            response.oldest_at.CopyFrom(Envelope.FromString(oldest[1]).timestamp)
        return response

    async def _place(self, request: pb.SubscribeRequest) -> int:
        start = request.WhichOneof("start")
        if start == "after":
            return self._journal.place_after(request.after)
        if start == "since":
            return await self._journal.place_since(request.since.ToNanoseconds())
        return self._journal.newest
