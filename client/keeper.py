"""Who cleans up behind a program that was killed: a process of its own that waits for the program's end.

A sandbox must not outlive its owner, and a program that gets SIGKILL can't remove anything. So the first sandbox starts
this process, at the other end of a pipe. It is told of each sandbox; when the pipe ends, it removes those that are
left, and before that each one whose time is up. What it needs to know of a sandbox is in a record on disk, written
before anything of the sandbox is made: if this process is killed too, the next one finds the record and does its work.

Lines on the pipe: `+ NAME SECONDS` (0: no limit of time), `- NAME`. Started as `python -m wherry.client.keeper FOLDER`.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from wherry.client.disk import Disk, release
from wherry.core.errors import FailedPrecondition, NotFound, WherryError
from wherry.linux.process import is_alive

if TYPE_CHECKING:
    from wherry.client.api import Client

RECORD = "record.json"
# for a daemon that is restarting, and between two tries
PATIENCE, PAUSE = 60.0, 0.5


class Record(NamedTuple):
    """What has to be known to remove a sandbox. `keeper` and `started` say which process takes care of it."""

    address: str
    namespace: str
    id: str
    keeper: int = 0
    started: int = 0
    snapshotter: str = ""
    upper: str = ""
    place: str = ""
    project: int = 0

    def write(self, folder: str) -> None:
        """Puts it into the sandbox's folder, in one step."""
        path = os.path.join(folder, RECORD)
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(self._asdict(), file)
        os.replace(f"{path}.new", path)

    @classmethod
    def read(cls, folder: str) -> Record | None:
        """The record in a folder; None where there is none that can be read."""
        try:
            with open(os.path.join(folder, RECORD), encoding="utf-8") as file:
                return cls(**json.load(file))
        except (OSError, ValueError, TypeError):
            return None


async def clear(client: Client, record: Record, folder: str) -> None:
    """Removes a sandbox: task, container, snapshot, disk, folder. What is gone already is no error."""
    client = client.tidying()
    with contextlib.suppress(NotFound):
        with contextlib.suppress(NotFound):
            await client.tasks.kill(record.id, signal.SIGKILL, every=True)
        await client.tasks.wait(record.id)
        await client.tasks.delete(record.id)
    with contextlib.suppress(NotFound):
        await client.containers.delete(record.id)
    if record.snapshotter:
        with contextlib.suppress(NotFound):
            await client.snapshots(record.snapshotter).remove(record.id)
    release(Disk((), record.upper, place=record.place, project=record.project))
    shutil.rmtree(folder, ignore_errors=True)


def tend(folder: str) -> None:
    """The process: until the pipe ends, and everything is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # a Ctrl-C that ends the owner is not for us: the end of the pipe is
        signal.signal(number, signal.SIG_IGN)
    deadlines: dict[str, float] = {}
    _take_over(folder)
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while True:
            now = time.monotonic()
            for name in [name for name, end in deadlines.items() if end <= now]:
                if _removed(os.path.join(folder, name)):
                    del deadlines[name]
            soonest = min(deadlines.values(), default=now + 3600)
            if not selector.select(max(0.0, min(soonest - now, 3600.0))):
                continue
            data = os.read(0, 4096)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                sign, name, *rest = line.decode().split()
                if sign == "-":
                    deadlines.pop(name, None)
                else:
                    deadlines[name] = time.monotonic() + float(rest[0]) if float(rest[0]) else float("inf")
    end = time.monotonic() + PATIENCE
    left = list(deadlines)
    while left and time.monotonic() < end:
        left = [name for name in left if not _removed(os.path.join(folder, name))]
        if left:
            time.sleep(PAUSE)


def _take_over(folder: str) -> None:
    """Removes what belongs to keepers that are gone."""
    for name in os.listdir(folder):
        place = os.path.join(folder, name)
        record = Record.read(place)
        if record is not None and not is_alive(record.keeper, record.started):
            _removed(place)


def _removed(folder: str) -> bool:
    """Whether a sandbox is gone now; False where its daemon can't be reached."""
    record = Record.read(folder)
    if record is None:
        shutil.rmtree(folder, ignore_errors=True)
        return True
    from wherry.client.address import connect_blocking
    from wherry.client.api import Client
    from wherry.client.blocking import drive

    try:
        transport = connect_blocking(record.address, 5.0)
    except WherryError:
        return False
    client = Client.over(transport, record.namespace)
    try:
        drive(clear(client, record, folder))
    except FailedPrecondition as error:
        sys.stderr.write(f"wherry keeper: {record.id}: {error}\n")
        return False
    except WherryError:
        return False
    finally:
        drive(client.close())
    return True


if __name__ == "__main__":
    tend(sys.argv[1])
