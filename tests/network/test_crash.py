"""Killed at any moment: the next start leaves no namespace, interface, rule or address behind that nobody has."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import networks
from tests.cli.conftest import Wherry
from tests.network.conftest import START, import_image, make_daemon
from tests.network.traffic import HTTP, free_port, http, until
from tests.wherryd import BUSYBOX, Wherryd

# where who is killed: the daemon in the middle of an attach and of a release, the worker likewise
DAEMON = ("network.recorded", "network.kept", "network.attached", "network.detaching", "network.detached")
WORKER = (
    "network.worker.bridged",
    "network.worker.made",
    "network.worker.paired",
    "network.worker.plugged",
    "network.worker.ruled",
    "network.worker.unplugged",
)


@pytest.fixture(scope="module")
def fragile() -> Iterator[Wherryd]:
    """A daemon that dies where its file says."""
    daemon = make_daemon()
    daemon.env["WHERRY_FAIL_FILE"] = str(daemon.folder / "fail")
    try:
        daemon.start(START)
        import_image(daemon)
        Wherry(daemon.address).run("network", "create", "--ipv6", "shop")
        yield daemon
    finally:
        daemon.close()
        assert networks.left(daemon.state) == []


def arm(daemon: Wherryd, point: str) -> Path:
    """The next process that comes there dies."""
    path = daemon.folder / "fail"
    path.write_text(point)
    return path


def elements(daemon: Wherryd) -> list[str]:
    """The published ports in the rules."""
    found = []
    for table in networks.tables(daemon.state):
        done = subprocess.run(["nft", "-j", "list", *table.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            continue  # gone since it was listed
        for item in json.loads(done.stdout)["nftables"]:
            if item.get("map", {}).get("name", "").startswith(("any", "one")):
                found += [str(element) for element in item["map"].get("elem", [])]
    return found


def addresses(daemon: Wherryd) -> list[str]:
    """The addresses that are given out."""
    with sqlite3.connect(daemon.root / "network.db") as database:
        rows = database.execute("SELECT address FROM addresses").fetchall()
        rows += database.execute("SELECT container FROM connections").fetchall()
    database.close()
    return [row[0] for row in rows]


def nothing(daemon: Wherryd) -> list[str]:
    """What is there of containers' networks."""
    veths = [name for name in networks.links(daemon.state) if name.startswith("wh" + networks.instance(daemon.state))]
    held = [str(path) for path in (daemon.state / "netns").rglob("*") if path.is_file()]
    files = [str(path) for path in (daemon.state / "network" / "files").rglob("*") if path.is_file()]
    return [*veths, *held, *files, *elements(daemon), *addresses(daemon)]


def remove_all(wherry: Wherry) -> None:
    if names := wherry.run("ps", "-aq").stdout.split():
        wherry.run("rm", "-f", *names)


@pytest.mark.parametrize("point", DAEMON)
def test_daemon_killed(fragile: Wherryd, point: str) -> None:
    wherry = Wherry(fragile.address)
    port = free_port()
    file = arm(fragile, point)
    # at the random port the keeper is asked before the worker
    done = wherry.run("run", "-d", "--net", "shop", "-p", "80", "-p", f"{port}:81", BUSYBOX, "sleep", "0.2", code=None)
    if point.startswith("network.detach"):
        assert done.returncode == 0, done.stderr
    assert until(lambda: not file.exists())
    fragile.kill()
    fragile.start(START)
    remove_all(wherry)
    assert until(lambda: nothing(fragile), lambda found: not found) == []
    # and it works as before, with the same port
    wherry.run("run", "-d", "--net", "shop", "-p", f"{port}:81", BUSYBOX, "sh", "-c", HTTP.format(word="w", port=81))
    assert until(lambda: http("127.0.0.1", port)) == "w"
    assert http("::1", port) == "w"
    remove_all(wherry)
    assert until(lambda: nothing(fragile), lambda found: not found) == []


@pytest.mark.parametrize("point", WORKER)
def test_worker_killed(fragile: Wherryd, point: str) -> None:
    wherry = Wherry(fragile.address)
    name = f"n{WORKER.index(point)}"
    wherry.run("network", "create", name)  # so that its bridge has to be made
    file = arm(fragile, point)
    done = wherry.run("run", "-d", "--net", name, "-p", "80", BUSYBOX, "sleep", "0.2", code=None)
    assert until(lambda: not file.exists())
    if point != "network.worker.unplugged":
        assert done.returncode == 125
        assert "network worker" in done.stderr
        remove_all(wherry)
        assert until(lambda: nothing(fragile), lambda found: not found) == []
    else:
        # the child that removes things died: what is left is recorded, and goes with the next start
        assert done.returncode == 0
        fragile.kill()
        fragile.start(START)
        remove_all(wherry)
        assert until(lambda: nothing(fragile), lambda found: not found) == []
    wherry.run("run", "--rm", "--net", name, BUSYBOX, "true")
    remove_all(wherry)
    wherry.run("network", "rm", name)


def test_running_containers_keep_their_network_over_a_crash(fragile: Wherryd) -> None:
    wherry = Wherry(fragile.address)
    port = free_port()
    serve = HTTP.format(word="alive", port=80)
    wherry.run("run", "-d", "--name", "web", "-p", f"{port}:80", BUSYBOX, "sh", "-c", serve)
    wherry.run("run", "-d", "--name", "short", "--net", "shop", BUSYBOX, "sleep", "1000")
    assert until(lambda: http("127.0.0.1", port)) == "alive"
    pid = int(wherry.run("inspect", "-f", "{{.State.Pid}}", "short").stdout)
    fragile.kill()
    assert http("127.0.0.1", port) == "alive"
    assert http("::1", port) == "alive"
    os.kill(pid, signal.SIGKILL)  # ends while nobody sees it
    fragile.start(START)
    assert http("127.0.0.1", port) == "alive"
    assert until(lambda: len(networks.links(fragile.state)), lambda count: count == 3) == 3  # two bridges, one veth
    wherry.run("run", "--rm", BUSYBOX, "true")
    remove_all(wherry)
    assert until(lambda: nothing(fragile), lambda found: not found) == []


def test_everything_is_gone_after_a_power_loss(fragile: Wherryd) -> None:
    """The host starts again: STATE, interfaces and rules are gone, the database is there."""
    wherry = Wherry(fragile.address)
    wherry.run("run", "-d", "--name", "web", "-p", "80", BUSYBOX, "sleep", "1000")
    fragile.lose_power()
    networks.clean(fragile.state)
    subprocess.run(["rm", "-rf", str(fragile.state)], check=True)
    fragile.start(START)
    assert until(lambda: nothing(fragile), lambda found: not found) == []
    remove_all(wherry)
    wherry.run("run", "--rm", BUSYBOX, "true")


def test_nothing_is_left_when_the_daemon_ends_without_containers() -> None:
    daemon = make_daemon()
    try:
        daemon.start(START)
        import_image(daemon)
        Wherry(daemon.address).run("run", "--rm", "-p", "80", BUSYBOX, "true")
        assert networks.tables(daemon.state)
        daemon.stop()
        assert networks.left(daemon.state) == []
    finally:
        daemon.close()
