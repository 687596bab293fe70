"""Runs a plugin of CNI for an ordinary user: among the user's bridges, with folders of the host's that it may write.

    python -m wherry.network.within HUB FOLDER PROGRAM [ARGUMENT…]

HUB is the file of a network namespace (hub.py). FOLDER stands in for /var/lib/cni, where plugins keep the addresses
that they gave out, in a mount namespace of the plugin's own; iptables' lock is there, too.
"""

from __future__ import annotations

import os
import sys

from wherry.linux import syscalls as sc

_STATE = "/var/lib/cni"


def main() -> int:
    """Becomes the program."""
    hub, folder, *words = sys.argv[1:]
    namespace = os.open(hub, os.O_RDONLY | os.O_CLOEXEC)
    sc.setns(namespace, sc.CLONE_NEWNET)
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount("", "/", "", sc.MS_REC | sc.MS_SLAVE)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    where = _STATE
    if not os.path.isdir(where):  # a host that never saw CNI
        own = os.path.join(folder, "lib")
        os.makedirs(os.path.join(own, "cni"), exist_ok=True)
        folder, where = own, os.path.dirname(_STATE)
    sc.mount(folder, where, "", sc.MS_BIND)
    os.execve(words[0], words, {**os.environ, "XTABLES_LOCKFILE": os.path.join(_STATE, "xtables.lock")})


if __name__ == "__main__":
    sys.exit(main())
