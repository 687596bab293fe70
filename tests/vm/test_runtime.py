"""wherry-runtime with systemd as the one who makes its cgroups, and its tests on pure cgroup v2."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.vm.machine import Machine

_BUNDLE = """
mkdir -p /root/bundle/rootfs && cd /root/bundle && rm -f config.json
cp /bin/busybox rootfs/ && mkdir -p rootfs/bin
for name in sh sleep cat true; do ln -sf /busybox rootfs/bin/$name; done
wherry-runtime spec
python3 - <<'END'
import json
spec = json.load(open("config.json"))
spec["process"].update(terminal=False, args=["sleep", "1000"])
spec["linux"]["cgroupsPath"] = "wherrytest-sub.slice:pre:unit"
limits = {"memory": {"limit": 64 << 20}, "pids": {"limit": 50}, "cpu": {"quota": 20000, "period": 100000}}
spec["linux"]["resources"].update(limits)
spec["annotations"] = {"org.systemd.property.TimeoutStopUSec": "uint64 5000000"}
json.dump(spec, open("config.json", "w"))
END
"""
UNIT = "pre-unit.scope"
FOLDER = f"/sys/fs/cgroup/wherrytest.slice/wherrytest-sub.slice/{UNIT}"
RUNTIME = "wherry-runtime --systemd-cgroup"


@pytest.fixture
def running(machine: Machine) -> Iterator[Machine]:
    machine.check(
        f"{_BUNDLE}{RUNTIME} run --detach --pid-file /root/pid one </dev/null >/dev/null 2>/root/said"
        " || (cat /root/said; exit 1)"
    )
    yield machine
    machine.run(f"{RUNTIME} delete --force one")


def properties(machine: Machine) -> dict[str, str]:
    shown = machine.check(f"systemctl show {UNIT}").splitlines()
    return dict(line.split("=", 1) for line in shown if "=" in line)


def test_the_container_is_a_scope(running: Machine) -> None:
    pid = running.check("cat /root/pid")
    assert running.check(f"cat {FOLDER}/cgroup.procs") == pid  # the placeholder is gone
    found = properties(running)
    assert found["ActiveState"] == "active"
    assert found["Slice"] == "wherrytest-sub.slice"
    assert found["Delegate"] == "yes"
    assert found["MemoryMax"] == str(64 << 20)
    assert found["TasksMax"] == "50"
    assert found["CPUQuotaPerSecUSec"] == "200ms"
    assert found["TimeoutStopUSec"] == "5s"
    assert running.check(f"cat {FOLDER}/memory.max {FOLDER}/pids.max {FOLDER}/cpu.max").split("\n") == [
        str(64 << 20), "50", "20000 100000",
    ]  # fmt: skip


def test_limits_outlive_a_reload(running: Machine) -> None:
    running.check(f"{RUNTIME} update --memory 96m --pids-limit 30 one")
    running.check("systemctl daemon-reload")
    assert properties(running)["MemoryMax"] == str(96 << 20)
    assert running.check(f"cat {FOLDER}/memory.max {FOLDER}/pids.max").split() == [str(96 << 20), "30"]


def test_exec_pause_and_delete(running: Machine) -> None:
    assert running.check(f"{RUNTIME} exec one cat /proc/self/cgroup") == "0::/"
    running.check(f"{RUNTIME} pause one && grep -q 'frozen 1' {FOLDER}/cgroup.events && {RUNTIME} resume one")
    running.check(f"{RUNTIME} delete --force one")
    assert running.run(f"test -e {FOLDER}").code == 1
    assert "not-found" in running.run(f"systemctl show -p LoadState {UNIT}").out


def test_a_failed_create_leaves_no_unit(machine: Machine) -> None:
    machine.check(_BUNDLE + 'sed -i \'s/"sleep"/"nosuch"/\' config.json')
    done = machine.run(f"cd /root/bundle && {RUNTIME} run two")
    assert done.code == 1
    assert "executable file not found" in done.out
    assert machine.run(f"test -e {FOLDER}").code == 1
    assert "not-found" in machine.run(f"systemctl show -p LoadState {UNIT}").out


def test_features_say_so(machine: Machine) -> None:
    assert json.loads(machine.check("wherry-runtime features"))["linux"]["cgroup"]["systemd"] is True


@pytest.mark.parametrize("name", ["exec", "filesystem", "lifecycle", "process", "rare"])
def test_those_of_the_host_hold_here(machine: Machine, name: str) -> None:
    """On pure v2. The references aren't in the image; its kernel, 6.1, can't map ids on a tmpfs (6.3) nor take an
    overlay's
    layers one by one (6.7)."""
    chosen = "-k 'not runc and not crun and not idmapped and not many_layers'"
    machine.check(
        f"cd /opt/src && python -B -m pytest -q -p no:cacheprovider {chosen} tests/runtime/test_{name}.py", timeout=170
    )
