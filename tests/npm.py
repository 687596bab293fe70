"""Packages of npm as peers: fetched once, by npm itself, into a cache folder outside of the repository."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from pathlib import Path

from tests.peers import missing, need

# exact, so that a test tomorrow meets the same peer
PACKAGES = {"spdy-transport": "3.0.0", "ws": "8.18.0"}


def folder() -> Path:
    """Where they are."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "wherry-tests" / "npm"


def modules(*names: str) -> Path:
    """The folder whose `node_modules` has these; without them the test skips (or fails where peers are required)."""
    need("node")
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        missing(f"{place}: {error}")
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(_there(place, name) for name in names):
            _fetch(place)
    absent = [name for name in names if not _there(place, name)]
    if absent:
        missing(f"npm's {', '.join(absent)} can't be had: npm install {' '.join(_spec(name) for name in absent)}")
    return place


def _spec(name: str) -> str:
    return f"{name}@{PACKAGES[name]}"


def _there(place: Path, name: str) -> bool:
    try:
        found = json.loads((place / "node_modules" / name / "package.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(found.get("version") == PACKAGES[name])


def _fetch(place: Path) -> None:
    command = [need("npm"), "install", "--prefix", str(place), "--no-audit", "--no-fund", "--ignore-scripts"]
    try:
        subprocess.run(
            [*command, *map(_spec, PACKAGES)], check=False, capture_output=True, timeout=120, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return
