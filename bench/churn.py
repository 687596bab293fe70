"""`python -m bench.churn [--minutes N]`: containers come and go for half an hour, the daemon is killed every minute.

Eight clients at once make a container, run a further process in it, kill it and remove it, over and over. At the end
the machine must be as it began: no process, descriptor, mount, cgroup, bundle, snapshot or socket more, and `wherryd`
not bigger than at the same age in the beginning. Exits with 1 where that isn't so. `--plot FILE` draws its memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench.plot import draw
from tests.wherryd import BUSYBOX, Wherryd
from wherry.client.address import connect_blocking
from wherry.client.api import Client
from wherry.client.blocking import drive
from wherry.client.launch import Launch, create, remove
from wherry.client.spec import SpecOptions
from wherry.client.tasks import Stdio
from wherry.core.container_logs import FOLDER, uri_of
from wherry.core.errors import NotFound, WherryError

EXEC = 5
# seconds: for one life with a daemon that is killed in it, and for the last things to go at the end
LIFE, SETTLE = 120.0, 30.0
# a life of the daemon is compared from this age on: until then it fills its caches
WARM = 20.0
# bytes that the last life may need more than the first at the same age
GROWTH = 3 << 20


class Sample(NamedTuple):
    """`at` in seconds from the start; `life` counts the daemon's lives; bytes of memory of its own, descriptors."""

    at: float
    life: int
    age: float
    memory: int
    descriptors: int


@dataclass
class Tally:
    """What happened."""

    lives: int = 0
    broken: int = 0
    wrong: list[str] = field(default_factory=list)


def memory_of(pid: int) -> int:
    """Bytes that belong to a process alone and to no file (RssAnon); 0 where it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def descriptors_of(pid: int) -> Counter[str]:
    """What a process has open, numbers left out."""
    found: Counter[str] = Counter()
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found[re.sub(r"\d+", "N", os.readlink(f"/proc/{pid}/fd/{name}"))] += 1
    return found


def command_of(pid: int) -> str:
    """A process's command line; "" where it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


class Worker(threading.Thread):
    """One client."""

    def __init__(self, number: int, daemon: Wherryd, namespace: str, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self.tally = Tally()
        self._number = number
        self._address = daemon.address
        self._namespace = namespace
        self._over = over

    def run(self) -> None:
        """Lives, until it is over."""
        while not self._over.is_set():
            self.tally.lives += 1
            name = f"w{self._number}-{self.tally.lives}"
            try:
                self._with_client(partial(self._live, name))
            except (WherryError, OSError):
                self.tally.broken += 1
                self._tidy(name)

    def _with_client(self, work: Callable[[Client], None]) -> None:
        client = Client.over(connect_blocking(self._address, 30.0), self._namespace, timeout=30.0)
        try:
            work(client)
        finally:
            with contextlib.suppress(WherryError, OSError):
                drive(client.close())

    def _live(self, name: str, client: Client) -> None:
        logged = self.tally.lives % 2
        uri = uri_of(self._namespace, name, {}) if logged else ""
        script = "echo begin; while :; do sleep 1000; done"
        labels = {"wherry/log-uri": uri} if logged else {}
        launch = Launch(name, BUSYBOX, SpecOptions(args=("sh", "-c", script)), labels=labels)
        launched = drive(create(client, launch))
        drive(client.tasks.create(name, launched.mounts, Stdio("", uri, uri)))
        drive(client.tasks.start(name))
        process = {"args": ["sh", "-c", f"exit {EXEC}"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
        drive(client.tasks.exec(name, "e", process, Stdio()))
        drive(client.tasks.start(name, "e"))
        status = drive(client.tasks.wait(name, "e")).status
        if status != EXEC:
            self.tally.wrong.append(f"{name}: the exec ended with {status}")
        drive(client.tasks.delete(name, "e"))
        drive(client.tasks.kill(name, 9))
        status = drive(client.tasks.wait(name)).status
        if status != 137:
            self.tally.wrong.append(f"{name}: it ended with {status}")
        drive(client.tasks.delete(name))
        drive(remove(client, launched.container))

    def _tidy(self, name: str) -> None:
        """Remove what a broken life left, however long the daemon is away."""
        deadline = time.monotonic() + LIFE
        while time.monotonic() < deadline:
            try:
                self._with_client(partial(_remove_all, name))
            except (WherryError, OSError):
                time.sleep(0.2)
            else:
                return
        self.tally.wrong.append(f"{name} can't be removed")


def _remove_all(name: str, client: Client) -> None:
    with contextlib.suppress(NotFound):
        status = drive(client.tasks.get(name)).status
        if status != "STOPPED":
            with contextlib.suppress(NotFound):
                drive(client.tasks.kill(name, 9))
            drive(client.tasks.wait(name))
        drive(client.tasks.delete(name))
    try:
        container = drive(client.containers.get(name))
    except NotFound:
        with contextlib.suppress(NotFound):
            drive(client.snapshots().remove(name))
    else:
        drive(remove(client, container))


class Churn:
    """The daemon, its clients, and what is measured."""

    def __init__(self, daemon: Wherryd, workers: int) -> None:
        self.daemon = daemon
        self.namespace = f"churn{os.getpid()}"
        self.samples: list[Sample] = []
        self.kills: list[float] = []
        self._workers = workers

    def run(self, seconds: float, kill_every: float) -> Tally:
        """Churn for so long."""
        over = threading.Event()
        workers = [Worker(number, self.daemon, self.namespace, over) for number in range(self._workers)]
        for worker in workers:
            worker.start()
        began = born = time.monotonic()
        while (at := time.monotonic() - began) < seconds:
            if kill_every and time.monotonic() - born >= kill_every:
                self.kills.append(at)
                again(self.daemon)
                born = time.monotonic()
            self._sample(at, time.monotonic() - born)
            time.sleep(1)
        over.set()
        tally = Tally()
        for worker in workers:
            worker.join(LIFE)
            tally.lives += worker.tally.lives
            tally.broken += worker.tally.broken
            tally.wrong += worker.tally.wrong
            if worker.is_alive():
                tally.wrong.append("a client hangs")
        return tally

    def _sample(self, at: float, age: float) -> None:
        pid = self.daemon.pid
        descriptors = 0
        with contextlib.suppress(OSError):
            descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        self.samples.append(Sample(at, len(self.kills), age, memory_of(pid), descriptors))

    def state(self) -> dict[str, int]:
        """Counts of what may leak, on the host and in the daemon."""
        with sqlite3.connect(f"file:{self.daemon.root}/metadata.db?mode=ro", uri=True) as connection:
            (snapshots,) = connection.execute("SELECT count(*) FROM snapshots").fetchone()
            (containers,) = connection.execute("SELECT count(*) FROM containers").fetchone()
        connection.close()
        return {
            "processes": len(self.daemon.processes()),
            "descriptors": len(os.listdir(f"/proc/{self.daemon.pid}/fd")),
            "mounts": len(self.daemon.mounts()),
            "cgroups": len(list(Path("/sys/fs/cgroup").glob(f"*/{self.namespace}/*/"))),
            "bundles": len(self.daemon.bundles()),
            "sockets": len(list((self.daemon.state / "s").glob("*"))),
            "runtime's states": len(list((self.daemon.state / "runtime").glob("*/*"))),
            "snapshots": snapshots,
            "folders of snapshots": len(list((self.daemon.root / "snapshotter/overlayfs/snapshots").glob("*"))),
            "containers": containers,
            "logs": len(list(Path(FOLDER, self.namespace).glob("*"))),
        }

    def growth(self) -> int:
        """Bytes that the daemon's last life needed more than its first whole one at the same age, at worst."""
        first = {int(s.age): s.memory for s in self.samples if s.life == 1 and s.age > WARM}
        last = [s for s in self.samples if s.life == len(self.kills) and int(s.age) in first]
        return max((s.memory - first[int(s.age)] for s in last), default=0)


def again(daemon: Wherryd) -> None:
    """Kill the daemon and start it, on a machine that may be very busy."""
    daemon.kill()
    daemon.start(LIFE)


def warm(daemon: Wherryd) -> None:
    """Wait until the fork server has loaded what it loads: until then it has children, and descriptors are open."""
    deadline = time.monotonic() + LIFE
    while time.monotonic() < deadline:
        if any(command_of(pid).startswith("wherry-forkserver ") for pid in daemon.processes()):
            break
        time.sleep(0.1)
    time.sleep(3)


def settled(churn: Churn, before: dict[str, int]) -> dict[str, tuple[int, int]]:
    """What differs from before, given time to become equal; fewer is as good."""
    deadline = time.monotonic() + SETTLE
    while True:
        now = churn.state()
        more = {name: (before[name], count) for name, count in now.items() if count > before[name]}
        if not more or time.monotonic() > deadline:
            return more
        time.sleep(0.5)


def plot(churn: Churn, path: str, title: str) -> None:
    """Memory of wherryd over time, and when it was killed."""
    points = [(s.at / 60, s.memory / (1 << 20)) for s in churn.samples]
    Path(path).write_text(draw(points, [at / 60 for at in churn.kills], title, "minutes", "MiB"))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.churn", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (30)")
    parser.add_argument("--workers", type=int, default=8, help="containers at once (8)")
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="SECONDS", help="0: never (60)")
    parser.add_argument("--plot", default="", metavar="FILE", help="draw wherryd's memory (SVG)")
    args = parser.parse_args()
    daemon = Wherryd()
    daemon.args = ["--log-level", "warn"]  # at debug level the log would be gigabytes
    churn = Churn(daemon, args.workers)
    try:
        daemon.start()
        daemon.import_busybox(churn.namespace)
        churn.run(5.0, 0)  # what is made once is made
        churn.samples.clear()
        again(daemon)
        warm(daemon)
        before, opened = churn.state(), descriptors_of(daemon.pid)
        tally = churn.run(args.minutes * 60, args.kill_every)
        again(daemon)
        warm(daemon)
        more = settled(churn, before)
        grown = churn.growth()
        print(
            f"{tally.lives} containers, {len(churn.kills)} times the daemon killed, {tally.broken} lives broken by it"
        )
        print(f"wherryd's last life beside its first: {grown / (1 << 20):+.1f} MiB")
        for name, (was, now) in more.items():
            print(f"more {name}: {was} before, {now} after")
        if "descriptors" in more:
            print("open beyond what was before:", dict(descriptors_of(daemon.pid) - opened))
        if "processes" in more:
            for pid in daemon.processes():
                print(f"process {pid}: {command_of(pid)}")
        for text in tally.wrong:
            print(text)
        if args.plot:
            plot(churn, args.plot, f"wherryd: {tally.lives} containers, {args.workers} at once")
        sys.exit(bool(more or tally.wrong or grown > GROWTH))
    finally:
        daemon.close()
        shutil.rmtree(f"{FOLDER}/{churn.namespace}", ignore_errors=True)
        # the namespace's, which stay, as they do with containerd
        for cgroup in Path("/sys/fs/cgroup").glob(f"*/{churn.namespace}"):
            with contextlib.suppress(OSError):
                cgroup.rmdir()


if __name__ == "__main__":
    main()
