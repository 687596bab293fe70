"""The event bus: who sees what, and that nobody waits for the slow."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from tests.daemon.test_restart import events
from tests.wherryd import Wherryd
from wherry.core.errors import InvalidArgument, ResourceExhausted
from wherry.core.typeurl import pack, unpack_as
from wherry.daemon import events as bus
from wherry.daemon.events import Exchange, Subscription
from wherry.proto.events_pb2 import ContainerUpdate, TaskCreate, TaskExit, TaskIO
from wherry.proto.types_pb2 import Envelope


async def next_of(subscription: Subscription) -> Envelope:
    return await asyncio.wait_for(anext(subscription), 30)


async def test_a_subscriber_sees_what_comes_after_it_in_order() -> None:
    exchange = Exchange()
    exchange.publish("ns", "/tasks/exit", TaskExit(container_id="before"))
    with exchange.subscribe() as subscription:
        for number in range(3):
            exchange.publish("ns", "/tasks/exit", TaskExit(container_id=str(number)))
        seen = [await next_of(subscription) for _ in range(3)]
    assert [unpack_as(each.event, TaskExit).container_id for each in seen] == ["0", "1", "2"]
    assert seen[0].namespace == "ns"
    assert seen[0].timestamp.seconds > 0
    assert seen[0].event.type_url == "containerd.events.TaskExit"


@pytest.mark.parametrize(
    ("filters", "matches"),
    [
        ([], True),
        (['topic=="/tasks/create"'], True),
        (["topic~=|^/tasks/|"], True),
        (['topic=="/images/create"'], False),
        (['topic=="/images/create"', "namespace==ns"], True),
        (["topic~=|^/tasks/|,namespace==other"], False),
        (["event.container_id==c1"], True),
        (["event.container_id==c2"], False),
        (["event.io.stdin==in"], True),
        (["event.io.terminal==true"], True),
        (["event.rootfs==x"], False),
        (["event.nothing"], False),
        (["event"], False),
    ],
)
async def test_filters(filters: list[str], matches: bool) -> None:
    exchange = Exchange()
    with exchange.subscribe(filters) as subscription:
        event = TaskCreate(container_id="c1", io=TaskIO(stdin="in", terminal=True))
        exchange.publish("ns", "/tasks/create", event)
        exchange.publish("ns", "/end", TaskExit())
        subscription._matches = lambda _: True
        exchange.publish("ns", "/end", TaskExit())
        first = await next_of(subscription)
    assert (first.topic == "/tasks/create") == matches


async def test_labels_with_dots_and_unknown_types() -> None:
    exchange = Exchange()
    with exchange.subscribe(['event.labels."io.x/y"==z']) as subscription:
        exchange.publish("ns", "/a", pack(TaskExit()))
        stranger = pack(TaskExit())
        stranger.type_url = "somebody.elses.Type"
        exchange.publish("ns", "/b", stranger)
        exchange.publish("ns", "/c", ContainerUpdate(labels={"io.x/y": "z"}))
        assert (await next_of(subscription)).topic == "/c"


async def test_a_slow_subscriber_is_cut_off_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "QUEUE_LIMIT", 10)
    exchange = Exchange()
    with exchange.subscribe() as slow, exchange.subscribe() as quick:
        seen = []
        for _ in range(20):
            exchange.publish("ns", "/a", TaskExit())
            seen.append(await next_of(quick))
        assert len(seen) == 20
        with pytest.raises(ResourceExhausted, match="too slow"):
            await next_of(slow)


async def test_publishing_from_another_thread_and_watching() -> None:
    exchange = Exchange()
    heard: list[str] = []
    exchange.watch("/a", lambda envelope: heard.append(envelope.topic))
    with exchange.subscribe() as subscription:
        thread = threading.Thread(target=exchange.publish, args=("ns", "/a", TaskExit()))
        thread.start()
        thread.join()
        assert (await next_of(subscription)).topic == "/a"
    assert heard == ["/a"]


async def test_closing_ends_the_reader() -> None:
    exchange = Exchange()
    subscription = exchange.subscribe()

    async def read() -> int:
        return len([envelope async for envelope in subscription])

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    exchange.publish("ns", "/a", TaskExit())
    await asyncio.sleep(0)
    subscription.close()
    assert await asyncio.wait_for(reader, 30) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda envelope: setattr(envelope, "namespace", "a/b"), "invalid namespace"),
        (lambda envelope: setattr(envelope, "namespace", ""), "invalid namespace"),
        (lambda envelope: setattr(envelope, "topic", ""), "envelope topic"),
        (lambda envelope: setattr(envelope, "topic", "tasks"), "must start with '/'"),
        (lambda envelope: setattr(envelope, "topic", "/"), "envelope topic"),
        (lambda envelope: setattr(envelope, "topic", "/a//b"), "envelope topic"),
        (lambda envelope: envelope.ClearField("timestamp"), "timestamp must be set"),
    ],
)
async def test_malformed_envelopes_are_refused(change: Callable[[Envelope], None], says: str) -> None:
    exchange = Exchange()
    envelope = Envelope(namespace="ns", topic="/a", event=pack(TaskExit()))
    envelope.timestamp.GetCurrentTime()
    await exchange.forward(envelope)
    change(envelope)
    with pytest.raises(InvalidArgument, match=says):
        await exchange.forward(envelope)


def test_ctr_sees_events_and_its_filters_are_checked(wherryd: Wherryd) -> None:
    with events(wherryd) as seen:
        wherryd.ctr("namespaces", "create", "fresh")
    assert any("/namespaces/create" in line and '"name":"fresh"' in line for line in seen)
    done = wherryd.ctr("events", "topic==", check=False, timeout=10)
    assert done.returncode != 0
