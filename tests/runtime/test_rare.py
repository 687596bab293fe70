"""What few configurations have: each is seen from inside the container, and fails when it is left out."""

from __future__ import annotations

import array
import errno
import json
import os
import socket
import struct
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.bundles import Bundle, Runtime, Spec


def run(runtime: Runtime, bundle: Bundle, script: str, change: object) -> str:
    folder = bundle.write(change, args=["sh", "-c", script])  # type: ignore[arg-type]
    return runtime.ok("run", "--bundle", str(folder), runtime.new_id())


# -- idmapped mounts --------------------------------------------------------------------------------------------------


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file of user 1000 on a filesystem that knows idmapped mounts."""
    folder = tmp_path / "shared"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    (folder / "file").touch()
    os.chown(folder / "file", 1000, 1001)
    os.chmod(folder, 0o777)
    (folder / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder / "sub")], check=True)
    (folder / "sub" / "deep").touch()
    os.chown(folder / "sub" / "deep", 1000, 1001)
    yield folder
    subprocess.run(["umount", "-R", str(folder)], check=True)


def idmapped(source: Path, *options: str, **more: Any) -> Spec:
    return {"destination": "/tmp", "source": str(source), "type": "bind", "options": list(options), **more}


_MAPS = {
    "uidMappings": [{"containerID": 1000, "hostID": 5000, "size": 1}],
    "gidMappings": [{"containerID": 1001, "hostID": 6000, "size": 1}],
}


@pytest.mark.parametrize(("option", "deep"), [("idmap", "1000 1001"), ("ridmap", "5000 6000")])
def test_an_idmapped_mount_shows_other_owners(
    ours: Runtime, bundle: Bundle, shared: Path, option: str, deep: str
) -> None:
    def change(spec: Spec) -> None:
        spec["mounts"].append(idmapped(shared, "rbind", option, "ro", **_MAPS))

    script = "stat -c '%u %g' /tmp/file /tmp/sub/deep; touch /tmp/x 2>/dev/null || echo read-only"
    assert run(ours, bundle, script, change).splitlines() == ["5000 6000", deep, "read-only"]
    assert os.stat(shared / "file").st_uid == 1000


def test_an_idmapped_mount_in_a_user_namespace(ours: Runtime, bundle: Bundle, shared: Path) -> None:
    """The host's user 1000 is the container's 1000, though that is the host's 101000; what it writes is 1000's."""
    both = [{"containerID": 0, "hostID": 100000, "size": 65536}]

    def change(spec: Spec) -> None:
        spec["linux"]["namespaces"].append({"type": "user"})
        spec["linux"].update(uidMappings=both, gidMappings=both)
        spec["process"]["user"] = {"uid": 1000, "gid": 1001}
        spec["mounts"].append(idmapped(shared, "bind", "idmap"))

    script = "stat -c '%u %g' /tmp/file; touch /tmp/new; stat -c %u /proc/self/fd/0 >/dev/null; id -u"
    assert run(ours, bundle, script, change).split() == ["1000", "1001", "1000"]
    assert (os.stat(shared / "new").st_uid, os.stat(shared / "new").st_gid) == (1000, 1001)


def test_a_filesystem_without_idmapped_mounts_is_named(ours: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["mounts"].append(idmapped(Path("/proc"), "bind", "idmap", **_MAPS))

    name = ours.new_id()
    result = ours("run", "--bundle", str(bundle.write(change, args=["true"])), name)
    assert result.returncode == 1
    assert "can't map its ids" in result.stderr
    assert not (ours.root / name).exists()


# -- settings of the process ------------------------------------------------------------------------------------------


def test_scheduler_and_io_priority(ours: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["process"]["scheduler"] = {"policy": "SCHED_BATCH", "nice": 5, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}
        spec["process"]["ioPriority"] = {"class": "IOPRIO_CLASS_IDLE"}

    # field 41 of stat is the policy, 19 is nice; a child of the shell would have them reset
    script = "read line </proc/self/stat; set -- $line; echo ${41} ${19}; ionice -p $$"
    folder = bundle.write(change, args=["sh", "-c", script])
    lines = ours.ok("run", "--bundle", str(folder), ours.new_id()).splitlines()
    assert lines[0] == "3 5"
    assert "idle" in lines[1]


def test_memory_policy(ours: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["memoryPolicy"] = {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}

    assert "bind" in run(ours, bundle, "grep -m1 -o ' bind[^ ]*' /proc/self/numa_maps", change)


def test_the_cpus_of_exec(ours: Runtime, bundle: Bundle) -> None:
    """`final` holds for what exec runs and not for init."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("takes two CPUs")

    def change(spec: Spec) -> None:
        spec["process"]["execCPUAffinity"] = {"initial": "0", "final": "1"}

    name = ours.new_id()
    ours.detached("run", "--detach", "--bundle", str(bundle.write(change, args=["sleep", "100"])), name)
    shown = "grep Cpus_allowed_list /proc/self/status"
    assert ours.ok("exec", name, "sh", "-c", shown).split()[1] == "1"
    with open(f"/proc/{ours.state(name)['pid']}/status") as file:
        assert next(line.split()[1] for line in file if line.startswith("Cpus_allowed_list")) != "1"


def test_personality(ours: Runtime, bundle: Bundle) -> None:
    change = lambda spec: spec["linux"].update(personality={"domain": "LINUX32"})  # noqa: E731
    assert run(ours, bundle, "uname -m", change).strip() in ("i686", "armv8l")


def test_time_offsets(ours: Runtime, bundle: Bundle) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["namespaces"].append({"type": "time"})
        spec["linux"]["timeOffsets"] = {"boottime": {"secs": 10_000_000}, "monotonic": {"secs": 1, "nanosecs": 5}}

    assert float(run(ours, bundle, "cut -d' ' -f1 /proc/uptime", change)) > 10_000_000


# -- network devices --------------------------------------------------------------------------------------------------


@pytest.fixture
def device() -> Iterator[str]:
    name = f"wh{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "link", "add", name, "type", "dummy"], check=False, capture_output=True)
    if made.returncode:
        subprocess.run(["ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p"], check=True)
    subprocess.run(["ip", "addr", "add", "192.0.2.7/24", "dev", name], check=True)
    subprocess.run(["ip", "-6", "addr", "add", "2001:db8::7/64", "dev", name, "nodad"], check=False)
    yield name
    subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)
    subprocess.run(["ip", "link", "del", f"{name}p"], check=False, capture_output=True)


def test_a_network_device_moves_in(ours: Runtime, bundle: Bundle, device: str) -> None:
    change = lambda spec: spec["linux"].update(netDevices={device: {"name": "inside0"}})  # noqa: E731
    shown = run(ours, bundle, "ip addr show inside0", change)
    assert "192.0.2.7/24" in shown
    assert "UP" in shown.splitlines()[0]


def test_a_network_device_that_is_not_there(ours: Runtime, bundle: Bundle) -> None:
    change = lambda spec: spec["linux"].update(netDevices={"nosuch0": {}})  # noqa: E731
    name = ours.new_id()
    result = ours("run", "--bundle", str(bundle.write(change, args=["true"])), name)
    assert result.returncode == 1
    assert 'linux.netDevices["nosuch0"]: can\'t be moved: no such device' in result.stderr.replace('\\"', '"')
    assert not (ours.root / name).exists()


# -- seccomp's listener -----------------------------------------------------------------------------------------------

_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV and _SEND


class Agent(threading.Thread):
    """Takes the listener, and answers every question with EXDEV."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(str(path))
        self._sock.listen()
        self.state: dict[str, Any] = {}
        self.start()

    def run(self) -> None:
        import fcntl  # noqa: PLC0415

        connection, _ = self._sock.accept()
        message, ancillary, _, _ = connection.recvmsg(65536, socket.CMSG_SPACE(16))
        self.state = json.loads(message)
        (fd,) = array.array("i", ancillary[0][2][:4])
        question = bytearray(80)
        fcntl.ioctl(fd, _RECEIVE, question)
        (cookie,) = struct.unpack_from("=Q", question)
        fcntl.ioctl(fd, _SEND, struct.pack("=QqiI", cookie, 0, -errno.EXDEV, 0))
        os.close(fd)
        connection.close()
        self._sock.close()


@pytest.mark.parametrize("no_new_privileges", [True, False])
def test_an_agent_answers_for_the_kernel(
    runtime: Runtime, bundle: Bundle, tmp_path: Path, no_new_privileges: bool
) -> None:
    agent = Agent(tmp_path / "agent")

    def change(spec: Spec) -> None:
        spec["process"]["noNewPrivileges"] = no_new_privileges
        spec["annotations"] = {"who": "tests"}
        spec["linux"]["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": str(tmp_path / "agent"),
            "listenerMetadata": "some words",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}],
        }

    name = runtime.new_id()
    folder = bundle.write(change, args=["sh", "-c", "mkdir /x 2>&1; true"])
    assert "nvalid cross-device link" in runtime.ok("run", "--bundle", str(folder), name)
    agent.join(5)
    assert agent.state["fds"] == ["seccompFd"]
    assert agent.state["metadata"] == "some words"
    assert agent.state["pid"] > 1
    assert agent.state["state"]["id"] == name
    assert agent.state["state"]["annotations"]["who"] == "tests"
    assert agent.state["state"]["status"] == "creating"


def test_an_agent_that_is_not_there(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": str(tmp_path / "agent"),
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}],
        }

    name = runtime.new_id()
    assert runtime("run", "--bundle", str(bundle.write(change, args=["true"])), name).returncode == 1
    assert runtime("state", name).returncode == 1


# -- systemd's notice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detached", [False, True])
def test_a_service_says_that_it_is_ready(ours: Runtime, bundle: Bundle, tmp_path: Path, detached: bool) -> None:
    """busybox can't send datagrams to a socket file: the message comes from here, through the container's root.

    runc 1.1 takes none from there, and hangs when the container ends without one."""
    runtime = ours
    host = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    host.bind(str(tmp_path / "host"))
    host.settimeout(10)
    environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "host")}
    name = runtime.new_id()

    def change(spec: Spec) -> None:
        spec["root"]["readonly"] = False

    folder = bundle.write(change, args=["sh", "-c", "echo $NOTIFY_SOCKET; exec sleep 3"])
    words = [*runtime.words, "run", *(["--detach"] if detached else []), "--bundle", str(folder), name]
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stdin=subprocess.DEVNULL)
        try:
            inside = _wait_for_socket(runtime, name)
            sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            sender.connect(inside)
            sender.send(b"STATUS=almost\nREADY=1\n")
            sender.close()
            assert host.recv(4096).strip() == b"READY=1"
            assert host.recv(4096).strip() == f"MAINPID={runtime.state(name)['pid']}".encode()
        finally:
            runtime("delete", "--force", name)
            process.wait(10)
            host.close()
    assert (tmp_path / "out").read_text().strip() == "/run/notify/notify.sock"


def test_a_service_that_ends_without_a_word(ours: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    host = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    host.bind(str(tmp_path / "host"))
    environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "host")}
    folder = bundle.write(lambda spec: spec["root"].update(readonly=False), args=["sh", "-c", "exit 3"])
    name = ours.new_id()
    assert ours("run", "--bundle", str(folder), name, env=environment).returncode == 3
    assert not (ours.root / name).exists()
    host.close()


def _wait_for_socket(runtime: Runtime, name: str) -> str:
    import time  # noqa: PLC0415

    for _ in range(200):
        try:
            path = f"/proc/{runtime.state(name)['pid']}/root/run/notify/notify.sock"
            if os.path.exists(path):
                return path
        except AssertionError:
            pass
        time.sleep(0.02)
    raise AssertionError("nobody listens in the container")
