"""What a container may do, sees and runs as: the security context in the specification, and in containers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cri.kubelet import WherryLab, refused
from tests.cri.test_containers import Lab, Pod
from wherry.client.spec import own_capabilities
from wherry.client.users import User
from wherry.core import apparmor
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound
from wherry.cri import container_mounts, container_security
from wherry.cri.container_spec import Making, arguments, build, cgroup_path, oom_score, resources
from wherry.cri.records import Pod as Record
from wherry.cri.settings import Handler, Settings
from wherry.proto import cri_pb2 as cri

DOCKER = 14  # capabilities of a container for which nothing is said
PASSWD = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1001::/home/alice:/bin/sh\n"
GROUP = "root:x:0:root\nusers:x:1001:\nwheel:x:10:root,alice\nextra:x:2000:alice\n"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes containers: run as root")


def read(path: str) -> str:
    return {"etc/passwd": PASSWD, "etc/group": GROUP}.get(path, "")


def context(**fields: Any) -> cri.LinuxContainerSecurityContext:
    return cri.LinuxContainerSecurityContext(**fields)


def number(value: int) -> cri.Int64Value:
    return cri.Int64Value(value=value)


def making(tmp_path: Path, **changes: Any) -> Making:
    """A container of a pod whose namespaces are named; `context` is its security context."""
    config = changes.pop("config", cri.ContainerConfig(command=["true"]))
    if "context" in changes:
        config.linux.security_context.CopyFrom(changes.pop("context"))
    pod = Record("p" * 64, cri.PodSandboxConfig(hostname="box"))
    pod.facts.namespaces = {kind: f"/ns/{kind}" for kind in ("network", "ipc", "uts")}
    for name in ("cgroup", "privileged", "uid_map", "gid_map", "namespaces", "selinux"):
        if name in changes:
            setattr(pod.facts, name, changes.pop(name))
    values = {
        "id": "c" * 64,
        "pod": pod,
        "config": config,
        "image": {},
        "image_name": "image",
        "folder": str(tmp_path),
        "settings": Settings(),
        "handler": Handler(),
    }
    return Making(**(values | changes))


# -- who


@pytest.mark.parametrize(
    ("fields", "image", "expected"),
    [
        ({}, "", User(0, 0, (0, 10))),
        ({}, "alice", User(1000, 1001, (1001, 10, 2000))),
        ({}, "alice:5", User(1000, 5, (5, 10, 2000))),
        ({"run_as_user": number(1000)}, "", User(1000, 1001, (1001, 10, 2000))),
        ({"run_as_user": number(77)}, "alice", User(77, 0, (0,))),
        ({"run_as_username": "alice"}, "", User(1000, 1001, (1001, 10, 2000))),
        ({"run_as_user": number(1000), "run_as_group": number(3)}, "", User(1000, 3, (3, 10, 2000))),
        ({"run_as_user": number(1000), "supplemental_groups": [4, 10]}, "", User(1000, 1001, (1001, 10, 2000, 4))),
        (
            {"run_as_user": number(1000), "supplemental_groups": [4], "supplemental_groups_policy": cri.Strict},
            "",
            User(1000, 1001, (1001, 4)),
        ),
        ({"supplemental_groups_policy": cri.Strict}, "", User(0, 0, (0,))),
    ],
)
def test_users(fields: Mapping[str, Any], image: str, expected: User) -> None:
    assert container_security.user(context(**fields), {"User": image}, read) == expected


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"run_as_group": number(3)}, 'user group "3" is specified without user'),
        ({"run_as_username": "nobody"}, "unable to find user nobody"),
        ({"run_as_user": number(-1)}, "run_as_user: -1"),
        ({"supplemental_groups": [1 << 33]}, "supplemental_groups"),
    ],
)
def test_users_that_are_refused(fields: Mapping[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        container_security.user(context(**fields), {}, read)


# -- what it runs


def test_command_and_arguments() -> None:
    image = {"Entrypoint": ["/entry"], "Cmd": ["by", "default"]}
    config = cri.ContainerConfig
    assert arguments(config(), image) == ["/entry", "by", "default"]
    assert arguments(config(args=["x"]), image) == ["/entry", "x"]
    assert arguments(config(command=["/c"]), image) == ["/c"]
    assert arguments(config(command=["/c"], args=["x"]), image) == ["/c", "x"]
    with pytest.raises(InvalidArgument, match="no command specified"):
        arguments(config(), {})


def test_variables_and_folder(tmp_path: Path) -> None:
    image = {"Env": ["A=image", "B=image"], "WorkingDir": "/image"}
    config = cri.ContainerConfig(command=["true"], envs=[cri.KeyValue(key="A", value="x=y")], tty=True)
    process = build(making(tmp_path, config=config, image=image))["process"]
    assert process["env"] == [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "TERM=xterm",
        "HOSTNAME=box",
        "A=x=y",
        "B=image",
    ]
    assert (process["cwd"], process["terminal"]) == ("/image", True)
    config.working_dir = "/mine"
    assert build(making(tmp_path, config=config, image=image))["process"]["cwd"] == "/mine"


# -- capabilities


def test_capabilities() -> None:
    names = ["CAP_CHOWN", "CAP_KILL"]

    def bounding(**wanted: list[str]) -> list[str]:
        return container_security.capability_sets(cri.Capability(**wanted), names, privileged=False)["bounding"]

    everything = own_capabilities()
    assert container_security.capability_sets(None, names, privileged=False)["bounding"] == names
    assert bounding(add_capabilities=["net_admin"]) == [*names, "CAP_NET_ADMIN"]
    assert bounding(add_capabilities=["CAP_NET_ADMIN"], drop_capabilities=["KILL"]) == ["CAP_CHOWN", "CAP_NET_ADMIN"]
    assert bounding(drop_capabilities=["ALL"], add_capabilities=["KILL"]) == ["CAP_KILL"]
    assert set(bounding(add_capabilities=["ALL"], drop_capabilities=["CHOWN"])) == set(everything) - {"CAP_CHOWN"}
    assert bounding(add_capabilities=["KILL"], drop_capabilities=["KILL"]) == ["CAP_CHOWN"]
    with pytest.raises(InvalidArgument, match="unknown capability 'FLY'"):
        bounding(add_capabilities=["FLY"])


def test_ambient_capabilities_are_in_all_sets() -> None:
    wanted = cri.Capability(drop_capabilities=["ALL"], add_ambient_capabilities=["NET_BIND_SERVICE"])
    sets = container_security.capability_sets(wanted, ["CAP_KILL"], privileged=False)
    assert set(sets) == {"bounding", "effective", "permitted", "inheritable", "ambient"}
    assert all(names == ["CAP_NET_BIND_SERVICE"] for names in sets.values())


# -- profiles


def test_seccomp_by_kind(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW"}))
    of = cri.SecurityProfile

    def seccomp(**fields: Any) -> Any:
        return build(making(tmp_path, context=context(**fields), privileged=True))["linux"].get("seccomp")

    assert seccomp() is None
    assert seccomp(seccomp=of(profile_type=of.Unconfined)) is None
    assert seccomp(seccomp=of(profile_type=of.RuntimeDefault))["defaultAction"] == "SCMP_ACT_ERRNO"
    local = of(profile_type=of.Localhost, localhost_ref=str(profile))
    assert seccomp(seccomp=local) == {"defaultAction": "SCMP_ACT_ALLOW"}
    assert seccomp(seccomp=local, privileged=True) is None
    for text in ("runtime/default", "docker/default"):
        assert seccomp(seccomp_profile_path=text)["defaultAction"] == "SCMP_ACT_ERRNO"
    assert seccomp(seccomp_profile_path="unconfined") is None
    assert seccomp(seccomp_profile_path=f"localhost/{profile}") == {"defaultAction": "SCMP_ACT_ALLOW"}
    # the message comes before the string
    assert seccomp(seccomp=of(profile_type=of.Unconfined), seccomp_profile_path="runtime/default") is None


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"seccomp": cri.SecurityProfile(localhost_ref="/x")}, "LocalhostRef must only be set"),
        ({"seccomp": cri.SecurityProfile(profile_type=cri.SecurityProfile.Localhost)}, "needs a localhost_ref"),
        ({"seccomp_profile_path": "nonsense"}, 'invalid seccomp profile "nonsense"'),
        ({"seccomp_profile_path": "localhost//no/such"}, "can't read the seccomp profile /no/such"),
        ({"apparmor_profile": "nonsense"}, 'invalid apparmor profile "nonsense"'),
    ],
)
def test_profiles_that_are_refused(tmp_path: Path, fields: Mapping[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        build(making(tmp_path, context=context(**fields)))


def test_the_profile_for_containers_without_one(tmp_path: Path) -> None:
    spec = build(making(tmp_path, settings=Settings(unset_seccomp_profile="runtime/default")))
    assert spec["linux"]["seccomp"]["defaultAction"] == "SCMP_ACT_ERRNO"


def test_apparmor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = cri.SecurityProfile
    local = of(profile_type=of.Localhost, localhost_ref="localhost/mine")

    def profile(**fields: Any) -> Any:
        made = making(tmp_path, context=context(**fields), privileged=True)
        return build(made)["process"].get("apparmorProfile", "")

    monkeypatch.setattr(apparmor, "enabled", lambda: False)
    assert profile() == profile(apparmor=of(profile_type=of.Unconfined)) == ""
    for asked in (local, of(profile_type=of.RuntimeDefault)):
        with pytest.raises(FailedPrecondition, match="apparmor is not supported"):
            profile(apparmor=asked)
    monkeypatch.setattr(apparmor, "enabled", lambda: True)
    monkeypatch.setattr(apparmor, "loaded", lambda name: name == apparmor.NAME)
    assert profile() == profile(apparmor=of(profile_type=of.RuntimeDefault)) == apparmor.NAME
    assert profile(apparmor=of(profile_type=of.Unconfined)) == profile(privileged=True) == ""
    with pytest.raises(NotFound, match="apparmor profile not found mine"):
        profile(apparmor=local)
    monkeypatch.setattr(apparmor, "loaded", lambda name: name == "mine")
    assert profile(apparmor=local) == profile(apparmor_profile="localhost/mine") == "mine"


# -- privileged, masks


def test_masks_are_what_the_kubelet_says(tmp_path: Path) -> None:
    linux = build(making(tmp_path))["linux"]
    assert (linux["maskedPaths"], linux["readonlyPaths"]) == ([], [])
    linux = build(making(tmp_path, context=context(masked_paths=["/a"], readonly_paths=["/b"])))["linux"]
    assert (linux["maskedPaths"], linux["readonlyPaths"]) == (["/a"], ["/b"])
    assert build(making(tmp_path, settings=Settings(disable_proc_mount=True)))["linux"]["maskedPaths"]


def test_privileged(tmp_path: Path) -> None:
    asked = context(privileged=True, masked_paths=["/a"])
    with pytest.raises(FailedPrecondition, match="no privileged container allowed in sandbox"):
        build(making(tmp_path, context=asked))
    spec = build(making(tmp_path, context=asked, privileged=True))
    assert spec["linux"]["maskedPaths"] == []
    assert "/dev/null" in {entry["path"] for entry in spec["linux"]["devices"]}
    assert spec["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert set(spec["process"]["capabilities"]["bounding"]) == set(own_capabilities())
    assert all("ro" not in m["options"] for m in spec["mounts"] if m["type"] in {"sysfs", "cgroup"})
    bare = Handler(privileged_without_host_devices=True)
    spec = build(making(tmp_path, context=asked, privileged=True, handler=bare))
    assert "devices" not in spec["linux"]
    assert len(spec["linux"]["resources"]["devices"]) > 1


# -- limits


def test_limits() -> None:
    wanted = cri.LinuxContainerResources(
        cpu_period=100000,
        cpu_quota=50000,
        cpu_shares=512,
        cpuset_cpus="0",
        memory_limit_in_bytes=64 << 20,
        unified={"memory.high": "1"},
        hugepage_limits=[cri.HugepageLimit(page_size="2MB", limit=4 << 20)],
    )
    found = resources(wanted, Settings())
    assert found["cpu"] == {"period": 100000, "quota": 50000, "shares": 512, "cpus": "0"}
    assert found["memory"]["limit"] == 64 << 20
    assert found["memory"].get("swap", 64 << 20) == 64 << 20
    assert found["unified"] == {"memory.high": "1"}
    assert "hugepageLimits" not in found
    limited = resources(wanted, Settings(disable_hugetlb_controller=False)).get("hugepageLimits")
    assert limited in (None, [{"pageSize": "2MB", "limit": 4 << 20}])
    assert resources(cri.LinuxContainerResources(), Settings()) == {}
    with pytest.raises(InvalidArgument, match="oom_score_adj 5000"):
        oom_score(5000, Settings())


def test_cgroup_paths() -> None:
    assert cgroup_path("", "x") == "/k8s.io/x"
    assert cgroup_path("/kubepods/pod1", "x") == "/kubepods/pod1/x"
    assert cgroup_path("/kubepods.slice/kubepods-pod1.slice", "x") == "kubepods-pod1.slice:cri-containerd:x"


# -- namespaces


def test_namespaces(tmp_path: Path) -> None:
    def found(pid: cri.NamespaceMode = cri.CONTAINER, **more: Any) -> dict[str, str]:
        options = cri.NamespaceOption(pid=pid)
        made = making(tmp_path, context=context(namespace_options=options), **more)
        return {item["type"]: item.get("path", "") for item in build(made)["linux"]["namespaces"]}

    of_pod = {"network": "/ns/network", "ipc": "/ns/ipc", "uts": "/ns/uts"}
    cgroup = {"cgroup": ""} if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else {}
    assert found() == {"mount": "", "pid": "", **of_pod, **cgroup}
    assert found(cri.NODE) == {"mount": "", **of_pod, **cgroup}
    assert found(cri.POD, namespaces={"pid": "/ns/pid"}) == {"mount": "", "pid": "/ns/pid", **cgroup}
    assert found(cri.TARGET, target_pid=12)["pid"] == "/proc/12/ns/pid"
    assert found(namespaces={}) == {"mount": "", "pid": "", **cgroup}


def test_a_user_namespace(tmp_path: Path) -> None:
    ids = [[0, 100000, 65536]]
    spec = build(making(tmp_path, uid_map=ids, gid_map=ids, namespaces={"user": "/ns/user"}))
    assert {"type": "user", "path": "/ns/user"} in spec["linux"]["namespaces"]
    assert spec["linux"]["uidMappings"] == [{"containerID": 0, "hostID": 100000, "size": 65536}]
    # sysfs can't be mounted where the network namespace is the host's
    assert next(m for m in spec["mounts"] if m["destination"] == "/sys")["type"] == "bind"


# -- mounts


def binds(tmp_path: Path, *mounts: cri.Mount, **more: Any) -> dict[str, Any]:
    config = cri.ContainerConfig(command=["true"], mounts=mounts)
    spec = build(making(tmp_path, config=config, **more))
    return {mount["destination"]: mount for mount in spec["mounts"]}


def test_mounts(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to("source")
    found = binds(
        tmp_path,
        cri.Mount(container_path="/a/b", host_path=str(tmp_path / "link"), readonly=True),
        cri.Mount(container_path="/a", host_path=str(tmp_path / "made")),
        cri.Mount(container_path="/r", host_path=str(tmp_path), readonly=True, recursive_read_only=True),
    )
    assert found["/a/b"]["source"] == str(tmp_path / "source")
    assert found["/a/b"]["options"] == ["rbind", "rprivate", "ro"]
    assert found["/a"]["options"] == ["rbind", "rprivate", "rw"]
    assert (tmp_path / "made").is_dir()
    assert found["/r"]["options"] == ["rbind", "rprivate", "rro"]
    assert list(found).index("/a") < list(found).index("/a/b")
    assert "/run" not in found
    assert found["/sys/fs/cgroup"]["options"][-1] == "ro"


def test_a_mount_at_a_default_place_takes_it(tmp_path: Path) -> None:
    found = binds(tmp_path, cri.Mount(container_path="/dev/", host_path="/dev"))
    assert not [place for place in found if place.startswith("/dev/") and place not in {"/dev/", "/dev/shm"}]


def test_files_of_the_pod(tmp_path: Path) -> None:
    for name in ("hostname", "hosts", "resolv.conf"):
        (tmp_path / name).write_text("x")
    (tmp_path / "shm").mkdir()
    mine = tmp_path / "mine"
    mine.write_text("y")
    found = binds(tmp_path, cri.Mount(container_path="/etc/hosts", host_path=str(mine)))
    assert found["/etc/hostname"]["source"] == str(tmp_path / "hostname")
    assert found["/etc/resolv.conf"]["source"] == str(tmp_path / "resolv.conf")
    assert found["/etc/hosts"]["source"] == str(mine)
    assert found["/dev/shm"]["source"] == str(tmp_path / "shm")
    host = binds(tmp_path, context=context(namespace_options=cri.NamespaceOption(ipc=cri.NODE)))
    assert host["/dev/shm"]["source"] == "/dev/shm"


@pytest.mark.parametrize(
    ("mount", "text"),
    [
        ({"host_path": "/tmp"}, "both paths are needed"),
        ({"host_path": "relative", "container_path": "/a"}, "isn't absolute"),
        ({"host_path": "/tmp", "container_path": "/a", "recursive_read_only": True}, "needs readonly"),
        (
            {
                "host_path": "/",
                "container_path": "/a",
                "readonly": True,
                "recursive_read_only": True,
                "propagation": cri.PROPAGATION_HOST_TO_CONTAINER,
            },
            "needs private propagation|is not a shared or slave mount",
        ),
    ],
)
def test_mounts_that_are_refused(tmp_path: Path, mount: Mapping[str, Any], text: str) -> None:
    with pytest.raises((InvalidArgument, FailedPrecondition), match=text):
        binds(tmp_path, cri.Mount(**mount))


def test_propagation_needs_a_mount_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        target = "/"
        propagation = ("shared:1",)

    monkeypatch.setattr(container_mounts, "mountinfo", lambda: [Info])
    both = cri.Mount(container_path="/a", host_path=str(tmp_path), propagation=cri.PROPAGATION_BIDIRECTIONAL)
    config = cri.ContainerConfig(command=["true"], mounts=[both])
    spec = build(making(tmp_path, config=config))
    assert spec["linux"]["rootfsPropagation"] == "rshared"
    assert "rshared" in spec["mounts"][-1]["options"]
    Info.propagation = ("master:1",)
    with pytest.raises(FailedPrecondition, match="but it is not a shared mount"):
        build(making(tmp_path, config=config))
    both.propagation = cri.PROPAGATION_HOST_TO_CONTAINER
    config = cri.ContainerConfig(command=["true"], mounts=[both])
    assert build(making(tmp_path, config=config))["linux"]["rootfsPropagation"] == "rslave"


# -- devices


def test_devices_and_cdi(tmp_path: Path) -> None:
    (tmp_path / "vendor.json").write_text(
        json.dumps(
            {
                "cdiVersion": "0.6.0",
                "kind": "vendor.test/thing",
                "devices": [
                    {"name": "one", "containerEdits": {"env": ["ONE=1"]}},
                    {"name": "two", "containerEdits": {"env": ["TWO=2"]}},
                ],
            }
        )
    )
    config = cri.ContainerConfig(
        command=["true"],
        devices=[cri.Device(host_path="/dev/null", container_path="/dev/nothing", permissions="r")],
        CDI_devices=[cri.CDIDevice(name="vendor.test/thing=one")],
        annotations={"cdi.k8s.io/plugin": "vendor.test/thing=two"},
    )
    settings = Settings(cdi_spec_dirs=[str(tmp_path)])
    spec = build(making(tmp_path, config=config, settings=settings))
    device = next(entry for entry in spec["linux"]["devices"] if entry["path"] == "/dev/nothing")
    assert (device["major"], device["minor"]) == (1, 3)
    rule = {"allow": True, "access": "r", "type": "c", "major": 1, "minor": 3}
    assert rule in spec["linux"]["resources"]["devices"]
    assert {"ONE=1", "TWO=2"} <= set(spec["process"]["env"])
    with pytest.raises(FailedPrecondition, match="enable_cdi is off"):
        build(making(tmp_path, config=config, settings=Settings(enable_cdi=False)))
    config.CDI_devices[0].name = "vendor.test/thing=three"
    with pytest.raises(NotFound, match=r"there are vendor\.test/thing=one, vendor\.test/thing=two"):
        build(making(tmp_path, config=config, settings=settings))


def test_annotations_that_a_handler_passes_on(tmp_path: Path) -> None:
    config = cri.ContainerConfig(command=["true"], annotations={"a.test/x": "1", "b": "2"})
    spec = build(making(tmp_path, config=config, handler=Handler(container_annotations=["a.test/*"])))
    assert spec["annotations"]["a.test/x"] == "1"
    assert "b" not in spec["annotations"]


# -- in containers


@pytest.fixture(scope="module")
def each_pod(each_lab: Lab) -> Pod:
    config = each_lab.pod_config(host_network=True)
    config.linux.security_context.privileged = True
    return Pod(each_lab.run_pod(config), config, each_lab)


@pytest.fixture(scope="module")
def pod(lab: WherryLab) -> Pod:
    config = lab.pod_config(host_network=True)
    return Pod(lab.run_pod(config), config, lab)


def says(pod: Pod, command: str, *, linux: Any = None, **more: Any) -> str:
    """What a container of its own prints; it must end well."""
    name = f"c{os.urandom(4).hex()}"
    linux = linux if linux is not None else cri.LinuxContainerConfig(security_context=context())
    if not linux.security_context.HasField("namespace_options"):
        linux.security_context.namespace_options.pid = cri.CONTAINER
        linux.security_context.namespace_options.network = cri.NODE
    container = pod.run(name, "sleep", "1000", linux=linux, **more)
    try:
        return str(pod.lab.exec(container, "sh", "-c", command)).strip()
    finally:
        pod.lab.kubelet.RemoveContainer(container_id=container)


def secured(**fields: Any) -> cri.LinuxContainerConfig:
    return cri.LinuxContainerConfig(security_context=context(**fields))


@needs_root
def test_ids_in_a_container(each_pod: Pod) -> None:
    linux = secured(run_as_user=number(1234), run_as_group=number(5678), supplemental_groups=[77])
    uid, gid, groups = says(each_pod, "id -u; id -g; id -G", linux=linux).split("\n")
    assert (uid, gid) == ("1234", "5678")
    assert set(groups.split()) == {"5678", "77"}


@needs_root
def test_capabilities_in_a_container(each_pod: Pod) -> None:
    def bounding(**fields: list[str]) -> int:
        linux = secured(capabilities=cri.Capability(**fields))
        return int(says(each_pod, "grep CapBnd /proc/self/status", linux=linux).split()[1], 16)

    assert bounding().bit_count() == DOCKER
    assert bounding(drop_capabilities=["ALL"], add_capabilities=["NET_ADMIN"]) == 1 << 12
    assert not bounding(add_capabilities=["ALL"], drop_capabilities=["SYS_ADMIN"]) & 1 << 21


@needs_root
def test_privileged_in_a_container(each_pod: Pod) -> None:
    found = says(each_pod, "test -e /dev/ram0 -o -e /dev/loop-control -o -e /dev/kmsg && echo devices; "
                 "grep -q ' /sys sysfs rw' /proc/mounts && echo sys", linux=secured(privileged=True))  # fmt: skip
    assert found.split() == ["devices", "sys"]


@needs_root
def test_rights_in_a_container(each_pod: Pod) -> None:
    fields = "grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t\\n'"
    assert says(each_pod, fields) == "NoNewPrivs:0Seccomp:0"
    default = cri.SecurityProfile(profile_type=cri.SecurityProfile.RuntimeDefault)
    assert says(each_pod, fields, linux=secured(no_new_privs=True, seccomp=default)) == "NoNewPrivs:1Seccomp:2"
    read_only = secured(readonly_rootfs=True)
    assert says(each_pod, "touch /x 2>/dev/null || echo read-only", linux=read_only) == "read-only"


@needs_root
def test_masks_in_a_container(each_pod: Pod) -> None:
    masked = secured(masked_paths=["/proc/version"], readonly_paths=["/proc/sys"])
    command = "cat /proc/version; echo 0 > /proc/sys/kernel/panic 2>/dev/null || echo no"
    assert says(each_pod, command, linux=masked) == "no"


@needs_root
def test_limits_in_a_container(each_pod: Pod) -> None:
    linux = secured()
    linux.resources.memory_limit_in_bytes = 32 << 20
    linux.resources.oom_score_adj = 500
    linux.resources.cpu_shares = 200
    container = each_pod.run("limits", "sleep", "1000", linux=linux)
    status = each_pod.lab.container_status(container)
    if each_pod.lab.name == "wherryd":
        assert status.resources.linux.memory_limit_in_bytes == 32 << 20
        assert status.resources.linux.cpu_shares == 200
    info = json.loads(each_pod.lab.kubelet.ContainerStatus(container_id=container, verbose=True).info["info"])
    assert Path(f"/proc/{info['pid']}/oom_score_adj").read_text().strip() == "500"
    each_pod.lab.kubelet.UpdateContainerResources(
        container_id=container, linux=cri.LinuxContainerResources(memory_limit_in_bytes=48 << 20)
    )
    paths = Path(f"/proc/{info['pid']}/cgroup").read_text()
    memory = next(
        line.rpartition(":")[2] for line in paths.splitlines() if ":memory:" in line or line.startswith("0::")
    )
    limit = Path("/sys/fs/cgroup/memory" + memory, "memory.limit_in_bytes")
    if limit.exists():
        assert limit.read_text().strip() == str(48 << 20)
    if each_pod.lab.name == "wherryd":
        assert each_pod.lab.container_status(container).resources.linux.memory_limit_in_bytes == 48 << 20
        assert each_pod.lab.container_status(container).resources.linux.cpu_shares == 200
    each_pod.lab.kubelet.RemoveContainer(container_id=container)


@needs_root
def test_mounts_in_a_container(each_pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    mounts = [
        cri.Mount(container_path="/rw", host_path=str(tmp_path)),
        cri.Mount(container_path="/ro", host_path=str(tmp_path), readonly=True),
    ]
    found = says(each_pod, "cat /rw/file; touch /rw/made; touch /ro/x 2>/dev/null || echo ' no'", mounts=mounts)
    assert found == "hello no"
    assert (tmp_path / "made").exists()


@needs_root
def test_devices_in_a_container(each_pod: Pod) -> None:
    device = cri.Device(host_path="/dev/null", container_path="/dev/void", permissions="rwm")
    assert says(each_pod, "echo x > /dev/void && ls -l /dev/void | cut -c1", devices=[device]) == "c"


@needs_root
def test_recursive_read_only_in_a_container(pod: Pod, tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(below)], check=True)
    try:
        mount = cri.Mount(container_path="/m", host_path=str(tmp_path), readonly=True, recursive_read_only=True)
        assert says(pod, "touch /m/below/x 2>/dev/null || echo no", mounts=[mount]) == "no"
    finally:
        subprocess.run(["umount", str(below)], check=True)


@needs_root
def test_an_idmapped_mount_in_a_container(pod: Pod, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.chown(tmp_path / "file", 500, 500)
    tmp_path.chmod(0o755)  # it belongs to nobody in there
    ids = [cri.IDMapping(container_id=500, host_id=700, length=10)]
    mount = cri.Mount(container_path="/m", host_path=str(tmp_path), uidMappings=ids, gidMappings=ids)
    try:
        assert says(pod, "stat -c %u:%g /m/file", mounts=[mount]) == "700:700"
    except grpc.RpcError as error:
        if "can't map its ids" not in str(error.details()):
            raise
        pytest.skip("the file system of the tests' folder has no idmapped mounts")


@needs_root
def test_a_target_for_pids(pod: Pod) -> None:
    target = pod.run("target", "sleep", "12345")
    options = cri.NamespaceOption(pid=cri.TARGET, target_id=target, network=cri.NODE)
    assert "sleep 12345" in says(pod, "ps", linux=secured(namespace_options=options))
    pod.lab.kubelet.RemoveContainer(container_id=target)
    config = pod.lab.container_config("late", ["true"], linux=secured(namespace_options=options))
    assert refused(pod.lab.create, pod.id, config, pod.config).code() == grpc.StatusCode.NOT_FOUND


@needs_root
def test_stop_signals(pod: Pod) -> None:
    command = "trap 'exit 9' USR1; touch /ready; while :; do sleep 0.1; done"
    container = pod.run("signal", "sh", "-c", command, stop_signal=cri.SIGUSR1)
    assert pod.lab.container_status(container).stop_signal == cri.SIGUSR1
    pod.ready(container)
    pod.lab.kubelet.StopContainer(cri.StopContainerRequest(container_id=container, timeout=20))
    assert pod.lab.container_status(container).exit_code == 9
