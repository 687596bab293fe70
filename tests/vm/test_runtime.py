"""wherry-runtime with systemd as the one who makes its cgroups, and its tests on pure cgroup v2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.machine import Machine

_BUNDLE = """
mkdir -p /root/bundle/rootfs && cd /root/bundle && rm -f config.json
cp /bin/busybox rootfs/ && mkdir -p rootfs/bin
for name in sh sleep cat true dd; do ln -sf /busybox rootfs/bin/$name; done
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
_FOLDER = Path(__file__).resolve().parents[1] / "runtime"
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


#: What the VM's kernel, 6.1, can't: map ids on a tmpfs (6.3), take an overlay's layers one by one (6.7).
_NOT_HERE = "not idmapped and not many_layers"
_OURS = f"{_NOT_HERE} and not runc and not crun"
#: Asked of the references, too: what is otherwise on v2 than on the host.
_OF_THE_HIERARCHY = "limit or cgroup or device_rules or pause_and or update or kill_all"
#: Two lanes that take about as long, for the VM's two processors; together they are all of tests/runtime, but for what
#: needs daemons that aren't in the image (test_callers).
_LANES = (
    (
        (_OURS, "attacks attacks_naive borrowed borrowed_exec entering exec hooks lifecycle terminal process"),
        (f"({_OF_THE_HIERARCHY}) and runc", "process lifecycle filesystem"),
    ),
    (
        ("not runc", "checkpoint"),
        (_OURS, "command_line filesystem library rare rdt resources rootless seccomp validation"),
        (f"({_OF_THE_HIERARCHY}) and crun", "process lifecycle filesystem"),
        ("(goes_on_where or terminal) and runc", "checkpoint"),
    ),
)


def test_all_files_are_in_a_lane() -> None:
    there = {path.stem.removeprefix("test_") for path in _FOLDER.glob("test_*.py")} - {"callers"}
    assert there == {name for lane in _LANES for _, names in lane for name in names.split()}


@pytest.mark.timeout(600)
def test_those_of_the_host_hold_here(machine: Machine) -> None:
    """The runtime's whole suite on pure v2, checkpoint and restore with it: criu can read this kernel's vdso."""
    machine.check("modprobe nf_conntrack_netlink")  # criu asks for it, and asking doesn't load it
    lanes = [
        "\n".join(
            "WHERRY_REQUIRE_PEERS=1 python -B -m pytest -q --assert=plain -p no:cacheprovider -rs --durations=5 "
            f"-k '{chosen}' {' '.join(f'tests/runtime/test_{name}.py' for name in names.split())} || failed=1"
            for chosen, names in lane
        )
        for lane in _LANES
    ]
    done = machine.lanes([f"cd /opt/src\nfailed=0\n{lane}\nexit $failed" for lane in lanes], timeout=560)
    print(done.out)
    assert done.code == 0, done.out
    assert "fails on this kernel's vdso" not in done.out


# -- AppArmor ---------------------------------------------------------------------------------------------------------

_PROFILE = """
cat >/root/profile <<'END'
profile wherry-test flags=(attach_disconnected,mediate_deleted) {
  file, network, capability, mount, umount, signal, ptrace,
  deny /secret r,
}
END
apparmor_parser -r /root/profile
"""


@pytest.fixture
def profile(machine: Machine) -> Iterator[Machine]:
    """A bundle at /root/bundle whose init is confined by a profile that keeps /secret from it."""
    machine.check(_PROFILE + _BUNDLE)
    machine.check(
        "cd /root/bundle && echo told >rootfs/secret && "
        + _change('spec["process"]["apparmorProfile"] = "wherry-test"')
    )
    yield machine
    machine.run("wherry-runtime delete --force confined")


def _change(line: str) -> str:
    return f"""python3 - <<'END'
import json
spec = json.load(open("config.json"))
spec["linux"]["cgroupsPath"] = ""
{line}
json.dump(spec, open("config.json", "w"))
END
"""


@pytest.mark.parametrize("runtime", ["wherry-runtime", "runc"])
def test_apparmor_confines(profile: Machine, runtime: str) -> None:
    start = f"cd /root/bundle && {runtime} run --detach confined </dev/null >/dev/null 2>/root/said || cat /root/said"
    assert profile.check(start) == ""
    try:
        assert profile.check(f"{runtime} exec confined cat /proc/1/attr/apparmor/current") == "wherry-test (enforce)"
        entered = profile.run(f"{runtime} exec confined cat /secret")
        assert entered.code == 1
        assert "Permission denied" in entered.out
        free = f"{runtime} exec --apparmor unconfined confined cat /proc/self/attr/apparmor/current"
        assert profile.check(free) == "unconfined"
    finally:
        profile.run(f"{runtime} delete --force confined")


def test_a_profile_that_is_not_loaded(profile: Machine) -> None:
    profile.check("cd /root/bundle && sed -i s/wherry-test/wherry-nosuch/ config.json")
    done = profile.run("cd /root/bundle && wherry-runtime run confined")
    assert done.code == 1
    assert "unable to apply apparmor profile wherry-nosuch: no such file or directory" in done.out


# -- the manager of a user --------------------------------------------------------------------------------------------

_MANAGER = """
grep -q ^wherry: /etc/passwd || {
  echo wherry:x:1000:1000::/home/wherry:/bin/sh >>/etc/passwd; echo wherry:x:1000: >>/etc/group
  echo wherry:100000:65536 >>/etc/subuid; echo wherry:100000:65536 >>/etc/subgid
}
chmod u+s /usr/bin/newuidmap /usr/bin/newgidmap
mkdir -p /home/wherry /run/user/1000 && chown 1000:1000 /home/wherry /run/user/1000 && chmod 700 /run/user/1000
cat >/run/systemd/system/user@1000.service <<'END'
[Unit]
Description=The manager of a user, without logind and PAM
[Service]
User=1000
Type=notify
Slice=user-1000.slice
Delegate=pids memory cpu
Environment=XDG_RUNTIME_DIR=/run/user/1000
ExecStart=/lib/systemd/systemd --user
KillMode=mixed
END
systemctl daemon-reload && systemctl start user@1000.service
"""
_AS_USER = (
    "setpriv --reuid=1000 --regid=1000 --clear-groups --inh-caps=-all "
    "env XDG_RUNTIME_DIR=/run/user/1000 HOME=/home/wherry "
)
_SLICE = "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/user.slice"


@pytest.fixture
def user(machine: Machine) -> Iterator[Machine]:
    """User 1000 with a systemd of its own, and a bundle in its home with limits."""
    machine.check(_MANAGER)
    limits = 'spec["linux"]["resources"] = {"memory": {"limit": 32 << 20}, "pids": {"limit": 20}}'
    mappings = "[{'containerID': 0, 'hostID': 1000, 'size': 1}, {'containerID': 1, 'hostID': 100000, 'size': 65536}]"
    machine.check(
        f"{_BUNDLE} rm -rf /home/wherry/bundle && cp -r /root/bundle /home/wherry/ && cd /home/wherry/bundle"
        f" && rm config.json && chown -R 1000:1000 . && {_AS_USER} wherry-runtime spec --rootless && "
        + _change(
            f'{limits}; spec["linux"]["cgroupsPath"] = "user.slice:wh:one"; '
            f'spec["linux"]["uidMappings"] = spec["linux"]["gidMappings"] = {mappings}; '
            'spec["process"].update(terminal=False, args=["sleep", "1000"])'
        )
    )
    yield machine
    machine.run(f"{_AS_USER} {RUNTIME} delete --force one")


def test_a_users_container_is_a_scope_of_its_manager(user: Machine) -> None:
    """The user may move nobody between its session and its manager's part of the tree, and systemd does it."""
    run = f"{_AS_USER} {RUNTIME}"
    start = f"cd /home/wherry/bundle && {run} run --detach one </dev/null >/dev/null 2>/root/said || cat /root/said"
    assert user.check(start) == ""
    scope = f"{_SLICE}/wh-one.scope"
    assert user.check(f"cat {scope}/memory.max {scope}/pids.max").split() == [str(32 << 20), "20"]
    assert user.check(f"{run} exec one cat /proc/self/cgroup") == "0::/"
    assert user.run(f"{run} exec one dd if=/dev/zero of=/dev/null bs=64M count=1").code == 137
    user.check(f"{run} pause one && grep -q 'frozen 1' {scope}/cgroup.events && {run} resume one")
    user.check(f"{run} update --memory 48m one")
    assert user.check(f"cat {scope}/memory.max") == str(48 << 20)
    user.check(f"{run} delete --force one")
    assert user.run(f"test -e {scope}").code == 1


def test_what_a_user_can_not_have_is_undone(user: Machine) -> None:
    user.check("""cd /home/wherry/bundle && sed -i 's/"sleep"/"nosuch"/' config.json""")
    done = user.run(f"cd /home/wherry/bundle && {_AS_USER} {RUNTIME} run one")
    assert done.code == 1
    assert "executable file not found" in done.out
    assert user.run(f"test -e {_SLICE}/wh-one.scope").code == 1
    assert user.check("ls /run/user/1000/wherry-runtime") == ""
