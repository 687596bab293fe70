"""What a transfer tells its client meanwhile: containerd's events, so that its clients draw their bars from it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

from wherry.core.descriptor import Descriptor
from wherry.daemon.streaming import Stream
from wherry.daemon.transfer_image import ref_key, to_proto
from wherry.proto import transfer_types_pb2 as types

# seconds between two looks at how far things are
INTERVAL = 0.1


class _Job:
    """One thing on its way."""

    def __init__(self, descriptor: Descriptor, name: str, parents: list[str]) -> None:
        self.descriptor = descriptor
        self.name = name
        self.parents = parents
        self.event = ""
        self.progress = 0
        self.total = descriptor.size
        self.told: tuple[str, int] | None = None


class Progress:
    """The progress of one transfer; without a stream nothing is told, and everything may be called all the same."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream
        self._jobs: dict[str, _Job] = {}
        self._parents: dict[str, list[str]] = {}
        self._root = ""

    def say(self, event: str, name: str = "", descriptor: Descriptor | None = None) -> None:
        """Tell of a step of the whole transfer."""
        if self._stream is not None:
            message = types.Progress(event=event, name=name)
            if descriptor is not None:
                message.desc.CopyFrom(to_proto(descriptor))
            self._stream.tell(message)

    def start(self, root: str) -> None:
        """Name what things without a parent belong to."""
        self._root = root

    def children(self, parent: Descriptor, children: Iterable[Descriptor]) -> None:
        """Say who belongs to whom, before the children are added."""
        for child in children:
            self._parents.setdefault(child.digest, []).append(ref_key(parent))

    def add(self, descriptor: Descriptor) -> None:
        """Something will be moved."""
        if descriptor.digest not in self._jobs:
            parents = self._parents.get(descriptor.digest) or [self._root]
            job = self._jobs[descriptor.digest] = _Job(descriptor, ref_key(descriptor), parents)
            job.event = "waiting"
            self._tell(job)

    def update(self, descriptor: Descriptor, event: str, progress: int, total: int | None = None) -> None:
        """How far something is, in bytes; told a few times a second."""
        job = self._jobs.get(descriptor.digest)
        if job is not None:
            job.event, job.progress = event, progress
            job.total = descriptor.size if total is None else total

    def finish(self, descriptor: Descriptor, event: str = "complete") -> None:
        """Something is done (`complete`, `already exists`, `extracted`)."""
        job = self._jobs.get(descriptor.digest)
        if job is not None:
            job.event, job.progress, job.total = event, descriptor.size, descriptor.size
            self._tell(job)

    def _tell(self, job: _Job) -> None:
        if self._stream is None or job.told == (job.event, job.progress):
            return
        job.told = (job.event, job.progress)
        self._stream.tell(
            types.Progress(
                event=job.event,
                name=job.name,
                parents=job.parents,
                progress=job.progress,
                total=job.total,
                desc=to_proto(job.descriptor),
            )
        )

    @contextlib.asynccontextmanager
    async def ticking(self) -> AsyncIterator[None]:
        """Tell what changed, a few times a second, inside of the `async with`."""
        if self._stream is None:
            yield
            return
        ticker = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            ticker.cancel()
            await asyncio.gather(ticker, return_exceptions=True)
            for job in self._jobs.values():
                self._tell(job)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            for job in self._jobs.values():
                self._tell(job)
