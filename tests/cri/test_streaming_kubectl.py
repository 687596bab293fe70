"""kubectl against the streaming server: Kubernetes' own client and its SPDY library, on `wherryd` and on containerd."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pty
import re
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cri.kubelet import ContainerdLab, WherryLab
from tests.cri.relay import Relay, relayed
from tests.peers import need

Lab = WherryLab | ContainerdLab


class Kubectl:
    """kubectl, and the node behind it."""

    def __init__(self, relay: Relay, home: Path) -> None:
        self.relay = relay
        self._home = home

    def start(self, *args: str, **streams: Any) -> subprocess.Popen[bytes]:
        command = [need("kubectl"), "--server", self.relay.address, "--cache-dir", str(self._home), *args]
        return subprocess.Popen(command, env={**os.environ, "HOME": str(self._home), "KUBECONFIG": ""}, **streams)

    def __call__(self, *args: str, stdin: bytes | None = None, timeout: float = 60) -> tuple[int, bytes, bytes]:
        with self.start(*args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(stdin or b"", timeout)
            finally:
                process.kill()
        return process.returncode, out, err


@contextlib.contextmanager
def box(lab: Lab, home: Path, script: str, *, network: bool = False, **fields: Any) -> Iterator[Kubectl]:
    need("kubectl")
    if network:
        lab.conflist()
    pod_config = lab.pod_config(host_network=not network)
    pod = lab.run_pod(pod_config)
    config = lab.container_config("box", ["sh", "-c", script], **fields)
    container = lab.run(pod, config, pod_config)
    with relayed(lab, pod, container, config) as relay:
        yield Kubectl(relay, home)


@pytest.fixture(scope="module")
def kubectl(each_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    with box(each_lab, tmp_path_factory.mktemp("home"), "sleep 1000000") as kubectl:
        yield kubectl


def test_exec_with_streams_and_exit_code(kubectl: Kubectl) -> None:
    code, out, err = kubectl("exec", "-i", "box", "--", "sh", "-c", "cat; echo err >&2; exit 7", stdin=b"hello\n")
    assert (code, out) == (7, b"hello\n")
    assert b"err\n" in err
    assert kubectl("exec", "box", "--", "true")[0] == 0


def test_what_can_not_be_executed(kubectl: Kubectl) -> None:
    code, _, err = kubectl("exec", "box", "--", "/no/such/program")
    assert code == 1
    assert b"/no/such/program" in err


def test_megabytes_both_ways(kubectl: Kubectl) -> None:
    """spdystream knows no windows: it is held up by its connection alone."""
    data = os.urandom(5 << 20)
    code, out, _ = kubectl("exec", "-i", "box", "--", "cat", stdin=data)
    assert (code, hashlib.sha256(out).digest()) == (0, hashlib.sha256(data).digest())


def test_a_slow_reader_gets_all(kubectl: Kubectl) -> None:
    with kubectl.start(
        "exec", "box", "--", "sh", "-c", "yes 0123456 | head -c 8000000", stdout=subprocess.PIPE
    ) as process:
        time.sleep(3)  # nothing is read meanwhile; the process in the container has ended long since, or is blocked
        assert process.stdout is not None
        assert process.stdout.read() == b"0123456\n" * 1_000_000
    assert process.returncode == 0


def test_a_terminal_of_a_size(kubectl: Kubectl) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 111, 0, 0))
    script = "while [ \"$(stty size)\" != '33 111' ]; do sleep 0.1; done; tty; echo $TERM; read x; echo got $x; exit 5"
    with kubectl.start("exec", "-it", "box", "--", "sh", "-c", script, stdin=theirs, stdout=theirs) as process:
        os.close(theirs)
        os.write(ours, b"typed\n")
        said = b""
        with contextlib.suppress(OSError):
            while part := os.read(ours, 4096):
                said += part
    os.close(ours)
    assert process.returncode == 5
    assert b"/dev/pts/" in said
    assert b"xterm" in said
    assert b"got typed" in said


def test_attach_to_a_container_that_is_fed_once(each_lab: Lab, tmp_path: Path) -> None:
    with box(each_lab, tmp_path, "echo early; cat; exit 3", stdin=True, stdin_once=True) as kubectl:
        each_lab.until(lambda: (log := next(iter(each_lab.logs.glob("*/box.log")))) and log.exists(), "a log is there")
        code, out, _ = kubectl("attach", "-i", "box", stdin=b"all of it\n")
        assert out.endswith(b"all of it\n")
        assert each_lab.exited(kubectl.relay.container).exit_code == 3
        assert code == 0


def test_attach_without_input(each_lab: Lab, tmp_path: Path) -> None:
    script = "i=0; while [ $i -lt 40 ]; do echo tick $i; i=$((i+1)); sleep 0.1; done"
    with box(each_lab, tmp_path, script) as kubectl:
        code, out, _ = kubectl("attach", "box")
        assert re.search(rb"tick 38\ntick 39\n", out)
        assert code == 0


def test_port_forward(each_lab: Lab, tmp_path: Path) -> None:
    script = "nc -ll -p 7008 -e sh -c 'read n; head -c $n /dev/zero'"
    with box(each_lab, tmp_path, script, network=True) as kubectl:
        container = kubectl.relay.container
        each_lab.until(lambda: "7008" in each_lab.exec(container, "netstat", "-ltn"), "it listens")
        with kubectl.start("port-forward", "box", ":7008", stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                found = re.search(rb"127.0.0.1:(\d+)", process.stdout.readline())
                assert found
                for _ in range(5):
                    with socket.create_connection(("127.0.0.1", int(found[1])), 30) as client:
                        client.sendall(b"1000000\n")
                        size = 0
                        while part := client.recv(65536):
                            size += len(part)
                        assert size == 1_000_000
            finally:
                process.kill()
