"""Long lists, some items at a time: what the CRI's Stream* methods put into one message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

T = TypeVar("T")

# items of one message: with long labels and annotations still far below the 16 MiB that a kubelet takes
SIZE: Final = 100


def batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """All of them, so many at a time."""
    for at in range(0, len(items), SIZE):
        yield items[at : at + SIZE]
