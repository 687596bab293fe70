"""wherryd as a service of a real systemd: whatever happens to the daemon, the container runs on."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.vm.machine import Machine, remove

IMAGE = "docker.io/library/busybox:test"
_SECONDS = 30


def shown(machine: Machine, name: str, unit: str = "wherryd.service") -> str:
    return machine.check(f"systemctl show -p {name} --value {unit}")


def wait_for(machine: Machine, script: str) -> None:
    """Run a script until it succeeds."""
    deadline = time.monotonic() + _SECONDS
    while (done := machine.run(script)).code:
        if time.monotonic() > deadline:
            journal = machine.run("journalctl -u wherryd -n 40 --no-pager").out
            pytest.fail(f"not within {_SECONDS} s: {script}\n{done.out}\n{journal}")


def task_pid(machine: Machine, name: str) -> str:
    """The pid of a running task, as the daemon says."""
    for line in machine.check("wherry tasks ls").splitlines()[1:]:
        task, pid, status = line.split()[:3]
        if task == name and status == "RUNNING":
            return pid
    return ""


@pytest.fixture
def container(daemon: Machine) -> Iterator[str]:
    """A running container that counts up in a file of its own; its pid."""
    loop = "i=0; while true; do i=$((i+1)); echo $i >/tmp/count; usleep 100000; done"
    daemon.check(f"wherry containers run -d {IMAGE} keeper sh -c '{loop}'")
    pid = task_pid(daemon, "keeper")
    assert pid
    yield pid
    wait_for(daemon, "systemctl start wherryd && wherry version >/dev/null")
    remove(daemon, "keeper")
    assert daemon.run(f"test -e /proc/{pid}").code == 1


def count(machine: Machine, pid: str) -> int:
    """How far the container has counted, seen from outside of it."""
    return int(machine.check(f"cat /proc/{pid}/root/tmp/count"))


def assert_goes_on(machine: Machine, pid: str) -> None:
    """The same process is known to the daemon, alive, counts on, and takes an exec."""
    wait_for(machine, "wherry version >/dev/null")
    assert task_pid(machine, "keeper") == pid
    before = count(machine, pid)
    wait_for(machine, f"test $(cat /proc/{pid}/root/tmp/count) -gt {before}")
    assert machine.check(f"wherry tasks exec --exec-id e{time.monotonic_ns()} keeper echo in") == "in"


def test_it_is_ready_when_systemd_says_so(daemon: Machine) -> None:
    assert shown(daemon, "ActiveState") == "active"
    assert shown(daemon, "Type") == "notify"
    assert shown(daemon, "StatusText") == "serving"
    daemon.check("systemd-analyze verify /etc/systemd/system/wherryd.service /etc/systemd/system/wherryd.socket")


def test_the_units_name_this_environment(daemon: Machine) -> None:
    text = daemon.check("cat /etc/systemd/system/wherryd.service")
    assert "ExecStart=/opt/wherry/bin/wherryd --log-level debug" in text
    # no mount namespace of its own: a restarted daemon must see the mounts of the containers that went on
    assert (
        daemon.check("readlink /proc/1/ns/mnt /proc/$(systemctl show -p MainPID --value wherryd)/ns/mnt | uniq | wc -l")
        == "1"
    )


def test_the_service_has_no_controllers_below_it(daemon: Machine, container: str) -> None:
    """A delegated cgroup whose subtree has controllers can't be entered again by a restarted service (EBUSY)."""
    assert daemon.check("cat /sys/fs/cgroup/system.slice/wherryd.service/cgroup.subtree_control") == ""
    assert daemon.check(f"cat /proc/{container}/cgroup") == "0::/default/keeper"


def test_the_kernel_may_take_a_container_before_the_daemon(daemon: Machine, container: str) -> None:
    assert daemon.check("cat /proc/$(systemctl show -p MainPID --value wherryd)/oom_score_adj") == "-999"
    assert daemon.check(f"cat /proc/{container}/oom_score_adj") == "0"


def test_after_sigkill_systemd_starts_it_again(daemon: Machine, container: str) -> None:
    old = shown(daemon, "MainPID")
    daemon.check(f"kill -9 {old}")
    wait_for(daemon, f'p=$(systemctl show -p MainPID --value wherryd); test "$p" != {old} -a "$p" != 0')
    assert_goes_on(daemon, container)
    assert int(shown(daemon, "NRestarts")) >= 1


def test_restart(daemon: Machine, container: str) -> None:
    old = shown(daemon, "MainPID")
    daemon.check("systemctl restart wherryd", timeout=90)
    assert shown(daemon, "MainPID") != old
    assert_goes_on(daemon, container)


def test_stop_and_start(daemon: Machine, container: str) -> None:
    daemon.check("systemctl stop wherryd", timeout=90)
    assert shown(daemon, "ActiveState") == "inactive"
    assert shown(daemon, "Result") == "success"
    before = count(daemon, container)
    wait_for(daemon, f"test $(cat /proc/{container}/root/tmp/count) -gt {before}")
    daemon.check("systemctl start wherryd", timeout=90)
    assert_goes_on(daemon, container)


def test_an_exit_while_it_was_stopped_is_found(daemon: Machine) -> None:
    script = "while test ! -e /tmp/go; do usleep 50000; done; exit 33"
    daemon.check(f"wherry containers run -d {IMAGE} short sh -c '{script}'")
    pid = task_pid(daemon, "short")
    daemon.check("systemctl stop wherryd", timeout=90)
    daemon.check(f"touch /proc/{pid}/root/tmp/go")
    wait_for(daemon, f"! test -e /proc/{pid}")
    daemon.check("systemctl start wherryd", timeout=90)
    wait_for(daemon, "wherry tasks ls | grep -q 'short.*STOPPED'")
    assert daemon.run("wherry tasks delete short").code == 33
    daemon.check("wherry containers rm short")


def test_the_socket_starts_it(daemon: Machine, container: str) -> None:
    """It leaves the daemon behind its socket unit."""
    daemon.check("systemctl stop wherryd && wherryd systemd install --socket --now", timeout=90)
    assert shown(daemon, "ActiveState") == "inactive"
    assert daemon.check("stat -c %a /run/wherry/wherryd.sock") == "660"
    # the first client is answered by the daemon that its connection started
    daemon.check("wherry version", timeout=90)
    assert shown(daemon, "ActiveState") == "active"
    assert shown(daemon, "TriggeredBy") == "wherryd.socket"
    assert_goes_on(daemon, container)
    # gRPC on the socket that was handed over, by the library that others use
    script = (
        "import grpc; from wherry.proto import version_pb2; c = grpc.insecure_channel('unix:///run/wherry/wherryd.sock');"
        "from google.protobuf.empty_pb2 import Empty;"
        "m = c.unary_unary('/containerd.services.version.v1.Version/Version',"
        "request_serializer=Empty.SerializeToString, response_deserializer=version_pb2.VersionResponse.FromString);"
        "print(m(Empty(), timeout=20).version)"
    )
    assert daemon.check(f'python -c "{script}"')
    # clients wait while it restarts, none is refused
    daemon.check("systemctl kill --kill-whom=main -s KILL wherryd && wherry version", timeout=90)
    assert_goes_on(daemon, container)


def test_removal(daemon: Machine) -> None:
    """Last of all: nothing of the installation is left, and the data is."""
    daemon.check("wherryd systemd install --remove", timeout=90)
    left = "ls /etc/systemd/system/*/wherryd.* /etc/systemd/system/wherryd.* /run/wherry/wherryd.sock"
    assert daemon.run(left).out.count("No such file") == 3
    assert shown(daemon, "LoadState") == "not-found"
    assert daemon.check("ls /var/lib/wherry")
