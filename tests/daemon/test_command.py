"""The command line of wherryd: containerd's flags, config default and dump, help, exit codes, publish, no fork."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests.daemon.test_restart import events, listening
from tests.peers import need
from tests.wherryd import BUSYBOX, Wherryd
from wherry.core.typeurl import pack
from wherry.daemon import run, version
from wherry.proto.events_pb2 import TaskOOM


def wherryd(*args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wherry.daemon", *args]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=30, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_version_and_help() -> None:
    assert wherryd("--version").stdout == f"wherryd wherry {version.VERSION}\n"
    assert wherryd("-v").returncode == 0
    text = wherryd("--help").stdout
    for word in ("--address", "--root", "--state", "--config", "--log-level", "config", "systemd", "SIGTERM"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


def test_wrong_use_exits_with_2() -> None:
    for args in (["--no-such-flag"], ["--log-level", "loud"], ["nonsense"], ["config", "what"]):
        done = wherryd(*args)
        assert done.returncode == 2, args
        assert "usage: wherryd" in done.stderr


def test_config_default_and_dump(tmp_path: Path) -> None:
    default = tomllib.loads(wherryd("config", "default").stdout)
    assert default["grpc"]["address"] == "/run/wherry/wherryd.sock"
    assert default["root"] == "/var/lib/wherry"
    path = tmp_path / "c.toml"
    path.write_text('version = 2\nstate = "/s"\nunknown = 1\n[grpc]\naddress = "/a"\n')
    done = wherryd("--config", str(path), "--root", "relative", "-l", "warn", "config", "dump")
    dumped = tomllib.loads(done.stdout)
    assert (dumped["state"], dumped["grpc"]["address"], dumped["debug"]["level"]) == ("/s", "/a", "warn")
    assert dumped["root"] == os.path.abspath("relative")
    assert "unknown: unknown key" in done.stderr
    assert done.returncode == 0


def test_an_address_may_be_a_url(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[grpc]\naddress = "unix:///run/g"\n[ttrpc]\naddress = "unix:///run/t"\n')
    dumped = tomllib.loads(wherryd("--config", str(path), "config", "dump").stdout)
    assert (dumped["grpc"]["address"], dumped["ttrpc"]["address"]) == ("/run/g", "/run/t")
    dumped = tomllib.loads(wherryd("--address", "unix:///run/x", "config", "dump").stdout)
    assert (dumped["grpc"]["address"], dumped["ttrpc"]["address"]) == ("/run/x", "")


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    done = wherryd("--config", str(tmp_path / "none.toml"))
    assert (done.returncode, done.stderr) == (1, f"wherryd: config file {tmp_path}/none.toml: not found\n")
    path = tmp_path / "c.toml"
    path.write_text("[grpc]\nuid = 'x'\n")
    done = wherryd("--config", str(path))
    assert done.returncode == 1
    assert "c.toml: grpc.uid: expected an integer" in done.stderr


def test_a_root_that_cannot_be_made() -> None:
    daemon = Wherryd()
    try:
        daemon.root = Path("/proc/nothing/here")
        done = subprocess.run(daemon.command(), capture_output=True, text=True, timeout=20, check=False)
        assert done.returncode == 1
        assert "wherryd: " in done.stderr
        assert "/proc/nothing" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        daemon.close()


def test_publish_as_a_shim_calls_it(wherryd: Wherryd) -> None:
    with events(wherryd) as seen:
        flags = ["--address", wherryd.address, "publish", "--topic", "/tasks/oom", "--namespace", "n1"]
        data = pack(TaskOOM(container_id="c9")).SerializeToString()
        done = subprocess.run(
            [sys.executable, "-m", "wherry.daemon", *flags], input=data, capture_output=True, timeout=20, check=False
        )
        assert done.returncode == 0, done.stderr
    assert any(" n1 /tasks/oom " in line and '"container_id":"c9"' in line for line in seen), seen


@pytest.mark.parametrize("call", ["os.fork()", "os.forkpty()", "__import__('pty').fork()"])
def test_the_daemon_cannot_fork(call: str) -> None:
    code = f"import os; from wherry.daemon.run import forbid_fork; forbid_fork(); {call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert "wherryd doesn't fork without exec" in done.stderr


def test_programs_can_still_be_started() -> None:
    code = (
        "import asyncio, subprocess; from wherry.daemon.run import forbid_fork; forbid_fork()\n"
        "print(subprocess.run(['echo', 'one'], capture_output=True, check=True).stdout)\n"
        "async def main():\n"
        "    process = await asyncio.create_subprocess_exec('echo', 'two', stdout=-1)\n"
        "    print((await process.communicate())[0])\n"
        "asyncio.run(main())\n"
        "subprocess.run(['true'], preexec_fn=lambda: None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert "b'one\\n'" in done.stdout
    assert "b'two\\n'" in done.stdout
    # what forks in C can't be stopped, but doesn't go unseen
    assert "fork without exec" in done.stdout + done.stderr


def test_a_day_of_work_forks_nothing_in_the_daemon(wherryd: Wherryd) -> None:
    wherryd.import_busybox()
    wherryd.ctr("run", "--rm", BUSYBOX, "a", "true")
    wherryd.ctr("run", "--rm", "--runtime", need("containerd-shim-runc-v2"), BUSYBOX, "b", "true")
    assert "fork without exec" not in wherryd.log_text()
    with open(f"/proc/{wherryd.pid}/task/{wherryd.pid}/children") as file:
        children = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in file.read().split()]
    # the fork server and the layers' worker, which were started by exec: a fork would still have our command line
    assert children
    assert not any(wherryd.address.encode() in child for child in children)
    assert run.publish_binary()


def test_it_stops_with_calls_under_way() -> None:
    daemon = Wherryd()
    try:
        daemon.start()
        with listening(daemon):
            began = time.monotonic()
            assert daemon.stop() == 0
            assert time.monotonic() - began < 20
        assert "Traceback" not in daemon.log_text()
    finally:
        daemon.close()
