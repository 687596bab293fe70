"""The daemon's side of applying and computing layers: asyncio, no file of a layer is touched in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wherry.linux.mounts import Mount


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

    def __init__(self, *, parallel: int | None = None) -> None:
        """`parallel`: how many workers at once, others wait for their turn; as many as there are processors."""

    async def apply(
        self,
        mounts: Sequence[Mount],
        source: str | int,
        media_type: str,
        *,
        expected: str | None = None,
        max_size: int | None = None,
        progress: Callable[[int], None] | None = None,
        sync_fs: bool = False,
        overlay: bool | None = None,
    ) -> Applied:
        """Apply the layer in `source` to the tree that `mounts` show.

        `source` is a path, or a descriptor that is read to its end from where it stands (a file, a pipe: downloading
        and unpacking may overlap); the caller keeps and closes its own. `expected` is the diff ID that must come out
        (a mismatch is found at the end: don't commit the snapshot after an error). `max_size` limits the uncompressed
        bytes. `progress` is called with the uncompressed bytes done so far, a few times a second. `sync_fs` writes
        the file system to disk before it returns. `overlay=True` says that the tree is a layer of an overlay though
        it is mounted alone (it will be set on its parent at the commit): whiteouts are then kept as overlay's.
        """
        raise NotImplementedError

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

        `source_date_epoch` (seconds) caps the times in the archive and is the time of its whiteouts.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """End all workers."""
