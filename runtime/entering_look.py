"""What is looked up in a container's root from outside, for `entering.py`: the program, and the user's home.

Below that root alone (openat2(2), RESOLVE_IN_ROOT), through no magic link, and on no other file system than the root's
own, which must be one of those that no process can make hang. Everything else is `Uncommon`.
"""

from __future__ import annotations

import ctypes
import os
import stat

from wherry.linux import syscalls as sc
from wherry.runtime import identity

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# statfs(2), f_type: ext4, XFS, btrfs, tmpfs, overlay, squashfs, EROFS
_LOCAL = frozenset({0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x794C7630, 0x73717368, 0xE0F5E1E2})
_LOOKUP = sc.RESOLVE_IN_ROOT | sc.RESOLVE_NO_MAGICLINKS | sc.RESOLVE_NO_XDEV
# bytes; a file of users that is larger is left to others
_PASSWD = 256 << 10


class Uncommon(Exception):
    """It is left to others."""


def look(pid: int, asked: dict[str, Any]) -> tuple[str, list[str]]:
    """The program's path and the environment, where they can be found out from here."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _kind(root) not in _LOCAL:
            raise Uncommon
        env = list(asked.get("env") or ())
        program = _program(root, asked["args"][0], env)
        if not any(item.startswith("HOME=") for item in env):
            env.append(f"HOME={_home(root, (asked.get('user') or {}).get('uid') or 0)}")
        return program, env
    finally:
        os.close(root)


def _kind(fd: int) -> int:
    buffer = ctypes.create_string_buffer(256)  # struct statfs, whose first word is f_type
    if sc.libc.fstatfs(ctypes.c_int(fd), buffer):
        raise OSError(ctypes.get_errno(), "fstatfs")
    return int.from_bytes(buffer.raw[:8], "little")


def _program(root: int, name: str, env: list[str]) -> str:
    """As `identity.find_program`, for absolute paths."""
    if "/" in name:
        if name.startswith("/") and _is_program(root, name):
            return name
        raise Uncommon
    path = ""
    for item in env:
        if item.startswith("PATH="):
            path = item[5:]
    for folder in path.split(":"):
        if not folder.startswith("/"):
            break
        candidate = os.path.join(folder, name)
        if _is_program(root, candidate):
            return candidate
    raise Uncommon


def _is_program(root: int, path: str) -> bool:
    try:
        fd = sc.openat2(root, path, os.O_PATH, resolve=_LOOKUP)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        mode = os.fstat(fd).st_mode
    finally:
        os.close(fd)
    return not stat.S_ISDIR(mode) and bool(mode & 0o111)


def _home(root: int, uid: int) -> str:
    """As `identity.home_of`, where the file can be read in one go."""
    try:
        fd = sc.openat2(root, "etc/passwd", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, resolve=_LOOKUP)
    except (FileNotFoundError, NotADirectoryError):
        return "/"
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_size > _PASSWD:
            raise Uncommon
        raw = os.read(fd, _PASSWD)
    finally:
        os.close(fd)
    return identity.home_in(raw.decode("utf-8", "surrogateescape").split("\n"), uid)
