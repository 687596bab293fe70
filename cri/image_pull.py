"""A pull that is watched: it goes on for as long as something comes, and is given up when nothing does."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from wherry.core.errors import DeadlineExceeded

if TYPE_CHECKING:
    from wherry.client.transfer import Progress

# what is about the network; unpacking may take its time
_COMING = frozenset({"downloading"})
_UNPACKING = frozenset({"extracting"})
_PLACED = frozenset({"complete", "already exists", "extracted"})


class Watch:
    """When something came last, for all pulls of a node: those that wait for others to end aren't stuck."""

    def __init__(self) -> None:
        self.moved_at = time.monotonic()


class _State:
    """How far one pull is."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._seen: dict[str, tuple[str, int]] = {}
        self.moved_at = watch.moved_at = time.monotonic()

    def take(self, progress: Progress) -> None:
        """One message of it."""
        if self._seen.get(progress.name) != (progress.event, progress.progress) or not progress.name:
            self._seen[progress.name] = (progress.event, progress.progress)
            self.moved_at = self._watch.moved_at = time.monotonic()

    def idle(self) -> float:
        """Seconds since something came. 0 while layers are unpacked: the disk may be slow, it isn't a registry."""
        events = {event for event, _ in self._seen.values()}
        if events & _UNPACKING:
            self.moved_at = time.monotonic()
        if "waiting" in events and not events & _COMING:
            # for its turn, maybe: then others move
            return time.monotonic() - max(self.moved_at, self._watch.moved_at)
        return time.monotonic() - self.moved_at

    def pending(self) -> str:
        """What didn't come, in words."""
        names = [f"{name} ({count} bytes)" for name, (event, count) in self._seen.items() if event in _COMING]
        names = names or [name for name, (event, _) in self._seen.items() if name and event == "waiting"]
        return ", ".join(names) or "the registry's first answer"


async def watched(steps: AsyncIterator[Progress], seconds: float, watch: Watch) -> None:
    """Iterates to the end. Raises DeadlineExceeded when nothing came for so many seconds (0: waits for ever).

    What was begun is cancelled then; what came stays for the next pull of the same image.
    """
    state = _State(watch)

    async def go() -> None:
        async for step in steps:
            state.take(step)

    pulling = asyncio.create_task(go())
    try:
        while True:
            left = seconds - state.idle() if seconds else None
            done, _ = await asyncio.wait({pulling}, timeout=None if left is None else max(left, 0.05))
            if done:
                pulling.result()
                return
            if seconds and state.idle() >= seconds:
                raise DeadlineExceeded(
                    f"no progress for {seconds:g} s, still to come: {state.pending()}: "
                    "given up by image_pull_progress_timeout: context deadline exceeded"
                )
    finally:
        if not pulling.done():
            pulling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({pulling})
