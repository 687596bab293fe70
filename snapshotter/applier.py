"""The daemon's side of applying and computing layers: asyncio, no file of a layer is touched in this process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from wherry.core import mediatypes
from wherry.core.errors import Code, Internal, InvalidArgument, NotFound, Unavailable, Unimplemented, from_code
from wherry.linux.mounts import Mount
from wherry.snapshotter.below import record_implied
from wherry.snapshotter.limits import NO_LIMITS, Limits

IDLE_SECONDS = 5.0
"""A worker without work is ended after that: it costs 10 MB and comes back in a tenth of a second."""
CANCEL_SECONDS = 10.0
"""How long a cancelled call waits until its process is gone and surely writes no more."""
ANSWER_LIMIT = 64 << 20
_SEND_RETRY_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a layer's archive.

    `digest` is that of the uncompressed archive (the diff ID, `sha256:…`), `size` its bytes, `media_type` that of the
    uncompressed archive: what `Diff.Apply` answers. `entries` is the count of the archive's members.
    """

    digest: str
    size: int
    media_type: str
    entries: int = 0


@dataclass(frozen=True, slots=True)
class Diffed:
    """A layer that was computed: `digest` and `size` of the file as written, `diff_id` of the archive inside."""

    digest: str
    size: int
    media_type: str
    diff_id: str


class Applier:
    """Runs layers in worker processes that can't leave the layer's root, a few at once.

    Errors: InvalidArgument for an archive that is none, is cut short, or has not the expected digest;
    Unimplemented for a media type that nobody here reads; ResourceExhausted for a full disk or a limit passed;
    FailedPrecondition when the mounts can't be mounted; Unavailable when the worker was killed. Cancelling the task
    kills its worker. In every case nothing is left mounted: a worker's mounts live in its own mount namespace.
    """

    def __init__(self, *, parallel: int | None = None, limits: Limits = NO_LIMITS, sync_fs: bool = False) -> None:
        """`parallel`: how many layers at once, others wait for their turn; as many as there are processors. `limits`
        hold for each layer. `sync_fs`: sync each, whether a call asks for it or not."""
        self.limits = limits
        self._sync = sync_fs
        self._turns = asyncio.Semaphore(parallel or len(os.sched_getaffinity(0)))
        self._ids = itertools.count(1)
        self._starting = asyncio.Lock()
        self._worker: _Worker | None = None
        self._leaving: list[_Worker] = []  # told to end, and perhaps not there yet
        self._busy = 0
        self._idle: asyncio.TimerHandle | None = None

    async def apply(
        self,
        mounts: Sequence[Mount],
        source: str | int,
        media_type: str,
        *,
        expected: str | None = None,
        progress: Callable[[int], None] | None = None,
        sync_fs: bool = False,
        overlay: bool | None = None,
        follow: int | None = None,
    ) -> Applied:
        """Apply the layer in `source` to the tree that `mounts` show.

        `source` is a path, or a descriptor that is read to its end from where it stands (a file, a pipe: downloading
        and unpacking may overlap); the caller keeps and closes its own. `expected` is the diff ID that must come out
        (a mismatch is found at the end: don't commit the snapshot after an error). `progress` is called with the
        uncompressed bytes done so far, a few times a second. `sync_fs` writes the file system to disk before it
        returns. `overlay=True` says that the tree is a layer of an overlay though it is mounted alone (it will be set
        on its parent at the commit): whiteouts are then kept as overlay's. `follow` is a pipe for a `source` that is
        still being written: at its end a byte is read, "." says that it is all there, the pipe's end that it never
        will be (Unavailable). Such a call has no turn: it waits most of the time.
        """
        message = {
            "op": "apply",
            "mounts": _listed(mounts),
            "compressed": _is_compressed(media_type),
            "expected": expected,
            "layer_bytes": self.limits.layer_bytes,
            "layer_entries": self.limits.layer_entries,
            "progress": progress is not None,
            "sync": sync_fs or self._sync,
            "overlay": overlay,
        }
        answer = await self._run(message, source, os.O_RDONLY, progress, follow)
        if answer["implied"]:
            record_implied(mounts[0].source, [os.fsencode(path) for path in answer["implied"]])
        return Applied(answer["digest"], answer["size"], mediatypes.OCI_LAYER, answer["entries"])

    async def diff(
        self,
        lower: Sequence[Mount],
        upper: Sequence[Mount],
        media_type: str,
        out: str | int,
        *,
        source_date_epoch: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Diffed:
        """Write the layer that turns `lower` into `upper` to `out` (a path, created or truncated, or a descriptor).

        `source_date_epoch` (seconds) caps the times in the archive and is the time of its whiteouts. Not more than
        the mounts is asked for: with an upper directory of an overlay only that is walked.
        """
        compression = mediatypes.compression(media_type)
        if compression is None or not mediatypes.is_layer(media_type):
            raise Unimplemented(f"unsupported diff media type: {media_type}: not implemented")
        message = {
            "op": "diff",
            "lower": _listed(lower) if lower else [],
            "upper": _listed(upper),
            "compression": compression,
            "epoch": source_date_epoch,
            "progress": progress is not None,
        }
        answer = await self._run(message, out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, progress)
        return Diffed(answer["digest"], answer["size"], media_type, answer["diff_id"])

    async def warm(self) -> None:
        """Start the worker now, so that the first layer doesn't wait for it: a download is about to begin."""
        await self._ready()
        self._rest()

    async def close(self) -> None:
        """End all workers; calls under way fail as Unavailable."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        worker, self._worker = self._worker, None
        if worker is not None:
            self._retire(worker)
        leaving, self._leaving = self._leaving, []
        for each in leaving:
            await each.ended()

    # one job

    async def _run(
        self,
        message: dict[str, Any],
        file: str | int,
        flags: int,
        progress: Callable[[int], None] | None,
        follow: int | None = None,
    ) -> dict[str, Any]:
        async with self._turns if follow is None else contextlib.nullcontext():
            fd = file if isinstance(file, int) else _open(file, flags)
            self._busy += 1
            try:
                return await self._job(message, [fd], [follow] if follow is not None else [], progress)
            finally:
                self._busy -= 1
                if not isinstance(file, int):
                    os.close(fd)
                self._rest()

    async def _job(
        self, message: dict[str, Any], before: list[int], after: list[int], progress: Callable[[int], None] | None
    ) -> dict[str, Any]:
        job = next(self._ids)
        receiving, sending = os.pipe2(os.O_CLOEXEC)
        results = os.fdopen(receiving, "rb", buffering=0)
        try:
            try:
                worker = await self._hand_over({"id": job, **message}, [*before, sending, *after])
            finally:
                os.close(sending)
            reader = asyncio.StreamReader(limit=ANSWER_LIMIT)
            loop = asyncio.get_running_loop()
            transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), results)
        except BaseException:
            results.close()
            raise
        try:
            return await _answer(reader, progress)
        except asyncio.CancelledError:
            await asyncio.shield(self._cancel(worker, job, reader))
            raise
        finally:
            transport.close()

    async def _hand_over(self, message: dict[str, Any], fds: list[int]) -> _Worker:
        worker = await self._ready()
        try:
            await worker.send(message, fds)
        except Unavailable:
            # it was killed, and that wasn't known yet; a new one hasn't that excuse
            self._dismiss(worker)
            worker = await self._ready()
            await worker.send(message, fds)
        return worker

    async def _cancel(self, worker: _Worker, job: int, reader: asyncio.StreamReader) -> None:
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                await worker.send({"cancel": job}, [])
                await reader.read()
        except (TimeoutError, Unavailable):
            worker.kill()  # whatever it hangs in, nothing may be written after this call

    # the worker's life

    async def _ready(self) -> _Worker:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        async with self._starting:
            if self._worker is not None and not self._worker.alive:
                self._dismiss(self._worker)
            if self._worker is None:
                self._worker = await _Worker.start()
            return self._worker

    def _dismiss(self, worker: _Worker) -> None:
        self._retire(worker)
        if self._worker is worker:
            self._worker = None

    def _retire(self, worker: _Worker) -> None:
        worker.retire()
        self._leaving = [each for each in self._leaving if each.alive] + [worker]

    def _rest(self) -> None:
        if self._busy or self._worker is None:
            return
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._idled)

    def _idled(self) -> None:
        self._idle = None
        if self._worker is not None:
            self._dismiss(self._worker)


class _Worker:
    """A started worker process and the socket to it."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        self._process = process
        self._control = control

    @classmethod
    async def start(cls) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-I",
                    "-m",
                    "wherry.snapshotter.worker",
                    "--control-fd",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                )
            except OSError as error:
                ours.close()
                raise Unavailable(f"the process that handles layers can't be started: {error}") from error
        return cls(process, ours)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def send(self, message: dict[str, Any], fds: list[int]) -> None:
        """Unavailable when the worker is gone, InvalidArgument when the message is too long for a datagram."""
        data = json.dumps(message).encode()
        while True:
            try:
                socket.send_fds(self._control, [data], fds)
                return
            except BlockingIOError:
                await asyncio.sleep(_SEND_RETRY_SECONDS)
            except OSError as error:
                if isinstance(error, ConnectionError):
                    raise Unavailable("the process that handles layers ended unexpectedly") from error
                raise InvalidArgument(
                    f"the mounts can't be sent to the process that handles layers: {error}"
                ) from error

    def retire(self) -> None:
        """It exits at the end of the socket; asyncio reaps it."""
        self._control.close()

    def kill(self) -> None:
        """Now, with its children (they die with their parent)."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def ended(self) -> None:
        """After `retire`."""
        await self._process.wait()


async def _answer(reader: asyncio.StreamReader, progress: Callable[[int], None] | None) -> dict[str, Any]:
    while line := await reader.readline():
        message: dict[str, Any] = json.loads(line)
        if "ok" in message:
            ok: dict[str, Any] = message["ok"]
            return ok
        if "error" in message:
            code, text = message["error"]
            raise from_code(code, text) if code != Code.INTERNAL else Internal(text)
        if progress is not None:
            progress(message["progress"])
    raise Unavailable("the process that handled the layer was killed")


def _listed(mounts: Sequence[Mount]) -> list[list[Any]]:
    if not mounts:
        raise InvalidArgument("a layer needs mounts to be applied to, none are given: invalid argument")
    return [[mount.type, mount.source, mount.target, list(mount.options)] for mount in mounts]


def _is_compressed(media_type: str) -> bool:
    if not mediatypes.is_layer(media_type):
        raise Unimplemented(f"no processor for media-type: {media_type}: not implemented")
    compression = mediatypes.compression(media_type)
    if compression is None and "+" in mediatypes.bare(media_type):
        raise Unimplemented(f"no processor for media-type: {media_type}: not implemented")
    return compression != ""


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)
    except FileNotFoundError as error:
        raise NotFound(f"layer {path}: not found") from error
