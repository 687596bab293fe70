"""Fills a volume for an ordinary user, started by exec: as root of a user namespace, where files keep their owners.

    python -I -m wherry.client.filler '{"folder": "/…", "mounts": […], "path": "/data"}'

It prints `filled` where something was done; otherwise its words on stderr say why not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable

from wherry.client import copies
from wherry.client.values import Mount
from wherry.core.errors import FailedPrecondition, WherryError
from wherry.linux import rootless


def run(folder: str, mounts: Iterable[Mount], path: str) -> bool:
    """`copies.fill` in a process of its own. Raises FailedPrecondition."""
    plain = [{"type": item.type, "source": item.source, "options": list(item.options)} for item in mounts]
    job = json.dumps({"folder": folder, "mounts": plain, "path": path})
    command = [sys.executable, "-I", "-m", "wherry.client.filler", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedPrecondition(f"the volume can't be filled: {done.stderr.strip() or done.returncode}")
    return "filled" in done.stdout


def main(argv: list[str] | None = None) -> int:
    """One volume."""
    job = json.loads((argv or sys.argv[1:])[0])
    try:
        if os.geteuid() != 0:
            rootless.become_root()
        mounts = [Mount(item["type"], item["source"], options=tuple(item["options"])) for item in job["mounts"]]
        if copies.fill(job["folder"], mounts, job["path"]):
            print("filled")
    except (WherryError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
