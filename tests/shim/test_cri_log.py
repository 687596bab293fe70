"""The shim's log in Kubernetes' format: records, parts, rotation, a full disk, and clients that are attached."""

# ruff: noqa: ASYNC110, ASYNC240 - tests poll for what other processes do

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from google.protobuf.message import Message

from tests.shim.harness import Lab
from wherry.core import container_logs
from wherry.core.errors import FailedPrecondition, NotFound
from wherry.linux import mounts
from wherry.proto import task_v2_pb2
from wherry.proto import wherry_shim_pb2 as _shim  # noqa: F401  # declares the service
from wherry.shim import crilog
from wherry.shim.crilog import CriCopy, CriLog
from wherry.shim.loop import Loop

RECORD = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) (stdout|stderr) ([PF]) (.*)\n")
STREAMS = "wherry.shim.v1.Streams"


def records(path: Path) -> list[tuple[str, str, bytes]]:
    """Stream, tag and text of each record; every line must be one."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        match = RECORD.fullmatch(line)
        assert match, line
        datetime.fromisoformat(match[1].decode())
        found.append((match[2].decode(), match[3].decode(), match[4]))
    return found


def output(path: Path, stream: str = "stdout") -> bytes:
    """What the process wrote, put together again as a kubelet does."""
    return b"".join(text + (b"\n" if tag == "F" else b"") for name, tag, text in records(path) if name == stream)


class Pipe:
    """A process's output that goes to a log, with the loop that copies it."""

    def __init__(self, path: Path | str, max_line: int = 16384) -> None:
        self.loop = Loop()
        self.log = CriLog(str(path), max_line)
        self.read, self.write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.read, False)
        self.ended = False
        self.copy = CriCopy(self.loop, self.read, self.log, "stdout", self._end)

    def _end(self) -> None:
        self.ended = True
        self.log.close()

    def say(self, data: bytes) -> None:
        os.write(self.write, data)
        self.copy.flush()

    def turn(self, until: Callable[[], bool], seconds: float = 20) -> None:
        """Let the loop run until something is so."""
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end
            self.loop.later(0.01, lambda: None)
            self.loop.turn()

    def finish(self) -> None:
        os.close(self.write)
        self.turn(lambda: self.ended)
        self.loop.forget(self.read)
        os.close(self.read)
        self.loop.close()


def follow(pipe: Pipe, path: Path) -> int:
    """A FIFO that a client reads; its reading end."""
    os.mkfifo(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    pipe.copy.follow(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    return fd


def test_lines_are_full_records_and_the_last_part_is_one(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path / "0.log")
    pipe.say(b"one\ntwo \xff\n\nthr")
    pipe.say(b"ee")
    pipe.finish()
    assert records(tmp_path / "0.log") == [
        ("stdout", "F", b"one"),
        ("stdout", "F", b"two \xff"),
        ("stdout", "F", b""),
        ("stdout", "P", b"three"),
    ]
    assert (tmp_path / "0.log").stat().st_mode & 0o777 == 0o640


def test_a_long_line_comes_in_parts_of_the_limit_as_containerd_cuts_it(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path / "0.log", 100)
    pipe.say(b"a" * 100 + b"\n" + b"b" * 101 + b"\n" + b"c" * 250)
    pipe.say(b"c\n")
    pipe.finish()
    assert [(tag, len(text)) for _, tag, text in records(tmp_path / "0.log")] == [
        ("F", 100), ("P", 100), ("F", 1), ("P", 100), ("P", 100), ("F", 51),
    ]  # fmt: skip


def test_no_limit_is_a_megabyte(tmp_path: Path) -> None:
    for limit in (0, -1):
        path = tmp_path / f"{limit}.log"
        pipe = Pipe(path, limit)
        for _ in range(20):
            pipe.say(b"x" * 60000)
        pipe.say(b"\n")
        pipe.finish()
        assert [tag for _, tag, _ in records(path)] == ["P", "F"]
        assert output(path) == b"x" * 1200000 + b"\n"


def test_a_part_that_waits_is_written_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crilog, "PATIENCE", 0.05)
    pipe = Pipe(tmp_path / "0.log")
    pipe.say(b"name: ")
    assert records(tmp_path / "0.log") == []
    pipe.turn(lambda: bool(records(tmp_path / "0.log")))
    pipe.say(b"x\n")
    pipe.finish()
    assert records(tmp_path / "0.log") == [("stdout", "P", b"name: "), ("stdout", "F", b"x")]


def test_a_rotation_loses_no_line_and_splits_none(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    pipe = Pipe(path)
    expected, files = b"", []
    for number in range(50):
        lines = b"".join(b"line %d of %d\n" % (number, part) for part in range(20))
        expected += lines
        half = len(lines) // 2 + 3  # within a line
        pipe.say(lines[:half])
        rotated = tmp_path / f"0.log.{number}"
        path.rename(rotated)
        files.append(rotated)
        pipe.say(lines[half : half + 5])  # between the renaming and the reopening: still the old file
        pipe.log.reopen()
        pipe.say(lines[half + 5 :])
    pipe.finish()
    assert b"".join(map(output, [*files, path])) == expected
    assert all(tag == "F" for each in [*files, path] for _, tag, _ in records(each))


def test_a_log_that_cannot_be_reopened_goes_on_in_the_old_file(tmp_path: Path) -> None:
    folder = tmp_path / "pod"
    pipe = Pipe(folder / "0.log")
    folder.rename(tmp_path / "away")
    with pytest.raises(FailedPrecondition, match=r"0\.log can't be opened: No such file"):
        pipe.log.reopen()
    pipe.say(b"still\n")
    pipe.finish()
    assert output(tmp_path / "away" / "0.log") == b"still\n"
    with pytest.raises(FailedPrecondition, match="has ended"):
        pipe.log.reopen()


def test_without_a_path_nothing_is_kept_and_clients_are_served(tmp_path: Path) -> None:
    pipe = Pipe("")
    client = follow(pipe, tmp_path / "fifo")
    pipe.log.reopen()
    pipe.say(b"heard\n")
    assert os.read(client, 100) == b"heard\n"
    pipe.finish()
    assert os.read(client, 100) == b""
    os.close(client)
    assert sorted(os.listdir(tmp_path)) == ["fifo"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True)
    yield folder
    mounts.unmount_all(str(folder))


def test_a_full_disk_loses_lines_and_says_how_many(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    pipe = Pipe(small_disk / "0.log")
    pipe.say(b"before\n")
    ballast.write_bytes(b"x" * 60000)
    for _ in range(3):
        pipe.say(b"y" * 5000 + b"\n" + b"z" * 5000 + b"\n")
    ballast.unlink()
    pipe.say(b"after\n")
    pipe.finish()
    found = records(small_disk / "0.log")
    assert found[0] == ("stdout", "F", b"before")
    assert found[-1] == ("stdout", "F", b"after")
    (note,) = [text for _, _, text in found if b"missing" in text]
    lost = int(note.split()[1])
    assert lost >= 2
    assert lost + len(found) - 3 == 6


def test_clients_get_the_bytes_as_they_come(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path / "0.log")
    pipe.say(b"early\n")
    one = follow(pipe, tmp_path / "one")
    pipe.say(b"no newline")
    two = follow(pipe, tmp_path / "two")
    pipe.say(b" yet\n")
    assert os.read(one, 100) == b"no newline yet\n"
    assert os.read(two, 100) == b" yet\n"
    os.close(one)
    pipe.say(b"one is gone\n")
    pipe.say(b"and that is fine\n")
    pipe.finish()
    assert os.read(two, 100) == b"one is gone\nand that is fine\n"
    assert os.read(two, 100) == b""
    os.close(two)
    assert output(tmp_path / "0.log") == b"early\nno newline yet\none is gone\nand that is fine\n"


def test_clients_that_left_a_silent_container_are_forgotten(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path / "0.log")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        os.close(follow(pipe, tmp_path / str(number)))
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    pipe.finish()


def test_a_client_that_reads_slowly_misses_nothing(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path / "0.log")
    client = follow(pipe, tmp_path / "fifo")
    data = b"".join(b"%08d\n" % number for number in range(100000))
    writer = os.fork()
    if not writer:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(pipe.write, rest) :]
        os._exit(0)
    heard = bytearray()

    def read() -> bool:
        with contextlib.suppress(BlockingIOError):
            heard.extend(os.read(client, 3000))
        return len(heard) >= len(data)

    pipe.turn(read, 60)
    os.waitpid(writer, 0)
    pipe.finish()
    os.close(client)
    assert heard == data
    assert output(tmp_path / "0.log") == data


def test_a_client_that_reads_nothing_is_cut_off_and_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crilog, "CLIENT_PATIENCE", 0.2)
    pipe = Pipe(tmp_path / "0.log")
    client, other = follow(pipe, tmp_path / "fifo"), follow(pipe, tmp_path / "other")
    data = b"".join(b"%08d\n" % number for number in range(50000))
    writer = os.fork()
    if not writer:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(pipe.write, rest) :]
        os._exit(0)
    heard = bytearray()

    def drain() -> bool:
        with contextlib.suppress(BlockingIOError):
            heard.extend(os.read(other, 1 << 16))
        return len(heard) >= len(data)

    pipe.turn(drain, 60)
    os.waitpid(writer, 0)
    pipe.finish()
    first = bytearray()
    while part := os.read(client, 1 << 16):
        first.extend(part)
    assert len(first) < len(data)
    assert data.startswith(bytes(first))  # a beginning, without gaps
    assert heard == data
    assert output(tmp_path / "0.log") == data
    os.close(client)
    os.close(other)


# -- a real shim ------------------------------------------------------------------------------------------------------


async def ask(lab: Lab, method: str, container: str, stdout: str = "", exec_id: str = "") -> None:
    shim = next(each for each in lab.shims if each.id == container)
    request: Message = task_v2_pb2.StateRequest(id=container, exec_id=exec_id)
    if method == "Attach":
        request = task_v2_pb2.ExecProcessRequest(id=container, exec_id=exec_id, stdout=stdout)
    await shim.call(method, request, service=STREAMS)


async def wait_for(path: Path, text: bytes) -> None:
    async with asyncio.timeout(20):
        while not path.exists() or text not in path.read_bytes():
            await asyncio.sleep(0.01)


async def test_a_shim_writes_rotates_and_hands_out(lab: Lab, tmp_path: Path) -> None:
    shim = await lab.spawn("c1")
    path = tmp_path / "logs" / "a%b 0.log"
    os.mkfifo(tmp_path / "in")
    script = "echo out; echo err >&2; while read line; do echo got $line; done; printf end"
    await shim.create(
        "/bin/sh", "-c", script, streams=False, stdin=str(tmp_path / "in"), stdout=container_logs.cri_uri(str(path))
    )
    stdin = os.open(tmp_path / "in", os.O_RDWR | os.O_NONBLOCK)
    await shim.start()
    await wait_for(path, b"err")
    fifo = tmp_path / "attached"
    os.mkfifo(fifo)
    client = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    await ask(lab, "Attach", "c1", stdout=str(fifo))
    await lab.stop_listening()  # the daemon is gone
    os.write(stdin, b"one\n")
    await wait_for(path, b"got one")
    path.rename(tmp_path / "rotated")
    os.write(stdin, b"two\n")
    await wait_for(tmp_path / "rotated", b"got two")
    await ask(lab, "ReopenLog", "c1")
    os.write(stdin, b"three\n")
    await wait_for(path, b"got three")
    os.close(stdin)
    await shim.call("CloseIO", task_v2_pb2.CloseIORequest(id="c1", stdin=True))
    assert (await shim.wait()).exit_status == 0
    await wait_for(path, b"end")
    assert output(tmp_path / "rotated") == b"out\ngot one\ngot two\n"
    assert output(tmp_path / "rotated", "stderr") == b"err\n"
    assert output(path) == b"got three\nend"
    assert os.read(client, 1000) == b"got one\ngot two\ngot three\nend"
    os.close(client)
    with pytest.raises(FailedPrecondition, match="has ended"):
        await ask(lab, "ReopenLog", "c1")
    await shim.delete()


async def test_what_has_no_such_log_says_so(lab: Lab, tmp_path: Path) -> None:
    shim = await lab.spawn("c1")
    with pytest.raises(NotFound):
        await ask(lab, "ReopenLog", "c1")
    await shim.create("/bin/sleep", "1000")
    await shim.start()
    with pytest.raises(FailedPrecondition, match="no log of that kind"):
        await ask(lab, "ReopenLog", "c1")
    with pytest.raises(FailedPrecondition, match="nobody who could be joined"):
        await ask(lab, "Attach", "c1", stdout="/nowhere")
    with pytest.raises(NotFound):
        await ask(lab, "Attach", "c1", exec_id="x", stdout="/nowhere")
    await shim.kill()
    await shim.wait()
    await shim.delete()


async def test_attaching_to_a_fifo_that_nobody_reads_is_refused(lab: Lab, tmp_path: Path) -> None:
    shim = await lab.spawn("c1")
    path = tmp_path / "0.log"
    await shim.create("/bin/sleep", "1000", streams=False, stdout=container_logs.cri_uri(str(path)))
    await shim.start()
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "missing"):
        with pytest.raises(FailedPrecondition, match=name):
            await ask(lab, "Attach", "c1", stdout=str(tmp_path / name))
    await shim.kill()
    await shim.wait()
    await shim.delete()
    assert path.read_bytes() == b""


async def test_a_terminal_is_logged_and_handed_out_at_once(lab: Lab, tmp_path: Path) -> None:
    shim = await lab.spawn("c1")
    path = tmp_path / "0.log"
    os.mkfifo(tmp_path / "in")
    await shim.create(
        "/bin/sh", "-c", "printf 'name: '; read x; echo hello $x",
        streams=False, terminal=True, stdin=str(tmp_path / "in"), stdout=container_logs.cri_uri(str(path)),
    )  # fmt: skip
    stdin = os.open(tmp_path / "in", os.O_RDWR | os.O_NONBLOCK)
    os.mkfifo(tmp_path / "fifo")
    client = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    await ask(lab, "Attach", "c1", stdout=str(tmp_path / "fifo"))  # before its start: nothing is missed
    await shim.start()
    heard = bytearray()
    async with asyncio.timeout(20):
        while b"name: " not in heard:
            try:
                heard.extend(os.read(client, 100))
            except BlockingIOError:
                await asyncio.sleep(0.01)
    os.write(stdin, b"you\n")
    await shim.wait()
    await wait_for(path, b"hello you")
    assert output(path).replace(b"\r", b"") == b"name: you\nhello you\n"
    os.close(client)
    os.close(stdin)
    await shim.delete()
