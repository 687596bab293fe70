"""Memory that is as it was is given back, and nothing else changes. In processes of their own: memory is replaced."""

# ruff: noqa: ASYNC110 - tests poll for what other processes do

from __future__ import annotations

import asyncio
import platform
import subprocess
import sys
import time

import pytest

from tests.shim.harness import Lab
from wherry.shim import machine_code

pytestmark = pytest.mark.skipif(
    platform.machine() not in machine_code.MACHINE_CODE, reason="no machine code for this processor: shims are heavier"
)

# later versions write no counts of immortal objects, so that there is little to give back
COUNTS = sys.version_info < (3, 12)
_HEAD = """
import gc, json, os, sys
import wherry.shim.forkserver
from wherry.shim import template

def private():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Anonymous:"))

data = {str(n): [n, str(n) * 3, {"x": n}] for n in range(5000)}
said = json.dumps(data)
gc.collect()
gc.freeze()
taken = template.take()
assert taken is not None
assert json.dumps(data) == said
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", _HEAD + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fork_gives_back_what_it_only_looked_at() -> None:
    out = run("""
if os.fork() == 0:
    for value in data.values():  # counts references up and down again, all over the heap
        repr(value)
    before = private()
    dropped = taken.give_back()
    print(before, private(), dropped, flush=True)
    assert json.dumps(data) == said
    os._exit(0)
assert os.wait()[1] == 0
assert json.dumps(data) == said
""")
    before, after, dropped = (int(word) for word in out.split())
    if COUNTS:
        assert dropped > 50
        assert after < before - dropped * 2


def test_what_was_changed_stays_changed() -> None:
    run("""
for round in range(5):
    if os.fork() == 0:
        for key in list(data)[:: 7]:
            data[key] = "changed" + key
        more = [bytes(1000) + str(n).encode() for n in range(20_000)]  # grows the heap, and arenas with it
        for _ in range(3):
            taken.give_back()
            assert all(data[key] == "changed" + key for key in list(data)[:: 7])
            assert data["1"] == [1, "111", {"x": 1}]
            assert all(more[n].endswith(str(n).encode()) for n in range(20_000))
        del more
        taken.give_back()
        assert len(json.dumps(data)) > 1000
        os._exit(0)
    assert os.wait()[1] == 0
assert json.dumps(data) == said
""")


def test_references_that_are_kept_keep_no_page() -> None:
    out = run("""
if os.fork() == 0:
    kept = list(data.values()) * 3  # each of them has three references more now
    before = private()
    dropped = taken.give_back()
    print(before, private(), dropped, flush=True)
    for _ in range(50):
        del kept
        taken.give_back()
        kept = [value for value in data.values() for _ in range(7)]
        taken.give_back()
    del kept
    gc.collect()
    assert json.dumps(data) == said
    data.clear()
    gc.collect()
    os._exit(0)
assert os.wait()[1] == 0
assert json.dumps(data) == said
""")
    before, after, dropped = (int(word) for word in out.split())
    if COUNTS:
        assert dropped > 50
        assert after < before - dropped * 2


def test_objects_that_only_code_knows_live_on() -> None:
    run("""
def function(a):
    return ("constant", a, frozenset({"inner"}), 1.5, b"bytes", 10**30)
if os.fork() == 0:
    for _ in range(2000):
        results = [function(n) for n in range(10)]
        taken.give_back()
    assert results[3] == ("constant", 3, frozenset({"inner"}), 1.5, b"bytes", 10**30)
    os._exit(0)
assert os.wait()[1] == 0
""")


def test_settled_code_does_the_same() -> None:
    run("""
from wherry.shim.settled import settle
gc.unfreeze()
class A:
    def __init__(self, x): self.x = x
class B:
    __slots__ = ("x",)
    def __init__(self, x): self.x = x
class C(A):
    @property
    def x(self): return self.y
    @x.setter
    def x(self, value): self.y = value * 2
def work(items):
    total, seen = 0, {}
    for number, item in enumerate(items):
        a, b = (number, item)
        seen[item] = b
        total += len(str(item)) if a > 3 else item.x if hasattr(item, "x") else 1
        if item == 7 or item is None: total = total * 1.5 - number
        seen.setdefault("k", []).append(a)
    return total, len(seen), seen["k"][-1]
inputs = [[1, 2.5, "three", None, (5,), 7] * 3, [A(1), B(2), C(3), 7], list(range(40)), ["x" * n for n in range(20)]]
for warm in (0, 1, 5, 30):
    expected = [work(items) for _ in range(max(warm, 1)) for items in inputs][-len(inputs):]
    assert settle() > 100 or sys.version_info[:2] != (3, 11)
    for _ in range(30):
        assert [work(items) for items in inputs] == expected
""")


async def test_a_shim_at_rest_is_lighter(lab: Lab) -> None:
    shim = await lab.spawn("a")
    await shim.create("/bin/sleep", "100")
    await shim.start()
    busy = private_of(shim.bootstrap.pid)
    end = time.monotonic() + 30
    while COUNTS and private_of(shim.bootstrap.pid) > busy * 0.85 and time.monotonic() < end:
        await asyncio.sleep(0.05)
    assert private_of(shim.bootstrap.pid) <= busy * (0.85 if COUNTS else 1.5)
    await shim.exec("x", "/bin/sh", "-c", "exit 3")
    await shim.start("x")
    assert (await shim.wait("x")).exit_status == 3
    await asyncio.sleep(0.6)
    await shim.kill()
    assert (await shim.wait()).exit_status == 137
    await shim.delete()
    await shim.shutdown()


def private_of(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Private_Dirty:"))
