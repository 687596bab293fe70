"""The network namespace in which an ordinary user's bridges are: one for each daemon, held by a mount on a file.

A user may touch none of the host's interfaces, but in a namespace of its own it may make what root makes on the host:
bridges, rules, names, all by the same code. A program of the user's (usermode.py) leads from there to the outside, as
it does from a container; published ports are the keeper's, which listens on the host and dials in here.
"""

from __future__ import annotations

import contextlib
import errno
import os

from pyroute2 import IPRoute

from wherry.linux import syscalls as sc


def enter(path: str) -> None:
    """This process goes into the namespace that the file `path` holds, which is made where it isn't there.

    For a process with one thread, as root of a user namespace: it can't come back. Raises OSError.
    """
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        sc.setns(file, sc.CLONE_NEWNET)
        return
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file that holds nothing (yet, or since the namespaces ended)
            raise
    finally:
        os.close(file)
    sc.unshare(sc.CLONE_NEWNET)
    with IPRoute() as inside:
        inside.link("set", index=1, state="up")
    sc.mount("/proc/self/ns/net", path, "none", sc.MS_BIND)


def remove(path: str) -> None:
    """Lets go of it; it ends with the last process in it. None there is fine."""
    with contextlib.suppress(OSError):
        sc.umount2(path, sc.MNT_DETACH)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
