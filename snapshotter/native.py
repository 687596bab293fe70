"""The native snapshotter: each snapshot is a full copy of its parent, for hosts without overlayfs.

Where the file system shares blocks between files (btrfs, xfs: reflink), copies share them. Mounts are bind mounts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from wherry.core.errors import Unimplemented
from wherry.linux.copying import copy_tree
from wherry.linux.mounts import Mount
from wherry.snapshotter import remap
from wherry.snapshotter.directories import DirectorySnapshotter
from wherry.snapshotter.interface import Kind
from wherry.snapshotter.metadata import Record


class NativeSnapshotter(DirectorySnapshotter):
    """`async_remove` leaves files of removed snapshots to `cleanup()`."""

    def _make(self, record: Record, directory: str) -> None:
        if record.info.kind is Kind.VIEW and record.parent_id is not None:
            return  # the parent itself is shown, read-only
        files = f"{directory}/fs"
        os.mkdir(files, 0o755)
        if record.parent_id is not None:
            copy_tree(self.content(record.parent_id), files)

    def _mounts_of(self, record: Record, chain: Sequence[int]) -> list[Mount]:
        writable = record.info.kind is Kind.ACTIVE
        number = chain[0] if chain and not writable else record.id
        maps = remap.options(record.info.labels) if self.remaps else ()
        return [Mount("bind", self.content(number), options=(*maps, "rw" if writable else "ro", "rbind"))]

    def _commit_on(self, record: Record, parent: Record) -> None:
        raise Unimplemented(
            f'snapshot "{record.info.name}" was prepared without a parent: a full copy can\'t be set on'
            f' "{parent.info.name}" at its commit: not implemented'
        )
