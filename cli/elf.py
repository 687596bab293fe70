"""What a program needs to start: its interpreter and its libraries, read from its ELF headers.

Nothing is run for it (ldd would run the program's own loader). The rules are those of elf(5) and ld.so(8).
"""

from __future__ import annotations

import glob
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from wherry.core.errors import InvalidArgument, NotFound
from wherry.core.tuples import NamedTuple

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 1, 5, 15, 29
# where the loader looks at last; the first two are Debian's, by architecture
DEFAULT_FOLDERS = ("/lib", "/usr/lib", "/lib64", "/usr/lib64")
# a file may include others (ld.so.conf.d); loops end here
MAX_INCLUDES = 64


class _Segment(NamedTuple):
    kind: int
    offset: int
    address: int
    size: int


@dataclass(frozen=True, slots=True)
class Elf:
    """A program's or library's needs. `interpreter` is "" for a library and for what is linked statically."""

    path: str
    machine: int
    bits: int
    interpreter: str
    needed: tuple[str, ...]
    rpath: tuple[str, ...]
    runpath: tuple[str, ...]


def is_elf(path: str) -> bool:
    """Whether a file is an ELF file."""
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def read(path: str) -> Elf:
    """The headers of a file; raises InvalidArgument where it is no ELF file or a damaged one."""
    with open(path, "rb") as file:
        data = file.read()
    if data[:4] != b"\x7fELF" or len(data) < 64:
        raise InvalidArgument(f"{path} isn't an ELF file")
    try:
        return _parse(path, data)
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"{path}: damaged ELF headers: {error}") from error


def _parse(path: str, data: bytes) -> Elf:
    bits = {1: 32, 2: 64}[data[4]] if data[4] in {1, 2} else 0
    order = {1: "<", 2: ">"}.get(data[5], "")
    if not bits or not order:
        raise InvalidArgument(f"{path}: unknown ELF class or byte order")
    (machine,) = struct.unpack_from(f"{order}H", data, 18)
    segments = list(_segments(data, bits, order))
    interpreter = ""
    entries: list[tuple[int, int]] = []
    for segment in segments:
        if segment.kind == _PT_INTERP:
            interpreter = data[segment.offset : segment.offset + segment.size].rstrip(b"\0").decode()
        elif segment.kind == _PT_DYNAMIC:
            entries = list(_dynamic(data, segment, bits, order))
    strings = next((_file_offset(segments, value) for tag, value in entries if tag == _DT_STRTAB), 0)

    def texts(wanted: int) -> list[str]:
        found = (data[strings + value : data.index(b"\0", strings + value)] for tag, value in entries if tag == wanted)
        return [text.decode() for text in found]

    def folders(wanted: int) -> tuple[str, ...]:
        return tuple(folder for text in texts(wanted) for folder in text.split(":") if folder)

    return Elf(path, machine, bits, interpreter, tuple(texts(_DT_NEEDED)), folders(_DT_RPATH), folders(_DT_RUNPATH))


def _segments(data: bytes, bits: int, order: str) -> Iterator[_Segment]:
    if bits == 64:
        (table,) = struct.unpack_from(f"{order}Q", data, 32)
        size, count = struct.unpack_from(f"{order}HH", data, 54)
    else:
        (table,) = struct.unpack_from(f"{order}I", data, 28)
        size, count = struct.unpack_from(f"{order}HH", data, 42)
    for number in range(count):
        at = table + number * size
        if bits == 64:
            kind, _, offset, address, _, length = struct.unpack_from(f"{order}IIQQQQ", data, at)
        else:
            kind, offset, address, _, length = struct.unpack_from(f"{order}IIIII", data, at)
        yield _Segment(kind, offset, address, length)


def _dynamic(data: bytes, segment: _Segment, bits: int, order: str) -> Iterator[tuple[int, int]]:
    entry = struct.Struct(f"{order}qQ" if bits == 64 else f"{order}iI")
    for at in range(segment.offset, segment.offset + segment.size, entry.size):
        tag, value = entry.unpack_from(data, at)
        if tag == 0:
            return
        yield tag, value


def _file_offset(segments: list[_Segment], address: int) -> int:
    for segment in segments:
        if segment.kind == _PT_LOAD and segment.address <= address < segment.address + segment.size:
            return address - segment.address + segment.offset
    raise InvalidArgument("the table of strings lies in no segment")


def configured_folders(path: str = "/etc/ld.so.conf") -> list[str]:
    """The folders that the host's loader is told of; none where it has no such file (musl)."""
    found: list[str] = []
    queue, seen = [path], 0
    while queue and seen < MAX_INCLUDES:
        seen += 1
        try:
            with open(queue.pop(0), encoding="utf-8") as file:
                lines = [line.partition("#")[0].strip() for line in file]
        except OSError:
            continue
        for line in filter(None, lines):
            word, _, rest = line.partition(" ")
            if word == "include":
                pattern = os.path.join(os.path.dirname(path), rest.strip())
                queue += sorted(glob.glob(pattern))
            else:
                found.append(line)
    return found


class Libraries:
    """Finds libraries as the loader would, and remembers what it read."""

    def __init__(self) -> None:
        triplets = glob.glob("/lib/*-linux-*") + glob.glob("/usr/lib/*-linux-*")
        musl = [
            folder
            for path in glob.glob("/etc/ld-musl-*.path")
            for folder in open(path, encoding="utf-8").read().replace("\n", ":").split(":")  # noqa: SIM115 - short
            if folder
        ]
        self._folders = [*configured_folders(), *sorted(triplets), *musl, *DEFAULT_FOLDERS]
        self._known: dict[str, Elf] = {}

    def needs(self, program: str) -> list[str]:
        """Everything that a program needs to start, as paths, itself first; raises NotFound for a missing library."""
        start = self._read(program)
        found = [program]
        if start.interpreter:
            found.append(start.interpreter)
        queue = [start]
        while queue:
            elf = queue.pop(0)
            for name in elf.needed:
                path = self._find(elf, start, name)
                if path not in found and os.path.realpath(path) != os.path.realpath(start.interpreter or "/"):
                    found.append(path)
                    queue.append(self._read(path))
        return found

    def _read(self, path: str) -> Elf:
        if path not in self._known:
            self._known[path] = read(path)
        return self._known[path]

    def _find(self, elf: Elf, start: Elf, name: str) -> str:
        if "/" in name:
            return name
        # an own DT_RUNPATH switches DT_RPATH off, the program's included (ld.so(8))
        own = elf.runpath or (*elf.rpath, *start.rpath)
        for folder in [*(_expand(item, elf) for item in own), *self._folders]:
            path = os.path.join(folder, name)
            if os.path.isfile(path) and is_elf(path):
                other = self._read(path)
                if (other.machine, other.bits) == (elf.machine, elf.bits):
                    return path
        raise NotFound(f"{elf.path} needs {name}, which is in none of the loader's folders")


def _expand(folder: str, elf: Elf) -> str:
    origin = os.path.dirname(os.path.realpath(elf.path))
    return folder.replace("${ORIGIN}", origin).replace("$ORIGIN", origin)
