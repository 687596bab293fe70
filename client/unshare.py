"""Into the namespaces that a user's containers live in."""

from __future__ import annotations

import contextlib
import os

from wherry.linux import rootless
from wherry.linux import syscalls as sc


def enter(state: str) -> None:
    """Makes this process root of the user's namespaces; they are made where no daemon made them yet.

    `state` is the daemon's state folder. For processes with one thread, which then start a program. Raises
    FailedPrecondition where the host doesn't allow it.
    """
    if os.geteuid() != 0:
        rootless.enter(state)


def look_from(pid: int) -> None:
    """Go where ids and their names are what the container of a process of one's own sees: before an exec.

    Its user namespace, and a mount namespace with its /etc/passwd. For a process with one thread. A namespace that may
    not be entered is left alone: ids are the host's then.
    """
    with contextlib.suppress(OSError):
        namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)
        sc.setns(namespace, sc.CLONE_NEWUSER)
        sc.unshare(sc.CLONE_NEWNS)
        try:
            names = sc.openat2(root, "etc/passwd", os.O_PATH | os.O_CLOEXEC, resolve=sc.RESOLVE_IN_ROOT)
        except OSError:
            names = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
        sc.mount(f"/proc/self/fd/{names}", "/etc/passwd", "", sc.MS_BIND)
