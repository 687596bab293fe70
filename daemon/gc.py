"""The garbage collector: what nothing references goes, and it can say why a thing is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wherry.daemon.metadata import Metadata

if TYPE_CHECKING:
    from wherry.daemon.content import ContentStore
    from wherry.daemon.snapshots import SnapshotStore


@dataclass(frozen=True, slots=True)
class Policy:
    """When it runs by itself: the options of containerd's plugin `io.containerd.gc.v1.scheduler`; times in seconds."""

    pause_threshold: float = 0.02
    deletion_threshold: int = 0
    mutation_threshold: int = 100
    schedule_delay: float = 0.0
    startup_delay: float = 0.1


class Collector:
    def __init__(
        self, metadata: Metadata, content: ContentStore, snapshots: SnapshotStore, policy: Policy | None = None
    ) -> None:
        raise NotImplementedError

    async def start(self) -> None:
        """Sweep files without a record, then watch the metadata and run by the policy. Before anything is served."""
        raise NotImplementedError

    async def collect(self) -> None:
        """Collect now and wait until the files are gone too (what `sync` on Delete asks for)."""
        raise NotImplementedError

    async def why(self, namespace: str, kind: str, id: str) -> list[tuple[str, str, str]]:  # noqa: A002
        """The chain from a root to the thing, each (kind, id, how it references the next); empty: nothing keeps it."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
