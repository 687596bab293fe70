"""Named networks of an ordinary user: the same as root's, in a network namespace of the user's own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import busybox, users
from tests.network import traffic
from tests.network.traffic import GET, HTTP, until
from tests.peers import need
from tests.users import User
from wherry.linux.process import is_alive

IMAGE = busybox.NAME
# both programs that lead outside
PROGRAMS = ("pasta", "slirp4netns")


@pytest.fixture
def barrow() -> Iterator[User]:
    user = users.of_host("barrow")
    try:
        folder = user.folder / "home/.config/cni/net.d"
        folder.mkdir(parents=True)
        (folder / "10-mine.conflist").write_text(json.dumps(CONFLIST))
        with users.devices("net/tun"):
            user("images", "import", user.archive)
            yield user
    finally:
        user.close()


def serve(user: User, name: str, *flags: str) -> None:
    user("run", "-d", "--name", name, *flags, IMAGE, "sh", "-c", HTTP.format(word=name, port=80))


def ask(user: User, name: str, address: str, port: int = 80) -> str:
    """What a container gets from an address: the last line."""
    done = user("exec", name, "timeout", "4", "sh", "-c", GET.format(address=address, port=port), check=False)
    return done.stdout.strip().rpartition("\n")[2].strip()


@pytest.mark.parametrize("program", PROGRAMS)
def test_names_ports_and_the_outside(barrow: User, program: str) -> None:
    need(program)
    barrow.more["WHERRY_USER_NETWORK"] = program
    barrow("network", "create", "--ipv6", "shop")
    port = traffic.free_port()
    serve(barrow, "db", "--net", "shop", "--network-alias", "store", "-p", str(port))
    serve(barrow, "app", "--net", "shop", "-p", f"{port}:80", "-p", "[::1]::80", "-p", "127.0.0.1::80")
    for name in ("db", "store"):
        assert until(lambda name=name: ask(barrow, "app", name) == "db")  # type: ignore[misc]
    # from the host, by every address; ::1 has a port of its own as well
    for address in ("127.0.0.1", "::1", traffic.own_address()):
        assert until(lambda address=address: traffic.http(address, port) == "app"), address  # type: ignore[misc]
    only6 = next(line for line in barrow("port", "app").stdout.splitlines() if "::1" in line)
    assert until(lambda: traffic.http("::1", int(only6.rpartition(":")[2])) == "app")
    # a container reaches the host, and so what is published there
    assert until(lambda: ask(barrow, "db", traffic.own_address(), port) == "app")
    taken = barrow("run", "--rm", "--net", "shop", "-p", f"{port}:80", IMAGE, "true", check=False)
    assert taken.returncode == 125
    assert "Address already in use" in taken.stderr


def test_datagrams(barrow: User) -> None:
    need("pasta")
    barrow("network", "create", "one")
    port = traffic.free_port()
    barrow("run", "-d", "--name", "echo", "--net", "one", "-p", f"{port}:9/udp", IMAGE, "sleep", "1000")
    with traffic.udp_echo(int(barrow("inspect", "-f", "{{.State.Pid}}", "echo").stdout), 9):
        for address in ("127.0.0.1", "::1", traffic.own_address()):
            assert until(lambda address=address: traffic.echo(address, port) == "hello")  # type: ignore[misc]


def test_networks_do_not_see_each_other(barrow: User) -> None:
    need("pasta")
    for name, flags in (("one", ()), ("two", ()), ("deep", ("--internal",))):
        barrow("network", "create", *flags, name)
    serve(barrow, "a", "--net", "one")
    serve(barrow, "b", "--net", "two")
    serve(barrow, "c", "--net", "deep")
    address = {name: _address(barrow, name) for name in "abc"}
    assert until(lambda: ask(barrow, "a", address["a"]) == "a")
    for asking, other in (("a", "b"), ("b", "a"), ("c", "a"), ("a", "c")):
        # a server answers in milliseconds; what is dropped would be waited for
        done = barrow(
            "exec", asking, "timeout", "1", "sh", "-c", GET.format(address=address[other], port=80), check=False
        )
        assert other not in done.stdout.split(), (asking, other)
    # a running container comes on a network, and leaves it
    barrow("network", "connect", "two", "a")
    assert until(lambda: ask(barrow, "a", address["b"]) == "b")
    barrow("network", "disconnect", "two", "a")
    done = barrow("exec", "a", "timeout", "1", "sh", "-c", GET.format(address=address["b"], port=80), check=False)
    assert "b" not in done.stdout.split()


def _address(user: User, name: str) -> str:
    networks = json.loads(user("inspect", name).stdout)[0]["NetworkSettings"]["Networks"]
    return str(next(iter(networks.values()))["IPAddress"])


def test_they_outlive_the_daemon_and_leave_nothing(barrow: User) -> None:
    """Killed with SIGKILL: names and ports go on; the next daemon finds them, and the last one takes all away."""
    need("pasta")
    barrow("network", "create", "shop")
    port = traffic.free_port()
    serve(barrow, "web", "--net", "shop", "-p", f"127.0.0.1:{port}:80")
    assert until(lambda: traffic.http("127.0.0.1", port) == "web")
    (daemon,) = running(barrow, b"--exit-idle")
    os.kill(daemon, signal.SIGKILL)
    assert traffic.http("127.0.0.1", port) == "web"
    serve(barrow, "other", "--net", "shop")
    assert until(lambda: ask(barrow, "other", "web") == "web")
    (uplink,) = running(barrow, b"bin/pasta")
    os.kill(uplink, signal.SIGKILL)
    assert until(lambda: not is_alive(uplink))  # its end takes the kernel 40 ms, longer than a container's start
    # the next container brings it back
    barrow("run", "--rm", "--net", "shop", IMAGE, "true")
    assert len(running(barrow, b"bin/pasta")) == 1
    barrow("rm", "-f", "web", "other")
    (daemon,) = running(barrow, b"--exit-idle")
    os.kill(daemon, signal.SIGTERM)
    for what in (b"--exit-idle", b"bin/pasta", b"network.keeper", b"wherry-rootless"):
        assert until(lambda what=what: not running(barrow, what)), what  # type: ignore[misc]


def test_the_next_network_is_made_in_advance(barrow: User) -> None:
    """One at most, which the next container gets; none is left when the daemon goes, nor when it was killed."""
    need("pasta")
    run = ("run", "--rm", IMAGE, "sh", "-c", "ip addr show eth0; readlink /proc/self/ns/net")
    for _ in range(3):
        shown = barrow(*run).stdout
        assert "inet " in shown
        last = re.search(r"net:\[(\d+)\]", shown)
        assert last
        # what the container had may still be on its way out
        (made,) = until(lambda found=last: [path for path, inode in _spares(barrow) if inode != int(found[1])])  # type: ignore[misc]
    barrow("run", "-d", "--name", "one", IMAGE, "sleep", "1000")
    joined = json.loads(barrow("inspect", "one").stdout)[0]["NetworkSettings"]["SandboxKey"]
    assert joined in {"", str(made)}
    (daemon,) = running(barrow, b"--exit-idle")
    os.kill(daemon, signal.SIGKILL)
    assert "inet " in barrow("exec", "one", "ip", "addr", "show", "eth0").stdout
    # only the container's own is left
    assert until(lambda: len(running(barrow, b"bin/pasta")) == 1)
    barrow("rm", "-f", "one")
    assert until(lambda: not running(barrow, b"bin/pasta"))


def _spares(user: User) -> list[tuple[Path, int]]:
    """The namespaces that were made in advance, those that containers have got included: path, inode number."""
    (daemon,) = running(user, b"--exit-idle")
    folder = user.run / "wherry/netns/.spare"
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            found.append((path, os.stat(f"/proc/{daemon}/root{path}").st_ino))
    return found


def running(user: User, word: bytes) -> list[int]:
    """The user's processes with a word in their command line."""
    found = []
    for pid in user.processes():
        with contextlib.suppress(OSError):
            if word in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_cni(barrow: User) -> None:
    """A conflist of the host's, with plugins that ask for an address and make a bridge; ports are the keeper's."""
    need("pasta")
    if not os.path.exists("/usr/lib/cni/bridge"):
        need("cni-bridge")
    port = traffic.free_port()
    serve(barrow, "web", "--net", "mine", "-p", f"{port}:80")
    assert until(lambda: traffic.http("127.0.0.1", port) == "web")
    barrow("rm", "-f", "web")
    assert until(lambda: traffic.http("127.0.0.1", port) == "")


CONFLIST = {
    "cniVersion": "0.4.0",
    "name": "mine",
    "plugins": [
        {
            "type": "bridge",
            "bridge": "cni-mine",
            "isGateway": True,
            "ipMasq": True,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.239.7.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]},
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}
