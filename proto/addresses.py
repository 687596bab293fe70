"""Unix socket paths: names that fit into `sockaddr_un`, and sockets with the right mode from their first moment on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

SUN_PATH = 108  # bytes of sockaddr_un.sun_path with its NUL (unix(7))


@contextlib.contextmanager
def short_path(path: str) -> Iterator[str]:
    """A name for a socket's path that fits: the path itself, or one through /proc/self/fd while the context lasts."""
    if len(os.fsencode(path)) < SUN_PATH:
        yield path
        return
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)


@contextlib.contextmanager
def tight_umask() -> Iterator[None]:
    """What is made meanwhile is its owner's alone. The umask is the whole process's: only while nothing else runs."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


def own(path: str, *, uid: int, gid: int) -> None:
    """Give a fresh socket to its owner: mode 0660 where a group was named, 0600 otherwise."""
    if (uid, gid) != (os.geteuid(), os.getegid()):
        os.chown(path, uid, gid)
    os.chmod(path, 0o660 if gid != os.getegid() else 0o600)
