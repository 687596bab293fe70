"""Is it reachable? Small questions that tests ask with real sockets, and a host beside the host."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tests.peers import need

T = TypeVar("T")
PATIENCE = 60.0

# a server for a container: says what it was given as its name to each connection, and over UDP to each datagram
TCP = "while :; do echo {word} | nc -l -p {port}; done"
HTTP = "mkdir -p /tmp/w; echo {word} >/tmp/w/index.html; exec httpd -f -p {port} -h /tmp/w"
# what is served at /, with the head (Debian's static busybox has a wget that dies of looking names up)
GET = "printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {address} {port}"
_UDP = """
import socket, sys
sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
sock.bind(("::", int(sys.argv[1])))
while True:
    data, source = sock.recvfrom(2048)
    sock.sendto(data, source)
"""


def until(ask: Callable[[], T], wanted: Callable[[T], bool] = bool) -> T:
    """Asks until the answer is the wanted one; the last answer where it never is."""
    end = time.monotonic() + PATIENCE
    while not wanted(answer := ask()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer


def http(address: str, port: int, seconds: float = 2.0) -> str:
    """What is served at / of a host's port; "" where nothing is."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(seconds)
        sock.connect((address, port))
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        data = b""
        while chunk := sock.recv(65536):
            data += chunk
        return data.partition(b"\r\n\r\n")[2].decode().strip()
    return ""


def echo(address: str, port: int, text: str = "hello", seconds: float = 1.0) -> str:
    """What comes back over UDP; "" for nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(seconds)
        sock.connect((address, port))
        sock.send(text.encode())
        return sock.recv(2048).decode()
    return ""


def own_address() -> str:
    """The host's own address towards others."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("192.0.2.1", 9))
        return str(sock.getsockname()[0])


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port that nobody has in this moment."""
    with socket.socket(socket.AF_INET6, kind) as sock:
        sock.bind(("::", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def udp_echo(pid: int, port: int) -> Iterator[None]:
    """A server that sends back what it gets, in the network of a process: busybox has none."""
    command = [need("nsenter"), f"--net=/proc/{pid}/ns/net", sys.executable, "-c", _UDP, str(port)]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def neighbour(name: str) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Another machine on a wire to this one: 10.248.77.2, this one is 10.248.77.1. Runs commands there."""
    ip = need("ip")
    wire = f"{name}0"

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    def there(*command: str) -> subprocess.CompletedProcess[str]:
        return run(ip, "netns", "exec", name, *command)

    try:
        for command in (
            ("netns", "add", name),
            ("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", name),
            ("addr", "add", "10.248.77.1/24", "dev", wire),
            ("link", "set", wire, "up"),
            ("-n", name, "addr", "add", "10.248.77.2/24", "dev", "eth0"),
            ("-n", name, "link", "set", "eth0", "up"),
            ("-n", name, "link", "set", "lo", "up"),
            ("-n", name, "route", "add", "default", "via", "10.248.77.1"),
        ):
            done = run(ip, *command)
            assert done.returncode == 0, done.stderr
        yield there
    finally:
        run(ip, "link", "del", wire)
        run(ip, "netns", "del", name)
