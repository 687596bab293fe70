"""A user's containers hold what podman's hold, and nobody else reaches them. The tests are another user, and root."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import bpf, busybox, users
from tests.peers import need
from tests.users import User

# of proc_pid_status(5): what a process may do
HELD = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")


@pytest.fixture
def barrow() -> Iterator[User]:
    user = users.of_host("barrow")
    try:
        user("images", "import", user.archive)
        yield user
    finally:
        user.close()


@pytest.fixture
def nobody() -> Iterator[User]:
    """Another user, with granted ids."""
    with users.granted("nobody", 400_000, 65_536):
        user = User("nobody", 65534)
        try:
            yield user
        finally:
            user.close()


@pytest.fixture
def podman(barrow: User) -> Iterator[list[str]]:
    for name in ("podman", "runc"):
        need(name)
    words = ["podman", "--root", f"{barrow.folder}/home/podman", "--runroot", f"{barrow.run}/podman"]
    words += ["--runtime", "runc", "--cgroup-manager", "cgroupfs"]
    barrow.command(*words, "load", "-q", "-i", barrow.archive)
    yield words
    barrow.command(*words, "rm", "-f", "-a", "-t", "0", check=False)
    barrow.command(*words, "unshare", "rm", "-rf", f"{barrow.folder}/home/podman")


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def both(user: User, podman: list[str]) -> tuple[int, int]:
    """A container of ours and one of podman's, by default: their first processes."""
    user("run", "-d", "--name", "one", "--net", "none", busybox.NAME, "sleep", "1000")
    user.command(*podman, "run", "-d", "--name", "one", "--net", "none", busybox.NAME, "sleep", "1000")
    format_ = ("inspect", "-f", "{{.State.Pid}}", "one")
    return int(user(*format_).stdout), int(user.command(*podman, *format_).stdout)


def test_the_same_rights_as_podmans(barrow: User, podman: list[str]) -> None:
    ours, theirs = (status(pid) for pid in both(barrow, podman))
    assert {key: ours[key] for key in HELD} == {key: theirs[key] for key in HELD}
    assert ours["Uid"].split() == theirs["Uid"].split() == [str(barrow.uid)] * 4


def test_no_system_call_that_podman_refuses(barrow: User, podman: list[str]) -> None:
    """The filters as the kernel has them, run for every number: what podman's lets pass, and no more."""
    ours, theirs = both(barrow, podman)
    mine, other = bpf.filters(ours), bpf.filters(theirs)
    passed = {name for name, number in bpf.SYSTEM_CALLS.items() if bpf.allows(mine, number)}
    wider = {name for name in passed if not bpf.allows(other, bpf.SYSTEM_CALLS[name])}
    assert not wider
    assert {"read", "execve", "clone", "openat"} <= passed
    for name in ("kexec_load", "init_module", "bpf", "add_key", "keyctl", "userfaultfd", "perf_event_open", "reboot"):
        assert name not in passed, name


def test_the_host_is_out_of_reach(barrow: User) -> None:
    """As root of a container: of the host's devices, modules, kernel settings and processes there is nothing."""
    secret = barrow.folder / "home/secret"
    secret.write_text("mine")
    secret.chmod(0o600)
    os.chown(secret, barrow.uid, barrow.uid)
    run = ("run", "--rm", "--net", "none", busybox.NAME, "sh", "-c")
    for script in (
        "mknod /d b 8 0",
        "mount -t tmpfs none /mnt",
        "mount -o remount,rw /sys",
        "echo 1 >/proc/sys/kernel/panic",
        "echo c >/proc/sysrq-trigger",
        "cat /proc/kcore",
        f"cat {secret}",
        f"cat /proc/1/root{secret}",
        "kill -0 $(( $$ + 1000 ))",
    ):
        assert barrow(*run, script, check=False).returncode != 0, script
    # what is the user's is the container's root's; what is root's on the host is nobody's
    shown = barrow("run", "--rm", "--net", "none", "-v", "/etc/shadow:/s:ro", busybox.NAME, "cat", "/s", check=False)
    assert shown.returncode != 0
    assert not shown.stdout


def test_nothing_of_ours_is_setuid() -> None:
    packages = users.install().parent
    for folder, _, names in os.walk(packages):
        for name in names:
            path = os.path.join(folder, name)
            info = os.lstat(path)
            if stat.S_ISLNK(info.st_mode):
                continue
            assert not info.st_mode & (stat.S_ISUID | stat.S_ISGID), path
            with_rights = [key for key in os.listxattr(path) if key == "security.capability"]
            assert not with_rights, path


def test_another_user_reaches_nothing(barrow: User, nobody: User) -> None:
    """Daemon, snapshots, state, logs, the namespaces and the memory of what runs there."""
    secret = "echo a secret line; echo a secret >/file; sleep 1000"
    barrow("run", "-d", "--name", "mine", "--net", "none", busybox.NAME, "sh", "-c", secret)
    pid = barrow("inspect", "-f", "{{.State.Pid}}", "mine").stdout.strip()
    home = barrow.folder / "home"
    home.chmod(0o755)  # as /home/USER often is
    folders = [barrow.run / "wherry", home / ".local/share/wherry", home / ".local/state/wherry"]
    for folder in folders:
        assert folder.is_dir(), folder
        for command in (["ls", str(folder)], ["cat", str(folder / "lock")], ["touch", str(folder / "x")]):
            assert nobody.command(*command, check=False).returncode != 0, command
    for path in (f"/proc/{pid}/root/file", f"/proc/{pid}/mem", f"/proc/{pid}/environ"):
        assert nobody.command("head", "-c", "1", path, check=False).returncode != 0, path
    enter = ["nsenter", "-t", pid, "-U", "-m", "--preserve-credentials", "true"]
    assert shutil.which("nsenter")
    assert nobody.command(*enter, check=False).returncode != 0
    assert nobody("-a", barrow.address, "ps", check=False).returncode == 1
    # nor through what nobody is root of
    inside = ["unshare", "ls", str(folders[1])]
    assert nobody(*inside, check=False).returncode != 0


def test_every_socket_is_the_users_alone(barrow: User) -> None:
    barrow("run", "-d", "--name", "one", "--net", "none", busybox.NAME, "sleep", "1000")
    found = 0
    for folder, _, names in os.walk(barrow.run / "wherry"):
        for name in names:
            info = os.lstat(os.path.join(folder, name))
            if stat.S_ISSOCK(info.st_mode):
                found += 1
                assert info.st_uid == barrow.uid
                assert not info.st_mode & 0o077, name
    assert found >= 3  # gRPC, ttrpc, a shim
    # nor are there sockets without a file, which everybody may call
    mine = {os.stat(f"/proc/{pid}/fd/{fd}").st_ino for pid in barrow.processes() for fd in _fds(pid)}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        assert not (len(fields) > 7 and fields[7].startswith("@") and int(fields[6]) in mine), line


def _fds(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return [name for name in os.listdir(f"/proc/{pid}/fd") if os.path.exists(f"/proc/{pid}/fd/{name}")]
    return []


def test_a_stranger_who_connects_is_refused(barrow: User) -> None:
    """The sockets' folder lets nobody through; one who got through would be told so by the kernel."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(barrow.address)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        assert struct.unpack("3i", credentials)[1] == barrow.uid
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "test", "-r", barrow.address], check=False
    )
    assert done.returncode != 0


def test_the_main_job_as_nobody(nobody: User) -> None:
    """The user nobody, with ids that were granted to it."""
    nobody("images", "import", nobody.archive)
    run = ("run", "--rm", "--net", "none", busybox.NAME)
    assert nobody(*run, "id", "-u").stdout == "0\n"
    lines = nobody(*run, "cat", "/proc/self/uid_map").stdout.split()
    assert lines == ["0", "65534", "1", "1", "400000", "65536"]
    nobody("run", "-d", "--name", "long", "--net", "none", "-u", "1000", busybox.NAME, "sleep", "1000")
    assert nobody("exec", "-u", "0", "long", "id", "-u").stdout == "0\n"
    pid = int(nobody("inspect", "-f", "{{.State.Pid}}", "long").stdout)
    assert status(pid)["Uid"].split()[0] == str(400_000 + 999)
    # shown as the container sees it
    assert nobody("top", "long").stdout.splitlines()[1].split()[0] == "1000"
    nobody("rm", "-f", "long")


def test_privileged_is_what_podman_calls_so(barrow: User, podman: list[str]) -> None:
    """All capabilities, over what is the user's: the devices and the settings of the host stay as they are."""
    run = ("run", "--rm", "--privileged", "--net", "none", busybox.NAME)
    held = ("grep", "^Cap", "/proc/self/status")
    ours, theirs = barrow(*run, *held).stdout, barrow.command(*podman, *run, *held).stdout
    assert ours == theirs
    assert "CapEff:\t0000000000000000" not in ours
    for script in ("mknod /d b 8 0", "echo 1 >/proc/sys/kernel/panic", "chroot /proc/1/root true; cat /etc/shadow"):
        assert barrow(*run, "sh", "-c", script, check=False).returncode != 0, script
