"""Bundles and runtimes for the tests: every test that speaks only the command line runs against runc, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.peers import need
from wherry.runtime import default_spec

Spec = dict[str, Any]

TIMEOUT = 30  # seconds for one command


class Runtime:
    """One OCI runtime's command line, with a state folder of its own."""

    def __init__(self, name: str, words: list[str], root: Path) -> None:
        self.name = name
        self.words = [*words, "--root", str(root)]
        self.root = root
        self.used: set[str] = set()

    def __call__(self, *args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        kwargs.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(
            [*self.words, *args], capture_output=True, text=True, timeout=TIMEOUT, check=False, **kwargs
        )

    def ok(self, *args: str, **kwargs: Any) -> str:
        """Its standard output; the test fails unless it exits with 0."""
        result = self(*args, **kwargs)
        assert result.returncode == 0, (args, result.returncode, result.stdout, result.stderr)
        return result.stdout

    def detached(self, *args: str, **kwargs: Any) -> None:
        """A command whose container keeps the standard streams."""
        result = subprocess.run(
            [*self.words, *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT,
            check=False,
            **kwargs,
        )
        assert result.returncode == 0, (args, result.returncode)

    def state(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.ok("state", container))
        return found

    def new_id(self) -> str:
        name = f"h2-{uuid.uuid4().hex[:12]}"
        self.used.add(name)
        return name

    def clean(self) -> None:
        for name in self.used:
            self("delete", "--force", name)


class Bundle:
    """A bundle folder with a busybox rootfs that all bundles share, read-only unless a test asks for its own."""

    def __init__(self, path: Path, rootfs: str) -> None:
        self.path = path
        self.rootfs = rootfs

    def write(self, change: Callable[[Spec], None] | None = None, *, args: list[str] | None = None) -> Path:
        """Write config.json: the default one, not a terminal, changed as wanted."""
        spec = make_spec(self.rootfs)
        if args:
            spec["process"]["args"] = args
        if change:
            change(spec)
        (self.path / "config.json").write_text(json.dumps(spec))
        return self.path


def make_spec(rootfs: str) -> Spec:
    spec = default_spec.make()
    spec["ociVersion"] = "1.0.2"
    spec["process"]["terminal"] = False
    spec["root"] = {"path": rootfs, "readonly": True}
    return spec


def wherry(root: Path) -> Runtime:
    return Runtime("wherry-runtime", [sys.executable, "-m", "wherry.runtime.command"], root)


def crun(root: Path) -> Runtime:
    """crun refuses a hybrid host: it gets a mount namespace without the v2 tree."""
    script = 'if [ -d /sys/fs/cgroup/unified ]; then umount /sys/fs/cgroup/unified; fi; exec "$0" "$@"'
    return Runtime("crun", ["unshare", "--mount", "sh", "-c", script, need("crun")], root)


def mounts_below(path: str | os.PathLike[str]) -> list[str]:
    """The host's mounts whose line names this path: others come and go as other tests run."""
    with open("/proc/self/mountinfo") as file:
        return [line for line in file if os.fspath(path) in line]


def cgroups_of(name: str) -> list[str]:
    """Directories of the host's hierarchies whose last part is the container's id."""
    found = []
    for folder, names, _ in os.walk("/sys/fs/cgroup"):
        found += [os.path.join(folder, item) for item in names if item == name]
    return found
