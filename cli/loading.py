"""Modules found in fewer steps than the interpreter's own importers take, which are a seventh of a command's time.

What is loaded, and when bytecode is out of date, stays as it was: a module of the standard library, of Wherry or of
protobuf is a file of source, and beside it there is bytecode made of just this file (its size and its time are noted in
the bytecode). Everything else, and every doubt, is left to the importers that were there before.

They list each folder of the path for the first module that might be in it, and look at each file several times.
"""

from __future__ import annotations

import os
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER, SourceFileLoader
from marshal import loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, ModuleType

_BUILTIN = frozenset(sys.builtin_module_names)
_STDLIB = os.path.dirname(os.__file__)
_OURS = ("wherry.", "google.protobuf.")
# PEP 552: magic number, no flags (the time decides, not a hash), time, size
_PLAIN = MAGIC_NUMBER + b"\0\0\0\0"
_HEADER = 16
# what is read into, one after the other: most modules fit, and memory isn't asked for and given back each time
_buffers = [bytearray(1 << 18)]


def install() -> None:
    """Puts the finder before all others, once; not where bytecode or modules have another place than usual."""
    usual = sys.pycache_prefix is None and not sys.flags.optimize and sys.implementation.cache_tag
    if usual and "PYTHONPATH" not in os.environ and Finder not in sys.meta_path:
        sys.meta_path.insert(0, Finder)


class Loader(SourceFileLoader):
    """The interpreter's loader; the bytecode that fits is read without it."""

    def __init__(self, fullname: str, path: str, found: os.stat_result) -> None:
        super().__init__(fullname, path)
        self._found = found

    def get_code(self, fullname: str) -> CodeType | None:
        """The module's code: from its bytecode, or as it is got elsewhere."""
        found = self._found
        time, size = int(found.st_mtime) & 0xFFFFFFFF, found.st_size & 0xFFFFFFFF
        buffer = _buffers.pop() if _buffers else bytearray()  # another thread has it
        try:
            length = _read(_bytecode(self.path), buffer)
            header = _PLAIN + time.to_bytes(4, "little") + size.to_bytes(4, "little")
            if _HEADER < length < len(buffer) and buffer[:_HEADER] == header:
                code: CodeType = loads(memoryview(buffer)[_HEADER:length])  # noqa: S302 - as importlib does
                return code
        except (OSError, EOFError, ValueError, TypeError):
            pass  # there is none, or it was cut off
        finally:
            if buffer:
                _buffers.append(buffer)
        return super().get_code(fullname)


class Finder:
    """A finder of `sys.meta_path`."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where a module is; None leaves it to others. `path` is that of its package."""
        if path is None:
            return None if fullname in _BUILTIN else _find(fullname, f"{_STDLIB}/{fullname}")
        parent, _, name = fullname.rpartition(".")
        if not fullname.startswith(_OURS) and list(path) != [f"{_STDLIB}/{parent.replace('.', '/')}"]:
            return None
        folder = next(iter(path), "")
        return _find(fullname, f"{folder}/{name}") if folder else None


def _find(fullname: str, path: str) -> ModuleSpec | None:
    """The spec of a module in a file, or of a package in a folder."""
    source = f"{path}.py"
    try:
        found = os.stat(source)
    except OSError:
        source = f"{path}/__init__.py"
        try:
            found = os.stat(source)
        except OSError:
            return None
    spec = ModuleSpec(fullname, Loader(fullname, source, found), origin=source)
    spec.has_location = True
    spec.cached = _bytecode(source)
    if source.endswith("/__init__.py"):
        spec.submodule_search_locations = [path]
    return spec


def _bytecode(source: str) -> str:
    folder, _, name = source.rpartition("/")
    return f"{folder}/__pycache__/{name[:-3]}.{sys.implementation.cache_tag}.pyc"


def _read(path: str, buffer: bytearray) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.readv(descriptor, [buffer])
    finally:
        os.close(descriptor)
