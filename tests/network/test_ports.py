"""Published ports: from the host by every address, from outside, from containers, and nothing that isn't published."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

from tests import networks
from tests.cli.conftest import Wherry
from tests.network.conftest import import_image
from tests.network.traffic import GET, HTTP, echo, free_port, http, neighbour, own_address, udp_echo, until
from tests.wherryd import BUSYBOX, Wherryd


def serve(wherry: Wherry, name: str, *options: str, port: int = 80) -> str:
    """A container that serves its name; its id."""
    return wherry.run(
        "run", "-d", "--name", name, *options, BUSYBOX, "sh", "-c", HTTP.format(word=name, port=port)
    ).stdout.strip()


def pid_of(wherry: Wherry, name: str) -> int:
    return int(wherry.run("inspect", "-f", "{{.State.Pid}}", name).stdout)


def test_published_port_answers_by_every_address_of_the_host(wherry: Wherry) -> None:
    port = free_port()
    serve(wherry, "web", "-p", f"{port}:80")
    assert until(lambda: http("127.0.0.1", port)) == "web"
    assert http("::1", port) == "web"  # relayed: the kernel never routes from ::1
    assert http(own_address(), port) == "web"
    assert wherry.run("port", "web").stdout.strip() == f"80/tcp -> 0.0.0.0:{port}"
    assert f"0.0.0.0:{port}->80/tcp" in wherry.run("ps").stdout
    # the container itself and its neighbours reach it by the host's address, too
    for who in ("web", "beside"):
        if who == "beside":
            wherry.run("run", "-d", "--name", who, BUSYBOX, "sleep", "1000")
        got = wherry.run("exec", who, "sh", "-c", GET.format(address=own_address(), port=port))
        assert got.stdout.strip().endswith("web")
    wherry.run("rm", "-f", "web")
    assert http("127.0.0.1", port) == ""
    with socket.socket(socket.AF_INET6) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("::", port))
        sock.listen()  # free again


def test_port_is_reached_from_outside_and_the_source_is_kept(wherry: Wherry) -> None:
    port = free_port()
    ident = serve(wherry, "web", "-p", f"{port}:80")
    until(lambda: http("127.0.0.1", port))
    status = json.loads(wherry.run("inspect", ident).stdout)[0]["NetworkSettings"]
    address = next(iter(status["Networks"].values()))["IPAddress"]
    ask = "import urllib.request as u,sys; print(u.urlopen(sys.argv[1], timeout=3).read().decode().strip())"
    with neighbour(f"wn{os.getpid()}") as there:
        assert there(sys.executable, "-c", ask, f"http://10.248.77.1:{port}/").stdout.strip() == "web"
        # not by its own address: nothing but what is published comes in
        assert there(sys.executable, "-c", ask, f"http://{address}:80/").returncode != 0
        # out: with the host's address, since the neighbour knows no way to the container's
        out = wherry.run("exec", "web", "ping", "-c1", "-W3", "10.248.77.2")
        assert "1 packets received" in out.stdout


def test_one_address_udp_ranges_and_any_port(wherry: Wherry) -> None:
    first = free_port()
    serve(wherry, "one", "-p", f"127.0.0.1:{first}:80")
    assert until(lambda: http("127.0.0.1", first)) == "one"
    assert http(own_address(), first) == ""
    assert http("::1", first) == ""

    six = free_port()
    serve(wherry, "six", "-p", f"[::1]:{six}:80")
    assert until(lambda: http("::1", six)) == "six"
    assert http("127.0.0.1", six) == ""

    udp = free_port(socket.SOCK_DGRAM)
    wherry.run("run", "-d", "--name", "echo", "-p", f"{udp}:7/udp", BUSYBOX, "sleep", "1000")
    with udp_echo(pid_of(wherry, "echo"), 7):
        assert until(lambda: echo("127.0.0.1", udp)) == "hello"
        assert echo(own_address(), udp) == "hello"
        assert until(lambda: echo("::1", udp)) == "hello"  # relayed

    serve(wherry, "any", "-p", "80")
    found = int(wherry.run("port", "any", "80").stdout.rpartition(":")[2])
    assert until(lambda: http("127.0.0.1", found)) == "any"

    start = 41000 + os.getpid() % 1000 * 4
    serve(wherry, "range", "-p", f"{start}-{start + 2}:79-81")
    assert until(lambda: http("127.0.0.1", start + 1)) == "range"
    assert f"{start}-{start + 2}->79-81/tcp" in wherry.run("ps").stdout


def test_port_of_somebody_else_is_refused_and_nothing_is_left(wherry: Wherry, daemon: Wherryd) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        taken = sock.getsockname()[1]
        before = wherry.run("network", "inspect", "bridge").stdout
        done = wherry.run("run", "--rm", "-p", f"{taken}:80", BUSYBOX, "true", code=125)
        assert f"port {taken}/tcp" in done.stderr
        assert "in use" in done.stderr.lower()
        assert wherry.run("network", "inspect", "bridge").stdout == before
    serve(wherry, "first", "-p", f"{taken}:80")
    done = wherry.run("run", "--rm", "-p", f"{taken}:80", BUSYBOX, "true", code=125)
    assert "in use" in done.stderr.lower()
    assert until(lambda: http("127.0.0.1", taken)) == "first"
    # who wanted it in vain took nothing away: the rules lead there, not the relay
    table = networks.tables(daemon.state)[0]
    listed = subprocess.run(["nft", "list", *table.split()], capture_output=True, text=True, check=True).stdout
    assert f"tcp . {taken} : " in listed


def test_ipv6_network_publishes_without_a_relay(wherry: Wherry) -> None:
    port = free_port()
    wherry.run("network", "create", "--ipv6", "--subnet", "fd77:5eed::/64", "six")
    serve(wherry, "web", "--net", "six", "-p", f"{port}:80")
    # httpd of busybox listens on both families
    assert until(lambda: http("::1", port)) == "web"
    assert http("127.0.0.1", port) == "web"
    assert http("fd77:5eed::1", port) == "web"  # the bridge's address is one of the host's: by the rules, not relayed
    assert "fd77:5eed::2/64" in wherry.run("exec", "web", "ip", "addr").stdout


def test_expose_is_published_by_the_image(wherry: Wherry, daemon: Wherryd) -> None:
    image = "docker.io/library/exposed:test"
    import_image(daemon, image, ("8123/tcp",))
    wherry.run("run", "-d", "--name", "all", "-P", image, "sh", "-c", HTTP.format(word="all", port=8123))
    port = int(wherry.run("port", "all", "8123").stdout.rpartition(":")[2])
    assert until(lambda: http("127.0.0.1", port)) == "all"


def test_flushed_rules_come_back_and_relays_help_meanwhile(wherry: Wherry, daemon: Wherryd) -> None:
    port = free_port()
    serve(wherry, "web", "-p", f"{port}:80")
    assert until(lambda: http("127.0.0.1", port)) == "web"
    table = networks.tables(daemon.state)[0]
    subprocess.run(["nft", "delete", *table.split()], check=True)
    assert http("127.0.0.1", port) == "web"
    serve(wherry, "next", "-p", "80")
    assert networks.tables(daemon.state) == [table]
    listed = subprocess.run(["nft", "list", *table.split()], capture_output=True, text=True, check=True).stdout
    assert f"tcp . {port}" in listed


def test_somebody_elses_drop_is_theirs_and_is_said(wherry: Wherry, daemon: Wherryd) -> None:
    """A firewall that drops what is forwarded: said in the log; the host itself still reaches what is published."""
    bridge = f"wherry-{networks.instance(daemon.state)}"
    table = f"wherrytest{os.getpid()}"
    chain = f'type filter hook forward priority 0; policy drop\niifname != "{bridge}" oifname != "{bridge}" accept\n'
    text = f"table inet {table} {{\nchain forward {{\n{chain}}}\n}}\n"
    daemon.restart()  # it says it once
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
    try:
        port = free_port()
        serve(wherry, "web", "-p", f"{port}:80")
        assert until(lambda: http("127.0.0.1", port)) == "web"
        assert until(lambda: f"inet {table} forward" in daemon.log_text())
        with neighbour(f"wn{os.getpid()}") as there:
            ask = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1)"
            assert there(sys.executable, "-c", ask, "10.248.77.1", str(port)).returncode != 0
        listed = subprocess.run(["nft", "list", "table", "inet", table], capture_output=True, text=True, check=True)
        assert bridge in listed.stdout  # untouched
    finally:
        subprocess.run(["nft", "delete", "table", "inet", table], check=True)


def test_a_port_of_sctp_is_refused_by_name(wherry: Wherry) -> None:
    wherry.run("run", "-d", "--name", "first", "-p", "18977:80/sctp", BUSYBOX, "sleep", "300")
    assert wherry.run("port", "first").stdout == "80/sctp -> 0.0.0.0:18977\n"
    error = wherry.run("run", "--rm", "-p", "18977:80/sctp", BUSYBOX, "true", code=125).stderr
    assert "port 18977/sctp of the host" in error
    assert "Address already in use ('wherry ps'" in error
    wherry.run("rm", "-f", "first")
    wherry.run("run", "--rm", "-p", "18977:80/sctp", BUSYBOX, "true")
