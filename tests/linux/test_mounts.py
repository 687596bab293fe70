"""Mounts as values, on real mounts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wherry.linux import mounts
from wherry.linux import syscalls as sc
from wherry.linux.mounts import Mount, Options

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")


def info(target: Path) -> mounts.MountInfo:
    return [item for item in mounts.mountinfo() if item.target == str(target)][-1]


def test_options_are_taken_apart() -> None:
    options = Options(["nosuid", "ro", "rw", "rbind", "rslave", "size=1m", "rro", "mode=755", "noexec", "exec", ""])
    assert options.flags == sc.MS_NOSUID | sc.MS_BIND | sc.MS_REC
    assert options.cleared == sc.MS_RDONLY | sc.MS_NOEXEC
    assert options.propagation == [sc.MS_SLAVE | sc.MS_REC]
    assert options.data == "size=1m,mode=755"
    assert options.set_rec == sc.MOUNT_ATTR_RDONLY


def test_a_mount_is_a_value() -> None:
    one, two = Mount("bind", "/a", "", ["ro"]), Mount("bind", "/a", options=("ro",))
    assert one == two
    assert len({one, two}) == 1
    assert "type='bind'" in repr(one)
    with pytest.raises(AttributeError):
        one.source = "/b"


def test_flags_by_name() -> None:
    assert mounts.describe_flags(sc.MS_RDONLY | sc.MS_BIND) == "MS_RDONLY|MS_BIND"
    assert mounts.describe_flags(0) == "0"


@needs_root
def test_a_set_is_mounted_and_taken_away(tmp_path: Path) -> None:
    planned = [
        Mount("tmpfs", "tmpfs", "", ["nosuid", "size=1m"]),
        Mount("tmpfs", "over", "", ["nodev"]),
    ]
    mounts.mount_all(planned, str(tmp_path))
    try:
        assert [i.source for i in mounts.mountinfo() if i.target == str(tmp_path)] == ["tmpfs", "over"]
        assert mounts.is_mountpoint(str(tmp_path))
    finally:
        mounts.unmount_all(str(tmp_path))
    assert not mounts.is_mountpoint(str(tmp_path))
    mounts.unmount_all(str(tmp_path))
    mounts.unmount_all(str(tmp_path / "nothing"))


@needs_root
def test_a_failure_undoes_what_was_mounted_and_says_all(tmp_path: Path) -> None:
    planned = [Mount("tmpfs", "tmpfs"), Mount("nosuchfs", "src", "", ["ro", "a=b"])]
    with pytest.raises(OSError, match=r"mount nosuchfs 'src' at .* \(flags MS_RDONLY, data 'a=b'\): No such device"):
        mounts.mount_all(planned, str(tmp_path))
    assert not mounts.is_mountpoint(str(tmp_path))


@needs_root
def test_a_bind_mounts_flags_hold_and_locked_ones_stay(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    Mount("tmpfs", "tmpfs", "", ["nosuid", "noexec"]).mount(str(source))
    try:
        Mount("bind", str(source), "", ["rbind", "ro"]).mount(str(target))
        try:
            assert set(info(target).options.split(",")) >= {"ro", "nosuid", "noexec"}
        finally:
            mounts.unmount_all(str(target))
    finally:
        mounts.unmount_all(str(source))


@needs_root
def test_a_busy_mount_is_detached(tmp_path: Path) -> None:
    Mount("tmpfs", "tmpfs").mount(str(tmp_path))
    with open(tmp_path / "held", "w"):
        mounts.unmount_all(str(tmp_path))
    assert not mounts.is_mountpoint(str(tmp_path))


@needs_root
def test_a_target_below_resolves_inside(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / str(outside).lstrip("/")).mkdir(parents=True)
    outside.mkdir()
    (root / "link").symlink_to(outside)
    Mount("tmpfs", "tmpfs", "link").mount(str(root))
    inside = root / str(outside).lstrip("/")
    assert mounts.is_mountpoint(str(inside))
    assert not mounts.is_mountpoint(str(outside))
    mounts.unmount_all(str(inside))


@needs_root
@pytest.mark.parametrize("count", [2, 60, 200])
def test_an_overlay_of_many_layers(tmp_path: Path, count: int) -> None:
    layers = []
    for number in range(count):
        layer = tmp_path / ("a-long-name-of-a-layer-" * 4) / str(number)
        layer.mkdir(parents=True)
        (layer / f"file-{number}").touch()
        layers.append(str(layer))
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    lower = "lowerdir=" + ":".join(layers)
    Mount("overlay", "overlay", "", [f"upperdir={tmp_path}/upper", f"workdir={tmp_path}/work", lower]).mount(
        str(tmp_path / "merged")
    )
    try:
        assert len(os.listdir(tmp_path / "merged")) == count
        (tmp_path / "merged" / "new").touch()
        assert (tmp_path / "upper" / "new").exists()
    finally:
        mounts.unmount_all(str(tmp_path / "merged"))


def test_mountinfo_undoes_escapes() -> None:
    line = (
        r"36 35 98:0 /mnt\0401 /mnt/with\040space\134 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue"
    )
    found = mounts.MountInfo(line)
    assert (found.root, found.target) == ("/mnt 1", "/mnt/with space\\")
    assert found.propagation == ("master:1", "shared:2")
    assert (found.type, found.source, found.super) == ("ext3", "/dev/root", "rw,errors=continue")
