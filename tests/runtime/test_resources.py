"""What few containers ask for of cgroups, mounts, keyrings and labels: that it is set, or why it can't be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.runtime.bundles import Bundle, Runtime, Spec, cgroups_of


def run(runtime: Runtime, bundle: Bundle, script: str, change: object = None, *args: str) -> str:
    folder = bundle.write(change, args=["sh", "-c", script])  # type: ignore[arg-type]
    return runtime.ok("run", *args, "--bundle", str(folder), runtime.new_id())


def files_of(runtime: Runtime, bundle: Bundle, limits: Spec, names: tuple[str, ...]) -> list[str]:
    """The texts of those of these files that the container's cgroups have."""
    name = runtime.new_id()

    def change(spec: Spec) -> None:
        spec["linux"]["resources"] = limits

    runtime.detached("run", "--detach", "--bundle", str(bundle.write(change, args=["sleep", "100"])), name)
    paths = [Path(folder, name) for folder in cgroups_of(name) for name in names]
    return [path.read_text().strip() for path in paths if path.exists()]


def disk() -> tuple[int, int]:
    """A block device that is there."""
    for entry in sorted(os.listdir("/sys/dev/block")):
        if not os.path.exists(f"/sys/dev/block/{entry}/partition"):
            major, _, minor = entry.partition(":")
            return int(major), int(minor)
    pytest.skip("no block device is here")


@pytest.mark.parametrize(
    ("limits", "names", "value"),
    [
        ({"cpu": {"shares": 512}}, ("cpu.shares", "cpu.weight"), ("512", "59")),
        ({"cpu": {"quota": 50000, "burst": 20000}}, ("cpu.cfs_burst_us", "cpu.max.burst"), ("20000",)),
        ({"cpu": {"idle": 1}}, ("cpu.idle",), ("1",)),
        ({"memory": {"reservation": 33554432}}, ("memory.soft_limit_in_bytes", "memory.low"), ("33554432",)),
    ],
)
def test_rare_limits(
    ours: Runtime, bundle: Bundle, limits: Spec, names: tuple[str, ...], value: tuple[str, ...]
) -> None:
    found = files_of(ours, bundle, limits, names)
    assert found
    assert found[0] in value


def test_throttled_devices(runtime: Runtime, bundle: Bundle) -> None:
    major, minor = disk()
    limits = {"blockIO": {"throttleReadBpsDevice": [{"major": major, "minor": minor, "rate": 1048576}]}}
    (found,) = files_of(runtime, bundle, limits, ("blkio.throttle.read_bps_device", "io.max"))
    assert found.startswith((f"{major}:{minor} 1048576", f"{major}:{minor} rbps=1048576"))


def test_no_oom_killer(ours: Runtime, bundle: Bundle) -> None:
    """cgroup v2 has no such switch, and the specification lets it be passed over there."""
    limits = {"memory": {"limit": 67108864, "swappiness": 10, "disableOOMKiller": True}}
    if not os.path.isdir("/sys/fs/cgroup/memory"):
        pytest.skip("cgroup v2 has no memory.oom_control")
    (control, swappiness) = files_of(ours, bundle, limits, ("memory.oom_control", "memory.swappiness"))
    assert "oom_kill_disable 1" in control
    assert swappiness == "10"


@pytest.mark.parametrize(
    "network", [{"classID": 0x100001}, {"priorities": [{"name": "lo", "priority": 3}]}], ids=["class", "priorities"]
)
def test_a_controller_that_is_not_there_is_named(ours: Runtime, bundle: Bundle, network: Spec) -> None:
    """cgroup v2 has neither, and the specification lets them be passed over there."""
    controller = "net_cls" if "classID" in network else "net_prio"
    if not os.path.isdir("/sys/fs/cgroup/devices"):
        pytest.skip("cgroup v2")
    if os.path.isdir(f"/sys/fs/cgroup/{controller}"):
        pytest.skip(f"{controller} is here")

    def change(spec: Spec) -> None:
        spec["linux"]["resources"] = {"network": network}

    done = ours("run", "--bundle", str(bundle.write(change, args=["true"])), ours.new_id())
    assert done.returncode == 1
    assert controller in done.stderr


def test_the_score_for_the_oom_killer(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["process"]["oomScoreAdj"] = 567

    assert run(runtime, bundle, "cat /proc/self/oom_score_adj", change) == "567\n"


@pytest.mark.parametrize(
    ("option", "field"), [("rprivate", ""), ("rslave", "master:"), ("rshared", "shared:"), ("unbindable", "unbindable")]
)
def test_the_propagation_of_a_mount(runtime: Runtime, bundle: Bundle, tmp_path: Path, option: str, field: str) -> None:
    source = tmp_path / "source"
    source.mkdir()

    def change(spec: Spec) -> None:
        mount = {"destination": "/mnt", "type": "bind", "source": str(source), "options": ["rbind", option]}
        spec["mounts"].append(mount)

    fields = optional_fields(run(runtime, bundle, "cat /proc/self/mountinfo", change), "/mnt")
    if option == "rslave":  # of what is private on the host nothing can be a slave
        assert "shared:" not in fields
    else:
        assert fields.startswith(field) if field else fields == ""


@pytest.mark.parametrize("kind", ["slave", "private"])
def test_the_propagation_of_the_root(runtime: Runtime, bundle: Bundle, kind: str) -> None:
    assert "shared:" not in propagation_of_the_root(runtime, bundle, kind)


def test_a_shared_root(ours: Runtime, bundle: Bundle) -> None:
    """runc 1.1 leaves it private."""
    assert "shared:" in propagation_of_the_root(ours, bundle, "shared")


def propagation_of_the_root(runtime: Runtime, bundle: Bundle, kind: str) -> str:
    def change(spec: Spec) -> None:
        spec["linux"]["rootfsPropagation"] = kind

    return optional_fields(run(runtime, bundle, "cat /proc/self/mountinfo", change), "/")


def optional_fields(mountinfo: str, target: str) -> str:
    """proc_pid_mountinfo(5): what is between the options and the hyphen."""
    line = next(line for line in mountinfo.splitlines() if line.split()[4] == target)
    return " ".join(line.partition(" - ")[0].split()[6:])


@pytest.mark.skipif(not os.path.exists("/proc/keys"), reason="this kernel shows no keys")
@pytest.mark.parametrize("own", [True, False])
def test_a_keyring_of_its_own(runtime: Runtime, bundle: Bundle, own: bool) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["maskedPaths"] = []

    name = runtime.new_id()
    folder = bundle.write(change, args=["cat", "/proc/keys"])
    shown = runtime.ok("run", *([] if own else ["--no-new-keyring"]), "--bundle", str(folder), name)
    assert (f"_ses.{name}" in shown) == own


def test_masked_arguments_of_calls(runtime: Runtime, bundle: Bundle) -> None:
    """SCMP_CMP_MASKED_EQ: nothing may be made setuid."""
    masked = {"value": 0o4000, "valueTwo": 0o4000, "op": "SCMP_CMP_MASKED_EQ"}

    def change(spec: Spec) -> None:
        rules = [
            {"names": [name], "action": "SCMP_ACT_ERRNO", "args": [{"index": index, **masked}]}
            for name, index in (("chmod", 1), ("fchmod", 1), ("fchmodat", 2))
        ]
        spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}
        spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})

    script = "touch /tmp/x; chmod 4755 /tmp/x 2>/dev/null || echo denied; chmod 755 /tmp/x && echo fine"
    assert run(runtime, bundle, script, change).split() == ["denied", "fine"]


SELINUX = pytest.mark.skipif(os.path.exists("/sys/fs/selinux/enforce"), reason="this host has SELinux")
LABEL = "system_u:system_r:container_t:s0:c4,c5"


@SELINUX
def test_a_label_that_this_host_does_not_know(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["process"]["selinuxLabel"] = LABEL

    refused(runtime, bundle.write(change, args=["true"]))


@SELINUX
def test_a_label_of_mounts_that_this_host_does_not_know(ours: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["mountLabel"] = LABEL

    refused(ours, bundle.write(change, args=["true"]))


def refused(runtime: Runtime, folder: Path) -> None:
    done = runtime("run", "--bundle", str(folder), runtime.new_id())
    assert done.returncode
    assert "selinux label is specified in config, but selinux is disabled or not supported" in done.stderr


@SELINUX
def test_an_exec_with_a_label(ours: Runtime, bundle: Bundle) -> None:
    name = ours.new_id()
    ours.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    done = ours("exec", "--process-label", LABEL, name, "true")
    assert done.returncode == 255
    assert "selinux" in done.stderr
