"""The examples of `examples/`, run as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.client.conftest import IMAGE, NAMESPACE
from tests.peers import need
from wherry.cli.host_image import write
from wherry.client import Wherry

EXAMPLES = Path(__file__).parents[2] / "examples"


def command(name: str, *args: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / f"{name}.py"), *args]


def environment(address: str) -> dict[str, str]:
    return {**os.environ, "WHERRY_ADDRESS": address, "WHERRY_NAMESPACE": NAMESPACE}


def run(address: str, name: str, *args: str, status: int = 0) -> str:
    done = subprocess.run(command(name, *args), env=environment(address), capture_output=True, text=True, timeout=100)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def test_a_ci_step(address: str, tmp_path: Path) -> None:
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout/build.sh").write_text(
        "echo built for $CI; mkdir results; wc -c build.sh > results/size; exit 4\n"
    )
    words = [IMAGE, str(tmp_path / "checkout"), str(tmp_path / "results"), "sh", "build.sh"]
    out = run(address, "ci_step", *words, status=4)
    assert out.splitlines() == ["$ sh build.sh", "  built for true", f"exit code 4, results in {tmp_path}/results"]
    assert (tmp_path / "results/size").read_text().endswith(" build.sh\n")


def test_twenty_forks(address: str) -> None:
    out = run(address, "code_sandbox", IMAGE)
    assert len(re.findall("took too long", out)) == 4
    assert len(re.findall("failed", out)) == 8
    assert out.splitlines()[-2:] == [
        f"8 of 20 worked, idea 19 is best: {19 * 999 * 500}",
        "its fork has 999 /data/numbers",
    ]


async def test_a_database(address: str, tmp_path: Path) -> None:
    need("redis-server")
    need("redis-cli")
    name = "docker.io/library/redis:test"
    archive = tmp_path / "redis.tar"
    write(str(archive), name, ["redis-server", "redis-cli"])
    async with Wherry(address, namespace=NAMESPACE) as wherry:
        await wherry.load(str(archive))
    out = run(address, "test_database", name)
    assert out.splitlines() == [f"test {number}: before $-1, length after :2" for number in (1, 2)]


def test_a_watcher(address: str) -> None:
    watcher = subprocess.Popen(
        command("watch_events", "6"), env=environment(address), stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdout is not None
    try:
        assert watcher.stdout.readline() == "watching\n"
        end = time.monotonic() + 60
        while watcher.poll() is None and time.monotonic() < end:
            # the subscription isn't there yet with the first line
            run(address, "ci_step", IMAGE, str(EXAMPLES), "/nowhere", "true")
        out = watcher.stdout.read()
    finally:
        watcher.kill()
        watcher.wait()
        watcher.stdout.close()
    assert re.search(rf"\d\d:\d\d:\d\d {NAMESPACE}/sandbox-\w+ exec-started", out)
    assert "exit with exit code 0" in out


@pytest.mark.parametrize("name", ["ci_step", "test_database", "code_sandbox"])
def test_wrong_use_says_how(address: str, name: str) -> None:
    done = subprocess.run(command(name), env=environment(address), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"python examples/{name}.py" in done.stderr
