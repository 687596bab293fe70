"""Sockets in a network namespace that this process isn't in: for an ordinary user's keeper.

A user's bridges are in a network namespace of the user's own (hub.py), the published ports on the host; who has gone
into the one can't come back to the other, which isn't the user's. A namespace belongs to a thread, though (setns(2)),
and a socket to the namespace in which it was made: so one thread goes in, and makes sockets for the others.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future

from wherry.linux import syscalls as sc

Make = Callable[[int, int], socket.socket]
"""A socket of a family and a kind (socket(2)); raises OSError."""


def here(family: int, kind: int) -> socket.socket:
    """In the namespace of this process."""
    return socket.socket(family, kind)


def sockets(path: str, settled: Callable[[], None]) -> Make:
    """Makes sockets in the namespace of the file `path`; `settled` runs in the thread that does, when it is inside.

    Raises OSError where it is no network namespace.
    """
    jobs: queue.SimpleQueue[tuple[int, int, Future[socket.socket]]] = queue.SimpleQueue()
    entered: Future[None] = Future()

    def work() -> None:
        try:
            namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                sc.setns(namespace, sc.CLONE_NEWNET)
            finally:
                os.close(namespace)
            settled()
        except BaseException as error:  # noqa: BLE001 -- it is raised again where somebody waits
            entered.set_exception(error)
            return
        entered.set_result(None)
        while True:
            family, kind, answer = jobs.get()
            try:
                answer.set_result(socket.socket(family, kind))
            except OSError as error:
                answer.set_exception(error)

    def make(family: int, kind: int) -> socket.socket:
        answer: Future[socket.socket] = Future()
        jobs.put((family, kind, answer))
        return answer.result()

    threading.Thread(target=work, name="inside", daemon=True).start()
    entered.result()
    return make
