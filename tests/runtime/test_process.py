"""The process: user, capabilities, limits, seccomp, environment, descriptors, namespaces, names."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any

import pytest

from tests.runtime.bundles import Bundle, Runtime, Spec


def run(runtime: Runtime, bundle: Bundle, script: str, change: Any = None, **kwargs: Any) -> str:
    folder = bundle.write(change, args=["sh", "-c", script])
    return runtime.ok("run", "--bundle", str(folder), runtime.new_id(), **kwargs)


def test_user_groups_and_umask(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["process"]["user"] = {"uid": 1000, "gid": 1000, "additionalGids": [2000, 3000], "umask": 0o77}

    script = "id -u; id -g; id -G; umask; echo $HOME; cat /proc/1/uid_map | tr -s ' '"
    output = run(runtime, bundle, script, change).splitlines()
    assert output[:5] == ["1000", "1000", "1000 2000 3000", "0077", "/home"]


def test_environment_is_exactly_what_was_asked_for(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["process"]["env"] = ["PATH=/bin", "A=1", "EMPTY=", "SPACE=a b"]

    bundle.write(change, args=["env"])
    lines = runtime.ok("run", "--bundle", str(bundle.path), runtime.new_id()).splitlines()
    assert sorted(lines) == ["A=1", "EMPTY=", "HOME=/root", "PATH=/bin", "SPACE=a b"]


def test_capabilities(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["process"]["user"] = {"uid": 1000, "gid": 1000}
        spec["process"]["capabilities"] = {
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"],
            "permitted": ["CAP_CHOWN", "CAP_KILL"],
            "inheritable": ["CAP_CHOWN"],
            "effective": ["CAP_CHOWN"],
            "ambient": ["CAP_CHOWN"],
        }

    found = dict(re.findall(r"Cap(\w+):\s+(\w+)", run(runtime, bundle, "cat /proc/self/status", change)))
    assert {key: int(value, 16) for key, value in found.items()} == {
        "Inh": 1,
        "Prm": 1,
        "Eff": 1,
        "Bnd": 1 | 1 << 5 | 1 << 13,
        "Amb": 1,
    }


def test_no_capabilities_at_all(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["process"]["capabilities"] = {}

    found = re.findall(r"Cap\w+:\s+(\w+)", run(runtime, bundle, "cat /proc/self/status", change))
    assert {int(value, 16) for value in found} == {0}


@pytest.mark.parametrize("wanted", [True, False])
def test_no_new_privileges(runtime: Runtime, bundle: Bundle, wanted: bool) -> None:
    def change(spec: Spec) -> None:
        spec["process"]["noNewPrivileges"] = wanted

    assert run(runtime, bundle, "grep NoNewPrivs /proc/self/status", change).split()[1] == str(int(wanted))


def test_rlimits(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["process"]["rlimits"] = [
            {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_NPROC", "soft": 300, "hard": 400},
        ]

    limits = run(runtime, bundle, "cat /proc/self/limits", change)
    assert re.search(r"Max open files\s+100\s+200", limits)
    assert re.search(r"Max core file size\s+0\s+0", limits)
    assert re.search(r"Max processes\s+300\s+400", limits)


def test_what_the_host_does_not_allow_is_an_error(runtime: Runtime, bundle: Bundle) -> None:
    with open("/proc/self/status") as file:
        if int(re.findall(r"CapEff:\s+(\w+)", file.read())[0], 16) >> 24 & 1:
            pytest.skip("this host has CAP_SYS_RESOURCE")

    def change(spec: Spec) -> None:
        spec["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 2**40, "hard": 2**40}]

    result = runtime("run", "--bundle", str(bundle.write(change, args=["true"])), runtime.new_id())
    assert result.returncode == 1
    assert "error setting rlimit type 7: operation not permitted" in result.stderr


def test_hostname_and_sysctl(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["hostname"] = "some-name"
        spec["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1", "kernel.shmmni": "1234"}

    script = "hostname; cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmni"
    assert run(runtime, bundle, script, change).split() == ["some-name", "1", "1234"]


def test_a_new_network_namespace_has_loopback_up(runtime: Runtime, bundle: Bundle) -> None:
    assert run(runtime, bundle, "ping -c 1 -W 1 127.0.0.1 >/dev/null 2>&1; ip addr show lo").count("LOOPBACK,UP") == 1


def test_user_namespace(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["namespaces"].append({"type": "user"})
        spec["linux"]["uidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
        spec["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 200000, "size": 65536}]

    script = "id -u; tr -s ' ' </proc/self/uid_map; tr -s ' ' </proc/self/gid_map; echo x >/dev/null && echo writes"
    output = [line.strip() for line in run(runtime, bundle, script, change).splitlines()]
    assert output == ["0", "0 100000 65536", "0 200000 65536", "writes"]


def test_exec_into_a_user_namespace(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["namespaces"].append({"type": "user"})
        spec["linux"]["uidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
        spec["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 100000, "size": 65536}]

    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(change, args=["sleep", "100"])), name)
    output = runtime.ok("exec", "-u", "7:8", name, "sh", "-c", "id -u; id -g; tr -s ' ' </proc/self/uid_map")
    assert [line.strip() for line in output.splitlines()] == ["7", "8", "0 100000 65536"]


def test_joining_namespaces_by_path(runtime: Runtime, bundle: Bundle) -> None:
    first = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), first)
    pid = runtime.state(first)["pid"]
    paths = {"pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts"}

    def change(spec: Spec) -> None:
        del spec["hostname"]
        for item in spec["linux"]["namespaces"]:
            if item["type"] in paths:
                item["path"] = f"/proc/{pid}/ns/{paths[item['type']]}"

    folder = bundle.write(
        change, args=["sh", "-c", "for n in pid net ipc uts; do readlink /proc/self/ns/$n; done; pidof sleep"]
    )
    output = runtime.ok("run", "--bundle", str(folder), runtime.new_id()).split()
    assert output == [*(os.readlink(f"/proc/{pid}/ns/{n}") for n in ("pid", "net", "ipc", "uts")), "1"]


SECCOMP = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
    "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
        {"names": ["personality"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
    ],
}


@pytest.mark.parametrize("no_new_privileges", [True, False])
def test_seccomp(runtime: Runtime, bundle: Bundle, no_new_privileges: bool) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["seccomp"] = SECCOMP
        spec["process"]["noNewPrivileges"] = no_new_privileges
        spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})

    script = "mkdir /tmp/x 2>&1; touch /tmp/y && echo fine; grep Seccomp: /proc/self/status"
    lines = run(runtime, bundle, script, change).splitlines()
    assert "Permission denied" in lines[0]
    assert lines[1:] == ["fine", "Seccomp:\t2"]


def test_seccomp_holds_for_exec(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["seccomp"] = SECCOMP

    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(change, args=["sleep", "100"])), name)
    assert "Permission denied" in runtime.ok("exec", name, "sh", "-c", "mkdir /tmp/x 2>&1; true")


def test_no_descriptor_of_ours_is_in_the_container(runtime: Runtime, bundle: Bundle) -> None:
    reader, writer = os.pipe()
    try:
        output = run(runtime, bundle, "ls /proc/$$/fd; true", pass_fds=(writer,))
    finally:
        os.close(reader)
        os.close(writer)
    assert output.split() == ["0", "1", "2"]


def test_preserved_descriptors(runtime: Runtime, bundle: Bundle) -> None:
    reader, writer = os.pipe()
    try:
        folder = bundle.write(args=["sh", "-c", "echo through >&3; ls /proc/$$/fd; true"])
        words = [*runtime.words, "run", "--preserve-fds", "1", "--bundle", str(folder), runtime.new_id()]
        shell = ["bash", "-c", f'exec "$@" 3>&{writer}', "sh", *words]
        output = subprocess.run(shell, pass_fds=(writer,), capture_output=True, text=True, timeout=30, check=True)
        assert output.stdout.split() == ["0", "1", "2", "3"]
        assert os.read(reader, 100) == b"through\n"
    finally:
        os.close(reader)
        os.close(writer)


def test_signals_are_as_a_program_expects_them(runtime: Runtime, bundle: Bundle) -> None:
    """A runtime ignores and blocks nothing for the container beyond what its caller did (nohup, CI systems)."""
    command = ["grep", "-E", "Sig(Ign|Blk)", "/proc/self/status"]  # a shell would ignore some itself

    def masks(output: str) -> list[int]:
        return [int(mask, 16) for mask in re.findall(r"Sig(?:Ign|Blk):\s*([0-9a-f]{16})", output)]

    handed_on = masks(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = masks(runtime.ok("run", "--bundle", str(bundle.write(args=command)), runtime.new_id()))
    assert len(found) == len(handed_on) == 2
    assert [mask & ~callers for mask, callers in zip(found, handed_on, strict=True)] == [0, 0]


@pytest.mark.parametrize(
    ("limits", "file", "value"),
    [
        ({"memory": {"limit": 67108864}}, ("memory.limit_in_bytes", "memory.max"), "67108864"),
        ({"pids": {"limit": 33}}, ("pids.max",), "33"),
        ({"cpu": {"quota": 50000, "period": 100000}}, ("cpu.cfs_quota_us", "cpu.max"), "50000"),
        ({"cpu": {"cpus": "0"}}, ("cpuset.cpus",), "0"),
    ],
)
def test_cgroup_limits(runtime: Runtime, bundle: Bundle, limits: Spec, file: tuple[str, ...], value: str) -> None:
    from tests.runtime.bundles import cgroups_of  # noqa: PLC0415

    name = runtime.new_id()

    def change(spec: Spec) -> None:
        spec["linux"]["resources"] = limits

    runtime.detached("run", "--detach", "--bundle", str(bundle.write(change, args=["sleep", "100"])), name)
    found = []
    for folder in cgroups_of(name):
        for candidate in file:
            if os.path.exists(f"{folder}/{candidate}"):
                with open(f"{folder}/{candidate}") as handle:
                    found.append(handle.read().split()[0])
    assert value in found


def test_memory_limit_holds(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["resources"] = {"memory": {"limit": 33554432, "swap": 33554432}}

    folder = bundle.write(change, args=["sh", "-c", "head -c 100m /dev/zero | tail >/dev/null; exit $?"])
    result = runtime("run", "--bundle", str(folder), runtime.new_id())
    assert result.returncode == 137


def test_device_rules_hold(runtime: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["devices"] = [{"path": "/dev/mem-like", "type": "c", "major": 1, "minor": 11}]

    assert "Operation not permitted" in run(runtime, bundle, "cat /dev/mem-like 2>&1; true", change)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nosuch"], 'exec: "nosuch": executable file not found in $PATH'),
        (["/no/such"], 'exec: "/no/such": stat /no/such: no such file or directory'),
        (["/etc"], 'exec: "/etc": permission denied'),
        (["/etc/passwd"], 'exec: "/etc/passwd": permission denied'),
    ],
)
def test_a_missing_program_is_named_by_create(runtime: Runtime, bundle: Bundle, words: list[str], message: str) -> None:
    name = runtime.new_id()
    result = runtime("create", "--bundle", str(bundle.write(args=words)), name)
    assert result.returncode == 1
    assert f"unable to start container process: {message}" in result.stderr.replace('\\"', '"')
    assert runtime("state", name).returncode == 1


def test_a_file_that_is_no_program(runtime: Runtime, own_bundle: Bundle) -> None:
    path = os.path.join(own_bundle.rootfs, "tmp/garbage")
    with open(path, "w") as file:
        file.write("\x01\x02 garbage")
    os.chmod(path, 0o755)
    result = runtime("run", "--bundle", str(own_bundle.write(args=["/tmp/garbage"])), runtime.new_id())
    assert result.returncode in (1, 255)
    assert "exec /tmp/garbage: exec format error" in result.stderr


def test_personality_and_scheduling(ours: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["personality"] = {"domain": "LINUX32"}
        spec["process"]["scheduler"] = {"policy": "SCHED_BATCH", "nice": 5}
        spec["process"]["ioPriority"] = {"class": "IOPRIO_CLASS_IDLE", "priority": 0}

    output = run(ours, bundle, "uname -m; ionice -p $$; cut -d' ' -f19,41 /proc/self/stat", change).split("\n")
    assert output[0] in ("i686", "armv8l")
    assert output[1].startswith("idle")
    assert output[2] == "5 3"


def test_time_namespace(ours: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["namespaces"].append({"type": "time"})
        spec["linux"]["timeOffsets"] = {"boottime": {"secs": 1000000}}

    assert float(run(ours, bundle, "cut -d' ' -f1 /proc/uptime", change)) > 1000000
