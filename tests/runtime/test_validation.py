"""Bad input is refused before anything is made, and the message names the field."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.runtime.bundles import Bundle, Runtime, Spec, cgroups_of

Change = Callable[[Spec], object]


def namespaces(*kinds: str) -> list[Spec]:
    return [{"type": kind} for kind in kinds]


BAD: list[tuple[Change, str]] = [
    (lambda s: s.pop("ociVersion"), "ociVersion: is missing"),
    (lambda s: s.update(ociVersion="2.0"), "ociVersion: unsupported version"),
    (lambda s: s.pop("root"), "root: is missing"),
    (lambda s: s["root"].update(path=""), "root.path: is missing"),
    (lambda s: s["root"].update(path="/no/such/root"), "invalid rootfs"),
    (lambda s: s.pop("process"), "process: is missing"),
    (lambda s: s["process"].update(args=[]), "process.args: args must not be empty"),
    (lambda s: s["process"].update(args="sh"), "process.args: must be an array"),
    (lambda s: s["process"].update(args=["sh", 1]), "process.args[1]: must be a string"),
    (lambda s: s["process"].update(args=["s\0h"]), "process.args[0]: holds a null byte"),
    (lambda s: s["process"].update(cwd="relative"), "process.cwd: Cwd must be an absolute path"),
    (lambda s: s["process"].update(cwd=""), "process.cwd: Cwd property must not be empty"),
    (lambda s: s["process"]["user"].update(uid=-1), "process.user.uid: -1 is out of range"),
    (lambda s: s["process"]["user"].update(uid="root"), "process.user.uid: must be an integer"),
    (lambda s: s["process"]["rlimits"][0].update(type="FOO"), "process.rlimits[0].type: invalid rlimit type: FOO"),
    (lambda s: s["process"]["rlimits"][0].update(soft=2048), "process.rlimits[0].soft: is above the hard limit"),
    (lambda s: s["process"].update(oomScoreAdj=2000), "process.oomScoreAdj: 2000 is not between"),
    (lambda s: s["linux"]["namespaces"][2].update(type="foo"), 'linux.namespaces[2].type: unknown namespace "foo"'),
    (lambda s: s["linux"]["namespaces"].append({"type": "pid"}), "linux.namespaces[6].type: malformed spec file: dup"),
    (lambda s: s["linux"]["namespaces"][0].update(path="/no/such"), "linux.namespaces[0].path: lstat /no/such"),
    (lambda s: s["linux"].update(namespaces=namespaces("mount", "pid")), "hostname: unable to set hostname without"),
    (lambda s: s["linux"]["namespaces"].append({"type": "user"}), "linux.uidMappings: a new user namespace needs"),
    (
        lambda s: s["linux"].update(uidMappings=[{"size": 1}]),
        "linux.uidMappings: User namespace mappings specified, but",
    ),
    (lambda s: s["linux"].update(rootfsPropagation="odd"), 'linux.rootfsPropagation: unknown propagation "odd"'),
    (lambda s: s["linux"].update(sysctl={"kernel.panic": "1"}), 'linux.sysctl["kernel.panic"]'),
    (lambda s: s["linux"].update(devices=[{"path": "x", "type": "c"}]), "linux.devices[0].path: must be an absolute"),
    (lambda s: s["linux"].update(devices=[{"path": "/x", "type": "z"}]), "linux.devices[0].type: invalid device type"),
    (lambda s: s["linux"].update(cgroupsPath="../../escape/../../.."), "cgroup"),
    (lambda s: s["mounts"].append({"source": "x"}), "mounts[7].destination: is missing"),
    (lambda s: s["mounts"].append({"destination": "/x", "type": "bind"}), "mounts[7].source: a bind mount needs"),
    (lambda s: s.update(hooks={"prestart": [{"path": "rel"}]}), "hooks.prestart[0].path: must be an absolute path"),
    (lambda s: s["process"].update(scheduler={"policy": "ODD"}), 'process.scheduler.policy: unknown value "ODD"'),
    (
        lambda s: s["process"].update(scheduler={"policy": "SCHED_OTHER", "priority": 3}),
        "process.scheduler.priority: only SCHED_FIFO and SCHED_RR",
    ),
    (lambda s: s["process"].update(scheduler={"policy": "SCHED_OTHER", "nice": 30}), "process.scheduler.nice: 30 is"),
    (lambda s: s["process"].update(ioPriority={"class": "x"}), 'process.ioPriority.class: unknown value "x"'),
    (
        lambda s: s["process"].update(ioPriority={"class": "IOPRIO_CLASS_BE", "priority": 8}),
        "process.ioPriority.priority: 8 is not between 0 and 7",
    ),
    (lambda s: s["process"].update(execCPUAffinity={"initial": "0-"}), "process.execCPUAffinity.initial: "),
    (lambda s: s["linux"].update(timeOffsets={"monotonic": {"secs": 1}}), "linux.timeOffsets: time namespace offsets"),
    (
        lambda s: s["linux"].update(namespaces=namespaces("time", "uts", "mount"), timeOffsets={"odd": {}}),
        'linux.timeOffsets["odd"]: unknown value',
    ),
    (lambda s: s["linux"].update(personality={"domain": "BSD"}), 'linux.personality.domain: unknown value "BSD"'),
    (lambda s: s["linux"].update(memoryPolicy={"mode": "MPOL_BIND"}), "linux.memoryPolicy.nodes: MPOL_BIND needs"),
    (lambda s: s["linux"].update(memoryPolicy={"mode": "x"}), 'linux.memoryPolicy.mode: unknown value "x"'),
    (lambda s: s["linux"].update(netDevices={"a/b": {}}), 'linux.netDevices["a/b"]: invalid network device name'),
    (lambda s: s["linux"].update(netDevices={"a": {"name": "x" * 16}}), 'linux.netDevices["a"]: invalid network'),
    (
        lambda s: s["linux"].update(netDevices={"a": {"name": "c"}, "b": {"name": "c"}}),
        'linux.netDevices["b"].name: two network devices',
    ),
    (lambda s: s["linux"].update(intelRdt={"closID": "x/y"}), 'linux.intelRdt.closID: invalid intelRdt.ClosID "x/y"'),
    (lambda s: s["linux"].update(intelRdt={"schemata": [1]}), "linux.intelRdt.schemata[0]: must be a string"),
    (
        lambda s: s["mounts"].append({"destination": "/x", "type": "tmpfs", "options": ["idmap"]}),
        "mounts[7]: id-mapped mounts are only supported for bind mounts",
    ),
    (
        lambda s: s["mounts"].append({"destination": "/x", "source": "/", "options": ["bind", "idmap"]}),
        "mounts[7]: idmap without mappings takes those of the user namespace",
    ),
    (
        lambda s: s["mounts"].append(
            {"destination": "/x", "source": "/", "options": ["bind"], "uidMappings": [{"size": 1}]}
        ),
        "mounts[7]: uidMappings and gidMappings are given together",
    ),
    (
        lambda s: s["mounts"].append(
            {"destination": "/x", "source": "/", "options": ["bind"], "uidMappings": [{}], "gidMappings": [{}]}
        ),
        "mounts[7].uidMappings[0].size: must be greater than zero",
    ),
    (
        lambda s: s["linux"]["resources"].update(memory={"limit": "1g"}),
        'linux.resources.memory.limit: must be an integer, not "1g"',
    ),
    (lambda s: s["linux"]["resources"].update(cpu={"cpus": "x"}), 'linux.resources.cpu.cpus: "x" is no list of'),
    (
        lambda s: s["linux"]["resources"].update(memory={"swappiness": 101}),
        "linux.resources.memory.swappiness: 101 is not between 0 and 100",
    ),
    (
        lambda s: s["linux"]["resources"].update(unified={"../x": "1"}),
        'linux.resources.unified["../x"]: must be a file name',
    ),
    (
        lambda s: s["linux"]["resources"].update(devices=[{"allow": True, "access": "rx"}]),
        'linux.resources.devices[0].access: invalid access "rx"',
    ),
    (
        lambda s: s["linux"].update(seccomp={"defaultAction": "SCMP_ACT_NOTIFY"}),
        "SCMP_ACT_NOTIFY cannot be used as default action",
    ),
    (
        lambda s: s["linux"].update(
            seccomp={
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}],
            }
        ),
        "linux.seccomp.listenerPath",
    ),
    (lambda s: s["process"].update(apparmorProfile="some"), "apparmor"),
    (lambda s: s["process"].update(selinuxLabel="a:b:c:d"), "selinux"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_configuration(ours: Runtime, bundle: Bundle, change: Change, message: str) -> None:
    name = ours.new_id()

    def apply(spec: Spec) -> None:
        change(spec)

    result = ours("create", "--bundle", str(bundle.write(apply, args=None)), name)
    assert result.returncode == 1
    assert message in result.stderr.replace('\\"', '"')
    assert not (ours.root / name).exists()
    assert cgroups_of(name) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"spec"', "\x00\x01", "[" * 5000])
def test_what_is_no_configuration(ours: Runtime, bundle: Bundle, text: str) -> None:
    """runc 1.1 panics at `null`."""
    (bundle.path / "config.json").write_text(text)
    result = ours("create", "--bundle", str(bundle.path), ours.new_id())
    assert result.returncode == 1
    assert "Traceback" not in result.stderr


def test_a_bundle_without_a_configuration(runtime: Runtime, bundle: Bundle) -> None:
    result = runtime("create", "--bundle", str(bundle.path), runtime.new_id())
    assert result.returncode == 1
    assert "JSON specification file" in result.stderr
    assert "config.json not found" in result.stderr


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "a b", "ü", "a\n", "x" * 2000])
def test_a_bad_id(runtime: Runtime, bundle: Bundle, name: str) -> None:
    result = runtime("create", "--bundle", str(bundle.write(args=["true"])), name)
    assert result.returncode != 0


@pytest.mark.parametrize(
    "words",
    [
        ["start"],
        ["kill"],
        ["delete"],
        ["state"],
        ["exec"],
        ["state", "a", "b"],
        ["nosuchcommand"],
        ["--nosuchflag", "list"],
    ],
)
def test_a_bad_command_line(runtime: Runtime, words: list[str]) -> None:
    assert runtime(*words).returncode != 0


@pytest.mark.parametrize("command", ["state", "start", "kill", "delete", "pause", "resume", "ps", "exec", "update"])
def test_a_container_that_is_not_there(runtime: Runtime, command: str) -> None:
    result = runtime(command, "no-such-container", *(["true"] if command == "exec" else []))
    assert result.returncode != 0
    assert "does not exist" in result.stderr


def test_an_unknown_signal(runtime: Runtime, bundle: Bundle) -> None:
    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    result = runtime("kill", name, "NOSUCH")
    assert result.returncode == 1
    assert 'unknown signal "NOSUCH"' in result.stderr.replace('\\"', '"')
    for good in ("0", "SIGCONT", "cont", "18"):
        runtime.ok("kill", name, good)


def test_the_log_is_what_containerd_reads(runtime: Runtime, bundle: Bundle) -> None:
    log = bundle.path / "log.json"
    result = runtime(
        "--log", str(log), "--log-format", "json", "create", "--bundle", str(bundle.write(args=["no"])), "x"
    )
    assert result.returncode == 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [sorted(line) for line in lines if line["level"] == "error"] == [["level", "msg", "time"]]
    assert lines[-1]["msg"].endswith(
        'unable to start container process: exec: "no": executable file not found in $PATH'
    )
    assert lines[-1]["msg"] in result.stderr


def test_spec_features_and_help(runtime: Runtime, bundle: Bundle) -> None:
    runtime.ok("spec", "--bundle", str(bundle.path))
    spec = json.loads((bundle.path / "config.json").read_text())
    assert spec["process"]["args"] == ["sh"]
    assert runtime("spec", "--bundle", str(bundle.path)).returncode == 1
    features = json.loads(runtime.ok("features"))
    assert {"mount", "pid", "network", "ipc", "uts", "user", "cgroup"} <= set(features["linux"]["namespaces"])
    assert "rbind" in features["mountOptions"]
    if runtime.name == "wherry-runtime":  # what runc 1.1 doesn't say
        linux = features["linux"]
        assert {"idmap", "ridmap", "rro"} <= set(features["mountOptions"])
        assert linux["mountExtensions"]["idmap"]["enabled"] is linux["netDevices"]["enabled"] is True
        assert "MPOL_BIND" in linux["memoryPolicy"]["modes"]
        assert "SCMP_ACT_NOTIFY" in linux["seccomp"]["actions"]
        assert linux["cgroup"] == {"v1": True, "v2": True, "systemd": True, "systemdUser": True, "rdma": True}
    assert "exec" in runtime.ok("--help")
    assert "--detach" in runtime.ok("exec", "--help")
    assert "spec:" in runtime.ok("--version")
