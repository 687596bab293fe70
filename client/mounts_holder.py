"""The process that holds the files of a container which doesn't run, started by exec for as long as they are used.

    python -I -m wherry.client.mounts_holder '{"mounts": […], "binds": [["/srv", "/data"]]}'

The mounts of its root, with `binds` (source and destination) on top, are mounted in a mount namespace of this process'
own, and become its root: `/proc/PID/root` is the way in (wherry.client.files). It says `ready` on stdout, and ends with
its stdin; the mounts go with it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from wherry.linux import syscalls as sc
from wherry.linux.mounts import Mount, mount_all

# in a mount namespace of one's own any folder will do that every host has: none is made, none can stay behind
_PLACE = "/sys"


def hold(job: dict[str, Any]) -> None:
    """Mounts, and goes in. OSError."""
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount("none", "/", "", sc.MS_REC | sc.MS_PRIVATE)
    # before anything is mounted over them
    sources = [(os.open(source, os.O_PATH | os.O_CLOEXEC), place) for source, place in job.get("binds") or ()]
    mount_all([Mount(item["type"], item["source"], "", item["options"]) for item in job["mounts"]], _PLACE)
    root = os.open(_PLACE, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for source, destination in sources:
        try:
            target = sc.openat2(root, destination, os.O_PATH, resolve=sc.RESOLVE_IN_ROOT)
        except OSError:
            # made when the container starts
            continue
        sc.mount(f"/proc/self/fd/{source}", f"/proc/self/fd/{target}", "", sc.MS_BIND | sc.MS_REC)
        os.close(target)
    os.fchdir(root)
    os.chroot(".")
    os.chdir("/")


def main(argv: list[str] | None = None) -> int:
    """One container's files."""
    job = json.loads((argv or sys.argv[1:])[0])
    try:
        hold(job)
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"{error.strerror or error}{name}\n")
        return 1
    os.write(1, b"ready\n")
    while os.read(0, 1):
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
