"""What a snapshotter is: the contract that overlayfs and native keep, and the words it is spoken in.

The life of a snapshot
----------------------
A snapshot is a file system tree. It is born with `prepare` as *active*: it has a *key*, which its maker chose, shows
the tree of its parent (or nothing) and may be written to through the mounts that `prepare` and `mounts` return. What
was written stays private to it. From there it goes one of two ways:

- `remove(key)`: it is gone, and what was written with it. This is the end of a container's root.
- `commit(name, key)`: the key ceases to exist and what was written becomes a *committed* snapshot under `name`, which
  is never written to again and can be the parent of others. This is how an image's layer comes to be: prepare on the
  layer below, apply the archive to the mounts, commit under the chain's digest.

`view(key, parent)` makes a snapshot that can only be read and can't be committed; it ends with `remove`.

Keys and names are one set: a key may not equal the name of a committed snapshot, nor the other way round. A *parent*
is always the name of a committed snapshot, or empty for none. A committed snapshot with children can't be removed.

A snapshotter doesn't mount: it returns mounts as values, for whoever needs the tree, wherever that is (another mount
namespace, another machine's socket). What mounts them also unmounts them before `remove`.

The methods block (on SQLite and the file system). They may be called from several threads at once: the daemon has one
for what a container's start asks for, and others for what may take long (`commit`, `usage`, `cleanup`). Errors are
those of `wherry.core.errors`. The contract is that of containerd's snapshots service.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from wherry.linux.mounts import Mount


class Kind(IntEnum):
    """What a snapshot is; the numbers are those of `containerd.services.snapshots.v1.Kind`."""

    UNKNOWN = 0
    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3

    @property
    def title(self) -> str:
        """The word that containerd prints and that filters compare with: `View`, `Active`, `Committed`."""
        return self.name.capitalize()


@dataclass(frozen=True, slots=True)
class Info:
    """What is known of a snapshot without looking at its files. Times are nanoseconds since the epoch."""

    kind: Kind
    name: str
    parent: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    created: int = 0
    updated: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a snapshot itself takes, without its parents: bytes on disk and inodes."""

    inodes: int = 0
    size: int = 0


class Snapshotter(Protocol):
    """See the module's docstring for the words; every implementation passes `tests/snapshotter/suite.py`.

    `rebases`: whether `commit` sets a snapshot that has no parent on the one that it is given.
    """

    rebases: bool

    def stat(self, key: str) -> Info:
        """The snapshot under a key or a name; NotFound if there is none."""

    def update(self, info: Info, fieldpaths: Sequence[str] = ()) -> Info:
        """Change labels of the snapshot `info.name` and return it as it is now.

        `fieldpaths` names what to take from `info`: `labels` (all) or `labels.KEY` (one; an empty or missing value
        removes it). Without any, all that may change is taken, which is the labels. NotFound; InvalidArgument for
        another field.
        """

    def usage(self, key: str) -> Usage:
        """What the snapshot takes: measured now for an active one, at the commit for a committed one. NotFound."""

    def mounts(self, key: str) -> list[Mount]:
        """The mounts that show an active snapshot or a view; NotFound, FailedPrecondition for a committed one."""

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        """Make an active snapshot and return its mounts.

        AlreadyExists for the key; NotFound for the parent; InvalidArgument for a parent that isn't committed.
        """

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        """Make a snapshot that can only be read and return its mounts; errors as `prepare`."""

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None, parent: str = "") -> None:
        """Turn the active snapshot `key` into the committed snapshot `name`; on return its record is on disk.

        Its files are there once the kernel has written them, unless the applier was told `sync_fs`, as in containerd.

        `labels` replace those of the key. `parent`, where given, must be the parent that the key has, or become it:
        a key that was prepared without a parent (so that layers unpack side by side) is set on that parent now.

        AlreadyExists for the name; NotFound for the key or the parent; FailedPrecondition if the key isn't active.
        """

    def remove(self, key: str) -> None:
        """Remove a snapshot of any kind; NotFound; FailedPrecondition while another has it as its parent."""

    def walk(self, filters: Sequence[str] = ()) -> Iterator[Info]:
        """All snapshots that one of the filters matches (`name`, `parent`, `kind`, `labels."key"`); all without."""

    def cleanup(self) -> None:
        """Delete directories that no snapshot has: of removed snapshots, and of a crash. May take long."""

    def close(self) -> None:
        """Release files and threads. Snapshots and mounts stay."""
