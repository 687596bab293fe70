"""containerd as Debian's sid has it (2.x), unpacked into a folder: fetched once, from this machine's mirror."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("LAB", Path(os.environ.get("TMPDIR", "/tmp")) / "wherry-peers")) / "sid"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def need_sid(program: str = "ctr") -> str:
    """The path of a program of sid's containerd; skips, also where peers are required, when it can't be had or run.

    sid moves: what it has today may not be there, or not run on this host, tomorrow.
    """
    path = FOLDER / "usr" / "bin" / program
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            try:
                _fetch()
            except (OSError, subprocess.SubprocessError) as error:
                pytest.skip(f"containerd of Debian sid can't be fetched: {error}")
    try:
        subprocess.run([str(path), "--version"], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"containerd of Debian sid doesn't run here: {error}")
    return str(path)


def _mirror() -> str:
    """The address of the archive in apt's sources."""
    sources = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    for source in sources:
        text = source.read_text() if source.is_file() else ""
        for line in text.splitlines():
            match = re.match(r"(?:URIs:\s*|deb\s+(?:\[[^]]*\]\s+)?)(\S+/debian/?)(?:\s|$)", line)
            if match:
                return match[1]
    raise OSError("apt's sources name no Debian archive")


def _fetch() -> None:
    with tempfile.TemporaryDirectory(prefix="wherry-sid-") as folder:
        work = Path(folder)
        for name in ("lists/partial", "cache/archives/partial"):
            (work / name).mkdir(parents=True)
        (work / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_mirror()} sid main\n")
        options = {
            "Dir::Etc::sourcelist": work / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::lists": work / "lists",
            "Dir::Cache": work / "cache",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",
        }
        apt = ["apt-get", "-qq", *(item for key, value in options.items() for item in ("-o", f"{key}={value}"))]
        for command in ([*apt, "update"], [*apt, "download", "containerd/sid"]):
            subprocess.run(command, check=True, cwd=work, timeout=100, capture_output=True)
        (package,) = work.glob("containerd_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), str(FOLDER)], check=True, timeout=60)
