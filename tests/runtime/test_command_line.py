"""The command line, flag by flag: what Debian's runc takes is taken, and means the same."""

from __future__ import annotations

import array
import json
import os
import re
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.peers import need
from tests.runtime.bundles import Bundle, Runtime, Spec, cgroups_of
from tests.runtime.test_terminal import listen
from wherry.runtime import options


@pytest.fixture
def sleeping(runtime: Runtime, bundle: Bundle) -> str:
    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    return name


def test_every_command_and_flag_of_runc_is_known() -> None:
    def flags(*words: str) -> set[str]:
        page = subprocess.run([need("runc"), *words, "--help"], capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"^   --([\w-]+)", page, re.MULTILINE))

    page = subprocess.run([need("runc"), "--help"], capture_output=True, text=True, check=True).stdout
    commands = set(re.findall(r"^   ([a-z]+) ", page.partition("COMMANDS:")[2], re.MULTILINE)) - {"help"}
    assert commands - set(options.COMMANDS) == set()
    assert flags() - set(options.GLOBAL) == set()
    for command in commands:
        assert flags(command) - {*options.COMMANDS[command][0], "help"} == set(), command


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("state",), '"state" requires exactly 1 argument(s)'),
        (("state", "a", "b"), '"state" requires exactly 1 argument(s)'),
        (("list", "a"), '"list" requires exactly 0 argument(s)'),
        (("kill",), '"kill" requires a minimum of 1 argument(s)'),
        (("kill", "a", "9", "b"), '"kill" requires a maximum of 2 argument(s)'),
        (("ps", "-f", "odd", "a"), ""),
    ],
)
def test_arguments_are_counted(runtime: Runtime, words: tuple[str, ...], says: str) -> None:
    result = runtime(*words)
    assert result.returncode == 1
    assert says in result.stderr.replace("\\", "")


def test_lists(runtime: Runtime, sleeping: str) -> None:
    assert runtime.ok("list", "--quiet") == f"{sleeping}\n"
    head, row = runtime.ok("list").splitlines()
    assert head.split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    pid = str(runtime.state(sleeping)["pid"])
    assert row.split()[:3] == [sleeping, pid, "running"]
    assert row.split()[5] == "root"
    assert row.index(pid) == head.index("PID")
    assert runtime("list", "--format", "odd").returncode == 1


def test_ps_with_the_options_of_ps(runtime: Runtime, sleeping: str) -> None:
    pid = str(runtime.state(sleeping)["pid"])
    head, row = runtime.ok("ps", sleeping).splitlines()
    assert head.split()[1] == "PID"
    assert row.split()[1] == pid
    assert runtime.ok("ps", sleeping, "-o", "pid,comm").split() == ["PID", "COMMAND", pid, "sleep"]
    assert "PID" in runtime("ps", sleeping, "-o", "comm").stderr


def test_update_from_standard_input(runtime: Runtime, sleeping: str) -> None:
    words = [*runtime.words, "update", "--resources", "-", sleeping]
    wanted = '{"pids": {"limit": 33}, "cpu": {"quota": 30000, "period": 100000}}'
    subprocess.run(words, input=wanted, text=True, check=True, capture_output=True)
    found = {}
    for folder in cgroups_of(sleeping):
        for name in ("pids.max", "cpu.cfs_quota_us", "cpu.max"):
            if os.path.exists(f"{folder}/{name}"):
                found[name] = Path(folder, name).read_text().split()
    assert found["pids.max"] == ["33"]
    assert found.get("cpu.max", found.get("cpu.cfs_quota_us", []))[0] == "30000"


def test_exec_into_a_paused_container(runtime: Runtime, sleeping: str) -> None:
    """It waits there, frozen as all else, and goes on with them."""
    runtime.ok("pause", sleeping)
    words = [*runtime.words, "exec", "--ignore-paused", sleeping, "echo", "thawed"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as entering:
        assert entering.stdout
        assert not select.select([entering.stdout], [], [], 0.3)[0]
        runtime.ok("resume", sleeping)
        assert entering.stdout.read() == "thawed\n"
        assert entering.wait(20) == 0


def test_exec_with_another_capability(runtime: Runtime, bundle: Bundle) -> None:
    def poor(spec: Spec) -> None:
        spec["process"]["capabilities"] = {"bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"]}

    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(poor, args=["sleep", "100"])), name)
    shown = runtime.ok("exec", "--cap", "CAP_NET_RAW", name, "grep", "CapBnd", "/proc/self/status")
    assert int(shown.split()[1], 16) == 1 << 13 | 1 << 5


def test_exec_in_a_cgroup_below(runtime: Runtime, sleeping: str) -> None:
    for folder in cgroups_of(sleeping):
        os.makedirs(f"{folder}/below", exist_ok=True)
        for name in ("cpuset.cpus", "cpuset.mems"):  # v1's cpuset begins empty, and then nobody may enter
            if os.path.exists(f"{folder}/below/{name}"):
                Path(folder, "below", name).write_text(Path(folder, name).read_text())
    shown = runtime("exec", "--cgroup", "below", sleeping, "cat", "/proc/self/cgroup")
    assert shown.returncode == 0, shown.stderr
    assert "/below" in shown.stdout
    refused = runtime("exec", "--cgroup", "../..", sleeping, "true")
    assert refused.returncode != 0


def test_keep_and_pid_file(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    name = runtime.new_id()
    words = ("run", "--keep", "--pid-file", str(tmp_path / "pid"), "--bundle", str(bundle.write(args=["true"])), name)
    runtime.ok(*words)
    assert runtime.state(name)["status"] == "stopped"
    assert int((tmp_path / "pid").read_text()) > 1
    runtime.ok("delete", name)


@pytest.mark.parametrize("command", ["create", "exec"])
def test_a_pidfd_is_handed_over(ours: Runtime, bundle: Bundle, tmp_path: Path, command: str) -> None:
    """runc 1.2's: the socket gets a descriptor that names the process for good."""
    name = ours.new_id()
    folder = str(bundle.write(args=["sleep", "100"]))
    with listen(tmp_path / "p.sock") as server:
        server.settimeout(20)
        flag = ("--pidfd-socket", str(tmp_path / "p.sock"))
        if command == "create":
            ours.detached("create", *flag, "--bundle", folder, name)
            pid = ours.state(name)["pid"]
        else:
            ours.detached("run", "--detach", "--bundle", folder, name)
            ours.detached("exec", "--detach", *flag, "--pid-file", str(tmp_path / "pid"), name, "sleep", "50")
            pid = int((tmp_path / "pid").read_text())
        connection, _ = server.accept()
        with connection:
            _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4))
    (fd,) = array.array("i", ancillary[0][2][:4])
    assert f"Pid:\t{pid}\n" in Path(f"/proc/self/fdinfo/{fd}").read_text()
    os.close(fd)


def test_a_configuration_for_somebody_without_rights(runtime: Runtime, tmp_path: Path) -> None:
    runtime.ok("spec", "--rootless", "--bundle", str(tmp_path))
    spec = json.loads((tmp_path / "config.json").read_text())
    kinds = [item["type"] for item in spec["linux"]["namespaces"]]
    assert "user" in kinds
    assert "network" not in kinds
    assert spec["linux"]["uidMappings"] == [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
    assert "resources" not in spec["linux"]
    assert next(m for m in spec["mounts"] if m["destination"] == "/sys")["options"][0] == "rbind"
    again = runtime("spec", "--bundle", str(tmp_path))
    assert again.returncode == 1
    assert "exists" in again.stderr


def test_descriptors_of_socket_activation(runtime: Runtime, bundle: Bundle) -> None:
    """LISTEN_FDS of the caller are the program's, and it is told so."""
    folder = str(bundle.write(args=["sh", "-c", "echo $LISTEN_FDS $LISTEN_PID; cat <&3"]))
    reader, writer = os.pipe()
    os.write(writer, b"from outside")
    os.close(writer)
    script = "os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))"
    script = f"import os, sys; {script}; os.execvp(sys.argv[2], sys.argv[2:])"
    words = [sys.executable, "-c", script, str(reader), *runtime.words, "run", "--bundle", folder, runtime.new_id()]
    done = subprocess.run(
        words, pass_fds=(reader,), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    os.close(reader)
    assert done.stdout == "1 1\nfrom outside", done.stderr


def test_debug_says_more(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("--debug", "--log", str(log), "--log-format", "json", "run", "--bundle", str(bundle.write(args=["true"])))
    runtime.ok(*words, runtime.new_id())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["level"] for line in lines} == {"debug"}
    assert all(line["msg"] and line["time"] for line in lines)


def test_events_until_the_end(ours: Runtime, bundle: Bundle) -> None:
    """One reading an interval, and an end when the container ends (which runc 1.1 doesn't see on a hybrid host)."""
    runtime = ours
    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    words = [*runtime.words, "events", "--interval", "100ms", name]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as watching:
        assert watching.stdout
        for _ in range(3):
            event = json.loads(watching.stdout.readline())
            assert (event["type"], event["id"]) == ("stats", name)
        runtime.ok("kill", name, "KILL")
        assert watching.wait(20) == 0


SLOW = {"json", "re", "enum", "typing", "argparse", "signal", "subprocess", "functools", "collections", "contextlib"}


def test_the_usual_way_imports_little(bundle: Bundle, tmp_path: Path) -> None:
    """Each of these costs a tenth of what a container's whole life takes (docs/runtime.md, How fast)."""
    script = "import sys; from wherry.runtime import command; command._main(sys.argv[1:]); print(*sys.modules)"
    words = [sys.executable, "-I", "-c", script, "--root", str(tmp_path / "state"), "run"]
    done = subprocess.run(
        [*words, "--bundle", str(bundle.write(args=["true"])), "imports"], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) & SLOW == set()
