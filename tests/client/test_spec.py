"""The specification that options make, and the users that an image names; no daemon needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wherry.client import users
from wherry.client.spec import SpecOptions, build, merge_env, mount
from wherry.client.values import Mount
from wherry.core.errors import InvalidArgument

PASSWD = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:100:app:/:/bin/sh\n# a comment\nbroken\n"
GROUP = "root:x:0:\nusers:x:100:\nwheel:x:10:root,app\nextra:x:20:app\n"


def read(path: str) -> str:
    return {"etc/passwd": PASSWD, "etc/group": GROUP}[path]


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", (0, 0, (0, 10))),
        ("0", (0, 0, (0, 10))),
        ("app", (1000, 100, (100, 10, 20))),
        ("1000", (1000, 100, (100, 10, 20))),
        ("app:wheel", (1000, 10, (10,))),
        ("app:7", (1000, 7, (7,))),
        ("4321", (4321, 0, (0,))),
        ("4321:users", (4321, 100, (100,))),
    ],
)
def test_users(user: str, expected: tuple[int, int, tuple[int, ...]]) -> None:
    assert tuple(users.resolve(user, read)) == expected


@pytest.mark.parametrize("user", ["stranger", "app:stranger", "99999999999"])
def test_users_that_are_not_there(user: str) -> None:
    with pytest.raises(InvalidArgument, match="unable to find"):
        users.resolve(user, read)


def test_files_of_an_image_are_read_layer_by_layer_and_never_through_links(tmp_path: Path) -> None:
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    for folder in (upper, lower):
        (folder / "etc").mkdir(parents=True)
    mounts = [Mount("overlay", "overlay", (f"upperdir={upper}", f"lowerdir={lower}:/nonexistent"))]
    reader = users.reader(mounts)
    assert reader("etc/passwd") == ""
    (lower / "etc/passwd").write_text("below")
    assert reader("etc/passwd") == "below"
    (upper / "etc/passwd").write_text("above")
    assert reader("etc/passwd") == "above"
    (upper / "etc/passwd").unlink()
    (upper / "etc/passwd").symlink_to("/etc/shadow")
    assert reader("etc/passwd") == ""
    (upper / "etc/passwd").unlink()
    if os.geteuid() == 0:
        os.mknod(upper / "etc/passwd", 0o020000, os.makedev(0, 0))
        assert reader("etc/passwd") == ""
        os.unlink(upper / "etc/passwd")
        os.setxattr(upper / "etc", "trusted.overlay.opaque", b"y")
        assert reader("etc/passwd") == ""


def test_an_images_settings_and_what_overrides_them() -> None:
    settings = {"Env": ["PATH=/bin", "A=1"], "Entrypoint": ["entry"], "Cmd": ["cmd"], "WorkingDir": "/work"}
    spec = build("ns", "box", SpecOptions(env=["A=2", "B=3"]), settings)
    assert spec["process"]["args"] == ["entry", "cmd"]
    assert spec["process"]["env"] == ["PATH=/bin", "A=2", "B=3"]
    assert (spec["process"]["cwd"], spec["linux"]["cgroupsPath"]) == ("/work", "/ns/box")
    spec = build("ns", "box", SpecOptions(args=["own"], cwd="/else", tty=True, hostname="h"), settings)
    assert (spec["process"]["args"], spec["process"]["cwd"], spec["process"]["terminal"]) == (["own"], "/else", True)
    assert "TERM=xterm" in spec["process"]["env"]
    with pytest.raises(InvalidArgument, match="no command"):
        build("ns", "box", SpecOptions(), {})
    with pytest.raises(InvalidArgument, match="absolute"):
        build("ns", "box", SpecOptions(cwd="here"), settings)


def test_limits() -> None:
    options = SpecOptions(args=["x"], cpus=1.5, memory=1 << 28, pids=7, cpu_shares=512, cpuset_cpus="0-1")
    resources = build("ns", "box", options)["linux"]["resources"]
    assert resources["cpu"] == {"shares": 512, "quota": 150000, "period": 100000, "cpus": "0-1"}
    assert (resources["memory"], resources["pids"]) == ({"limit": 1 << 28}, {"limit": 7})


def test_capabilities_and_privileges() -> None:
    spec = build("ns", "box", SpecOptions(args=["x"], cap_add=["sys_admin"], cap_drop=["CAP_KILL"]))
    names = spec["process"]["capabilities"]["bounding"]
    assert "CAP_SYS_ADMIN" in names
    assert "CAP_KILL" not in names
    assert build("ns", "box", SpecOptions(args=["x"], cap_drop=["all"]))["process"]["capabilities"]["effective"] == []
    privileged = build("ns", "box", SpecOptions(args=["x"], privileged=True))
    assert privileged["linux"]["maskedPaths"] == privileged["linux"]["readonlyPaths"] == []
    assert privileged["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert "/dev/null" in {item["path"] for item in privileged["linux"]["devices"]}
    assert build("ns", "box", SpecOptions(args=["x"], allow_new_privs=True))["process"]["noNewPrivileges"] is False
    assert build("ns", "box", SpecOptions(args=["x"], seccomp=True))["linux"]["seccomp"]["defaultAction"]


def test_what_is_shared_with_the_host() -> None:
    spec = build("ns", "box", SpecOptions(args=["x"], net_host=True, namespaces=[("ipc", "/proc/1/ns/ipc")], cgroup=""))
    kinds = {item["type"]: item.get("path") for item in spec["linux"]["namespaces"]}
    assert "network" not in kinds
    assert kinds["ipc"] == "/proc/1/ns/ipc"
    assert "cgroupsPath" not in spec["linux"]
    assert any(item.startswith("HOSTNAME=") for item in spec["process"]["env"])


def test_devices() -> None:
    spec = build("ns", "box", SpecOptions(args=["x"], devices=["/dev/null:/dev/nothing:r"]))
    (device,) = spec["linux"]["devices"]
    assert (device["path"], device["type"], device["major"], device["minor"]) == ("/dev/nothing", "c", 1, 3)
    assert spec["linux"]["resources"]["devices"][-1]["access"] == "r"
    for bad in ("/dev/no-such-device", "/etc/passwd"):
        with pytest.raises(InvalidArgument):
            build("ns", "box", SpecOptions(args=["x"], devices=[bad]))


def test_variables_replace_and_go() -> None:
    assert merge_env(["A=1", "B=2"], ["A=3", "C=", "B"]) == ["A=3", "C="]


def test_mounts_as_people_write_them() -> None:
    parsed = mount("type=bind,src=/a,dst=/b,options=rbind:ro")
    assert parsed == {"type": "bind", "source": "/a", "destination": "/b", "options": ["rbind", "ro"]}
    for bad in ("nonsense", "type=bind,src=/a", "type=bind,color=red,dst=/b", "dst=relative"):
        with pytest.raises(InvalidArgument):
            mount(bad)
