"""A wherryd with busybox for all tests here, and the command as a person runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

from tests.wherryd import Wherryd


class Wherry:
    """The command line on one daemon."""

    def __init__(self, address: str) -> None:
        self.address = address

    def command(self, *args: str) -> list[str]:
        """The command line as it is run."""
        return [sys.executable, "-m", "wherry.cli", "--address", self.address, *args]

    def run(
        self, *args: str, code: int | None = 0, stdin: str = "", env: dict[str, str] | None = None, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end; `code` is what it must exit with, None for whatever."""
        done = subprocess.run(
            self.command(*args),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **(env or {})},
            check=False,
        )
        if code is not None:
            assert done.returncode == code, f"{args} exits with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done

    def start(self, *args: str, **options: object) -> subprocess.Popen[bytes]:
        """Starts a command; the caller ends it."""
        return subprocess.Popen(self.command(*args), **options)  # type: ignore[call-overload,no-any-return]

    def ids(self, what: Sequence[str] = ("containers", "ls", "-q")) -> list[str]:
        """What a listing prints with -q."""
        return self.run(*what).stdout.split()


@pytest.fixture(scope="session")
def daemon() -> Iterator[Wherryd]:
    """A daemon with an image."""
    daemon = Wherryd()
    try:
        daemon.start()
        daemon.import_busybox()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture
def wherry(daemon: Wherryd) -> Iterator[Wherry]:
    """The command; a test that leaves a container behind fails."""
    wherry = Wherry(daemon.address)
    yield wherry
    left = wherry.ids()
    for name in left:
        wherry.run("tasks", "rm", "-f", name, code=None)
        wherry.run("containers", "rm", name, code=None)
    assert left == []
