"""`wherryd` as an ordinary user: a user with granted ids and one without, each of which only sees its own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import busybox, users
from tests.network import traffic
from tests.peers import need
from tests.users import User
from wherry.linux.rootless import Range, granted


@pytest.fixture
def barrow() -> Iterator[User]:
    """A user with ids in /etc/subuid."""
    user = users.of_host("barrow")
    assert granted("/etc/subuid", "barrow", user.uid)
    try:
        yield user
    finally:
        user.close()


@pytest.fixture
def nobody() -> Iterator[User]:
    """A user without any other id."""
    user = User("nobody", 65534)
    try:
        yield user
    finally:
        user.close()


def test_the_main_job(barrow: User) -> None:
    barrow("images", "import", barrow.archive)
    run = ("run", "--rm", "--net", "none", busybox.NAME)
    assert barrow(*run, "sh", "-c", "id -u; touch /new; stat -c %u /new").stdout == "0\n0\n"
    done = barrow(*run, "sh", "-c", "cat /proc/self/uid_map; exit 3", check=False)
    assert done.returncode == 3
    assert str(barrow.uid) in done.stdout.split()
    # what runs with another id inside is an id of the user's range outside
    assert barrow("run", "--rm", "--net", "none", "-u", "1000", busybox.NAME, "id", "-u").stdout == "1000\n"


def test_containers_outlive_the_daemon_and_the_namespaces_go_with_the_last(barrow: User) -> None:
    barrow("--embedded", "images", "import", barrow.archive)
    barrow("--embedded", "run", "-d", "--name", "long", "--net", "none", busybox.NAME, "sleep", "1000")
    assert barrow("--embedded", "exec", "long", "echo", "in").stdout == "in\n"
    # nothing of a cgroup that isn't the container's, for one: a user has none of his own here
    assert [path.read_text() for path in barrow.run.glob("wherry-embedded/**/shim.log")] == [""]
    holder = int((barrow.run / "wherry-embedded/rootless").read_text().split()[0])
    os.kill(holder, 0)
    barrow("--embedded", "rm", "-f", "long")
    barrow("--embedded", "version")
    assert not (barrow.run / "wherry-embedded/rootless").exists()


def test_nothing_configured(barrow: User) -> None:
    """Two commands at once: one of them starts the daemon, which both use, and the next ones as well."""
    words = ["setpriv", f"--reuid={barrow.uid}", f"--regid={barrow.uid}", "--init-groups", "wherry", "version"]
    both = [
        subprocess.Popen(words, env=barrow.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for one in both:
        out, err = one.communicate(timeout=100)
        assert one.returncode == 0, err
        assert "Server:" in out
    barrow("images", "import", barrow.archive)
    assert barrow("run", "--rm", "--net", "none", busybox.NAME, "echo", "hi").stdout == "hi\n"
    daemons = [pid for pid in barrow.processes() if b"--exit-idle" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(daemons) == 1


def test_a_limit_that_can_not_be_had_is_refused(barrow: User) -> None:
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        pytest.skip("cgroups may be delegated here")
    barrow("images", "import", barrow.archive)
    done = barrow("run", "--rm", "--net", "none", "-m", "64m", busybox.NAME, "true", check=False)
    assert done.returncode == 125
    assert "limits (memory) can't be had without rights: no cgroup is delegated" in done.stderr


@pytest.fixture
def tun() -> Iterator[None]:
    with users.devices("net/tun"):
        yield


@pytest.mark.usefixtures("tun")
@pytest.mark.parametrize("program", ["pasta", "slirp4netns"])
def test_a_network_with_a_published_port(barrow: User, program: str) -> None:
    need(program)
    barrow.more["WHERRY_USER_NETWORK"] = program
    barrow("images", "import", barrow.archive)
    serve = "echo works >/tmp/index.html; httpd -f -p 80 -h /tmp"
    barrow("run", "-d", "--name", "web", "-p", "127.0.0.1::80", busybox.NAME, "sh", "-c", serve)
    port = barrow("port", "web").stdout.strip().rpartition(":")[2]
    end = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/index.html", timeout=5) as answer:
                assert answer.read() == b"works\n"
                break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)
    assert barrow("exec", "web", "cat", "/etc/resolv.conf").stdout.startswith("nameserver ")
    taken = barrow("run", "--rm", "-p", f"127.0.0.1:{port}:80", busybox.NAME, "true", check=False)
    assert taken.returncode == 125
    assert f"can't publish port 127.0.0.1:{port}" in taken.stderr
    other = barrow("run", "--rm", "--net", "other", busybox.NAME, "true", check=False)
    assert 'network "other": not found' in other.stderr
    barrow("rm", "-f", "web")
    end = time.monotonic() + 30
    while any(program.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in barrow.processes()):
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.usefixtures("tun")
def test_published_ports_of_every_form(barrow: User) -> None:
    """On the default network, by pasta: datagrams, IPv6, any port of a range; what it can't do is refused."""
    need("pasta")
    barrow("images", "import", barrow.archive)
    tcp, udp = traffic.free_port(), traffic.free_port(socket.SOCK_DGRAM)
    serve = "mkdir /w; echo web >/w/index.html; httpd -f -p 80 -h /w"
    flags = ["-p", f"{tcp}:80", "-p", "[::1]::80", "-p", f"127.0.0.1:{tcp}-{tcp + 20}:80", "-p", f"{udp}:{udp}/udp"]
    barrow("run", "-d", "--name", "web", *flags, busybox.NAME, "sh", "-c", serve)
    ports = [line.partition(" -> ")[2] for line in barrow("port", "web").stdout.splitlines()]
    only6 = next(int(item.rpartition(":")[2]) for item in ports if item.startswith("[::1]"))
    ranged = next(int(item.rpartition(":")[2]) for item in ports if item.startswith("127.0.0.1"))
    assert ranged != tcp
    for address, port in (("127.0.0.1", tcp), ("::1", tcp), ("::1", only6), ("127.0.0.1", ranged)):
        assert traffic.until(lambda where=(address, port): traffic.http(*where) == "web"), (address, port)  # type: ignore[misc]
    with traffic.udp_echo(int(barrow("inspect", "-f", "{{.State.Pid}}", "web").stdout), udp):
        for address in ("127.0.0.1", "::1"):
            assert traffic.until(lambda where=address: traffic.echo(where, udp) == "hello"), address  # type: ignore[misc]
    barrow.more["WHERRY_USER_NETWORK"] = "slirp4netns"
    low = barrow("run", "--rm", "-p", "1:80", busybox.NAME, "true", check=False)
    assert low.returncode == 125
    assert "net.ipv4.ip_unprivileged_port_start" in low.stderr


def test_a_network_that_can_not_be_had_says_what_to_install(barrow: User) -> None:
    barrow.more["WHERRY_USER_NETWORK"] = "neither"
    barrow("images", "import", barrow.archive)
    done = barrow("run", "--rm", busybox.NAME, "true", check=False)
    assert done.returncode == 125
    assert "install the package passt or slirp4netns, or use --net none" in done.stderr


def test_a_user_with_one_id(nobody: User) -> None:
    nobody("images", "import", nobody.archive)
    out = nobody("run", "--rm", "--net", "none", busybox.NAME, "cat", "/proc/self/uid_map").stdout
    assert out.split() == ["0", "65534", "1"]


def test_nobody_else_reaches_a_users_daemon(barrow: User, nobody: User) -> None:
    barrow("images", "import", barrow.archive)
    barrow("run", "-d", "--name", "mine", "--net", "none", busybox.NAME, "sleep", "1000")
    for path in (barrow.run / "wherry", barrow.folder / "home/.local/share/wherry"):
        for command in (["ls", str(path)], ["cat", str(path / "lock")]):
            done = subprocess.run(
                ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *command],
                capture_output=True,
                check=False,
            )
            assert done.returncode != 0, (path, command)
    assert nobody("-a", barrow.address, "ps", check=False).returncode == 1


def test_granted_ids(tmp_path: Path) -> None:
    file = tmp_path / "subuid"
    file.write_text("other:1:2\nme:100000:65536\n1234:7:8\nme:x:y\nme:5:0\n\ngarbage\n")
    assert granted(str(file), "me", 1234) == [Range(100000, 65536), Range(7, 8)]
    assert granted(str(tmp_path / "none"), "me", 1) == []
