"""User namespaces of containers: `--userns`, `--uidmap` and `--gidmap` (docker's and podman's words).

A container with one has a root who is nobody on the host. Its files aren't changed for that: the snapshotter shows them
with other owners (idmapped mounts), and so does the runtime for volumes. `auto` gives each container 65536 ids of its
own, so that not even two containers share an id:

- out of what /etc/subuid and /etc/subgid grant to `wherry` or `containers`, where they grant something (podman's rule);
- else out of 524288 to 1879048191, which systemd's "Users, Groups, UIDs and GIDs" keeps for containers, but for what
  those files grant to people.

What is taken is told by the records: a range belongs to a container from its creation to its removal.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from wherry.client.finding import find
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from wherry.core.tuples import NamedTuple

if TYPE_CHECKING:
    from wherry.client.api import Client

UID_LABEL, GID_LABEL = "containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping"
# what a snapshotter says of itself that heeds these labels
REMAPS = "remap-ids"
SIZE = 65536
_POOL = (524288, 1879048192)
_OWNERS = ("wherry", "containers")
_GRANTS = ("/etc/subuid", "/etc/subgid")
_LARGEST = 0xFFFFFFFF

Range = tuple[int, int, int]
"""(first id in the container, first id of the host, how many)"""


class Users(NamedTuple):
    """A user namespace that a container is to have; `path` of one that is there, "" for a new one."""

    uids: Sequence[Range]
    gids: Sequence[Range]
    path: str = ""

    def labels(self) -> dict[str, str]:
        """What asks a snapshotter for files with these owners."""
        return {UID_LABEL: _text(self.uids), GID_LABEL: _text(self.gids)}

    def root(self) -> tuple[int, int]:
        """The container's root, as the host numbers it."""
        found = [
            next((outside for inside, outside, _ in ranges if inside == 0), 0) for ranges in (self.uids, self.gids)
        ]
        return found[0], found[1]

    def put(self, spec: dict[str, Any]) -> None:
        """Gives the namespace to a specification."""
        linux = spec["linux"]
        others = [item for item in linux["namespaces"] if item["type"] != "user"]
        linux["namespaces"] = [*others, {"type": "user", **({"path": self.path} if self.path else {})}]
        linux["uidMappings"], linux["gidMappings"] = _mappings(self.uids), _mappings(self.gids)


def _text(ranges: Iterable[Range]) -> str:
    return ",".join(":".join(map(str, item)) for item in ranges)


def mappings(users: Users) -> list[dict[str, int]]:
    """`uidMappings` of the specification."""
    return _mappings(users.uids)


def _mappings(ranges: Iterable[Range]) -> list[dict[str, int]]:
    return [{"containerID": inside, "hostID": outside, "size": count} for inside, outside, count in ranges]


def parse(flag: str, items: Iterable[str]) -> list[Range]:
    """The ranges of `--uidmap CONTAINER:HOST[:SIZE]`; raises InvalidArgument."""
    found: list[Range] = []
    for item in items:
        numbers = item.split(":")
        if len(numbers) == 2:
            numbers.append("1")
        if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            raise InvalidArgument(f"{flag} {item!r}: expected CONTAINER:HOST:SIZE, as in 0:100000:65536")
        inside, outside, count = map(int, numbers)
        if not count or max(inside, outside) + count - 1 > _LARGEST - 1:
            raise InvalidArgument(f"{flag} {item!r}: ids go from 0 to {_LARGEST - 1}, and a range has at least one")
        for other in found:
            if _overlap((inside, count), (other[0], other[2])) or _overlap((outside, count), (other[1], other[2])):
                raise InvalidArgument(f"{flag} {item!r}: two ranges overlap")
        found.append((inside, outside, count))
    return found


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


async def users_for(client: Client, mode: str, uidmap: Iterable[str] = (), gidmap: Iterable[str] = ()) -> Users | None:
    """The user namespace that a mode asks for, None for the host's.

    `mode` is "", `host`, `auto[:size=N]`, `private` or `container:NAME`; mappings are given for "" and `private` alone,
    those of groups are those of users where only the latter are given. Raises InvalidArgument, NotFound,
    FailedPrecondition, ResourceExhausted.
    """
    uids, gids = parse("--uidmap", uidmap), parse("--gidmap", gidmap)
    word, _, rest = mode.partition(":")
    if (uids or gids) and mode not in {"", "private"}:
        raise InvalidArgument(f"--userns {mode} can't be used together with --uidmap and --gidmap: they say it all")
    if word in {"", "host"} and not (uids or gids):
        return None
    if os.geteuid():
        raise FailedPrecondition(
            "--userns: your containers are in your own user namespace already, and another one takes root: leave it out"
        )
    if word == "container":
        return await _of_other(client, mode, rest)
    if uids or gids:
        return _whole(Users(uids or gids, gids or uids))
    if word == "auto" or mode == "private":
        return _automatic(await _taken(client), _size(mode, rest))
    if word in {"keep-id", "nomap"}:
        raise InvalidArgument(f"--userns {mode}: that is for ordinary users of podman; 'auto' gives it ids of its own")
    raise InvalidArgument(f"--userns {mode!r}: it is host, auto, auto:size=N, private or container:NAME")


def _whole(users: Users) -> Users:
    for flag, ranges in (("--uidmap", users.uids), ("--gidmap", users.gids)):
        if not any(inside == 0 for inside, _, _ in ranges):
            raise InvalidArgument(f"{flag}: a container needs a root: map its 0, as in 0:100000:65536")
    return users


def _size(mode: str, rest: str) -> int:
    if not rest:
        return SIZE
    name, _, value = rest.partition("=")
    if name != "size" or not value.isdecimal() or not 1 <= int(value) <= 1 << 24:
        raise InvalidArgument(f"--userns {mode!r}: expected auto:size=N, as in auto:size=65536")
    return int(value)


async def _of_other(client: Client, mode: str, name: str) -> Users:
    """The namespace of a container that runs, with its mappings: files must be seen by the same ids."""
    other = await find(client, name)
    linux = (other.spec or {}).get("linux") or {}
    if not any(item.get("type") == "user" for item in linux.get("namespaces") or ()):
        raise InvalidArgument(f"--userns {mode}: container {name} has no user namespace")
    try:
        pid = (await client.tasks.get(other.id)).pid
    except NotFound:
        raise InvalidArgument(f"--userns {mode}: container {name} doesn't run: 'wherry start {name}'") from None
    ranges = [
        [(int(item.get("containerID") or 0), int(item.get("hostID") or 0), int(item["size"])) for item in linux[kind]]
        for kind in ("uidMappings", "gidMappings")
    ]
    return Users(ranges[0], ranges[1], f"/proc/{pid}/ns/user")


async def _taken(client: Client) -> list[tuple[int, int]]:
    """The host's ids that containers have: of this daemon, in all its namespaces."""
    found = []
    for namespace in await client.namespaces.list():
        for container in await client.within(namespace.name).containers.list():
            linux = (container.spec or {}).get("linux") or {}
            for kind in ("uidMappings", "gidMappings"):
                found += [(int(item.get("hostID") or 0), int(item["size"])) for item in linux.get(kind) or ()]
    return found


def _automatic(taken: Sequence[tuple[int, int]], size: int) -> Users:
    """A range that nobody has, by chance: two that look at once hardly ever find the same one."""
    ours, others = _granted()
    pool = ours or [(_POOL[0], _POOL[1] - _POOL[0])]
    busy = [*taken, *([] if ours else others)]
    step = max(size, 1024 if ours else SIZE)
    starts = [
        first
        for start, count in pool
        for first in range(start, start + count - size + 1, step)
        if not any(_overlap((first, size), item) for item in busy)
    ]
    if not starts:
        raise ResourceExhausted(
            f"no {size} ids are free for --userns auto: remove containers that have them ('wherry ps -a'), or grant "
            f"more to '{_OWNERS[0]}' in {_GRANTS[0]} and {_GRANTS[1]}"
        )
    first = random.choice(starts)  # noqa: S311 - it is no secret
    return Users([(0, first, size)], [(0, first, size)])


def _granted(paths: Sequence[str] = _GRANTS) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(first, count) of what subuid(5) and subgid(5) both grant to us, and of what either grants to anybody else."""
    ours: list[set[tuple[int, int]]] = []
    others = []
    for path in paths:
        mine = set()
        for name, first, count in _lines(path):
            if name in _OWNERS:
                mine.add((first, count))
            else:
                others.append((first, count))
        ours.append(mine)
    return sorted(set.intersection(*ours)), others


def _lines(path: str) -> list[tuple[str, int, int]]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            rows = [line.strip().split(":") for line in file]
    except OSError:
        return []
    return [
        (row[0], int(row[1]), int(row[2]))
        for row in rows
        if len(row) == 3 and row[1].isdecimal() and row[2].isdecimal() and int(row[2])
    ]


async def check_snapshotter(client: Client, name: str) -> None:
    """Raises FailedPrecondition where a snapshotter doesn't give files other owners."""
    plugins = await client.introspection.plugins([f"type==io.containerd.snapshotter.v1,id=={name}"])
    if not any(REMAPS in plugin.capabilities for plugin in plugins):
        raise FailedPrecondition(
            f"--userns: snapshotter {name} can't give a container's files other owners (it needs Linux 5.19 and a "
            "daemon that maps them): use another one with --snapshotter, or leave --userns out"
        )
