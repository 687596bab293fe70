"""exec: namespaces, cgroup, user, environment, errors."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.runtime.bundles import Bundle, Runtime, Spec


@pytest.fixture
def running(runtime: Runtime, bundle: Bundle) -> tuple[Runtime, str]:
    name = runtime.new_id()

    def writable_tmp(spec: Spec) -> None:
        spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})

    runtime.detached("run", "--detach", "--bundle", str(bundle.write(writable_tmp, args=["sleep", "100"])), name)
    return runtime, name


def test_exec_is_in_every_namespace_of_init(running: tuple[Runtime, str]) -> None:
    runtime, name = running
    pid = runtime.state(name)["pid"]
    kinds = ("cgroup", "ipc", "mnt", "net", "pid", "uts", "user")
    script = "for n in " + " ".join(kinds) + "; do readlink /proc/self/ns/$n; done"
    assert runtime.ok("exec", name, "sh", "-c", script).split() == [os.readlink(f"/proc/{pid}/ns/{n}") for n in kinds]
    assert runtime.ok("exec", name, "cat", "/proc/self/cgroup") == runtime.ok("exec", name, "cat", "/proc/1/cgroup")


def test_exec_passes_exit_codes_and_streams(running: tuple[Runtime, str]) -> None:
    runtime, name = running
    result = runtime("exec", name, "sh", "-c", "echo out; echo err >&2; exit 9")
    assert (result.stdout, result.returncode) == ("out\n", 9)
    assert result.stderr.startswith("err\n")


def test_exec_takes_user_cwd_and_environment(running: tuple[Runtime, str]) -> None:
    runtime, name = running
    flags = ["-u", "1000:1000", "-g", "2000", "--cwd", "/tmp", "-e", "A=b c", "-e", "HOME=/x"]
    script = "id -u; id -g; id -G; pwd; echo $A $HOME"
    output = runtime.ok("exec", *flags, name, "sh", "-c", script).splitlines()
    assert output == ["1000", "1000", "1000 2000", "/tmp", "b c /x"]


def test_exec_by_process_file(running: tuple[Runtime, str], bundle: Bundle) -> None:
    runtime, name = running
    process = {
        "args": [
            "sh",
            "-c",
            "grep CapEff /proc/self/status; grep NoNewPrivs /proc/self/status; grep processes /proc/self/limits",
        ],
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
        "capabilities": {key: ["CAP_CHOWN"] for key in ("bounding", "effective", "permitted")},
        "noNewPrivileges": True,
        "rlimits": [{"type": "RLIMIT_NPROC", "soft": 77, "hard": 78}],
    }
    path = bundle.path / "process.json"
    path.write_text(json.dumps(process))
    words = runtime.ok("exec", "--process", str(path), name).split()
    assert words == ["CapEff:", "0000000000000001", "NoNewPrivs:", "1", "Max", "processes", "77", "78", "processes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nosuch"], 'exec: "nosuch": executable file not found in $PATH'),
        (["/no/such"], 'exec: "/no/such": stat /no/such: no such file or directory'),
        (["/etc/passwd"], 'exec: "/etc/passwd": permission denied'),
        (["--cwd", "/nosuch", "true"], 'chdir to cwd ("/nosuch") set in config.json failed: no such file or directory'),
    ],
)
def test_exec_says_what_it_could_not_run(running: tuple[Runtime, str], words: list[str], message: str) -> None:
    runtime, name = running
    flags = words[:2] if words[0].startswith("-") else []
    result = runtime("exec", *flags, name, *words[len(flags) :])
    assert result.returncode == 255
    assert message in result.stderr.replace('\\"', '"')


def test_exec_detached_writes_its_pid(running: tuple[Runtime, str], bundle: Bundle) -> None:
    runtime, name = running
    path = bundle.path / "exec.pid"
    runtime.detached("exec", "--detach", "--pid-file", str(path), name, "sleep", "99")
    pid = int(path.read_text())
    assert pid in json.loads(runtime.ok("ps", "--format", "json", name))
    deadline = time.monotonic() + 20  # runc doesn't wait for the program
    while Path(f"/proc/{pid}/cmdline").read_bytes() != b"sleep\x0099\x00":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_exec_in_a_stopped_container(runtime: Runtime, bundle: Bundle) -> None:
    name = runtime.new_id()
    runtime.ok("run", "--keep", "--bundle", str(bundle.write(args=["true"])), name)
    result = runtime("exec", name, "true")
    assert result.returncode == 255
    assert "cannot exec in a stopped container" in result.stderr


def test_exec_leaks_no_descriptor(running: tuple[Runtime, str]) -> None:
    runtime, name = running
    reader, writer = os.pipe()
    try:
        output = runtime.ok("exec", name, "sh", "-c", "ls /proc/$$/fd; true", pass_fds=(writer,))
    finally:
        os.close(reader)
        os.close(writer)
    assert output.split() == ["0", "1", "2"]
