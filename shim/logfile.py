"""A container's log: JSON lines as docker's json-file driver has them, in files of a limited size and number.

    {"log":"hello\\n","stream":"stdout","time":"2026-11-22T18:00:00.123456789Z"}

A record is a line, or a part of one that has no newline at its end: of 16 KiB, or what had come when 0.1 s passed (at
once with a terminal, whose reader waits for a prompt). Bytes that aren't UTF-8 are written as `\\udc80` to `\\udcff`:
valid JSON, which readers of ours turn back into the bytes and others show as U+FFFD.

The lock by which readers know whether more will come, and what a full disk does: `copying.py`.
"""

from __future__ import annotations

import contextlib
import os
from _json import encode_basestring, encode_basestring_ascii  # json.encoder's own, without its classes
from collections.abc import Callable
from functools import partial
from typing import Final

from wherry.core.container_logs import CURRENT, NAME
from wherry.shim.copying import LineCopy, LogWriter, open_log
from wherry.shim.log import log
from wherry.shim.loop import Loop

# what a record holds at most of a line (docker's defaultBufSize): a line without an end can't eat the memory
PART: Final = 16384
# seconds that a part of a line waits for the rest of it
PATIENCE: Final = 0.1


class LogFile(LogWriter):
    """The files of one log. Nothing here raises but the constructor."""

    def __init__(self, folder: str, max_size: int, max_files: int, name: str = "") -> None:
        """Open the current file to append to it, made where missing. Raises OSError."""
        super().__init__(os.path.join(folder, CURRENT))
        self._max_size = max_size
        self._max_files = max_files
        self._size = 0
        os.makedirs(folder, 0o700, exist_ok=True)
        self._open()
        if name:
            with contextlib.suppress(OSError), open(os.path.join(folder, NAME), "w") as file:
                file.write(name)

    def _open(self, *, fresh: bool = False) -> None:
        """Go on in the current file; with `fresh` in a new one, which nobody sees before it is locked: who follows it
        would take that for the end."""
        path = f"{self._path}.new" if fresh else self._path
        fd = open_log(path, fresh=fresh)
        if fresh:
            try:
                os.rename(path, self._path)
            except OSError:
                os.close(fd)
                raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._size = os.fstat(fd).st_size

    def add(self, stream: str, lines: list[bytes]) -> None:
        """Write lines, or parts of them, as records of this moment."""
        if self._fd < 0:
            return
        end = f',"stream":"{stream}","time":"{self._now()}"}}\n'
        records = [f'{{"log":{_quoted(line)}{end}'.encode() for line in lines]
        if self._lost:
            note = f'{{"log":{_quoted(self._missing.encode())},"lost":{self._lost}{end}'
            if not self._write(note.encode()):
                self._lost += len(lines)
                return
            self._lost = 0
        for count, data in self._pieces(records):
            # behind a gap nothing is written before the record that tells of it
            if self._lost or not self._write(data):
                self._lost += count

    def _pieces(self, records: list[bytes]) -> list[tuple[int, bytes]]:
        """Records joined to what is written at once, each with their number: all of them, unless that is more than the
        file may hold. A shim that got its turn late finds a pipe full of lines, which are several files' worth."""
        room = self._max_size - self._size
        together = b"".join(records)
        if not self._max_size or len(together) <= room:
            return [(len(records), together)]
        pieces: list[tuple[int, bytes]] = []
        first = length = 0
        for number, record in enumerate(records):
            if length + len(record) > room:
                if number > first:
                    pieces.append((number - first, b"".join(records[first:number])))
                first, length, room = number, 0, self._max_size
            length += len(record)
        return [*pieces, (len(records) - first, b"".join(records[first:]))]

    def _write(self, data: bytes) -> bool:
        if self._max_size and self._size and self._size + len(data) > self._max_size:
            self._rotate()
        if not self._append(data):
            return False
        self._size += len(data)
        return True

    def _rotate(self) -> None:
        """Shift the files by one and begin another; where that fails the current one grows on."""
        try:
            if self._max_files == 1:
                os.unlink(self._path)
            else:
                for number in range(self._max_files - 2, 0, -1):
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(f"{self._path}.{number}", f"{self._path}.{number + 1}")
                os.rename(self._path, f"{self._path}.1")
        except FileNotFoundError:
            with contextlib.suppress(OSError):
                os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
        except OSError as error:
            log("error", f"the container's log can't be rotated: {error.strerror}", path=self._path)
            return
        try:
            self._open(fresh=True)
        except OSError as error:
            log("error", f"the container's log can't be rotated: {error.strerror}", path=self._path)


def _quoted(line: bytes) -> str:
    try:
        return encode_basestring(line.decode())
    except UnicodeDecodeError:
        return encode_basestring_ascii(line.decode(errors="surrogateescape"))


class LogCopy(LineCopy):
    """Moves output into a log, and to a FIFO that somebody follows."""

    def __init__(
        self,
        loop: Loop,
        source: int,
        log_file: LogFile,
        stream: str,
        finished: Callable[[], None],
        *,
        prompt: bool,
        sink: int = -1,
    ) -> None:
        """`prompt`: a part of a line doesn't wait for the rest of it. `sink`: a FIFO that gets it all, too; one that
        takes nothing stops the copy, and so the writer."""
        self._sink = sink
        self._rest = b""
        write = partial(log_file.add, stream)
        super().__init__(loop, source, finished, write=write, cut=_cut, longest=PART, patience=PATIENCE, prompt=prompt)

    def stop(self) -> None:
        """Move nothing more; `finished` isn't called."""
        if not self.done and self._rest:
            self._loop.on_write(self._sink, None)
        super().stop()

    def _held(self) -> bool:
        return bool(self._rest)

    def _pass_on(self, data: bytes) -> None:
        """Give it to who follows; what doesn't fit is kept, and nothing more is read meanwhile."""
        if self._sink < 0:
            return
        try:
            written = os.write(self._sink, data)
        except BlockingIOError:
            written = 0
        except OSError:  # nobody reads there any more: the log goes on
            self._sink, written = -1, len(data)
        before, self._rest = self._rest, data[written:]
        if self._rest and not before:
            self._loop.on_read(self._source, None)
            self._loop.on_write(self._sink, self._make_room)

    def _make_room(self) -> None:
        sink = self._sink
        self._pass_on(self._rest)
        if not self._rest:
            self._loop.on_write(sink, None)
            self._loop.on_read(self._source, self._move)


def _cut(data: bytes) -> bytes:
    """The first part of what is too long, not in the middle of a character."""
    end = PART
    for back in range(1, 4):
        byte = data[end - back]
        if byte & 0xC0 != 0x80:  # the first byte of a character, or one of its own
            if byte >= 0xC0 and back < _length(byte):
                end -= back
            break
    return data[:end]


def _length(first: int) -> int:
    return 4 if first >= 0xF0 else 3 if first >= 0xE0 else 2
