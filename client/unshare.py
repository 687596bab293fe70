"""Into the namespaces that a user's containers live in."""

from __future__ import annotations

import contextlib
import os

from wherry.linux import rootless
from wherry.linux import syscalls as sc

# bytes of a container's passwd(5) that are read
_PASSWD = 1 << 20


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
        # a copy, since what is mounted in another mount namespace can't be mounted here
        sc.mount("tmpfs", "/tmp", "tmpfs", sc.MS_NOSUID | sc.MS_NODEV, "mode=700")
        with open("/tmp/passwd", "wb") as file, contextlib.suppress(OSError):
            names = sc.openat2(root, "etc/passwd", os.O_RDONLY | os.O_CLOEXEC, resolve=sc.RESOLVE_IN_ROOT)
            file.write(os.read(names, _PASSWD))
        sc.mount("/tmp/passwd", "/etc/passwd", "", sc.MS_BIND)
