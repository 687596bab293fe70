"""Modules found on the shorter way are the modules that the interpreter finds, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# a package that the finder takes for one of protobuf's; google's own is a regular package, so its path is given
_PROGRAM = """
import sys
sys.dont_write_bytecode = {dont_write}
from wherry.cli import loading
loading.install()
loading.install()
assert sys.meta_path.count(loading.Finder) == 1
import google.protobuf
google.protobuf.__path__.insert(0, {folder!r})
import google.protobuf.probe as probe
print(probe.VALUE, type(probe.__loader__).__name__, probe.__file__, probe.__cached__)
"""


def _probe(folder: Path, *, dont_write: bool = False) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    program = _PROGRAM.format(folder=str(folder), dont_write=dont_write)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def _bytecode(folder: Path) -> Path:
    return folder / "__pycache__" / f"probe.{sys.implementation.cache_tag}.pyc"


def test_a_module_without_bytecode_is_compiled_and_kept(tmp_path: Path) -> None:
    source = tmp_path / "probe.py"
    source.write_text("VALUE = 'first'")
    assert _probe(tmp_path) == ["first", "Loader", str(source), str(_bytecode(tmp_path))]
    assert _bytecode(tmp_path).exists()
    assert _probe(tmp_path)[0] == "first"


def test_bytecode_of_another_text_is_not_used(tmp_path: Path) -> None:
    source = tmp_path / "probe.py"
    source.write_text("VALUE = 'first'")
    os.utime(source, (1_000_000, 1_000_000))
    _probe(tmp_path)
    # of the same length: its time says it; then of the same time: its length says it
    source.write_text("VALUE = 'other'")
    os.utime(source, (1_000_001, 1_000_001))
    assert _probe(tmp_path)[0] == "other"
    source.write_text("VALUE = 'longer'")
    os.utime(source, (1_000_001, 1_000_001))
    assert _probe(tmp_path)[0] == "longer"


@pytest.mark.parametrize("length", [0, 3, 15])
def test_bytecode_that_was_cut_off_is_made_anew(tmp_path: Path, length: int) -> None:
    (tmp_path / "probe.py").write_text("VALUE = 'first'")
    _probe(tmp_path)
    whole = _bytecode(tmp_path).read_bytes()
    _bytecode(tmp_path).write_bytes(whole[:length])
    assert _probe(tmp_path)[0] == "first"
    assert _bytecode(tmp_path).read_bytes() == whole


def test_bytecode_alone_is_no_module(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text("VALUE = 'first'")
    _probe(tmp_path)
    (tmp_path / "probe.py").unlink()
    with pytest.raises(AssertionError, match="No module named"):
        _probe(tmp_path)


def test_a_long_module_is_read_whole(tmp_path: Path) -> None:
    """Also where it is longer than what the short way takes in."""
    (tmp_path / "probe.py").write_text(f"TEXT = {'x' * 300_000!r}\nVALUE = len(TEXT)")
    assert _probe(tmp_path)[0] == "300000"
    assert _probe(tmp_path, dont_write=True)[0] == "300000"


def test_a_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "__init__.py").write_text("from google.protobuf.probe.inner import VALUE")
    (tmp_path / "probe" / "inner.py").write_text("VALUE = 'inside'")
    assert _probe(tmp_path)[:2] == ["inside", "Loader"]


def test_another_path_for_modules_is_respected(tmp_path: Path) -> None:
    """PYTHONPATH goes before the standard library: nothing is shortened then."""
    (tmp_path / "argparse.py").write_text("VALUE = 'mine'")
    program = (
        "import sys; from wherry.cli import loading; loading.install(); import argparse; "
        "print(argparse.VALUE, loading.Finder in sys.meta_path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["mine", "False"], done.stderr


def test_modules_that_are_loaded_late_are_whole() -> None:
    """What stands in place of a module until it is needed is that module when it is."""
    program = (
        "from wherry.cli import startup; startup.prepare(); import threading, datetime, hashlib, inspect, typing; "
        "import google.protobuf.timestamp_pb2, dataclasses; before = type(typing).__name__; "
        "from threading import Lock, RLock; from google.protobuf import text_encoding; "
        "thread = threading.Thread(target=print, args=('in a thread',)); thread.start(); thread.join(); "
        "print(threading.current_thread() is threading.main_thread(), type(Lock()) is type(threading.Lock())); "
        "print(datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc).isoformat(), datetime.date.__module__); "
        "print(hashlib.sha256(b'').hexdigest()[:4], inspect.isfunction(print), text_encoding.CEscape(b'a\\n', False)); "
        "made = dataclasses.make_dataclass('Made', [('x', typing.ClassVar[int]), ('y', int)]); "
        "print(before, typing.Optional[int] == typing.Union[int, None], [f.name for f in dataclasses.fields(made)])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "in a thread",
        "True True",
        "2026-01-02T00:00:00+00:00 datetime",
        "e3b0 False a\\n",
        "_Deferred True ['y']",
    ], done.stderr


_EACH = """
import os, pkgutil, sys
from wherry.cli import startup
startup.prepare()
import wherry.cli, wherry.client
import wherry.client.api, wherry.client.values, wherry.client.tasks, wherry.cli.table  # what most of them load
for package in (wherry.cli, wherry.client):
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "__main__" and not os.fork():
            __import__(f"{package.__name__}.{module.name}")
            os._exit(0)
        if module.name != "__main__" and os.wait()[1]:
            print(package.__name__, module.name)
"""


def test_every_module_can_be_the_first() -> None:
    """Each of them finds what it needs in what stands in place of other modules."""
    done = subprocess.run([sys.executable, "-c", _EACH], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
