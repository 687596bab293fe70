"""A shim whose container was deleted is the next container's; what it carries over, and what it doesn't."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from tests.peers import need
from tests.wherryd import BUSYBOX, Wherryd
from wherry.client import connect
from wherry.client.containers import Container
from wherry.client.launch import Launch, create, remove
from wherry.client.spec import SpecOptions
from wherry.client.tasks import Stdio
from wherry.core.errors import NotFound
from wherry.daemon import vacant
from wherry.proto.ttrpc.client import TtrpcClient
from wherry.shim.client import Bootstrap

if TYPE_CHECKING:
    from wherry.daemon.link import Shim


@pytest.fixture(scope="module")
def daemon() -> Iterator[Wherryd]:
    daemon = Wherryd()
    try:
        daemon.start()
        daemon.folder.chmod(0o711)  # a user namespace's root has to get there
        daemon.import_busybox()
        daemon.import_busybox("other")
        yield daemon
    finally:
        daemon.close()


@pytest.fixture(autouse=True)
def none_before_none_after(daemon: Wherryd) -> Iterator[None]:
    gone(daemon)
    yield
    assert daemon.settle() == []
    assert "call failed" not in daemon.log_text()


def gone(daemon: Wherryd) -> None:
    """Wait until no shim is in reserve."""
    deadline = time.monotonic() + 10
    while daemon.vacant():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(pid: int) -> None:
    """Wait until a process is no more."""
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:  # it has just ended
        return ""


def shim_of(daemon: Wherryd, identity: str, namespace: str = "default") -> int:
    found = [pid for pid in daemon.processes() if f" -namespace {namespace} -id {identity} " in title(pid)]
    assert len(found) == 1, found
    return found[0]


def one(daemon: Wherryd) -> int:
    """A container that comes and goes; the pid of the shim that is in reserve then."""
    daemon.ctr("run", "--rm", BUSYBOX, "before", "true")
    deadline = time.monotonic() + 5
    while not (there := daemon.vacant()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert len(there) == 1
    return there[0]


def test_the_next_container_has_the_same_shim_under_its_own_name(daemon: Wherryd) -> None:
    pid = one(daemon)
    assert title(pid) == f"containerd-shim-wherry-v1 -vacant -address {daemon.address}"
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert list((daemon.state / "s").glob("*")) == []
    daemon.ctr("run", "-d", BUSYBOX, "after", "sleep", "1000", namespace="other")
    try:
        assert shim_of(daemon, "after", "other") == pid
        bundle = daemon.state / "tasks" / "other" / "after"
        assert os.readlink(f"/proc/{pid}/cwd") == str(bundle)
        assert os.readlink(f"/proc/{pid}/fd/2") == str(bundle / "shim.log")
        done = daemon.ctr("task", "exec", "--exec-id", "e", "after", "echo", "in it", namespace="other")
        assert done.stdout == "in it\n"
        # it outlives the daemon as any other
        daemon.restart()
        assert shim_of(daemon, "after", "other") == pid
        done = daemon.ctr("task", "exec", "--exec-id", "e", "after", "echo", "still", namespace="other")
        assert done.stdout == "still\n"
    finally:
        daemon.ctr("task", "kill", "-s", "KILL", "after", namespace="other", check=False)
        time.sleep(0.3)
        daemon.ctr("task", "delete", "after", namespace="other", check=False)
        daemon.ctr("containers", "delete", "after", namespace="other", check=False)


def test_many_containers_in_one_shim_leave_it_as_light_as_the_second_did(daemon: Wherryd) -> None:
    def weight(pid: int) -> tuple[int, int]:
        time.sleep(0.6)  # until it has given back what it can
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        anonymous = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Anonymous:"))
        return anonymous, len(os.listdir(f"/proc/{pid}/fd"))

    first = one(daemon)
    assert one(daemon) == first
    kilobytes, descriptors = weight(first)
    for _ in range(30):
        assert one(daemon) == first
    more, now = weight(first)
    assert now == descriptors
    assert more < kilobytes + 700


def test_it_has_an_end(daemon: Wherryd) -> None:
    first = one(daemon)
    for _ in range(vacant._LIVES + 1):
        daemon.ctr("run", "--rm", BUSYBOX, "before", "true")
    assert one(daemon) != first


def test_a_quiet_daemon_keeps_none(daemon: Wherryd) -> None:
    pid = one(daemon)
    gone(daemon)
    ended(pid)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_daemon(daemon: Wherryd, end: signal.Signals) -> None:
    pid = one(daemon)
    daemon.kill() if end is signal.SIGKILL else daemon.stop()
    ended(pid)
    daemon.start()


def test_one_that_was_killed_is_not_missed(daemon: Wherryd) -> None:
    pid = one(daemon)
    os.kill(pid, signal.SIGKILL)
    assert daemon.ctr("run", "--rm", BUSYBOX, "after", "echo", "fine").stdout == "fine\n"


def test_what_went_wrong_in_it_is_told_as_by_any_other(daemon: Wherryd) -> None:
    texts = []
    for warm in (False, True):
        gone(daemon)
        if warm:
            one(daemon)
        done = daemon.ctr("run", "--rm", BUSYBOX, "bad", "/no/such", check=False)
        assert done.returncode != 0
        texts.append(done.stderr)
        daemon.ctr("containers", "delete", "bad", check=False)
        assert daemon.settle() == []
    assert texts[0] == texts[1]
    assert "/no/such" in texts[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"],
        ["--net-host"],
        ["--memory-limit", "20000000"],
        ["--privileged"],
        ["--read-only"],
    ],
    ids=" ".join,
)
def test_every_kind_of_container_can_be_the_next(daemon: Wherryd, flags: list[str]) -> None:
    one(daemon)
    assert daemon.ctr("run", "--rm", *flags, BUSYBOX, "after", "echo", "it is").stdout == "it is\n"


def test_a_container_with_hooks_is_the_next(daemon: Wherryd) -> None:
    """What may take long is forked, as in a shim's first container."""
    hooked = daemon.folder / "hooked"

    async def run() -> int:
        async with await connect(daemon.address) as client:
            launched = await create(client, Launch("after", BUSYBOX, SpecOptions(args=("true",))))
            hook = {"path": "/bin/touch", "args": ["touch", str(hooked)]}
            spec = {**(launched.container.spec or {}), "hooks": {"createRuntime": [hook]}}
            await client.containers.update(Container(id="after", spec=spec), ["spec"])
            await client.tasks.create("after", launched.mounts, Stdio())
            waiting = client.tasks.waiting("after")
            await client.tasks.start("after")
            await waiting.result()
            status = (await client.tasks.delete("after")).status
            await remove(client, launched.container)
            return status

    one(daemon)
    assert asyncio.run(run()) == 0
    assert hooked.exists()


def test_a_shim_that_somebody_else_is_connected_to_leaves(daemon: Wherryd) -> None:
    daemon.ctr("run", "-d", BUSYBOX, "long", "sleep", "1000")
    pid = shim_of(daemon, "long")
    with socket.socket(socket.AF_UNIX) as second:
        second.connect(str(next((daemon.state / "s").glob("*"))))
        daemon.ctr("task", "delete", "--force", "long", check=False)
        daemon.ctr("containers", "delete", "long")
        ended(pid)
        assert daemon.vacant() == []


def test_one_that_does_not_answer_is_left_alone(daemon: Wherryd) -> None:
    pid = one(daemon)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert daemon.ctr("run", "--rm", BUSYBOX, "after", "echo", "fine").stdout == "fine\n"
    finally:
        os.kill(pid, signal.SIGCONT)


def test_who_still_waits_in_it_hears_of_the_end(daemon: Wherryd) -> None:
    """A process that was added and never started has no end: its container's deletion is what it comes to."""

    async def run() -> None:
        async with await connect(daemon.address) as client:
            launched = await create(client, Launch("long", BUSYBOX, SpecOptions(args=("sleep", "1000"))))
            await client.tasks.create("long", launched.mounts, Stdio())
            await client.tasks.start("long")
            process = {"args": ["true"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
            await client.tasks.exec("long", "never", process, Stdio())
            never = client.tasks.waiting("long", "never")
            ending = client.tasks.waiting("long")
            await client.tasks.kill("long", signal.SIGKILL)
            await ending.result()
            await client.tasks.delete("long")
            with pytest.raises(NotFound):
                await asyncio.wait_for(never.result(), 10)
            await remove(client, launched.container)

    asyncio.run(run())
    assert daemon.vacant() == []


def test_one_that_an_earlier_daemon_had_is_not_used_again(daemon: Wherryd) -> None:
    """Its code may be older than the daemon's."""
    daemon.ctr("run", "-d", BUSYBOX, "long", "sleep", "1000")
    pid = shim_of(daemon, "long")
    daemon.restart()
    daemon.ctr("task", "delete", "--force", "long", check=False)
    daemon.ctr("containers", "delete", "long")
    ended(pid)
    assert daemon.vacant() == []


async def test_no_more_are_kept_than_are_allowed() -> None:
    """However many containers are deleted at once."""

    class Client(TtrpcClient):
        async def close(self) -> None:
            return

    class Slow:
        def __init__(self) -> None:
            self.client = Client()
            self.lives = 1
            self.bootstrap = Bootstrap("unix:///nowhere")

        async def call(self, *_: object) -> None:
            await asyncio.sleep(0.01)

        def part(self) -> None:
            return

    reserve = vacant.Vacant()
    kept = await asyncio.gather(*(reserve.keep(cast("Shim", Slow()), 1.0) for _ in range(40)))
    assert sum(kept) == vacant._MOST
    await reserve.close()


def test_a_stale_socket_is_in_nobodys_way(daemon: Wherryd) -> None:
    pid = one(daemon)
    place = daemon.state / "s" / hashlib.sha256(b"default/after").hexdigest()[:32]
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(place))
    daemon.ctr("run", "-d", BUSYBOX, "after", "sleep", "1000")
    assert shim_of(daemon, "after") == pid
    daemon.ctr("task", "delete", "--force", "after", check=False)
    daemon.ctr("containers", "delete", "after")


def test_a_daemon_that_dies_while_it_gives_one_away(daemon: Wherryd) -> None:
    """The shim was told, and the daemon was gone before the answer: it ends as if nobody had told it anything."""
    pid = one(daemon)
    os.kill(pid, signal.SIGSTOP)
    with subprocess.Popen(
        [need("ctr"), "-a", daemon.address, "run", "--rm", BUSYBOX, "after", "true"], stderr=subprocess.DEVNULL
    ) as run:
        deadline = time.monotonic() + 5
        while daemon.vacant() and not (daemon.state / "tasks/default/after").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.1)
        daemon.kill()
        os.kill(pid, signal.SIGCONT)
        run.kill()
    ended(pid)
    daemon.start()
    assert daemon.settle() == []
    daemon.ctr("containers", "delete", "after", check=False)
