"""The keeper's loop: sockets that are ready, and what is due. asyncio would be four times its memory."""

from __future__ import annotations

import heapq
import itertools
import selectors
import socket
import time
from collections.abc import Callable

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Timer:
    """Something that is due; `cancel` takes it back."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Calls back when a socket is ready (with the events) or a time has come; for one thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = itertools.count()
        self.stopped = False

    def watch(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        """Watch a socket, or watch it for something else; `events` 0 stops that."""
        try:
            known = self._selector.get_key(sock)
        except KeyError:
            if events:
                self._selector.register(sock, events, callback)
            return
        if not events:
            self._selector.unregister(sock)
        elif known.events != events or known.data is not callback:
            self._selector.modify(sock, events, callback)

    def close(self, sock: socket.socket) -> None:
        """Close a socket and forget it; one that is closed is fine."""
        if sock.fileno() != -1:
            self.watch(sock, 0, lambda _: None)
            sock.close()

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), timer))
        return timer

    def run(self, failed: Callable[[], None]) -> None:
        """Until `stopped`; `failed` is told of what a callback raised (in `sys.exc_info`), which ends nothing else."""
        while not self.stopped:
            timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            for key, events in self._selector.select(timeout):
                # closed by a callback before this one in the same round
                if key.fileobj.fileno() == -1:  # type: ignore[union-attr] # sockets alone are registered
                    continue
                self._call(lambda call=key.data, ready=events: call(ready), failed)  # type: ignore[misc]
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                timer = heapq.heappop(self._timers)[2]
                if timer.callback is not None:
                    self._call(timer.callback, failed)

    def _call(self, callback: Callable[[], None], failed: Callable[[], None]) -> None:
        try:
            callback()
        except Exception:  # noqa: BLE001 -- one container's packet must not end the names and ports of all others
            failed()
