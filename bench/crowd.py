"""Two hundred containers and a daemon that is killed: when it serves again, and when it knows every shim again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import NamedTuple

from bench.api import Api
from bench.daemons import Daemon
from bench.measure import parent

CONTAINERS = 200
_LIMIT = 30.0


class Return(NamedTuple):
    """Seconds from SIGKILL until the next daemon answered, and until it had every shim that can answer."""

    serving: float
    connected: float


def return_of(daemon: Daemon, image: str) -> tuple[Return, Return]:
    """First with all shims in order, then with one that is stopped and one whose socket is dead."""
    before = daemon.tasks()
    asyncio.run(_fill(daemon, image, CONTAINERS - len(before)))
    tasks = daemon.tasks()
    plain = _restart(daemon, tasks)
    mute, deaf = sorted(tasks)[:2]
    mute_shim, deaf_shim = parent(tasks[mute]), parent(tasks[deaf])
    os.kill(mute_shim, signal.SIGSTOP)
    try:
        _deafen(daemon, deaf)
        rest = {name: pid for name, pid in tasks.items() if name not in (mute, deaf)}
        disturbed = _restart(daemon, rest)
    finally:
        os.kill(mute_shim, signal.SIGCONT)
        for pid in (deaf_shim, tasks[deaf]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return plain, disturbed


async def _fill(daemon: Daemon, image: str, count: int) -> None:
    async with Api(daemon, image) as api:
        names = iter([f"crowd-{number}" for number in range(count)])

        async def work() -> None:
            for name in names:
                await api.sleep(name)

        await asyncio.gather(*(work() for _ in range(4)))


def _deafen(daemon: Daemon, container: str) -> None:
    """Put a socket that nobody listens on in the place of a shim's."""
    bootstrap = json.loads(Path(f"{daemon.folder}/state/tasks/default/{container}/bootstrap.json").read_text())
    path = bootstrap["address"].removeprefix("unix://")
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)


def _restart(daemon: Daemon, expected: dict[str, int]) -> Return:
    begun = time.monotonic()
    daemon.kill()
    daemon.start()
    serving = time.monotonic() - begun
    while not expected.items() <= daemon.tasks().items():
        if time.monotonic() - begun > _LIMIT:
            missing = sorted(expected.items() - daemon.tasks().items())
            raise SystemExit(f"bench: {daemon.kind} lost {len(missing)} tasks: {missing[:5]}")
    return Return(serving, time.monotonic() - begun)
