"""Named networks: names, isolation, several at once, and what a container finds below /etc."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.cli.conftest import Wherry
from tests.network.conftest import START
from tests.network.traffic import HTTP, free_port, http, until
from tests.peers import need
from tests.wherryd import BUSYBOX, Wherryd
from wherry.network import dns_message as wire


def sleeper(wherry: Wherry, name: str, *options: str) -> str:
    return wherry.run("run", "-d", "--name", name, *options, BUSYBOX, "sleep", "1000").stdout.strip()


def address(wherry: Wherry, name: str, network: str) -> str:
    found = json.loads(wherry.run("inspect", name).stdout)[0]["NetworkSettings"]["Networks"]
    return str(found[network]["IPAddress"])


def lookup(wherry: Wherry, who: str, name: str, code: int | None = None) -> str:
    return wherry.run("exec", who, "nslookup", name, code=code).stdout


def reaches(wherry: Wherry, who: str, address: str) -> bool:
    return wherry.run("exec", who, "ping", "-c1", "-W1", address, code=None).returncode == 0


def test_containers_resolve_each_other_on_a_named_network(wherry: Wherry) -> None:
    wherry.run("network", "create", "--ipv6", "shop")
    sleeper(wherry, "db", "--net", "shop", "--network-alias", "store")
    ident = sleeper(wherry, "web", "--net", "shop", "--network-alias", "store")
    db = address(wherry, "db", "shop")
    assert f"Address: {db}" in lookup(wherry, "web", "db")
    assert f"Address: {db}" in lookup(wherry, "web", "DB")
    assert f"Address: {address(wherry, 'web', 'shop')}" in lookup(wherry, "db", ident[:12])
    both = lookup(wherry, "web", "store")
    assert all(f"Address: {address(wherry, name, 'shop')}" in both for name in ("db", "web"))
    assert "name = db" in lookup(wherry, "web", db)  # backwards
    assert "NXDOMAIN" in lookup(wherry, "web", "nobody.invalid") or "SERVFAIL" in lookup(
        wherry, "web", "nobody.invalid"
    )
    wherry.run("rename", "db", "database")
    assert f"Address: {db}" in until(lambda: lookup(wherry, "web", "database"), lambda text: db in text)
    wherry.run("rm", "-f", "database")
    assert "Address: " + db not in lookup(wherry, "web", "store")


def test_networks_do_not_see_each_other(wherry: Wherry) -> None:
    for name in ("one", "two"):
        wherry.run("network", "create", name)
    wherry.run("network", "create", "--internal", "closed")
    sleeper(wherry, "a", "--net", "one")
    sleeper(wherry, "b", "--net", "two")
    sleeper(wherry, "c", "--net", "closed")
    sleeper(wherry, "d", "--net", "closed")
    sleeper(wherry, "e")
    a, b, c, d, e = (
        address(wherry, name, network)
        for name, network in (("a", "one"), ("b", "two"), ("c", "closed"), ("d", "closed"), ("e", "bridge"))
    )
    assert reaches(wherry, "c", d)
    ways = [(who, to) for who, others in (("a", (b, c, e)), ("c", (a, e)), ("e", (a, b, c))) for to in others]
    with ThreadPoolExecutor() as pool:  # each waits a second for an answer
        assert [
            way for way, did in zip(ways, pool.map(lambda way: reaches(wherry, *way), ways), strict=True) if did
        ] == []
    assert "Address: " + b not in lookup(wherry, "a", "b")
    # the other network's name server has nothing to say to it either
    gateway = json.loads(wherry.run("network", "inspect", "two").stdout)[0]["IPAM"]["Config"][0]["Gateway"]
    assert "Address: " + b not in wherry.run("exec", "a", "nslookup", "b", gateway, code=None).stdout
    # no way out of an internal network, not even by a question
    assert "NXDOMAIN" in lookup(wherry, "c", "example.com")
    assert wherry.run("run", "--rm", "--net", "closed", "-p", "80", BUSYBOX, "true", code=125).stderr.count("internal")

    wherry.run("network", "connect", "--alias", "bee", "one", "b")
    assert reaches(wherry, "a", address(wherry, "b", "one"))
    assert f"Address: {a}" in lookup(wherry, "b", "a")
    assert "Address: " in lookup(wherry, "a", "bee")
    wherry.run("network", "disconnect", "one", "b")
    assert not reaches(wherry, "b", a)
    assert "eth1" not in wherry.run("exec", "b", "ip", "addr").stdout


def test_isolated_network_hides_its_containers_from_each_other(wherry: Wherry) -> None:
    wherry.run("network", "create", "-o", "isolated=true", "-o", "mtu=1280", "alone")
    sleeper(wherry, "a", "--net", "alone")
    sleeper(wherry, "b", "--net", "alone")
    assert not reaches(wherry, "a", address(wherry, "b", "alone"))
    assert "mtu 1280" in wherry.run("exec", "a", "ip", "link").stdout


def test_wanted_addresses_and_their_owner(wherry: Wherry) -> None:
    subnet = "10.248.7.0/24"
    wherry.run(
        "network", "create", "--subnet", subnet, "--gateway", "10.248.7.254", "--ip-range", "10.248.7.128/30", "n"
    )
    sleeper(wherry, "fixed", "--net", "n", "--ip", "10.248.7.9", "--mac-address", "02:00:5e:10:00:09")
    shown = wherry.run("exec", "fixed", "ip", "addr").stdout
    assert "10.248.7.9/24" in shown
    assert "02:00:5e:10:00:09" in shown
    assert "default via 10.248.7.254" in wherry.run("exec", "fixed", "ip", "route").stdout
    refused = wherry.run("run", "--rm", "--net", "n", "--ip", "10.248.7.9", BUSYBOX, "true", code=125).stderr
    assert "10.248.7.9 is in use by container" in refused
    assert "none that" in wherry.run("run", "--rm", "--net", "n", "--ip", "10.1.1.1", BUSYBOX, "true", code=125).stderr
    for name in ("x", "y", "z", "w"):
        sleeper(wherry, name, "--net", "n")
    given = {address(wherry, name, "n") for name in ("x", "y", "z", "w")}
    assert given == {f"10.248.7.{last}" for last in range(128, 132)}
    assert "no address is free" in wherry.run("run", "--rm", "--net", "n", BUSYBOX, "true", code=125).stderr
    assert "overlaps" in wherry.run("network", "create", "--subnet", "10.248.7.0/25", "m", code=1).stderr


def test_modes_none_host_and_another_container(wherry: Wherry) -> None:
    none = wherry.run("run", "--rm", "--net", "none", BUSYBOX, "sh", "-c", "ls /sys/class/net; cat /etc/hosts").stdout
    assert none.split()[0] == "lo"
    assert "eth0" not in none
    assert "localhost" in none
    host = wherry.run("run", "--rm", "--net", "host", BUSYBOX, "sh", "-c", "hostname; ls /sys/class/net").stdout.split()
    assert host[0] == socket.gethostname()
    assert set(os.listdir("/sys/class/net")) & set(host)
    port = free_port()
    wherry.run("run", "-d", "--name", "web", "-p", f"{port}:80", BUSYBOX, "sh", "-c", HTTP.format(word="w", port=80))
    beside = wherry.run(
        "run", "--rm", "--net", "container:web", BUSYBOX, "sh", "-c", "ip addr; hostname; cat /etc/hosts"
    ).stdout
    assert address(wherry, "web", "bridge") in beside
    assert wherry.run("exec", "web", "hostname").stdout in beside
    assert until(lambda: http("127.0.0.1", port)) == "w"
    gone = wherry.run("run", "--rm", "--net", "container:nobody", BUSYBOX, "true", code=125).stderr
    assert "nobody" in gone
    assert "not found" in wherry.run("run", "--rm", "--net", "nowhere", BUSYBOX, "true", code=125).stderr


def test_files_below_etc(wherry: Wherry) -> None:
    script = "cat /etc/hosts; echo --; cat /etc/resolv.conf; echo --; hostname; cat /etc/hostname"
    options = ["--hostname", "box", "--domainname", "example.org", "--add-host", "db:10.1.2.3"]
    options += ["--add-host", "up:host-gateway", "--dns", "192.0.2.53", "--dns-search", "a.example", "--dns-option"]
    out = wherry.run("run", "--rm", *options, "ndots:2", BUSYBOX, "sh", "-c", script).stdout
    hosts, resolv, names = out.split("--\n")
    gateway = json.loads(wherry.run("network", "inspect", "bridge").stdout)[0]["IPAM"]["Config"][0]["Gateway"]
    assert "10.1.2.3\tdb" in hosts
    assert f"{gateway}\tup" in hosts
    assert "\tbox.example.org box" in hosts
    assert resolv == "search a.example\nnameserver 192.0.2.53\noptions ndots:2\n"
    assert names.split() == ["box", "box"]
    # what an image or a person mounts there stays
    wherry.run("run", "--rm", "-v", "/etc/hosts:/etc/hosts:ro", BUSYBOX, "cat", "/etc/hosts")


def test_wrong_flags_are_told(wherry: Wherry) -> None:
    for flags, text in (
        (["-p", "99999:80"], "ports go from 1 to 65535"),
        (["-p", "80:81:82:83"], "expected"),
        (["-p", "8000-8002:80-81"], "differ in length"),
        (["--net", "none", "-p", "80"], "can't be used with --net none"),
        (["--net", "host", "--ip", "10.0.0.1"], "can't be used with --net host"),
        (["--net", "host", "--net", "other"], "can't be joined"),
        (["--mac-address", "01:00:00:00:00:00"], "multicast"),
        (["--ip6", "fd00::9"], "no IPv6"),
    ):
        done = wherry.run("run", "--rm", *flags, BUSYBOX, "true", code=None)
        assert done.returncode == 125, flags
        assert text in done.stderr, flags
    assert "can't be used" in wherry.run("network", "create", "host", code=1).stderr
    assert "built-in" in wherry.run("network", "rm", "bridge", code=1).stderr


def test_names_survive_the_daemon_and_the_keeper_comes_back(wherry: Wherry, daemon: Wherryd) -> None:
    wherry.run("network", "create", "shop")
    sleeper(wherry, "db", "--net", "shop")
    sleeper(wherry, "web", "--net", "shop")
    db = address(wherry, "db", "shop")
    pid = int(wherry.run("inspect", "-f", "{{.State.Pid}}", "web").stdout)
    before = keeper(daemon)
    daemon.kill()
    assert db in _ask_from(pid, "db")  # nobody but the keeper is there
    daemon.start(START)
    assert keeper(daemon) == before
    assert db in until(lambda: lookup(wherry, "web", "db"), lambda text: db in text)
    os.kill(before, signal.SIGKILL)
    assert db in until(lambda: lookup(wherry, "web", "db"), lambda text: db in text)
    assert keeper(daemon) != before
    sleeper(wherry, "more", "--net", "shop")
    assert "Address: " in lookup(wherry, "web", "more")


def test_port_53_of_the_host_may_be_taken(wherry: Wherry) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND: there is no such address yet
        udp.bind(("10.248.53.1", 53))
        wherry.run("network", "create", "--subnet", "10.248.53.0/24", "shop")
        sleeper(wherry, "db", "--net", "shop")
        sleeper(wherry, "web", "--net", "shop")
        assert address(wherry, "db", "shop") in lookup(wherry, "web", "db")
        wherry.run("rm", "-f", "db", "web")


def test_a_network_is_removed_once_the_last_one_is_off_it(wherry: Wherry, daemon: Wherryd) -> None:
    wherry.run("network", "create", "quay")
    sleeper(wherry, "boat", "--net", "quay")
    worker = helper(daemon, "worker")
    os.kill(worker, signal.SIGSTOP)  # who takes the interface off has no time
    try:
        wherry.run("rm", "-f", "boat")  # doesn't wait for that
    finally:
        threading.Timer(0.5, os.kill, (worker, signal.SIGCONT)).start()
    wherry.run("network", "rm", "quay")


def keeper(daemon: Wherryd) -> int:
    """The pid of a daemon's keeper; it may take a moment until there is one."""
    return helper(daemon, "keeper")


def helper(daemon: Wherryd, module: str) -> int:
    """The pid of one of a daemon's processes for networks; it may take a moment until there is one."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for pid in daemon.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if f"wherry.network.{module}".encode() in words:
                    return pid
        time.sleep(0.05)
    raise AssertionError(f"no {module}")


def _ask_from(pid: int, name: str) -> str:
    command = [need("nsenter"), f"--net=/proc/{pid}/ns/net", f"--mount=/proc/{pid}/ns/mnt", "/bin/nslookup", name]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout


@contextlib.contextmanager
def upstream(address: str) -> Iterator[list[str]]:
    """A name server outside: every name has the address 203.0.113.7; what it was asked."""
    asked: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 53))
        sock.settimeout(0.1)
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    data, source = sock.recvfrom(2048)
                    query = wire.parse(data)
                    asked.append(query.name)
                    records = [wire.address("203.0.113.7")] if query.kind == wire.A else []
                    sock.sendto(wire.answer(query, records), source)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            ended.set()
            thread.join()


def test_what_is_not_known_is_asked_outside(wherry: Wherry) -> None:
    wherry.run("network", "create", "shop")
    # a server that only the host reaches is fine: the keeper asks; the first one is mute, the second answers
    sleeper(wherry, "web", "--net", "shop", "--dns", "127.0.0.78", "--dns", "127.0.0.77")
    with upstream("127.0.0.77") as asked:
        assert "Address: 203.0.113.7" in until(
            lambda: lookup(wherry, "web", "out.example"), lambda text: "203." in text
        )
        assert "out.example" in asked
        assert "web" not in asked  # names of its own networks never leave
        assert "203.0.113.7" not in lookup(wherry, "web", "web")
