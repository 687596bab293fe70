"""Streams: big output, slow readers, input and its end, terminals, files, logging programs."""

# ruff: noqa: ASYNC110, ASYNC240 - tests poll for what other processes do

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from pathlib import Path

import pytest

from tests.shim.harness import Lab
from wherry.core import errors
from wherry.proto import task_v2_pb2

MEGABYTE = 1 << 20


async def test_a_hundred_megabytes_and_a_slow_reader(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sh", "-c", "dd if=/dev/zero bs=1M count=100 2>/dev/null | tr '\\0' 'x'; echo end")
    await shim.start()
    reader = os.open(shim.bundle / "init-stdout", os.O_RDONLY | os.O_NONBLOCK)
    waiting = asyncio.create_task(shim.wait())
    try:
        # nobody reads: the writer stops, nothing is hoarded, and the shim answers
        await asyncio.sleep(0.3)
        assert (await shim.state()).status == 2
        resident = Path(f"/proc/{shim.bootstrap.pid}/statm").read_text().split()[1]
        assert int(resident) * 4096 < 80 * MEGABYTE
        digest, size, last = hashlib.sha256(), 0, b""
        async with asyncio.timeout(60):
            while True:
                try:
                    data = os.read(reader, MEGABYTE)
                except BlockingIOError:
                    await asyncio.sleep(0.001)
                    continue
                if not data:
                    break
                digest.update(data)
                size += len(data)
                last = (last + data)[-4:]
        assert size == 100 * MEGABYTE + 4
        assert last == b"end\n"
    finally:
        os.close(reader)
    assert (await waiting).exit_status == 0
    await shim.delete()
    await shim.shutdown()


async def test_output_waits_for_a_client_that_comes_late(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/echo", "unread")
    await shim.start()
    await shim.wait()
    reader = os.open(shim.bundle / "init-stdout", os.O_RDONLY | os.O_NONBLOCK)
    assert os.read(reader, 100) == b"unread\n"
    assert os.read(reader, 100) == b""
    os.close(reader)
    await shim.delete()
    await shim.shutdown()


async def test_a_client_goes_and_another_comes(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sh", "-c", "while read line; do echo got $line; done")
    await shim.start()
    for word in ("one", "two", "three"):
        out = shim.output()
        stdin = os.open(shim.bundle / "init-stdin", os.O_WRONLY | os.O_NONBLOCK)
        os.write(stdin, f"{word}\n".encode())
        await out.wait_for(f"got {word}\n".encode())
        os.close(stdin)
        out.close()
    assert (await shim.state()).status == 2
    await shim.kill(9)
    await shim.wait()
    await shim.delete()
    await shim.shutdown()


async def test_close_io_is_the_end_of_the_input(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sh", "-c", "cat; echo over")
    out = shim.output()
    await shim.start()
    stdin = os.open(shim.bundle / "init-stdin", os.O_WRONLY | os.O_NONBLOCK)
    os.write(stdin, b"input\n")
    await shim.call("CloseIO", task_v2_pb2.CloseIORequest(id="a", stdin=True))
    await out.wait_for(b"input\n")
    assert b"over" not in out.data  # the client has not closed its end
    os.write(stdin, b"more\n")
    os.close(stdin)
    assert (await shim.wait()).exit_status == 0
    await asyncio.wait_for(out.ended.wait(), 30)
    assert bytes(out.data) == b"input\nmore\nover\n"
    await shim.delete()
    await shim.shutdown()


async def test_without_streams_it_reads_and_writes_nothing(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sh", "-c", "cat; echo lost; [ /dev/null -ef /proc/self/fd/1 ]", streams=False)
    await shim.start()
    assert (await shim.wait()).exit_status == 0
    await shim.delete()
    await shim.shutdown()


async def test_a_terminal(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sh", "-c", "stty size; tty; read x; stty size; echo [$x]", terminal=True)
    out = shim.output()
    resize = task_v2_pb2.ResizePtyRequest(id="a", width=132, height=43)
    await shim.call("ResizePty", resize)
    await shim.start()
    await out.wait_for(b"43 132\r\n")
    await out.wait_for(b"/dev/")
    await shim.call("ResizePty", task_v2_pb2.ResizePtyRequest(id="a", width=80, height=24))
    stdin = os.open(shim.bundle / "init-stdin", os.O_WRONLY | os.O_NONBLOCK)
    os.write(stdin, b"typed\n")
    assert (await shim.wait()).exit_status == 0
    os.close(stdin)
    await shim.delete()
    await asyncio.wait_for(out.ended.wait(), 30)
    assert b"24 80\r\n[typed]\r\n" in out.data
    await shim.shutdown()


async def test_an_exec_with_a_terminal(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sleep", "100")
    await shim.start()
    await shim.exec(
        "t", "/bin/sh", "-c", "test -t 0 && test -t 1 && tty && head -c 200000 /dev/zero | tr '\\0' y", terminal=True
    )
    out = shim.output("stdout", "t")
    await shim.start("t")
    assert (await shim.wait("t")).exit_status == 0
    await shim.delete("t")
    await asyncio.wait_for(out.ended.wait(), 30)
    assert out.data.count(b"y") >= 200000
    await shim.kill(9)
    await shim.wait()
    await shim.delete()
    await shim.shutdown()


async def test_a_process_left_behind_does_not_hold_up_the_delete_for_ever(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sleep", "100")
    await shim.start()
    await shim.exec("x", "/bin/sh", "-c", "sleep 50 & echo done")
    out = shim.output("stdout", "x")
    await shim.start("x")
    assert (await shim.wait("x")).exit_status == 0
    async with asyncio.timeout(30):
        await shim.delete("x")
    await asyncio.wait_for(out.ended.wait(), 30)
    assert bytes(out.data) == b"done\n"
    await shim.kill(9)
    await shim.wait()
    await shim.delete()
    await shim.shutdown()


async def test_output_into_a_file(lab: Lab) -> None:
    shim = await lab.spawn("a")
    log = shim.bundle / "logs" / "out.log"
    log.parent.mkdir()
    log.write_text("before\n")
    await shim.create(
        "/bin/sh", "-c", "echo out; echo err >&2", streams=False, stdout=f"file://{log}", stderr=f"file://{log}"
    )
    await shim.start()
    await shim.wait()
    await shim.delete()
    assert sorted(log.read_text().splitlines()) == ["before", "err", "out"]
    await shim.shutdown()


LOGGER = """#!{python}
import os, sys
names = [os.environ["CONTAINER_ID"], os.environ["CONTAINER_NAMESPACE"], sys.argv[1]]
open(sys.argv[2] + ".start", "w").write(" ".join(names))
os.close(5)
text = b""
while data := os.read(3, 65536):
    text += data
open(sys.argv[2], "wb").write(text + b"|" + os.read(4, 65536))
"""


async def test_a_logging_program(lab: Lab) -> None:
    shim = await lab.spawn("a")
    program, log = shim.bundle / "logger", shim.bundle / "log.txt"
    program.write_text(LOGGER.format(python=sys.executable))
    program.chmod(0o755)
    await shim.create("/bin/sh", "-c", "echo out; echo err >&2", streams=False, stdout=f"binary://{program}?key={log}")
    await shim.start()
    await shim.wait()
    await shim.delete()
    async with asyncio.timeout(30):
        while not log.exists() or not log.read_text():
            await asyncio.sleep(0.01)
    assert (shim.bundle / "log.txt.start").read_text() == "a testing key"
    assert log.read_text() == "out\n|err\n"
    await shim.shutdown()


async def test_streams_that_can_not_be(lab: Lab) -> None:
    shim = await lab.spawn("a")
    for number, uri in enumerate(("nosuch:///x", "binary:///nowhere/logger", "/nowhere/fifo")):
        with pytest.raises(errors.WherryError) as caught:
            await shim.create("/bin/true", streams=False, stdout=uri)
        assert caught.value.message, number
    fds = os.listdir(f"/proc/{shim.bootstrap.pid}/fd")
    assert len(fds) < 14
    await shim.shutdown()
