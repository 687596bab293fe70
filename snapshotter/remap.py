"""Snapshots for a user namespace: the labels that ask for other owners than the image's files have.

    containerd.io/snapshot/uidmapping = 0:100000:65536      ids from 0 on are seen as 100000 and the ids after it

The mounts of such a snapshot say it by the options `uidmap=` and `gidmap=` (`linux/idmapped.py` carries them out), so
that no file is touched. What a container writes into an overlay's upper directory has the owners that the host sees.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from wherry.core.errors import InvalidArgument

UID_LABEL = "containerd.io/snapshot/uidmapping"
GID_LABEL = "containerd.io/snapshot/gidmapping"
CAPABILITY = "remap-ids"
"""What a plugin says that heeds the labels; containerd's clients change owners themselves where nobody says so."""
_LARGEST = 0xFFFFFFFF
_OVERFLOW = 65534
"""Whom the kernel shows for an id that nothing is mapped to."""

Ranges = Sequence[tuple[int, int, int]]
"""(first id of the image, first id of the host, how many)"""


def parse(text: str) -> Ranges:
    """The ranges of a label, separated by commas. InvalidArgument."""
    found = []
    for entry in text.split(","):
        numbers = entry.split(":")
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) <= _LARGEST for number in numbers):
            raise InvalidArgument(f"{text!r} is no mapping of ids, as 0:100000:65536 is one: invalid argument")
        found.append((int(numbers[0]), int(numbers[1]), int(numbers[2])))
    return found


def check(labels: Mapping[str, str]) -> bool:
    """Whether the labels ask for other owners. InvalidArgument for a mapping that is none, or one without the other."""
    asked = [label for label in (UID_LABEL, GID_LABEL) if label in labels]
    for label in asked:
        parse(labels[label])
    if len(asked) == 1:
        raise InvalidArgument(f"snapshot has the label {asked[0]} and not the other of the two: invalid argument")
    return bool(asked)


def options(labels: Mapping[str, str]) -> tuple[str, ...]:
    """The mount options for the labels; none where they ask for nothing."""
    if UID_LABEL not in labels or GID_LABEL not in labels:
        return ()
    return (f"uidmap={labels[UID_LABEL]}", f"gidmap={labels[GID_LABEL]}")


def to_host(identity: int, ranges: Ranges) -> int:
    """The host's id for one of the image's; the kernel's overflow id where there is none."""
    for inside, outside, count in ranges:
        if inside <= identity < inside + count:
            return outside + identity - inside
    return _OVERFLOW


def to_image(identity: int, ranges: Ranges) -> int:
    """The image's id for one of the host's; the id itself where nothing is mapped to it."""
    for inside, outside, count in ranges:
        if outside <= identity < outside + count:
            return inside + identity - outside
    return identity


def supported() -> bool:
    """Whether the kernel maps the layers of an overlay: Linux 5.19."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(char for char in minor if char.isdigit()) or 0)) >= (5, 19)
