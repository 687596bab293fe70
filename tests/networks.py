"""What a test's daemon has of the host's network: seen from outside, and removed whatever became of the daemon."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path


def instance(state: Path | str) -> str:
    """What the daemon of a state folder marks its things with."""
    return hashlib.sha256(os.path.realpath(state).encode()).hexdigest()[:6]


def links(state: Path | str) -> list[str]:
    """The interfaces of the host that belong to the daemon of this state folder."""
    mark = instance(state)
    done = subprocess.run(["ip", "-j", "link"], capture_output=True, text=True, check=False)
    found = []
    for link in json.loads(done.stdout or "[]"):
        name, alias = str(link["ifname"]), str(link.get("ifalias", ""))
        if name.startswith(f"wh{mark}") or name == f"wherry-{mark}" or alias.startswith(f"wherry {mark} "):
            found.append(name)
    return found


def tables(state: Path | str) -> list[str]:
    """Its tables of nftables."""
    done = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if line.split()[-1] == f"wherry_{instance(state)}"]


def left(state: Path | str) -> list[str]:
    """Interfaces, tables, and held namespaces."""
    held = [str(path) for path in (Path(state) / "netns").rglob("*") if path.is_file()]
    return links(state) + tables(state) + held


def clean(state: Path | str) -> None:
    """Removes all of it. Who is no root, or has no ip, has made nothing."""
    try:
        for name in links(state):
            subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)
        for table in tables(state):
            subprocess.run(["nft", "delete", *table.split()], capture_output=True, check=False)
    except FileNotFoundError:
        return
