"""Mounts, masked and read-only paths, devices, links: what the container sees of the world."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.runtime.bundles import Bundle, Runtime, Spec, cgroups_of, mounts_below


def run(runtime: Runtime, bundle: Bundle, script: str, change: object = None) -> str:
    folder = bundle.write(change, args=["sh", "-c", script])  # type: ignore[arg-type]
    return runtime.ok("run", "--bundle", str(folder), runtime.new_id())


def mount(destination: str, source: str, *options: str, kind: str = "bind") -> Spec:
    return {"destination": destination, "source": source, "type": kind, "options": list(options)}


def test_default_devices_and_links(runtime: Runtime, bundle: Bundle) -> None:
    script = "cd /dev; for n in null zero full tty random urandom; do stat -c '%n %t:%T %a' $n; done; "
    script += (
        "for n in fd stdin stdout stderr ptmx; do readlink $n; done; echo x >/dev/null; head -c 3 /dev/zero | wc -c"
    )
    assert run(runtime, bundle, script).splitlines() == [
        "null 1:3 666",
        "zero 1:5 666",
        "full 1:7 666",
        "tty 5:0 666",
        "random 1:8 666",
        "urandom 1:9 666",
        "/proc/self/fd",
        "/proc/self/fd/0",
        "/proc/self/fd/1",
        "/proc/self/fd/2",
        "pts/ptmx",
        "3",
    ]


def test_configured_devices(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["devices"] = [
            {"path": "/dev/sub/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 1000, "gid": 2000},
            {"path": "/dev/pipe", "type": "p", "fileMode": 0o600},
        ]

    script = "stat -c '%F %t:%T %a %u %g' /dev/sub/mine; stat -c '%F %a' /dev/pipe"
    assert run(runtime, bundle, script, change).splitlines() == ["character special file 1:3 640 1000 2000", "fifo 600"]


def test_the_root_is_read_only_and_the_host_invisible(runtime: Runtime, bundle: Bundle) -> None:
    script = "touch /x 2>/dev/null && echo written; ls /.. | sort | tr '\\n' ' '; grep -c . /proc/self/mountinfo"
    visible = run(runtime, bundle, script).split()
    assert "written" not in visible
    assert set(visible[:-1]) == set(os.listdir(bundle.rootfs))


def test_bind_mounts(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    source = tmp_path / "data"
    (source / "sub").mkdir(parents=True)
    (source / "file").write_text("content")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(source / "sub")], check=True)
    try:
        (source / "sub" / "deep").write_text("deeper")

        def change(spec: Spec) -> None:
            spec["mounts"] += [
                mount("/tmp", "tmpfs", "mode=1777", kind="tmpfs"),
                mount("/tmp/a/b/rec", str(source), "rbind", "ro"),
                mount("/tmp/one", str(source), "bind", "nosuid", "nodev"),
                mount("/tmp/file", str(source / "file"), "bind", "ro"),
            ]

        script = """
            cat /tmp/a/b/rec/file /tmp/a/b/rec/sub/deep /tmp/file; echo
            ls /tmp/one/sub | wc -l
            for f in /tmp/a/b/rec/new /tmp/file /tmp/one/new; do (echo x >$f) 2>/dev/null && echo "wrote $f"; done
            grep ' /tmp/one ' /proc/self/mountinfo | cut -d' ' -f6
        """
        lines = run(runtime, bundle, script, change).splitlines()
        assert lines[:3] == ["contentdeepercontent", "0", "wrote /tmp/one/new"]
        assert lines[3].startswith("rw,nosuid,nodev")
    finally:
        subprocess.run(["umount", str(source / "sub")], check=True)


def test_recursive_read_only(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    source = tmp_path / "data"
    (source / "sub").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(source / "sub")], check=True)
    try:

        def change(spec: Spec) -> None:
            spec["mounts"] += [mount("/tmp", str(source), "rbind", "rro")]

        script = "touch /tmp/x 2>/dev/null || echo refused; touch /tmp/sub/x 2>/dev/null || echo refused"
        assert run(runtime, bundle, script, change).split() == ["refused", "refused"]
    finally:
        subprocess.run(["umount", str(source / "sub")], check=True)


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ("rnosuid", "nosuid"),
        ("rnodev", "nodev"),
        ("rnoexec", "noexec"),
        ("rnoatime", "noatime"),
        ("rnodiratime", "nodiratime"),
        ("rnosymfollow", "nosymfollow"),
    ],
)
def test_recursive_attributes_reach_what_lies_below(
    runtime: Runtime, bundle: Bundle, tmp_path: Path, option: str, flag: str
) -> None:
    source = tmp_path / "data"
    (source / "sub").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(source / "sub")], check=True)
    try:

        def change(spec: Spec) -> None:
            spec["mounts"] += [mount("/tmp", str(source), "rbind", option)]

        lines = run(runtime, bundle, "cut -d' ' -f5,6 /proc/self/mountinfo | grep '^/tmp'", change).splitlines()
        assert [flag in line.split()[1].split(",") for line in lines] == [True, True]
    finally:
        subprocess.run(["umount", str(source / "sub")], check=True)


@pytest.mark.parametrize("back", ["rrw", "rsuid", "rdev", "rexec"])
def test_recursive_attributes_are_taken_back(runtime: Runtime, bundle: Bundle, tmp_path: Path, back: str) -> None:
    set_ = {"rrw": "ro", "rsuid": "nosuid", "rdev": "nodev", "rexec": "noexec"}[back]
    source = tmp_path / "data"
    (source / "sub").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", set_, "tmpfs", str(source / "sub")], check=True)
    try:

        def change(spec: Spec) -> None:
            spec["mounts"] += [mount("/tmp", str(source), "rbind", back)]

        lines = run(runtime, bundle, "grep ' /tmp/sub ' /proc/self/mountinfo | cut -d' ' -f6", change).split()
        assert [set_ in line.split(",") for line in lines] == [False]
    finally:
        subprocess.run(["umount", str(source / "sub")], check=True)


def test_tmpfs_options_and_copy_up(runtime: Runtime, own_bundle: Bundle) -> None:
    folder = Path(own_bundle.rootfs) / "var"
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text("kept")
    os.chown(folder / "deep" / "file", 1000, 2000)
    (folder / "link").symlink_to("deep/file")
    os.chmod(folder, 0o750)

    def change(spec: Spec) -> None:
        spec["mounts"] += [mount("/var", "tmpfs", "tmpcopyup", "size=1m", "nodev", kind="tmpfs")]

    script = "cat /var/link; echo; stat -c '%u %g' /var/deep/file; stat -c %a /var; grep ' /var ' /proc/mounts"
    lines = run(runtime, own_bundle, script, change).splitlines()
    assert lines[:3] == ["kept", "1000 2000", "750"]
    assert "size=1024k" in lines[3]
    assert "nodev" in lines[3]


def test_masked_and_read_only_paths(runtime: Runtime, own_bundle: Bundle) -> None:
    root = Path(own_bundle.rootfs)
    (root / "secret").write_text("secret")
    (root / "secrets").mkdir()
    (root / "secrets" / "one").write_text("secret")
    (root / "fixed").mkdir()

    def change(spec: Spec) -> None:
        spec["root"]["readonly"] = False
        spec["linux"]["maskedPaths"] = ["/secret", "/secrets", "/no/such"]
        spec["linux"]["readonlyPaths"] = ["/fixed", "/proc/sys", "/no/such"]

    script = (
        "cat /secret; ls /secrets; touch /secrets/x 2>/dev/null || echo r1; touch /fixed/x 2>/dev/null || echo r2; "
    )
    script += "(echo 1 >/proc/sys/kernel/domainname) 2>/dev/null || echo r3; touch /elsewhere && echo free"
    assert run(runtime, own_bundle, script, change).split() == ["r1", "r2", "r3", "free"]
    (root / "elsewhere").unlink()


def test_working_directory_is_made(runtime: Runtime, own_bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["root"]["readonly"] = False
        spec["process"]["cwd"] = "/made/for/this"

    assert run(runtime, own_bundle, "pwd", change) == "/made/for/this\n"


def test_cgroup_mounts(runtime: Runtime, bundle: Bundle) -> None:
    script = "cat /proc/self/cgroup | cut -d: -f3 | sort -u; touch /sys/fs/cgroup/x 2>/dev/null || echo refused"
    assert run(runtime, bundle, script).split() == ["/", "refused"]


def test_mounts_of_the_container_stay_in_it(runtime: Runtime, bundle: Bundle) -> None:
    run(runtime, bundle, "true")
    assert mounts_below(bundle.rootfs) == mounts_below(bundle.path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mount("/x", "/no/such/source", "bind"), "no such file or directory"),
        (mount("/mnt", "x", kind="nosuchfs"), "o such device"),
    ],
)
def test_what_cannot_be_mounted_is_named(runtime: Runtime, own_bundle: Bundle, change: Spec, message: str) -> None:
    def add(spec: Spec) -> None:
        spec["root"]["readonly"] = False
        spec["mounts"].append(change)

    name = runtime.new_id()
    result = runtime("run", "--bundle", str(own_bundle.write(add, args=["true"])), name)
    assert result.returncode == 1
    text = result.stderr.replace('\\"', '"')
    assert message in text
    assert change["destination"] in text
    assert runtime("state", name).returncode == 1
    assert cgroups_of(name) == []


def test_nothing_is_mounted_inside_proc(ours: Runtime, bundle: Bundle) -> None:
    """runc 1.1 refuses it for bind mounts only."""
    folder = bundle.write(lambda spec: spec["mounts"].append(mount("/proc/bus", "tmpfs", kind="tmpfs")), args=["true"])
    result = ours("run", "--bundle", str(folder), ours.new_id())
    assert "cannot be mounted because it is inside /proc" in result.stderr


def test_no_pivot(runtime: Runtime, bundle: Bundle) -> None:
    folder = bundle.write(args=["sh", "-c", "ls /.."])
    output = runtime.ok("run", "--no-pivot", "--bundle", str(folder), runtime.new_id())
    assert set(output.split()) == set(os.listdir(bundle.rootfs))


def test_a_mount_over_many_layers(ours: Runtime, tmp_path: Path) -> None:
    """An overlay root whose options are longer than a page: 120 layers with long names."""
    from tests.rootfs import build_busybox_rootfs  # noqa: PLC0415
    from wherry.linux.mounts import Mount, unmount_all  # noqa: PLC0415

    layers = []
    for number in range(120):
        layer = tmp_path / ("layer-with-a-long-name-" * 3) / str(number)
        layer.mkdir(parents=True)
        (layer / f"from-{number}").touch()
        layers.append(str(layer))
    layers.append(build_busybox_rootfs(tmp_path / "base"))
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = [f"lowerdir={':'.join(layers)}", f"upperdir={tmp_path}/upper", f"workdir={tmp_path}/work"]
    Mount("overlay", "overlay", "", options).mount(str(tmp_path / "merged"))
    try:
        folder = Bundle(tmp_path, str(tmp_path / "merged")).write(args=["sh", "-c", "ls / | grep -c from-"])
        assert ours.ok("run", "--bundle", str(folder), ours.new_id()) == "120\n"
    finally:
        unmount_all(str(tmp_path / "merged"))
