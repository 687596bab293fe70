"""Pure cgroup v2: the tests that depend on the hierarchy, and containers by the command line of a user."""

from __future__ import annotations

import json

from tests.vm.machine import Machine, remove

IMAGE = "docker.io/library/busybox:test"


def test_the_machine_is_pure_v2(machine: Machine) -> None:
    assert machine.check("stat -f -c %T /sys/fs/cgroup") == "cgroup2fs"
    assert machine.check("cat /proc/self/cgroup").startswith("0::/")
    assert {"cpu", "cpuset", "io", "memory", "pids"} <= set(
        machine.check("cat /sys/fs/cgroup/cgroup.controllers").split()
    )
    assert machine.check("cat /proc/1/comm") == "systemd"


def test_those_of_the_host_hold_here(machine: Machine) -> None:
    words = "python -B -m pytest -q --assert=plain -p no:cacheprovider tests/linux/test_cgroups.py"
    machine.check(f"cd /opt/src && {words}", timeout=200)


def test_run_prints_and_passes_the_code_on(daemon: Machine) -> None:
    assert daemon.check(f"wherry containers run --rm {IMAGE} hello echo hi") == "hi"
    assert daemon.run(f"wherry containers run --rm {IMAGE} seven sh -c 'exit 7'").code == 7
    assert daemon.check("find /sys/fs/cgroup/default -mindepth 1 -type d") == ""


def test_a_container_sees_its_own_cgroup_as_the_root(daemon: Machine) -> None:
    assert daemon.check(f"wherry containers run --rm {IMAGE} root cat /proc/self/cgroup") == "0::/"


def test_the_memory_limit_holds(daemon: Machine) -> None:
    daemon.check(f"wherry containers run -d --memory 32m {IMAGE} limited sleep 1000")
    try:
        directory = "/sys/fs/cgroup/default/limited"
        assert daemon.check(f"cat {directory}/memory.max") == str(32 << 20)
        assert daemon.check("wherry tasks exec --exec-id a limited echo inside") == "inside"
        hog = "dd if=/dev/zero of=/dev/null bs=64M count=1"
        assert daemon.run(f"wherry tasks exec --exec-id b limited {hog}").code == 137
        assert "oom_kill 1" in daemon.check(f"cat {directory}/memory.events")
    finally:
        remove(daemon, "limited")
    assert daemon.run("test -e /sys/fs/cgroup/default/limited").code == 1


def test_an_oom_kill_is_an_event(daemon: Machine) -> None:
    daemon.check("wherry events > /root/events 2>&1 & echo $! > /root/events.pid; sleep 1")
    hog = "dd if=/dev/zero of=/dev/null bs=64M count=1"
    assert daemon.run(f"wherry containers run --rm --memory 32m {IMAGE} hog {hog}").code == 137
    daemon.run("kill $(cat /root/events.pid)")
    assert "/tasks/oom" in daemon.check("cat /root/events")


def test_pause_freezes_and_resume_thaws(daemon: Machine) -> None:
    daemon.check(f"wherry containers run -d {IMAGE} cold sleep 1000")
    try:
        events = "/sys/fs/cgroup/default/cold/cgroup.events"
        daemon.check("wherry tasks pause cold")
        assert "frozen 1" in daemon.check(f"cat {events}")
        assert "PAUSED" in daemon.check("wherry tasks ls")
        daemon.check("wherry tasks resume cold")
        assert "frozen 0" in daemon.check(f"cat {events}")
    finally:
        remove(daemon, "cold")


def test_metrics_are_those_of_v2(daemon: Machine) -> None:
    daemon.check(f"wherry containers run -d --memory 48m {IMAGE} counted sleep 1000")
    try:
        shown = json.loads(daemon.check("wherry tasks metrics --format json counted"))
        values = shown.get("metrics", shown)
        assert values["memory"]["usage_limit"] == 48 << 20
        assert values["pids"]["current"] == 1
        assert "usage_usec" in values["cpu"]
    finally:
        remove(daemon, "counted")


def test_other_devices_are_denied(daemon: Machine) -> None:
    # /dev/kmsg is 1:11; the node can be made, opening it is what the filter refuses
    script = "mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg"
    done = daemon.run(f"wherry containers run --rm {IMAGE} node sh -c '{script}'")
    assert done.code == 1
    assert "Operation not permitted" in done.out
    script = "head -c 1 /dev/zero >/dev/null && echo x >/dev/null && echo open"
    assert daemon.check(f"wherry containers run --rm {IMAGE} usual sh -c '{script}'") == "open"


def test_cpu_and_pids_limits_are_set(daemon: Machine) -> None:
    files = "cat /sys/fs/cgroup/default/measured/cpu.max /sys/fs/cgroup/default/measured/pids.max"
    daemon.check(f"wherry containers run -d --cpus 0.5 --pids-limit 44 {IMAGE} measured sleep 1000")
    try:
        assert daemon.check(files).splitlines() == ["50000 100000", "44"]
    finally:
        remove(daemon, "measured")


def test_the_default_seccomp_profile_filters(daemon: Machine) -> None:
    script = "grep ^Seccomp: /proc/self/status; unshare -n true 2>/dev/null || echo denied"
    out = daemon.check(f"wherry containers run --rm --seccomp {IMAGE} filtered sh -c '{script}'")
    assert out.splitlines()[0].split() == ["Seccomp:", "2"]
    assert out.splitlines()[-1] == "denied"
    assert daemon.check("ls /run/wherry/seccomp | wc -l") == "1"
