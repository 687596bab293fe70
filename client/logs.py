"""A container's log, read from its files: no daemon is needed for that (`core/container_logs.py`, `shim/logfile.py`).

Bytes come back as the container wrote them. Whether more will come is told by the lock that the writer holds. A log in
Kubernetes' format (`shim/crilog.py`) is read the same way, `client/cri_logs.py` has what is its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from wherry.core.container_logs import CURRENT, FOLDER, NAME, SCHEME, cri_path_of, folder_of
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound

__all__ = ["Entry", "find", "folder", "nanoseconds", "open_file", "read"]

_CHUNK = 1 << 16
# so many records before the last lines may hold their parts, between those of the other stream
_FURTHER = 256
# seconds between looks at a log that is followed: just after something came, and when nothing does (a look costs 20 µs;
# what would tell of writes needs either a signal, which is the program's, or a library)
_LOOK = 0.002, 0.05
_LOCK = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


class Entry(NamedTuple):
    """A line, or a part of one without a newline at its end; `at` in nanoseconds since the epoch."""

    at: int
    stream: str
    data: bytes


def folder(uri: str) -> str:
    """Where a container's log is by its URI, for `read`: a folder, or the file of a log in Kubernetes' format.

    Raises FailedPrecondition where there is none to be read.
    """
    found = folder_of(uri) or cri_path_of(uri)
    if found:
        return found
    if uri:
        raise FailedPrecondition(
            f"the output goes to {uri}: only logs of the driver {SCHEME}, and Kubernetes', can be read here"
        )
    raise FailedPrecondition("the container has no log (--log-driver none, or it was made without one)")


def find(name: str, namespace: str) -> str:
    """The folder of a container's log by its id, the beginning of it, or its name as it was when it was started; asks
    nobody. Raises NotFound, InvalidArgument where several begin so."""
    top = os.path.join(FOLDER, namespace)
    try:
        ids = os.listdir(top)
    except OSError:
        ids = []
    if name in ids:
        return os.path.join(top, name)
    for each in ids:
        with contextlib.suppress(OSError), open(os.path.join(top, each, NAME)) as file:
            if file.read() == name:
                return os.path.join(top, each)
    found = [each for each in ids if name and each.startswith(name)]
    if len(found) > 1:
        raise InvalidArgument(f"several containers' ids begin with {name!r}")
    if not found:
        raise NotFound(f"no log of a container {name!r} in {top}: not found")
    return os.path.join(top, found[0])


def read(
    path: str, *, since: float | None = None, until: float | None = None, tail: int | None = None, follow: bool = False
) -> Iterator[Entry]:
    """The entries of a log, oldest first, by what `folder` gave; times in seconds since the epoch, `tail` in lines.

    With `follow` it goes on until the container's output has ended (or `until` has come). Raises NotFound.
    """
    reader = _reader(path)
    first = None if since is None else int(since * 1e9)
    last = None if until is None else int(until * 1e9)
    try:
        entries = reader.kept() if tail is None else reader.last(tail)
        yield from _between(entries, first, last)
        if follow:
            yield from _between(reader.coming(until), first, last)
    finally:
        reader.close()


def _reader(path: str) -> _Reader:
    if os.path.isdir(path):
        return _Reader(os.path.join(path, CURRENT), _files, _parse)
    from wherry.client import cri_logs

    return _Reader(path, cri_logs.files, cri_logs.parse)


def _between(entries: Iterable[Entry], first: int | None, last: int | None) -> Iterator[Entry]:
    for entry in entries:
        if (first is None or entry.at >= first) and (last is None or entry.at <= last):
            yield entry


class _Reader:
    """The files of one log, opened before they are read: what is rotated away meanwhile is still here."""

    def __init__(
        self, path: str, files: Callable[[str], Iterator[int]], parse: Callable[[bytes], Entry | None]
    ) -> None:
        """`path` is the current file; `files` opens that and the ones before it, newest first, for whoever asks."""
        self._path = path
        self._open_all = files
        self._parse = parse
        self._files: list[int] = []
        self._before = -1
        self._rest = b""
        self._files = self._newer_than(0)
        if not self._files:
            raise NotFound(f"no log in {path}: not found")

    def kept(self) -> Iterator[Entry]:
        """What is there now."""
        for fd in self._files:
            yield from self._read(fd)

    def last(self, lines: int) -> list[Entry]:
        """The last lines of what is there now, with their parts; the rest is left unread."""
        found: deque[Entry] = deque()
        seen: set[str] = set()  # streams of which a record was kept
        whole: set[str] = set()  # of these, those whose oldest line here has all its parts
        count = further = 0
        backwards = (entry for fd in reversed(self._files) for entry in _backwards(fd, self._parse))
        for entry in backwards if lines > 0 else ():
            stream = entry.stream
            if entry.data.endswith(b"\n") or stream not in seen:  # the last record of a line
                if count == lines:
                    whole.add(stream)
                else:
                    count += 1
            if stream not in whole:
                seen.add(stream)
                found.appendleft(entry)
            # the streams' parts lie between each other; one that is silent before its line isn't looked for for ever
            further += count == lines
            if further > _FURTHER or (count == lines and seen <= whole):
                break
        for fd in self._files:
            os.lseek(fd, 0, os.SEEK_END)
        # the current file may end in half a record that is being written
        self._rest = _unfinished(self._files[-1])
        return list(found)

    def coming(self, until: float | None) -> Iterator[Entry]:
        """What comes, until nobody writes any more."""
        pause = _LOOK[0]
        while until is None or time.time() < until:
            current = self._files[-1]
            # the one before is given up when this one is locked, not earlier: asked in this order one of them is
            before = _is_written(self._before)
            written = _is_written(current) or before
            for entry in self._read(current):
                pause = _LOOK[0]
                yield entry
            following = self._newer_than(os.fstat(current).st_ino)
            if following:
                # nothing is written to a file any more that another one has followed
                yield from self._read(current)
                self._forget_before()
                self._before = self._files.pop()
                self._files += following
                for fd in following[:-1]:
                    self._rest = b""
                    yield from self._read(fd)
                self._rest = b""
            elif not written:
                return
            else:
                time.sleep(pause)
                pause = min(pause * 1.5, _LOOK[1])

    def _newer_than(self, inode: int) -> list[int]:
        """The files that came after one (all where there is none of this number), oldest first.

        The newest is looked for first: a rotation meanwhile shows a file twice and hides none.
        """
        found: list[int] = []
        seen: set[int] = set()
        for fd in self._open_all(self._path):
            status = os.fstat(fd)
            if status.st_ino == inode:
                os.close(fd)
                break
            if status.st_ino in seen:
                os.close(fd)
            else:
                seen.add(status.st_ino)
                found.insert(0, fd)
        return found

    def _read(self, fd: int) -> Iterator[Entry]:
        while data := os.read(fd, _CHUNK):
            lines = (self._rest + data).split(b"\n")
            self._rest = lines.pop()
            for line in lines:
                entry = self._parse(line)
                if entry is not None:
                    yield entry

    def _forget_before(self) -> None:
        if self._before >= 0:
            os.close(self._before)
            self._before = -1

    def close(self) -> None:
        """Free the files."""
        self._forget_before()
        for fd in self._files:
            os.close(fd)
        self._files = []


def _files(path: str) -> Iterator[int]:
    """While a rotation renames, one number is missing; behind the last file two are."""
    number = missing = 0
    while missing < 2:
        fd = open_file(f"{path}.{number}" if number else path)
        number += 1
        if fd < 0:
            missing += 1
        else:
            missing = 0
            yield fd


def open_file(path: str) -> int:
    """A file to read; -1 where there is none."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1


def _is_written(fd: int) -> bool:
    """Whether a shim holds the lock."""
    if fd < 0:
        return False
    try:
        kind = struct.unpack_from("@h", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _LOCK))[0]
    except OSError:
        return False
    return bool(kind != fcntl.F_UNLCK)


def _parse(line: bytes) -> Entry | None:
    """An entry of a record; None for what is none (half of one, after a disk was full)."""
    try:
        value = json.loads(line)
        return Entry(nanoseconds(value["time"]), value["stream"], value["log"].encode("utf-8", "surrogateescape"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


_days: dict[str, int] = {}


def nanoseconds(text: str) -> int:
    """RFC 3339 in UTC with up to nine digits of a fraction. Raises ValueError."""
    day = text[:10]
    start = _days.get(day)
    if start is None:
        import calendar

        _days.clear()
        start = _days[day] = calendar.timegm((int(day[:4]), int(day[5:7]), int(day[8:10]), 0, 0, 0))
    seconds = start + int(text[11:13]) * 3600 + int(text[14:16]) * 60 + int(text[17:19])
    return seconds * 10**9 + int(text[19:].strip(".Z").ljust(9, "0") or 0)


def _backwards(fd: int, parse: Callable[[bytes], Entry | None]) -> Iterator[Entry]:
    """The entries of a file, the last one first."""
    at = os.fstat(fd).st_size
    rest = b""
    first = True
    while at > 0:
        length = min(_CHUNK, at)
        at -= length
        lines = (os.pread(fd, length, at) + rest).split(b"\n")
        rest = lines.pop(0)
        if first and lines:
            lines.pop()  # empty, or half a record
        first = False
        for line in reversed(lines):
            entry = parse(line)
            if entry is not None:
                yield entry
    entry = parse(rest) if rest else None
    if entry is not None:
        yield entry


def _unfinished(fd: int) -> bytes:
    size = os.lseek(fd, 0, os.SEEK_CUR)
    length = min(_CHUNK, size)
    return os.pread(fd, length, size - length).rpartition(b"\n")[2]
