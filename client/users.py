"""Who a container's process runs as: an image's `User` and its /etc/passwd and /etc/group (docker's rules).

The files are read from the directories that a snapshot's mounts name, layer by layer, without mounting them: nothing of
an image is followed (no symbolic link), and root on the daemon's host is all that it needs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable

from wherry.client.values import Mount
from wherry.core.errors import InvalidArgument
from wherry.core.tuples import NamedTuple

# larger than any real one; what an image brings isn't trusted to be small
MAX_FILE = 4 << 20
Reader = Callable[[str], str]


class User(NamedTuple):
    """Numbers for `process.user`; `groups` holds the primary one too, as containerd writes it."""

    uid: int
    gid: int
    groups: tuple[int, ...]

    def json(self) -> dict[str, object]:
        """As the specification has it."""
        return {"uid": self.uid, "gid": self.gid, "additionalGids": list(self.groups)}


ROOT = User(0, 0, (0,))


def _records(text: str, fields: int) -> list[list[str]]:
    rows = (line.strip().split(":") for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return [row for row in rows if len(row) >= fields]


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and int(text) < 1 << 32 else None


def resolve(user: str, read: Reader) -> User:
    """The numbers for `NAME|UID[:GROUP|GID]`, "" is root. `read` gives a file's text, "" where it isn't there.

    A number that no file knows is fine; a name that none knows raises InvalidArgument.
    """
    name, colon, group = (user or "0").partition(":")
    uid = _number(name)
    row = next(
        (row for row in _records(read("etc/passwd"), 4) if (row[0] == name if uid is None else _number(row[2]) == uid)),
        None,
    )
    if row is None and uid is None:
        raise InvalidArgument(f"unable to find user {name}: no matching entries in the container's /etc/passwd")
    login = row[0] if row else ""
    uid = _number(row[2]) if row else uid
    groups = _records(read("etc/group"), 3)
    if colon:
        gid = _group(group, groups)
        extra: list[int] = []
    else:
        gid = (_number(row[3]) if row else 0) or 0
        extra = [
            number
            for entry in groups
            if len(entry) > 3 and login and login in entry[3].split(",")
            if (number := _number(entry[2])) is not None
        ]
    if uid is None:
        raise InvalidArgument(f"the container's /etc/passwd gives user {name} no number")
    return User(uid, gid, tuple(dict.fromkeys([gid, *extra])))


def group_ids(names: Iterable[str], read: Reader) -> list[int]:
    """The numbers of groups, by name or number; raises InvalidArgument for a name that no file knows."""
    groups = _records(read("etc/group"), 3)
    return [_group(name, groups) for name in names]


def _group(name: str, groups: list[list[str]]) -> int:
    number = _number(name)
    if number is not None:
        return number
    for entry in groups:
        found = _number(entry[2])
        if entry[0] == name and found is not None:
            return found
    raise InvalidArgument(f"unable to find group {name}: no matching entries in the container's /etc/group")


def layers(mounts: Iterable[Mount]) -> list[str]:
    """The directories that a snapshot's mounts put on top of each other, the topmost first."""
    found: list[str] = []
    for mount in mounts:
        if mount.type in {"overlay", "fuse3.fuse-overlayfs"}:
            options = dict(option.partition("=")[::2] for option in mount.options)
            upper = options.get("upperdir")
            found += [upper] if upper else []
            found += [folder for folder in options.get("lowerdir", "").split(":") if folder]
        elif mount.type in {"bind", "rbind"}:
            found.append(mount.source)
    return found


def reader(mounts: Iterable[Mount]) -> Reader:
    """A reader of files (`etc/passwd`) in a snapshot; raises InvalidArgument where this process may not look."""
    folders = layers(mounts)

    def read(path: str) -> str:
        for folder in folders:
            text = _read(folder, path)
            if text is not None:
                return text
        return ""

    return read


def _read(folder: str, path: str) -> str | None:
    """The file's text, "" where this layer says that it isn't there, None where a lower one decides."""
    *parents, name = path.split("/")
    try:
        at = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        raise InvalidArgument(f"no permission to read the image's files in {folder}: run as root") from None
    except FileNotFoundError:
        return None
    try:
        for parent in parents:
            following = _open(parent, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, at)
            if following is None:
                return None
            os.close(at)
            at = following
            mode = os.fstat(at)
            if not stat.S_ISDIR(mode.st_mode):
                # a whiteout (a device 0/0), or something that can't have files below it
                return ""
        file = _open(name, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, at)
        if file is None:
            return "" if _opaque(at) else None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return ""
            with open(f"/proc/self/fd/{file}", "rb") as source:
                return source.read(MAX_FILE).decode(errors="replace")
        finally:
            os.close(file)
    finally:
        os.close(at)


def _open(name: str, flags: int, at: int) -> int | None:
    try:
        return os.open(name, flags, dir_fd=at)
    except FileNotFoundError:
        return None


def _opaque(folder: int) -> bool:
    try:
        return os.getxattr(f"/proc/self/fd/{folder}", "trusted.overlay.opaque") == b"y"
    except OSError:
        return False
