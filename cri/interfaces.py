"""What the interfaces of a pod's network carried: counters of a network namespace that has no process to ask."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import NamedTuple

from wherry.linux import syscalls as sc

# /proc/PID/net/dev: eight columns for what came in, then eight for what went out (proc(5))
_COLUMNS = 16


class Interface(NamedTuple):
    """Counters of an interface since it was made."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


async def read(namespace: str) -> list[Interface]:
    """Of all interfaces but the loopback; [] where the namespace is gone."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[list[Interface]] = loop.create_future()

    def tell(found: list[Interface]) -> None:
        if not done.done():
            done.set_result(found)

    def work() -> None:
        # a thread for this alone: it stays in that namespace, where nobody else may find himself
        found: list[Interface] = []
        with contextlib.suppress(OSError):
            descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
            try:
                sc.setns(descriptor, sc.CLONE_NEWNET)
            finally:
                os.close(descriptor)
            with open("/proc/thread-self/net/dev", encoding="ascii") as file:
                found = parse(file.read())
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, found)

    threading.Thread(target=work, name="interfaces", daemon=True).start()
    return await done


def parse(text: str) -> list[Interface]:
    """The lines of net/dev; two of them are headings."""
    found = []
    for line in text.splitlines()[2:]:
        name, _, rest = line.partition(":")
        columns = rest.split()
        if len(columns) < _COLUMNS or name.strip() == "lo":
            continue
        found.append(Interface(name.strip(), *map(int, columns[:4]), *map(int, columns[8:12])))
    return found
