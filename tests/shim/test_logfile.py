"""The shim's log writer: records, parts, bytes, rotation, a full disk, and the reader that follows it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wherry.client import logs
from wherry.core import container_logs
from wherry.core.errors import InvalidArgument, NotFound
from wherry.shim import copying, logfile
from wherry.shim.logfile import PART, LogCopy, LogFile
from wherry.shim.loop import Loop


def records(folder: Path, name: str = "json.log") -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


class Pipe:
    """A process's output that goes to a log, with the loop that copies it."""

    def __init__(self, folder: Path, *, prompt: bool = False, size: int = 0, files: int = 1) -> None:
        self.loop = Loop()
        self.log = LogFile(str(folder), size, files)
        self.read, self.write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.read, False)
        self.ended = False
        self.copy = LogCopy(self.loop, self.read, self.log, "stdout", self._end, prompt=prompt)

    def _end(self) -> None:
        self.ended = True
        self.log.close()

    def say(self, data: bytes) -> None:
        """Write, and have it copied."""
        os.write(self.write, data)
        self.copy.flush()

    def turn(self, seconds: float) -> None:
        """Let the loop run for a while."""
        over = self.loop.sleep(seconds)
        while not over.done:
            self.loop.turn()

    def finish(self) -> None:
        """The process ended."""
        os.close(self.write)
        while not self.ended:
            self.loop.turn()
        self.loop.forget(self.read)
        os.close(self.read)
        self.loop.close()


def test_lines_become_records_with_time_and_stream(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path)
    before = time.time_ns()
    pipe.say('hello\n"quoted" \\ \t grün\n\n'.encode())
    pipe.finish()
    found = records(tmp_path)
    assert [each["log"] for each in found] == ["hello\n", '"quoted" \\ \t grün\n', "\n"]
    assert {each["stream"] for each in found} == {"stdout"}
    assert set(found[0]) == {"log", "stream", "time"}
    (first, *_) = logs.read(str(tmp_path))
    assert before <= first.at <= time.time_ns()
    assert "grün" in (tmp_path / "json.log").read_text()
    assert oct((tmp_path / "json.log").stat().st_mode & 0o777) == "0o640"


def test_parts_of_a_line_wait_a_little_for_the_rest(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path)
    pipe.say(b"a")
    pipe.say(b"b")
    assert (tmp_path / "json.log").read_bytes() == b""
    pipe.turn(logfile.PATIENCE * 3)
    assert [each["log"] for each in records(tmp_path)] == ["ab"]
    pipe.say(b"c\nd")
    pipe.finish()
    assert [each["log"] for each in records(tmp_path)] == ["ab", "c\n", "d"]


def test_a_prompt_is_there_at_once(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path, prompt=True)
    pipe.say(b"/ # ")
    assert [each["log"] for each in records(tmp_path)] == ["/ # "]
    pipe.finish()


def test_a_line_without_an_end_is_cut_but_not_within_a_character(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path)
    line = ("x" + "€" * 20000).encode()
    for at in range(0, len(line), 5000):
        pipe.say(line[at : at + 5000])
    pipe.say(b"\n" + b"y" * (3 * PART) + b"\n")
    pipe.finish()
    found = records(tmp_path)
    assert all(len(each["log"].encode()) <= PART for each in found)
    assert "".join(each["log"] for each in found).encode() == line + b"\n" + b"y" * (3 * PART) + b"\n"
    assert "\\ud" not in (tmp_path / "json.log").read_text()


def test_any_bytes_come_back_as_they_were(tmp_path: Path) -> None:
    data = os.urandom(200_000) + bytes(range(256)) * 3 + b"\xed\xa0\x80\xf0\x9f\x98\x80\xff"
    pipe = Pipe(tmp_path)
    for at in range(0, len(data), 30_000):
        pipe.say(data[at : at + 30_000])
    pipe.finish()
    for line in (tmp_path / "json.log").read_bytes().splitlines():
        line.decode()  # valid UTF-8
        json.loads(line)
    assert b"".join(entry.data for entry in logs.read(str(tmp_path))) == data


def test_files_are_limited_in_size_and_number(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path, size=8192, files=3)
    for number in range(1000):
        pipe.say(f"line {number}\n".encode())
    pipe.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["json.log", "json.log.1", "json.log.2"]
    assert all(path.stat().st_size <= 8192 for path in tmp_path.iterdir())
    numbers = [int(entry.data.split()[1]) for entry in logs.read(str(tmp_path))]
    assert numbers == list(range(numbers[0], 1000))
    assert len(numbers) > 200


def test_a_pipe_full_of_lines_makes_several_files(tmp_path: Path) -> None:
    """What a shim finds that got its turn late."""
    pipe = Pipe(tmp_path, size=16384, files=3)
    pipe.say(b"first\n")
    pipe.say(b"".join(b"line %d\n" % number for number in range(3000)))
    pipe.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["json.log", "json.log.1", "json.log.2"]
    assert all(path.stat().st_size <= 16384 for path in tmp_path.iterdir())
    numbers = [int(entry.data.split()[1]) for entry in logs.read(str(tmp_path))]
    assert numbers == list(range(numbers[0], 3000))
    assert len(numbers) > 400


def test_one_file_alone_begins_anew(tmp_path: Path) -> None:
    pipe = Pipe(tmp_path, size=4096, files=1)
    for number in range(500):
        pipe.say(f"line {number}\n".encode())
    pipe.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["json.log"]
    assert records(tmp_path)[-1]["log"] == "line 499\n"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_loses_lines_and_says_how_many(small_disk: Path) -> None:
    pipe = Pipe(small_disk)
    line = b"z" * 99 + b"\n"
    for _ in range(1500):
        pipe.say(line)
    kept = len(records(small_disk))
    assert 100 < kept < 1500
    pipe.turn(0.01)
    os.truncate(small_disk / "json.log", 0)
    pipe.log._size = 0
    pipe.say(b"there is room\n")
    pipe.finish()
    note, last = records(small_disk)
    assert int(note["lost"]) == 1500 - kept
    assert "could not be written" in note["log"]
    assert last["log"] == "there is room\n"


def test_a_folder_that_was_removed_is_made_again_at_the_next_file(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    pipe = Pipe(folder, size=4096, files=2)
    pipe.say(b"one\n")
    (folder / "json.log").unlink()
    folder.rmdir()
    for number in range(100):
        pipe.say(f"line {number}\n".encode())
    pipe.finish()
    assert records(folder)[-1]["log"] == "line 99\n"


def follow(folder: Path, write: Callable[[], None]) -> bytes:
    thread = threading.Thread(target=write)
    thread.start()
    try:
        return b"".join(entry.data for entry in logs.read(str(folder), follow=True))
    finally:
        thread.join()


def test_a_follower_sees_all_over_rotations_and_ends_with_the_writer(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path), 16384, 50)

    def write() -> None:
        for number in range(3000):
            log.add("stdout", [f"line {number}\n".encode()])
            if number % 50 == 0:
                time.sleep(0.002)
        log.close()

    assert follow(tmp_path, write).decode().splitlines() == [f"line {number}" for number in range(3000)]


def test_files_are_found_while_a_rotation_renames_them(tmp_path: Path) -> None:
    """Between two renames one number is missing: that isn't the end of the files."""
    for number in (1, 3):
        (tmp_path / f"json.log.{number}").write_text("")
    reader = logs._reader(str(tmp_path))
    try:
        assert [os.fstat(fd).st_ino for fd in reader._files] == [
            (tmp_path / f"json.log.{number}").stat().st_ino for number in (3, 1)
        ]
    finally:
        reader.close()


def test_a_follower_may_begin_with_the_last_lines_or_with_none(tmp_path: Path) -> None:
    for tail, before in ((2, b"2\n3\n"), (0, b"")):
        folder = tmp_path / str(tail)
        log = LogFile(str(folder), 0, 1)
        log.add("stdout", [b"1\n", b"2\n", b"3\n"])
        reader = logs._reader(str(folder))
        try:
            assert b"".join(entry.data for entry in reader.last(tail)) == before
            log.add("stdout", [b"4\n"])
            log.close()
            assert [entry.data for entry in reader.coming(None)] == [b"4\n"]
        finally:
            reader.close()


def test_the_last_lines_are_counted_with_their_parts_and_over_files(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path), 4096, 4)
    for number in range(120):
        log.add("stdout" if number % 2 else "stderr", [f"{number} ".encode(), b"and its end\n"])
    log.add("stdout", [b"half"])
    log.close()
    got = b"".join(entry.data for entry in logs.read(str(tmp_path), tail=3))
    assert got == b"118 and its end\n119 and its end\nhalf"
    everything = b"".join(entry.data for entry in logs.read(str(tmp_path)))
    assert b"".join(entry.data for entry in logs.read(str(tmp_path), tail=100_000)) == everything


def test_the_last_lines_are_whole_where_the_other_stream_wrote_between_their_parts(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path), 0, 1)
    log.add("stdout", [b"before\n", b"a"])
    log.add("stderr", [b"between\n"])
    log.add("stdout", [b"b"])
    log.add("stderr", [b"half"])
    log.add("stdout", [b"c\n"])
    log.close()
    data = [[entry.data for entry in logs.read(str(tmp_path), tail=tail)] for tail in range(5)]
    assert data == [
        [],
        [b"a", b"b", b"c\n"],
        [b"a", b"b", b"half", b"c\n"],
        [b"a", b"between\n", b"b", b"half", b"c\n"],
        [b"before\n", b"a", b"between\n", b"b", b"half", b"c\n"],
    ]


def test_half_a_record_is_passed_over(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path), 0, 1)
    log.add("stdout", [b"one\n"])
    log.close()
    with (tmp_path / "json.log").open("ab") as file:
        file.write(b'{"log":"tor\n[]\n{"log":1,"stream":"stdout","time":"x"}\n')
    log = LogFile(str(tmp_path), 0, 1)
    log.add("stdout", [b"two\n"])
    log.close()
    assert [entry.data for entry in logs.read(str(tmp_path))] == [b"one\n", b"two\n"]
    assert [entry.data for entry in logs.read(str(tmp_path), tail=5)] == [b"one\n", b"two\n"]


def test_entries_between_two_times(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path), 0, 1)
    times = []
    for number in range(3):
        log.add("stdout", [b"%d\n" % number])
        times.append(time.time())
        time.sleep(0.01)
    log.close()
    assert [entry.data for entry in logs.read(str(tmp_path), since=times[0])] == [b"1\n", b"2\n"]
    assert [entry.data for entry in logs.read(str(tmp_path), until=times[0])] == [b"0\n"]
    with pytest.raises(NotFound):
        list(logs.read(str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (10 << 20, 5)),
        ({"max-size": "64k", "max-file": "2"}, (64 << 10, 2)),
        ({"max-size": "1GiB"}, (1 << 30, 5)),
        ({"max-size": "-1"}, (0, 5)),
        ({"max-size": "100"}, None),
        ({"max-size": "much"}, None),
        ({"max-file": "0"}, None),
        ({"max-file": "x"}, None),
        ({"tag": "x"}, None),
    ],
)
def test_options(options: dict[str, str], expected: tuple[int, int] | None) -> None:
    if expected is None:
        with pytest.raises(InvalidArgument, match="log option"):
            container_logs.uri_of("default", "c", options)
    else:
        uri = container_logs.uri_of("default", "c", options)
        assert container_logs.folder_of(uri) == "/var/log/wherry/default/c"
        assert container_logs.limits(options) == expected


def test_who_follows_gets_it_all_and_a_slow_one_makes_the_writer_wait(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    sink = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    pipe = Pipe(tmp_path / "log")
    pipe.copy.stop()
    pipe.copy = LogCopy(pipe.loop, pipe.read, pipe.log, "stdout", pipe._end, prompt=False, sink=sink)
    written = [b"%063d\n" % number for number in range(4096)]

    def write() -> None:
        for line in written:
            os.write(pipe.write, line)

    thread = threading.Thread(target=write)
    thread.start()
    pipe.turn(0.3)
    assert thread.is_alive()  # the FIFO and the pipe are full
    got = b""
    while len(got) < sum(map(len, written)):
        pipe.turn(0.01)
        with contextlib.suppress(BlockingIOError):
            got += os.read(reader, 1 << 20)
    thread.join()
    os.close(reader)
    # nobody is there any more: the log goes on
    pipe.say(b"alone\n")
    pipe.finish()
    os.close(sink)
    assert got == b"".join(written)
    assert [item["log"].encode() for item in records(tmp_path / "log")] == [*written, b"alone\n"]


def test_a_file_that_follows_is_locked_before_anybody_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogFile(str(tmp_path), 200, 2)
    seen = []

    def look(fd: int, command: int, value: bytes) -> bytes:
        current = tmp_path / "json.log"
        seen.append(current.exists() and os.fstat(fd).st_ino == current.stat().st_ino)
        return fcntl.fcntl(fd, command, value)

    calls = type("calls", (), {"fcntl": staticmethod(look), "F_OFD_SETLK": fcntl.F_OFD_SETLK})
    monkeypatch.setattr(copying, "fcntl", calls)
    for number in range(10):
        log.add("stdout", [b"line %d\n" % number])
    log.close()
    assert len(seen) > 3
    assert not any(seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["json.log", "json.log.1"]
