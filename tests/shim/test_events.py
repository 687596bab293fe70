"""Events reach the daemon in order and none that matters is lost, whatever the daemon does meanwhile."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from tests.shim.harness import Lab
from wherry.proto import events_pb2, task_v2_pb2
from wherry.proto.ttrpc.client import TtrpcClient
from wherry.shim.events import CONFIRM, MAX_QUEUED, Publisher
from wherry.shim.loop import Children, Loop


async def test_a_daemon_that_was_away_gets_everything_in_order(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await lab.stop_listening()
    await shim.create("/bin/true")
    await shim.start()
    await shim.wait()
    await shim.delete()
    assert lab.events.topics == []
    await lab.listen()
    # what a daemon does after its restart: it connects to the shim, which takes that for a sign
    again = await TtrpcClient.connect(shim.bootstrap.path)
    await lab.events.wait_for("/tasks/delete")
    assert lab.events.topics == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    await again.close()
    await shim.shutdown()


async def test_a_mute_daemon_holds_up_nothing(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await lab.stop_listening()
    mute = socket.socket(socket.AF_UNIX)
    mute.bind(lab.address)
    mute.listen(1)
    await shim.create("/bin/true")
    await shim.start()
    async with asyncio.timeout(CONFIRM - 0.5):
        assert (await shim.wait()).exit_status == 0
        await shim.delete()
    mute.close()
    os.unlink(lab.address)
    await lab.listen()
    await lab.events.wait_for("/tasks/delete")
    await shim.shutdown()


def test_a_full_queue_keeps_what_matters(work: Path) -> None:
    loop = Loop()
    children = Children(loop)
    try:
        publisher = Publisher(loop, children)
        publisher.address("testing", str(work / "nobody.ttrpc"))
        publisher.publish(events_pb2.TaskExit(container_id="first"))
        for number in range(MAX_QUEUED + 100):
            publisher.publish(events_pb2.TaskPaused(container_id=str(number)))
        publisher.publish(events_pb2.TaskOOM(container_id="last"))
        queued = [topic for topic, _ in publisher.queue]
        assert len(queued) == MAX_QUEUED
        assert (queued[0], queued[-1]) == ("/tasks/exit", "/tasks/oom")
        publisher.close()
    finally:
        children.close()
        loop.close()


def test_without_an_address_the_publish_command_is_run(work: Path) -> None:
    program = work / "publish"
    program.write_text(f'#!/bin/sh\necho "$@" >> {work}/said; cat >> {work}/said; echo >> {work}/said\n')
    program.chmod(0o755)
    loop = Loop()
    children = Children(loop)
    try:
        publisher = Publisher(loop, children)
        publisher.address("testing", "", binary=str(program), grpc_address="/run/d.sock")
        publisher.publish(events_pb2.TaskStart(container_id="one", pid=1))
        publisher.publish(events_pb2.TaskExit(container_id="two", pid=1))

        async def emptied() -> None:
            await loop.within(10, publisher.emptied(), "publishing")

        loop.run_until(emptied())
    finally:
        children.close()
        loop.close()
    first, second = (work / "said").read_bytes().split(b"\n--address")
    assert first.startswith(b"--address /run/d.sock publish --topic /tasks/start --namespace testing")
    assert b"containerd.events.TaskStart" in first
    assert b"/tasks/exit" in second


async def test_a_peer_that_talks_garbage_harms_only_itself(lab: Lab) -> None:
    shim = await lab.spawn("a")
    for garbage in (b"GET / HTTP/1.1\r\n\r\n" * 10, b"\xff" * 4096, b"\x00\x00\x00\x05\x00\x00\x00\x01\x01\x00hello"):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(shim.bootstrap.path)
            peer.sendall(garbage)
    response = await shim.call("Connect", task_v2_pb2.ConnectRequest(id="a"))
    assert response.shim_pid == shim.bootstrap.pid
    await shim.shutdown()
