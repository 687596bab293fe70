"""The start protocol, by the bytes that each generation of containerd sends and reads; containerd 2.3 is in no package.

The bytes are written out here, so that our own `.proto` is checked by them, too.
"""

# ruff: noqa: ASYNC110, ASYNC240 - tests look at files and wait for other processes

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shim.harness import alive
from wherry.core.errors import InvalidArgument, Unimplemented
from wherry.proto import task_v3_pb2
from wherry.proto.ttrpc.client import TtrpcClient
from wherry.shim.client import parse_start_response

COMMAND = [sys.executable, "-I", "-c", "from wherry.shim.bootstrap import main; main()"]
# an Any with runc's options, as containerd 1.6 to 2.2 send them: type URL, and BinaryName "runc" (field 6)
OPTIONS = b"\x0a\x1acontainerd.runc.v1.Options\x12\x06\x32\x04runc"


def text(number: int, value: str) -> bytes:
    """A protobuf field of text shorter than 128 bytes."""
    return bytes([number << 3 | 2, len(value)]) + value.encode()


def params(work: Path, *, instance: str = "box", namespace: str = "testing") -> bytes:
    """`BootstrapParams` of containerd 2.3, field by field in the order of their numbers; level info is left out."""
    return (
        text(1, instance)
        + text(2, namespace)
        + text(4, "2.3.1")
        + text(5, f"{work}/c.ttrpc")
        + text(6, f"{work}/c.sock")
        + text(7, "/usr/bin/containerd")
        + bytes([0x42, len(OPTIONS) + 2, 0x0A, len(OPTIONS)])
        + OPTIONS
        + text(9, f"{work}/s")
    )


class Started:
    """Shims that a test started, by their sockets."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.bundle = work / "bundle"
        self.bundle.mkdir()
        self.pids: list[int] = []

    def start(self, stdin: bytes, **environment: str) -> bytes:
        """What the start action prints."""
        command = [*COMMAND, "-namespace", "testing", "-id", "box", "-address", f"{self.work}/c.sock"]
        done = subprocess.run(
            [*command, "-publish-binary", "/bin/false", "start"],
            input=stdin,
            capture_output=True,
            cwd=self.bundle,
            env={"PATH": os.environ["PATH"], **environment},
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout

    async def check(self, address: str) -> None:
        """A shim for `box` answers there."""
        client = await TtrpcClient.connect(address)
        request = task_v3_pb2.ConnectRequest(id="box")
        answer = await client.call("containerd.task.v3.Task", "Connect", request, timeout=20)
        assert isinstance(answer, task_v3_pb2.ConnectResponse)
        self.pids.append(answer.shim_pid)
        title = Path(f"/proc/{answer.shim_pid}/cmdline").read_bytes()
        assert title.startswith(b"containerd-shim-wherry-v1\0-namespace\0testing\0-id\0box\0")
        await client.call("containerd.task.v3.Task", "Shutdown", task_v3_pb2.ShutdownRequest(id="box"), timeout=20)
        await client.close()
        async with asyncio.timeout(20):
            while alive(answer.shim_pid):
                await asyncio.sleep(0.01)
        assert not Path(address.removeprefix("unix://")).exists()


@pytest.fixture
def started(work: Path) -> Iterator[Started]:
    started = Started(work)
    yield started
    for pid in started.pids:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


async def test_containerd_2_3(started: Started) -> None:
    said = started.start(params(started.work))
    assert said.startswith(b"\x08\x03\x12")
    length = said[3]
    address = said[4 : 4 + length].decode()
    assert said[4 + length :] == b"\x1a\x05ttrpc"
    assert address.startswith(f"unix://{started.work}/s/")
    await started.check(address)


async def test_containerd_2_3_again_finds_the_same_shim(started: Started) -> None:
    first, second = started.start(params(started.work)), started.start(params(started.work))
    assert first == second
    await started.check(first[4 : 4 + first[3]].decode())


@pytest.mark.parametrize("newest", ["2", "3"])
async def test_containerd_1_7_to_2_2(started: Started, newest: str) -> None:
    said = json.loads(started.start(OPTIONS, MAX_SHIM_VERSION=newest, TTRPC_ADDRESS=f"{started.work}/c.ttrpc"))
    assert set(said) == {"version", "address", "protocol"}
    assert (said["version"], said["protocol"]) == (int(newest), "ttrpc")
    await started.check(said["address"])


@pytest.mark.parametrize("stdin", [OPTIONS, b""])
async def test_containerd_1_6(started: Started, stdin: bytes) -> None:
    said = started.start(stdin, TTRPC_ADDRESS=f"{started.work}/c.ttrpc")
    assert said.startswith(b"unix:///run/containerd/s/")
    await started.check(said.decode())


async def test_parameters_of_another_shim_are_none(started: Started) -> None:
    """An Any parses as parameters, too: what names another id or namespace is the old form."""
    said = started.start(params(started.work, instance="other"), MAX_SHIM_VERSION="2")
    await started.check(json.loads(said)["address"])
    said = started.start(params(started.work, namespace="other"), MAX_SHIM_VERSION="2")
    await started.check(json.loads(said)["address"])


@pytest.mark.parametrize(
    ("said", "address", "protocol", "version"),
    [
        (b"unix:///run/containerd/s/abc", "unix:///run/containerd/s/abc", "ttrpc", 2),
        (b"unix:///run/containerd/s/abc\n", "unix:///run/containerd/s/abc", "ttrpc", 2),
        (b'{"version":2,"address":"unix:///s","protocol":"ttrpc"}', "unix:///s", "ttrpc", 2),
        (b'{"version":3,"address":"unix:///s","protocol":"grpc"}\n', "unix:///s", "grpc", 3),
        (b"\x08\x03\x12\x09unix:///s\x1a\x05ttrpc", "unix:///s", "ttrpc", 3),
        # with capabilities and metadata, and what a later one may add
        (
            b"\x08\x03\x12\x09unix:///s\x1a\x04grpc\x22\x01\x00\x2a\x06\x0a\x01a\x12\x01b\x32\x01x",
            "unix:///s",
            "grpc",
            3,
        ),
    ],
)
def test_answers_of_other_shims(said: bytes, address: str, protocol: str, version: int) -> None:
    found = parse_start_response(said)
    assert (found.address, found.protocol, found.version) == (address, protocol, version)


def test_answers_that_are_none() -> None:
    for said in (b"", b"\n", b"\xff\xfe", b"one\ntwo", b'{"version":3}'):
        with pytest.raises(InvalidArgument, match="printed no address"):
            parse_start_response(said)
    with pytest.raises(Unimplemented, match=r"unsupported shim version \(4\)"):
        parse_start_response(b"\x08\x04\x12\x09unix:///s")
    with pytest.raises(InvalidArgument, match='unexpected protocol: "http"'):
        parse_start_response(b'{"version":3,"address":"unix:///s","protocol":"http"}')
