"""A snapshot's mounts whose files show other owners than they have: the options `uidmap=` and `gidmap=` of containerd.

    uidmap=0:100000:65536      what belongs to 0 and the ids after it is shown as 100000 and the ids after that

Of an overlay the lower directories are mapped (Linux 5.19), each by a mount of its own that is gone again when the
overlay stands; its upper directory has the owners that are seen. A bind mount is mapped as a whole (Linux 5.12).
"""

from __future__ import annotations

import errno
import os

from wherry.linux import namespaces
from wherry.linux import syscalls as sc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_count = 0


def lines(mapping: str) -> str:
    """`0:100000:65536,…` (inside, outside, how many) as /proc/PID/uid_map takes it. OSError for what is none."""
    found = []
    for entry in mapping.split(","):
        numbers = entry.split(":")
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            raise OSError(errno.EINVAL, f"{mapping!r} is no mapping of ids, as 0:100000:65536 is one")
        found.append(" ".join(numbers) + "\n")
    return "".join(found)


def user_namespace(uids: str, gids: str) -> int:
    """The descriptor of a user namespace for the two mappings; one that is empty maps nothing. OSError."""
    everything = "0:0:4294967295"
    return namespaces.make_user_namespace(lines(uids or everything), lines(gids or everything))


def bind(source: str, target: str, users: int, *, recursive: bool) -> None:
    """A bind mount of `source` at `target`, its ids mapped by the user namespace. OSError."""
    depth = sc.AT_RECURSIVE if recursive else 0
    tree = sc.open_tree(sc.AT_FDCWD, source, sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC | depth)
    try:
        sc.mount_setattr(tree, "", sc.AT_EMPTY_PATH | depth, set_=sc.MOUNT_ATTR_IDMAP, userns_fd=users)
        sc.move_mount(tree, "", sc.AT_FDCWD, target, sc.MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(tree)


def with_layers(layers: Sequence[str], users: int, use: Callable[[Sequence[str]], None]) -> None:
    """Call `use` with places where the layers are seen mapped; they are gone when it returns. OSError."""
    global _count  # noqa: PLW0603 - a name that no other call of this process has
    _count += 1
    base = f"{'/run' if os.path.isdir('/run') else '/tmp'}/wherry-map-{os.getpid()}-{_count}"
    os.mkdir(base, 0o700)
    made: list[str] = []
    try:
        for number, layer in enumerate(layers):
            place = f"{base}/{number}"
            os.mkdir(place, 0o700)
            made.append(place)
            bind(layer, place, users, recursive=False)
        use(made)
    finally:
        for place in made:
            try:
                sc.umount2(place, sc.MNT_DETACH)
            except OSError as error:
                if error.errno != errno.EINVAL:  # it wasn't mounted
                    raise
            os.rmdir(place)
        os.rmdir(base)
