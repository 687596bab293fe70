"""The journal of events: numbers that only grow, nothing told twice, nothing missed, what is too old, a full disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.daemon.stores import killed
from wherry.core.errors import OutOfRange, ResourceExhausted
from wherry.core.typeurl import pack, unpack_as
from wherry.daemon import events_journal
from wherry.daemon.events import Exchange
from wherry.daemon.events_journal import BLOCK, Journal, Retention, key_of
from wherry.daemon.events_kept import KeptEventsService
from wherry.daemon.metadata import Metadata
from wherry.proto import wherry_events_pb2 as pb
from wherry.proto.events_pb2 import TaskDelete, TaskExit, TaskStart
from wherry.proto.service import Context
from wherry.proto.types_pb2 import Envelope


def envelope(number: int, topic: str = "/tasks/start", at: int = 0) -> Envelope:
    made = Envelope(namespace="ns", topic=topic, event=pack(TaskStart(container_id=f"c{number}", pid=number)))
    made.timestamp.FromNanoseconds(at or time.time_ns())
    return made


async def settled(journal: Journal, count: int, place: int = 0) -> list[int]:
    """The numbers after a place, once there are so many."""
    numbers: list[int] = []
    async with asyncio.timeout(20):
        while len(numbers) < count:
            numbers += [number for number, _ in await journal.after(numbers[-1] if numbers else place)]
    return numbers


@pytest.fixture
async def metadata(tmp_path: Path) -> AsyncIterator[Metadata]:
    opened = await Metadata.open(str(tmp_path / "m.db"))
    yield opened
    await opened.close()


async def test_numbers_go_on_over_an_orderly_end(metadata: Metadata) -> None:
    journal = await Journal.open(metadata, Retention())
    for number in range(5):
        journal.add(envelope(number))
    assert await settled(journal, 5) == [1, 2, 3, 4, 5]
    await journal.close()
    journal = await Journal.open(metadata, Retention())
    assert journal.newest == 5
    journal.add(envelope(6))
    assert await settled(journal, 1, 5) == [6]
    await journal.close()


async def test_numbers_only_grow_where_the_last_events_were_lost(metadata: Metadata) -> None:
    journal = await Journal.open(metadata, Retention())
    for number in range(10):
        journal.add(envelope(number))
    seen = (await settled(journal, 10))[-1]
    # a power loss: what was reserved was synced, the last events weren't
    await metadata.write(lambda db: db.execute("DELETE FROM events WHERE sequence > 4"))
    later = await Journal.open(metadata, Retention())
    assert later.place_after(seen) == seen
    later.add(envelope(11))
    (first,) = await settled(later, 1, seen)
    assert first == BLOCK + 1
    for each in (journal, later):
        await each.close()


async def test_numbers_are_reserved_on_disk_before_they_are_given(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_journal, "BLOCK", 8)
    journal = await Journal.open(metadata, Retention())
    for number in range(100):
        journal.add(envelope(number))
        if number % 7 == 0:
            await settled(journal, 1, journal.newest)
    numbers = await settled(journal, 100)
    assert numbers == sorted(set(numbers))
    (reserved,) = metadata.row("SELECT reserved FROM event_sequence") or (0,)
    assert reserved >= numbers[-1]
    await journal.close()


async def test_an_event_that_is_told_twice_is_kept_once(metadata: Metadata) -> None:
    exchange = Exchange()
    exchange.journal = journal = await Journal.open(metadata, Retention())
    told = envelope(1, at=time.time_ns() - 5 * 10**9)
    with exchange.subscribe() as subscription:
        await exchange.forward(told)
        await exchange.forward(told)
        await exchange.forward(envelope(2))
        assert [(await anext(subscription)).event.value, (await anext(subscription)).event.value] == [
            told.event.value,
            envelope(2).event.value,
        ]
    assert len(await journal.after(0)) == 2
    await journal.close()


async def test_an_end_that_shim_and_daemon_tell_is_one_end(metadata: Metadata) -> None:
    exchange = Exchange()
    exchange.journal = journal = await Journal.open(metadata, Retention())
    exit_ = TaskExit(container_id="c", id="c", pid=7, exit_status=3)
    exit_.exited_at.GetCurrentTime()
    by_shim = Envelope(namespace="ns", topic="/tasks/exit", event=pack(exit_))
    by_shim.timestamp.GetCurrentTime()
    await exchange.forward(by_shim)
    await exchange.publish_kept("ns", "/tasks/exit", exit_)
    deleted = TaskDelete(container_id="c", pid=7, exit_status=3, exited_at=exit_.exited_at)
    gone = Envelope(namespace="ns", topic="/tasks/delete", event=pack(deleted))
    gone.timestamp.GetCurrentTime()
    await exchange.forward(gone)
    deleted.id = "c"
    await exchange.publish_kept("ns", "/tasks/delete", deleted)
    topics = [Envelope.FromString(kept).topic for _, kept in await journal.after(0)]
    assert topics == ["/tasks/exit", "/tasks/delete"]
    await journal.close()


async def test_what_is_too_old_goes_and_cannot_be_resumed(metadata: Metadata) -> None:
    journal = await Journal.open(metadata, Retention(seconds=100, count=0))
    now = time.time_ns()
    for number in range(10):
        journal.add(envelope(number, at=now - (200 - number * 20) * 10**9))
    await settled(journal, 10)
    assert await journal.trim(now) == 5
    assert journal.dropped == 5
    assert journal.place_after(5) == 5
    assert journal.place_after(0) == 5
    with pytest.raises(OutOfRange, match="not kept any more"):
        journal.place_after(4)
    with pytest.raises(OutOfRange, match="no event has had the number"):
        journal.place_after(10**9)
    with pytest.raises(OutOfRange, match="too slow"):
        await journal.after(4)
    await journal.close()
    again = await Journal.open(metadata, Retention())
    with pytest.raises(OutOfRange):
        again.place_after(4)
    await again.close()


async def test_no_more_than_so_many_are_kept(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_journal, "DROP_PAGE", 7)
    journal = await Journal.open(metadata, Retention(seconds=0, count=20))
    for number in range(100):
        journal.add(envelope(number, at=1))
    await settled(journal, 100)
    assert await journal.trim() == 80
    assert [number for number, _ in await journal.after(80)] == list(range(81, 101))
    assert metadata.row("SELECT count(*) FROM events") == (20,)
    await journal.close()


async def test_a_reader_goes_from_old_pages_to_the_newest_without_a_gap(metadata: Metadata) -> None:
    journal = await Journal.open(metadata, Retention())
    total = 3 * events_journal.TAIL
    for number in range(total // 2):
        journal.add(envelope(number))
    await settled(journal, total // 2)

    async def rest() -> None:
        for number in range(total // 2, total):
            journal.add(envelope(number))
            if number % 50 == 0:
                await asyncio.sleep(0.001)

    writer = asyncio.create_task(rest())
    assert await settled(journal, total) == list(range(1, total + 1))
    await writer
    await journal.close()


async def test_a_full_disk_loses_nothing_that_matters(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_journal, "RETRY", 0.02)
    exchange = Exchange()
    exchange.journal = journal = await Journal.open(metadata, Retention())
    (pages,) = metadata.row("PRAGMA page_count") or (0,)
    await metadata.write(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    refused = None
    for number in range(1000):
        try:
            await exchange.forward(envelope(number))
        except ResourceExhausted as error:
            refused = number, error
            break
    assert refused is not None
    await exchange.publish_kept("ns", "/tasks/exit", TaskExit(container_id="ours"))
    await metadata.write(lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchone())
    await exchange.forward(envelope(refused[0]))  # as its shim does
    numbers = await settled(journal, refused[0] + 2)
    assert numbers == sorted(set(numbers))
    kept = await metadata.rows("SELECT envelope FROM events")
    exits = [each for (data,) in kept if (each := Envelope.FromString(data)).topic == "/tasks/exit"]
    assert [unpack_as(each.event, TaskExit).container_id for each in exits] == ["ours"]
    await journal.close()


async def test_while_nothing_can_be_written_what_matters_stays(
    metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_journal, "MAX_WAITING", 10)
    journal = await Journal.open(metadata, Retention())
    for number in range(40):
        journal.add(envelope(number, "/tasks/exit" if number % 4 == 0 else "/tasks/start"))
    await settled(journal, 10)
    topics = [Envelope.FromString(kept).topic for _, kept in await journal.after(0)]
    assert topics.count("/tasks/exit") == 10
    await journal.close()


WRITES = """
import asyncio, os, sys
from tests.daemon.test_events_journal import envelope
from wherry.daemon.events_journal import Journal, Retention
from wherry.daemon.metadata import Metadata

async def main():
    journal = await Journal.open(await Metadata.open(sys.argv[1]), Retention())
    number = 0
    while True:
        number += 1
        await journal.add(envelope(number), key=os.urandom(8), confirm=True)
        print(journal.newest, flush=True)

asyncio.run(main())
"""


async def test_what_was_confirmed_survives_sigkill_and_no_number_comes_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "m.db")
    last = 0
    for _ in range(3):
        said = [int(line) for line in killed(WRITES, path, lines=60)]
        assert said, "it was killed before it wrote"
        assert said[0] > last
        last = said[-1]
        metadata = await Metadata.open(path)
        kept = {number for (number,) in await metadata.rows("SELECT sequence FROM events")}
        assert set(said) <= kept
        await metadata.close()


async def collect(stream: AsyncIterator[pb.Event], count: int) -> list[pb.Event]:
    found = []
    async with asyncio.timeout(30):
        async for event in stream:
            found.append(event)
            if len(found) == count:
                break
    return found


async def test_the_service_begins_where_it_is_told(metadata: Metadata) -> None:
    exchange = Exchange()
    exchange.journal = journal = await Journal.open(metadata, Retention())
    service = KeptEventsService(journal)
    base = time.time_ns() - 100 * 10**9
    for number in range(6):
        topic = "/tasks/exit" if number % 2 else "/tasks/start"
        await exchange.forward(envelope(number, topic, at=base + number * 10**9))
    context = Context()
    after = await collect(service.subscribe(pb.SubscribeRequest(after=2), context), 4)
    assert [event.sequence for event in after] == [3, 4, 5, 6]
    everything = await collect(service.subscribe(pb.SubscribeRequest(after=0), context), 6)
    assert [event.sequence for event in everything] == [1, 2, 3, 4, 5, 6]
    request = pb.SubscribeRequest(filters=['topic=="/tasks/exit"'])
    request.since.FromNanoseconds(base + 2 * 10**9)
    request.until.FromNanoseconds(base + 4 * 10**9)
    assert [event.sequence async for event in service.subscribe(request, context)] == [4]
    with pytest.raises(OutOfRange):
        await collect(service.subscribe(pb.SubscribeRequest(after=10**9), context), 1)
    found = await service.range(pb.RangeRequest(), context)
    assert (found.oldest, found.newest, found.resume_from) == (1, 6, 0)
    assert found.oldest_at.ToNanoseconds() == base

    live = asyncio.create_task(collect(service.subscribe(pb.SubscribeRequest(), context), 1))
    await asyncio.sleep(0)
    exchange.publish("ns", "/tasks/start", TaskStart(container_id="live"))
    assert unpack_as((await live)[0].envelope.event, TaskStart).container_id == "live"
    await journal.close()


async def test_bookmarks_keep_a_quiet_subscriber_up_to_date(metadata: Metadata) -> None:
    exchange = Exchange()
    exchange.journal = journal = await Journal.open(metadata, Retention())
    for number in range(2500):
        journal.add(envelope(number))
    await settled(journal, 2500)
    request = pb.SubscribeRequest(after=0, filters=["topic==nothing"], bookmarks=True)
    found = await collect(KeptEventsService(journal).subscribe(request, Context()), 3)
    assert [event.sequence for event in found] == [0, 1000, 2000]
    assert not any(event.HasField("envelope") for event in found)
    await journal.close()


def test_keys_tell_events_apart() -> None:
    one = envelope(1)
    assert key_of(one) == key_of(Envelope.FromString(one.SerializeToString()))
    assert key_of(one) != key_of(envelope(2, at=one.timestamp.ToNanoseconds()))
