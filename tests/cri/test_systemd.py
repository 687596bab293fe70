"""A node with systemd and cgroup v2, as nodes are: run in the VM (`tests/vm/test_cri.py`), skipped elsewhere."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cri.guest import GuestLab
from tests.cri.kubelet import WherryLab, refused
from tests.cri.worker import stop
from wherry.core import apparmor
from wherry.proto import cri_pb2 as cri

CGROUPS = Path("/sys/fs/cgroup")
pytestmark = pytest.mark.skipif(
    Path("/proc/1/comm").read_text().strip() != "systemd" or not (CGROUPS / "cgroup.controllers").exists(),
    reason="no systemd with a pure cgroup v2 here",
)
MIB = 1 << 20


def slice_of(name: str) -> str:
    """A pod's slice, made as a kubelet makes it: by systemd."""
    unit = f"kubepods-burstable-pod{name}.slice"
    subprocess.run(["systemctl", "start", unit], check=True, capture_output=True, timeout=60)
    return unit


def cgroup_of(lab: WherryLab, container: str) -> Path:
    """Where a container's process is, as the kernel says."""
    info = lab.kubelet.ContainerStatus(container_id=container, verbose=True).info["info"]
    pid = int(info.partition('"pid":')[2].lstrip().partition(",")[0].rstrip("}"))
    line = Path(f"/proc/{pid}/cgroup").read_text().strip()
    return CGROUPS / line.removeprefix("0::/")


def make(lab: WherryLab, parent: str, command: list[str], **resources: Any) -> tuple[str, str, Any]:
    config = lab.pod_config(host_network=True)
    config.linux.cgroup_parent = parent
    pod = lab.run_pod(config)
    made = lab.container_config("main", command)
    made.linux.resources.CopyFrom(cri.LinuxContainerResources(**resources))
    return pod, lab.run(pod, made, config), config


def test_the_kubelet_is_told_who_makes_cgroups(guest: GuestLab) -> None:
    assert guest.kubelet.RuntimeConfig().linux.cgroup_driver == cri.SYSTEMD


def test_a_container_is_a_scope_in_its_pods_slice(guest: GuestLab) -> None:
    """With its limits, which systemd knows as well; an update changes them; a restarted daemon finds all of it."""
    unit = slice_of("aaaa")
    limits = {"memory_limit_in_bytes": 64 * MIB, "cpu_quota": 20000, "cpu_period": 100000, "cpu_shares": 512}
    pod, container, _ = make(guest, unit, ["sleep", "1000"], **limits)
    where = cgroup_of(guest, container)
    assert where.parent == CGROUPS / "kubepods.slice" / "kubepods-burstable.slice" / unit
    assert where.name.endswith(f"{container}.scope")
    assert (where / "memory.max").read_text().strip() == str(64 * MIB)
    assert (where / "cpu.max").read_text().split() == ["20000", "100000"]
    shown = subprocess.run(
        ["systemctl", "show", "-p", "MemoryMax", "--value", where.name], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == str(64 * MIB)
    wanted = cri.LinuxContainerResources(memory_limit_in_bytes=96 * MIB, cpu_quota=50000, cpu_period=100000)
    guest.kubelet.UpdateContainerResources(container_id=container, linux=wanted)
    assert (where / "memory.max").read_text().strip() == str(96 * MIB)
    assert (where / "cpu.max").read_text().split() == ["50000", "100000"]
    told = guest.container_status(container).resources.linux
    assert (told.memory_limit_in_bytes, told.cpu_quota) == (96 * MIB, 50000)
    guest.restart()
    assert cgroup_of(guest, container) == where
    assert guest.exec(container, "cat", "/proc/self/cgroup").strip() == "0::/"
    stats = guest.kubelet.ContainerStats(container_id=container).stats
    assert 0 < stats.memory.working_set_bytes.value < 96 * MIB
    assert stats.cpu.usage_core_nano_seconds.value > 0
    stop(guest, container, 0)
    guest.kubelet.StopPodSandbox(pod_sandbox_id=pod)
    guest.kubelet.RemovePodSandbox(pod_sandbox_id=pod)
    guest.until(lambda: not where.exists(), "the scope is gone")


def test_out_of_memory_in_a_scope(guest: GuestLab) -> None:
    hog = ["dd", "if=/dev/zero", "of=/dev/null", "bs=128M", "count=1"]
    _, container, _ = make(guest, slice_of("bbbb"), hog, memory_limit_in_bytes=48 * MIB)
    ended = guest.exited(container, 60)
    assert (ended.exit_code, ended.reason) == (137, "OOMKilled")
    guest.remove_pods()


def test_keys_of_version_2(guest: GuestLab) -> None:
    """What the kubelet's MemoryQoS sends, and a limit for swap."""
    unified = {"memory.high": str(40 * MIB), "memory.min": str(8 * MIB)}
    limits = {"memory_limit_in_bytes": 48 * MIB, "memory_swap_limit_in_bytes": 64 * MIB, "unified": unified}
    _, container, _ = make(guest, slice_of("cccc"), ["sleep", "1000"], **limits)
    where = cgroup_of(guest, container)
    assert (where / "memory.high").read_text().strip() == str(40 * MIB)
    assert (where / "memory.min").read_text().strip() == str(8 * MIB)
    if (where / "memory.swap.max").exists():
        assert (where / "memory.swap.max").read_text().strip() == str(16 * MIB)
    guest.remove_pods()


def test_a_pods_figures_are_those_of_its_slice(guest: GuestLab) -> None:
    pod, container, _ = make(guest, slice_of("dddd"), ["sh", "-c", "while true; do :; done"])
    guest.until(
        lambda: guest.kubelet.ContainerStats(container_id=container).stats.cpu.usage_core_nano_seconds.value > 10**8,
        "it uses the processor",
    )
    found = guest.kubelet.PodSandboxStats(pod_sandbox_id=pod).stats.linux
    assert found.cpu.usage_core_nano_seconds.value > 10**8
    assert found.memory.usage_bytes.value > 0
    assert found.process.process_count.value >= 1
    assert [item.attributes.id for item in found.containers] == [container]
    guest.remove_pods()


def test_with_cgroupfs_a_parent_is_a_path(guest: GuestLab) -> None:
    lab = GuestLab()
    try:
        assert lab.kubelet.RuntimeConfig().linux.cgroup_driver == cri.CGROUPFS
        parent = f"/kubepods-{os.getpid()}/burstable/pod1"
        _, container, _ = make(lab, parent, ["sleep", "1000"], memory_limit_in_bytes=32 * MIB)
        where = cgroup_of(lab, container)
        assert where == CGROUPS / parent.lstrip("/") / container
        assert (where / "memory.max").read_text().strip() == str(32 * MIB)
        lab.remove_pods()
        assert not where.exists()
    finally:
        lab.close()


def test_the_default_apparmor_profile_and_one_that_is_not_there(guest: GuestLab) -> None:
    if not apparmor.enabled():
        pytest.skip("this kernel has no AppArmor")
    pod, container, config = make(guest, slice_of("eeee"), ["sleep", "1000"])
    assert guest.exec(container, "cat", "/proc/1/attr/current").strip() == f"{apparmor.NAME} (enforce)"
    made = guest.container_config("other", ["true"])
    made.linux.security_context.apparmor.profile_type = cri.SecurityProfile.Localhost
    made.linux.security_context.apparmor.localhost_ref = "wherry-nosuch"
    request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=made, sandbox_config=config)
    error = refused(guest.kubelet.CreateContainer, request)
    assert "apparmor profile not found wherry-nosuch" in error.details()
    guest.remove_pods()
