"""Kubernetes' logs under containerd's own shim: the same records, rotation and attached clients as under ours."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers import need
from tests.wherryd import BUSYBOX, Wherryd
from wherry.client import connect
from wherry.client.api import Client
from wherry.client.tasks import Stdio
from wherry.core.container_logs import cri_uri
from wherry.core.errors import FailedPrecondition, WherryError

SCRIPT = "echo err >&2; i=0; while true; do echo $i; i=$((i+1)); sleep 0.02; done"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Wherryd]:
    need("runc")
    daemon = Wherryd()
    try:
        daemon.start()
        daemon.import_busybox()
        yield daemon
    finally:
        daemon.close()


def run(daemon: Wherryd, name: str, uri: str, script: str = SCRIPT) -> None:
    shim = need("containerd-shim-runc-v2")
    daemon.ctr("run", "-d", "--runtime", shim, "--log-uri", uri, BUSYBOX, name, "sh", "-c", script)


def asked(daemon: Wherryd, call: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
    async def ask() -> None:
        async with await connect(daemon.address) as client:
            await call(client)

    asyncio.run(ask())


def until(found: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def numbers(path: Path) -> list[int]:
    found = [re.fullmatch(r"\S+Z stdout F (\d+)", line) for line in path.read_text().splitlines()]
    return [int(match[1]) for match in found if match]


def writers(path: Path) -> int:
    """How many programs write this log."""
    found = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            found += str(path.parent).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    return found


def test_a_log_is_written_rotated_and_joined_while_the_daemon_comes_and_goes(daemon: Wherryd, tmp_path: Path) -> None:
    path, old = tmp_path / "a 'name'%?.log", tmp_path / "old"
    run(daemon, "one", cri_uri(str(path)))
    until(lambda: path.exists() and len(numbers(path)) > 3)
    assert "stderr F err" in path.read_text()
    daemon.kill()
    before = len(numbers(path))
    until(lambda: len(numbers(path)) > before + 5)
    daemon.start()
    path.rename(old)
    asked(daemon, lambda client: client.tasks.reopen_log("one"))
    until(lambda: len(numbers(path)) > 3)
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    asked(daemon, lambda client: client.tasks.attach("one", Stdio(stdout=str(tmp_path / "fifo"))))
    heard = bytearray()

    def read() -> bool:
        try:
            heard.extend(os.read(fifo, 4096))
        except BlockingIOError:
            return False
        return heard.count(b"\n") > 5

    until(read)
    daemon.ctr("task", "delete", "--force", "one", check=False)
    until(lambda: writers(path) == 0)
    os.close(fifo)
    found = numbers(old) + numbers(path)
    assert found == list(range(len(found)))
    with pytest.raises(WherryError):
        asked(daemon, lambda client: client.tasks.reopen_log("one"))
    daemon.ctr("containers", "delete", "one")


def test_what_can_not_be_joined_or_opened_says_so(daemon: Wherryd, tmp_path: Path) -> None:
    run(daemon, "two", cri_uri(str(tmp_path / "0.log")))
    with pytest.raises(FailedPrecondition, match="No such file"):
        asked(daemon, lambda client: client.tasks.attach("two", Stdio(stdout=str(tmp_path / "none"))))
    asked(daemon, lambda client: client.tasks.reopen_log("two"))
    daemon.ctr("task", "delete", "--force", "two", check=False)
    daemon.ctr("containers", "delete", "two")
