"""What needs no cgroup filesystem: layouts, paths, conversions, device rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from wherry.linux.cgroups import Mode, convert, devices, layout, resources_v2
from wherry.linux.cgroups.oom import EventsWatch

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
TMPFS = "25 20 0:22 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755\n"
CPU = "31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:5 - cgroup cgroup rw,cpu,cpuacct\n"
MEMORY = "32 25 0:28 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
SYSTEMD = "33 25 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
SPACE = "34 25 0:30 / /mnt/a\\040b rw - cgroup cgroup rw,pids\n"
EMPTY_V2 = V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")


def detect(tmp_path: Path, *lines: str) -> layout.Layout:
    (tmp_path / "mountinfo").write_text("1 0 8:1 / / rw - ext4 /dev/vda rw\n" + "".join(lines))
    return layout.detect(str(tmp_path / "mountinfo"))


def test_the_unified_hierarchy_is_found(tmp_path: Path) -> None:
    found = detect(tmp_path, V2)
    assert found.mode == Mode.V2
    assert found.v2 is not None
    assert found.v2.mountpoint == "/sys/fs/cgroup"


def test_controllers_mounted_together_share_a_hierarchy(tmp_path: Path) -> None:
    found = detect(tmp_path, TMPFS, CPU, SYSTEMD, SPACE)
    assert found.mode == Mode.V1
    assert found.v1["cpu"].mountpoint == found.v1["cpuacct"].mountpoint == "/sys/fs/cgroup/cpu,cpuacct"
    assert found.v1["name=systemd"].mountpoint == "/sys/fs/cgroup/systemd"
    assert found.v1["pids"].mountpoint == "/mnt/a b"


def test_an_empty_v2_tree_makes_it_hybrid(tmp_path: Path) -> None:
    assert detect(tmp_path, TMPFS, CPU, EMPTY_V2).mode == Mode.HYBRID


def test_a_v2_tree_beside_systemds_own_is_v2(tmp_path: Path) -> None:
    assert detect(tmp_path, V2, SYSTEMD).mode == Mode.V2


def test_no_hierarchy_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no cgroup hierarchy is mounted"):
        detect(tmp_path)


def test_a_mount_of_a_part_is_taken_into_account(tmp_path: Path) -> None:
    memory = detect(tmp_path, MEMORY).v1["memory"]
    assert memory.below("/docker/abc/inner", "x") == "/sys/fs/cgroup/memory/inner/x"
    assert memory.below("/elsewhere", "x") == "/sys/fs/cgroup/memory/x"


@pytest.mark.parametrize(
    ("path", "inner"),
    [("", "the-id"), ("/a/b", "/a/b"), ("a/../b", "b"), ("//a", "/a"), ("/../a", "/a"), ("./a/", "a")],
)
def test_cgroups_path(path: str, inner: str) -> None:
    assert layout.inner_path(path, "the-id") == inner


@pytest.mark.parametrize("path", ["/", "..", "../x", ".", "a/../.."])
def test_paths_that_leave_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="invalid cgroup path"):
        layout.inner_path(path, "the-id")


@pytest.mark.parametrize(("shares", "weight"), [(0, 0), (1, 1), (2, 1), (1024, 100), (262144, 10000), (1 << 20, 10000)])
def test_shares_become_weight(shares: int, weight: int) -> None:
    assert convert.cpu_weight(shares) == weight


def test_weights_grow_with_shares() -> None:
    weights = [convert.cpu_weight(shares) for shares in range(2, 262145, 97)]
    assert weights == sorted(weights)
    assert all(1 <= weight <= 10000 for weight in weights)


@pytest.mark.parametrize(("blkio", "io"), [(0, 0), (10, 1), (500, 4950), (1000, 10000)])
def test_blkio_weight_becomes_io_weight(blkio: int, io: int) -> None:
    assert convert.io_weight(blkio) == io


@pytest.mark.parametrize(
    ("swap", "memory", "expected"),
    [(0, 0, None), (0, 100, None), (0, -1, -1), (-1, 100, -1), (100, 100, 0), (300, 100, 200)],
)
def test_swap_of_v2_is_without_memory(swap: int, memory: int, expected: int | None) -> None:
    assert convert.swap_max(swap, memory) == expected


@pytest.mark.parametrize(
    ("swap", "memory", "message"),
    [
        (100, 0, "unable to set swap limit without memory limit"),
        (100, -1, "unable to set swap limit without memory limit"),
        (100, -7, "invalid memory value: -7"),
        (99, 100, "memory\\+swap limit should be >= memory limit"),
    ],
)
def test_swap_needs_a_memory_limit(swap: int, memory: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.swap_max(swap, memory)


def test_all_is_allowed_only_by_a_rule_that_says_so() -> None:
    assert devices.allows_all(devices.effective_rules([{"allow": True, "access": "rwm"}]))
    assert devices.allows_all(devices.effective_rules([{"allow": False}, {"allow": True}]))
    assert not devices.allows_all(devices.effective_rules([]))
    assert not devices.allows_all(devices.effective_rules([{"allow": True, "access": "rw"}]))
    assert not devices.allows_all(
        devices.effective_rules([{"allow": True}, {"allow": False, "type": "c", "major": 1, "access": "w"}])
    )


def test_a_rule_is_written_as_the_kernel_reads_it() -> None:
    rule = devices.parse([{"allow": True, "type": "c", "major": 10, "access": "mr"}])[0]
    assert str(rule) == "c 10:* rm"


def test_rdma_limits_name_at_least_one() -> None:
    assert resources_v2.rdma_line("mlx5_1", {"hcaHandles": 3}) == "mlx5_1 hca_handle=3"
    with pytest.raises(ValueError, match=r"rdma\[mlx5_1\]: neither hcaHandles nor hcaObjects"):
        resources_v2.rdma_line("mlx5_1", {})


def test_a_page_size_is_no_path() -> None:
    with pytest.raises(ValueError, match=r"hugepageLimits\[0\]\.pageSize: invalid size"):
        resources_v2.hugepage_size(0, {"pageSize": "../x", "limit": 1})


def test_an_oom_watch_that_cannot_start_leaves_no_descriptor(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        EventsWatch(str(tmp_path / "memory.events"))
