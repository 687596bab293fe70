"""Containers with user namespaces: whose files are whose, on which networks, and what is left of them."""

from __future__ import annotations

import json
import tarfile
import time
from pathlib import Path

import pytest

from tests.busybox import NAME as BUSYBOX
from tests.cli.conftest import Wherry
from tests.peers import need
from tests.wherryd import Wherryd
from wherry.client import userns
from wherry.core.errors import InvalidArgument, ResourceExhausted

HOLD = "sleep 300"


@pytest.fixture(autouse=True)
def passable(daemon: Wherryd) -> None:
    """The bundles' folder can be reached by whoever knows it, as that of a real daemon."""
    daemon.folder.chmod(0o711)


def mapping(wherry: Wherry, name: str) -> list[int]:
    """(inside, outside, count) of a container that runs."""
    return [int(word) for word in wherry.run("exec", name, "cat", "/proc/self/uid_map").stdout.split()]


def settled(daemon: Wherryd) -> list[Path]:
    """The namespaces that are held, when those on their way out have gone."""
    deadline = time.monotonic() + 30
    while (held := list((daemon.state / "netns").glob("*/*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def test_on_the_bridge_its_root_is_nobody_of_the_host(wherry: Wherry) -> None:
    script = (
        "id -u; ls -ln /bin/busybox; mount | grep ' /sys '; ip addr show eth0; echo >> /etc/hosts; echo >/dev/stderr"
    )
    done = wherry.run("run", "--rm", "--userns", "auto", BUSYBOX, "sh", "-ec", script)
    user, busybox, sys, *rest = done.stdout.splitlines()
    assert user == "0"
    assert busybox.split()[2:4] == ["0", "0"]
    # its own: the network namespace belongs to its user namespace
    assert sys.startswith("sysfs on /sys type sysfs (ro")
    assert any("inet 10.247." in line for line in rest)


def test_each_has_ids_of_its_own_and_keeps_them(wherry: Wherry, daemon: Wherryd) -> None:
    for name in ("one", "two"):
        wherry.run("run", "-d", "--name", name, "--userns", "auto", BUSYBOX, *HOLD.split())
    one, two = mapping(wherry, "one"), mapping(wherry, "two")
    assert one[0] == 0
    assert one[2] == userns.SIZE
    assert abs(one[1] - two[1]) >= userns.SIZE
    pid = wherry.run("inspect", "-f", "{{.State.Pid}}", "one").stdout.strip()
    assert Path(f"/proc/{pid}").stat().st_uid == one[1]
    wherry.run("exec", "one", "touch", "/kept")
    wherry.run("restart", "-t", "0", "one")
    assert mapping(wherry, "one") == one
    assert wherry.run("exec", "one", "stat", "-c", "%u", "/kept").stdout == "0\n"
    shown = json.loads(wherry.run("inspect", "one").stdout)[0]["HostConfig"]
    assert shown["UsernsMode"] == "auto"
    assert shown["IDMappings"]["UidMap"] == [":".join(map(str, one))]
    wherry.run("rm", "-f", "one", "two")
    assert settled(daemon) == []


def test_it_is_reached_by_a_published_port_and_may_change_its_network(wherry: Wherry) -> None:
    script = "ip link set lo mtu 1000 && cat /sys/class/net/lo/mtu"
    options = ["--uidmap", "0:300000:1000", "--cap-add", "NET_ADMIN"]
    assert wherry.run("run", "--rm", *options, BUSYBOX, "sh", "-c", script).stdout == "1000\n"
    serve = "mkdir /w; echo reached >/w/index.html; exec httpd -f -p 80 -h /w"
    wherry.run("run", "-d", "--name", "web", "--userns", "auto", "-p", "127.0.0.1:18923:80", BUSYBOX, "sh", "-c", serve)
    fetch = "for i in $(seq 50); do wget -qO- http://127.0.0.1:18923 && exit; sleep 0.1; done"
    assert wherry.run("run", "--rm", "--net", "host", BUSYBOX, "sh", "-c", fetch).stdout == "reached\n"


def test_volumes_are_its_roots_and_binds_where_asked(wherry: Wherry, tmp_path: Path) -> None:
    options = ["-v", "shared-ids:/v", "-v", f"{tmp_path}:/b:idmap"]
    script = "touch /v/mine /b/mine; stat -c %u /v/mine /b/mine"
    assert wherry.run("run", "--rm", "--userns", "auto", *options, BUSYBOX, "sh", "-c", script).stdout == "0\n0\n"
    assert (tmp_path / "mine").stat().st_uid == 0
    # another one with other ids, and one without
    for more in (["--userns", "auto"], []):
        found = wherry.run("run", "--rm", *more, "-v", "shared-ids:/v", BUSYBOX, "stat", "-c", "%u", "/v/mine").stdout
        assert found == "0\n"
    wherry.run("volume", "rm", "shared-ids")


def test_a_volume_gets_what_the_image_has(wherry: Wherry) -> None:
    script = "stat -c %u /bin/busybox"
    done = wherry.run("run", "--rm", "--userns", "auto", "-v", "filled:/bin", BUSYBOX, "/bin/sh", "-c", script)
    assert done.stdout == "0\n"
    assert wherry.run("run", "--rm", "-v", "filled:/bin", BUSYBOX, "/bin/sh", "-c", script).stdout == "0\n"
    wherry.run("volume", "rm", "filled")


def test_a_committed_image_has_the_ids_of_the_inside(wherry: Wherry) -> None:
    wherry.run("run", "--name", "made", "--userns", "auto", BUSYBOX, "sh", "-c", "touch /f; chown 7:8 /f")
    wherry.run("commit", "made", "of-made")
    assert wherry.run("run", "--rm", "of-made", "stat", "-c", "%u %g", "/f").stdout == "7 8\n"
    wherry.run("rm", "made")
    wherry.run("rmi", "of-made")


def test_files_go_in_and_out_with_the_ids_of_the_inside(wherry: Wherry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in\n")
    wherry.run("run", "-d", "--name", "box", "--userns", "auto", BUSYBOX, *HOLD.split())
    wherry.run("cp", str(tmp_path / "file"), "box:/running")
    assert wherry.run("exec", "box", "stat", "-c", "%u %g", "/running").stdout == "0 0\n"
    wherry.run("kill", "box")
    wherry.run("wait", "box")
    wherry.run("cp", str(tmp_path / "file"), "box:/stopped")
    wherry.run("export", "-o", str(tmp_path / "all.tar"), "box")
    with tarfile.open(tmp_path / "all.tar") as archive:
        owners = {member.name.lstrip("./"): (member.uid, member.gid) for member in archive}
    assert owners["running"] == owners["stopped"] == owners["bin/busybox"] == (0, 0)
    wherry.run("start", "box")
    assert wherry.run("exec", "box", "stat", "-c", "%u %g", "/stopped").stdout == "0 0\n"


def test_two_containers_in_one(wherry: Wherry) -> None:
    wherry.run("run", "-d", "--name", "first", "--userns", "auto", BUSYBOX, *HOLD.split())
    shared = ["--userns", "container:first", "--net", "container:first", "--pid", "container:first"]
    done = wherry.run("run", "--rm", *shared, BUSYBOX, "sh", "-c", "cat /proc/self/uid_map; ps; ip addr show eth0")
    assert [int(word) for word in done.stdout.splitlines()[0].split()] == mapping(wherry, "first")
    assert HOLD in done.stdout
    assert "inet 10.247." in done.stdout
    # its own network beside the other's ids
    wherry.run("run", "--rm", "--userns", "container:first", BUSYBOX, "ip", "addr", "show", "eth0")


def test_without_a_network_and_with_the_hosts(wherry: Wherry) -> None:
    for mode in ("none", "host"):
        done = wherry.run("run", "--rm", "--userns", "auto", "--net", mode, BUSYBOX, "ls", "/sys/class/net")
        assert "lo" in done.stdout.split()


def test_runc_makes_them_too(wherry: Wherry) -> None:
    need("runc")
    options = ["--runtime", "runc", "--userns", "auto"]
    done = wherry.run("run", "--rm", *options, BUSYBOX, "sh", "-c", "ip addr show eth0; mount | grep ' /sys '")
    assert "inet 10.247." in done.stdout
    assert "sysfs on /sys" in done.stdout


def test_a_killed_daemon_finds_them_again_and_leaves_nothing(wherry: Wherry, daemon: Wherryd) -> None:
    wherry.run("run", "-d", "--name", "stays", "--userns", "auto", BUSYBOX, *HOLD.split())
    daemon.kill()
    daemon.start(120)
    assert mapping(wherry, "stays")[2] == userns.SIZE
    held = sorted(path.name.rpartition(".")[2] for path in (daemon.state / "netns").glob("*/*"))
    assert held[-1] == "user"
    assert len(held) == 2
    wherry.run("rm", "-f", "stays")
    assert settled(daemon) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--userns", "keep-id"], "'auto' gives it ids of its own"),
        (["--userns", "strange"], "it is host, auto"),
        (["--userns", "auto:length=3"], "auto:size=N"),
        (["--userns", "auto", "--privileged"], "can't be used together"),
        (["--userns", "auto", "--pid", "host"], "can't be used together"),
        (["--userns", "auto", "--uidmap", "0:1:1"], "can't be used together"),
        (["--uidmap", "1:100000:10"], "needs a root"),
        (["--uidmap", "0:1:10", "--uidmap", "5:100:10"], "overlap"),
        (["--uidmap", "zero"], "expected CONTAINER:HOST:SIZE"),
        (["-v", "/tmp:/b:idmap"], "needs --userns"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be(wherry: Wherry, options: list[str], complaint: str) -> None:
    done = wherry.run("run", "--rm", *options, BUSYBOX, "true", code=125)
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


def test_which_ids_are_given_out(tmp_path: Path) -> None:
    subuid, subgid = tmp_path / "subuid", tmp_path / "subgid"
    subuid.write_text("ann:524288:65536\nnonsense\ncontainers:1000000:131072\nwherry:5000000:1000\n")
    subgid.write_text("ann:589824:65536\ncontainers:1000000:131072\n")
    ours, others = userns._granted([str(subuid), str(subgid)])
    assert ours == [(1000000, 131072)]
    assert others == [(524288, 65536), (589824, 65536)]
    assert userns._granted([str(tmp_path / "none"), str(subgid)])[0] == []


def test_ids_that_are_taken_are_not_given_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userns, "_granted", lambda: ([(1000000, 131072)], []))
    first = userns._automatic([], 65536).uids[0][1]
    second = userns._automatic([(first, 65536)], 65536).uids[0][1]
    assert {first, second} == {1000000, 1065536}
    with pytest.raises(ResourceExhausted, match="no 65536 ids are free"):
        userns._automatic([(1000000, 131072)], 65536)
    with pytest.raises(InvalidArgument, match="overlap"):
        userns.parse("--uidmap", ["0:10:10", "10:15:10"])
