"""A process that enters a container by system calls alone: what it is, what it may see, and what it can't do to who
made it. Each test ends with its maker as it was: descriptors, namespaces, no child, no module."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.runtime.bundles import Bundle
from tests.runtime.test_library import drive
from wherry.linux.cgroups.layout import Hierarchy
from wherry.runtime import entering

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has the machine code")

HEAD = """
import signal, time
from wherry.linux import syscalls
from wherry.runtime import entering
null = os.open("/dev/null", os.O_RDWR)
def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def asked(*args, change=None, stdio=None, **kwargs):
    process_ = {**spec["process"], "args": list(args), **(change or {})}
    return container.ExecRequest(root, "box", process_, stdio=stdio or (null, null, null), **kwargs)
def begin(*args, **kwargs):
    begun = container.entering(asked(*args, **kwargs))
    assert begun is not None
    assert syscalls.prctl(3) == 0  # PR_GET_DUMPABLE
    return begun
def end(begun):
    pid = begun.end(wait(begun.helper))
    if begun.lost:
        wait(begun.lost)
    begun.close()
    return pid
def until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
def no_children():
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
box = container.create(request("box", "sleep", "1000"))
container.start(root, "box")
maps = open("/proc/self/maps").read().count("\\n")
"""
TAIL = """
assert syscalls.prctl(3) == 1
container.kill(root, "box", 9)
assert wait(box) == -9
container.delete(root, "box")
assert no_children()
os.close(null)
"""
# a test that fails must not stop the others, whose containers have the same cgroups
CLEANING = """
except BaseException:
    container.kill(root, "box", 9, all=True)
    while not no_children():  # those of its pid namespace before its init
        time.sleep(0.01)
    container.delete(root, "box", force=True)
    raise
"""
# a process that stays in the middle of entering, in all namespaces and with all rights, until its input has a byte
WAITING = """
steps = entering.steps
become = steps.become
def slowly(made, *rest):
    made.add(0, 0, made.data(bytes(8)), 1)  # read(2)
    become(made, *rest)
steps.become = slowly
gate, opened = os.pipe()
def entered(begun):
    until(lambda: begun._calls.pid)
    pid = begun._calls.pid
    until(lambda: os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink(f"/proc/{box}/ns/mnt"))
    return pid
"""
CLOSED = "os.close(gate), os.close(opened)\n"


def _confines() -> bool:
    enabled = Path("/sys/module/apparmor/parameters/enabled")
    return enabled.exists() and enabled.read_text().startswith("Y")


def run(bundle: Bundle, body: str) -> list[str]:
    return drive(bundle, HEAD + "try:\n" + textwrap.indent(body, "    ") + CLEANING + TAIL)


def test_it_is_what_was_asked_for(bundle: Bundle) -> None:
    body = """
reader, writer = os.pipe()
script = "id -u; id -G; pwd; echo $A; ulimit -n; umask; cat /proc/self/oom_score_adj; echo $HOME"
script += "; grep -E 'CapBnd|CapEff|CapAmb|NoNewPrivs|SigIgn|SigBlk|SigCgt' /proc/self/status; ls /proc/self/fd"
limits = [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 77}]
none = {kind: ["CAP_KILL"] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")}
user = {"uid": 5, "gid": 6, "additionalGids": [7, 8], "umask": 0o77}
change = {"user": user, "cwd": "/tmp", "env": ["PATH=/nowhere:/bin", "A=b"], "oomScoreAdj": 77}
change.update(rlimits=limits, capabilities=none, noNewPrivileges=True)
file = bundle + "/pid"
words = ["sh", "-c", script + "; cat /proc/self/stat"]
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
pid = end(begin(*words, change=change, stdio=(null, writer, writer), pid_file=file))
assert int(open(file).read()) == pid
os.close(writer)
said = b""
while part := os.read(reader, 1000):
    said += part
assert wait(pid) == 0, said
lines = said.decode().splitlines()
print(*lines[:8], *[line.replace("\\t", "") for line in lines[8:15]])
assert lines[15:19] == ["0", "1", "2", "3"], lines  # the last one is the folder that ls reads
fields = lines[19].rpartition(")")[2].split()
assert fields[1] != fields[2] == fields[3] != "0", fields  # a session and a group of its own
assert os.fstat(reader).st_uid == 5
os.close(reader)
assert open("/proc/self/oom_score_adj").read() == before_score
assert open("/proc/self/maps").read().count("\\n") <= maps + 1
"""
    nothing = "0" * 16
    rights = f"CapEff:{32:016x} CapBnd:{32:016x} CapAmb:{32:016x}"
    assert run(bundle, 'before_score = open("/proc/self/oom_score_adj").read()\n' + body) == [
        f"5 6 7 8 /tmp b 77 0077 77 / SigBlk:{nothing} SigIgn:{nothing} SigCgt:{nothing} {rights} NoNewPrivs:1"
    ]


def test_it_is_in_the_containers_namespaces_and_cgroups(bundle: Bundle) -> None:
    body = """
pid = end(begin("sleep", "1000"))
for kind in ("pid", "mnt", "ipc", "uts", "net", "cgroup"):
    assert os.readlink(f"/proc/{pid}/ns/{kind}") == os.readlink(f"/proc/{box}/ns/{kind}"), kind
assert open(f"/proc/{pid}/cgroup").read() == open(f"/proc/{box}/cgroup").read()
assert sorted(container.pids(root, "box")) == sorted([box, pid])
assert os.readlink(f"/proc/{pid}/root") == os.readlink(f"/proc/{box}/root")
os.kill(pid, 9)
assert wait(pid) == -9
"""
    run(bundle, body)


def test_a_filter_is_in_force(bundle: Bundle) -> None:
    body = """
from wherry.runtime import seccomp
profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]}
path = f"{root}/box/config.json"
kept = open(path).read()
known = json.loads(kept)
known["linux"]["seccomp"] = profile
with open(path, "w") as file:
    file.write(json.dumps(known))
assert container.entering(asked("true")) is None  # nobody has compiled it yet
seccomp.compile_filter(profile, "")
modules |= set(sys.modules)
entering._known.clear()
words = "sh", "-c", "! mkdir /dev/shm/x && grep -q 'Seccomp:.2' /proc/self/status && pwd | grep -q tmp"
for none in (True, False):
    change = {"noNewPrivileges": none, "cwd": "/tmp", "user": {"uid": 5, "gid": 5}}
    assert wait(end(begin(*words, change=change))) == 0
assert end(begin("true", change={"noNewPrivileges": False, "cwd": "/proc/self/cwd"})) == 0
with open(path, "w") as file:
    file.write(kept)
assert wait(end(begin("sh", "-c", "mkdir /dev/shm/x && grep -q 'Seccomp:.0' /proc/self/status"))) == 0
"""
    run(bundle, body)


def test_what_can_not_be_executed_is_told_and_gone(bundle: Bundle) -> None:
    """By the runtime's other way, in its words."""
    body = """
place = bundle + "/rootfs/odd" if os.path.isdir(bundle + "/rootfs") else spec["root"]["path"] + "/odd"
with open(place, "w") as file:
    file.write("#!/not/there\\n")
    os.fchmod(file.fileno(), 0o755)
try:
    for words in (["nosuch"], ["/nosuch"], ["/odd"], ["/etc"]):
        try:
            container.exec_quickly(asked(*words, pid_file=bundle + "/pid"))
        except ContainerError as error:
            print(error.message.removeprefix("unable to start container process: "))
        assert not os.path.exists(bundle + "/pid")
        assert container.pids(root, "box") == [box]
    assert end(begin("/odd")) == 0
finally:
    os.unlink(place)
try:
    container.exec_quickly(asked("true", change={"cwd": "/nosuch"}))
except ContainerError as error:
    print(error.message.removeprefix("unable to start container process: "))
"""
    assert run(bundle, body) == [
        'exec: "nosuch": executable file not found in $PATH',
        'exec: "/nosuch": stat /nosuch: no such file or directory',
        "exec /odd: no such file or directory",
        'exec: "/etc": permission denied',
        'chdir to cwd ("/nosuch") set in config.json failed: no such file or directory',
    ]


def test_nobody_looks_into_the_memory_that_it_borrows(bundle: Bundle) -> None:
    """A process of the container, root and with CAP_DAC_OVERRIDE, tries to look into one that is in the middle of
    entering (all namespaces joined, all rights left), whose memory is its maker's."""
    body = (
        WAITING
        + """
begun = begin("true", stdio=(gate, null, null))
pid = entered(begun)
inside = [line for line in open(f"/proc/{pid}/status") if line.startswith("NSpid")][0].split()[-1]
reader, writer = os.pipe()
steps.become = become
script = f"for f in maps mem environ auxv exe cwd root fd/0; do ls -l /proc/{inside}/$f; cat /proc/{inside}/$f; done"
rights = {kind: ["CAP_DAC_OVERRIDE", "CAP_KILL"] for kind in ("bounding", "effective", "permitted")}
looker = end(begin("sh", "-c", script, change={"capabilities": rights}, stdio=(null, writer, null)))
os.close(writer)
said = b""
while part := os.read(reader, 1000):
    said += part
assert wait(looker) != 0
lines = [line for line in said.decode().splitlines() if "->" in line or not line.startswith(("l", "-", "d"))]
assert not lines, lines  # nothing was read, no link shown
assert syscalls.prctl(3) == 0  # the first one is still there
os.write(opened, b"x")
assert wait(end(begun)) == 0
os.close(reader)
"""
        + CLOSED
    )
    run(bundle, body)


def test_its_maker_goes_on_while_it_hangs_and_when_it_is_killed(bundle: Bundle) -> None:
    """In the middle of entering, from within the container, as anybody there with CAP_KILL can."""
    body = (
        WAITING
        + """
secret = os.open("/etc/passwd", os.O_RDONLY)
begun = begin("true", stdio=(gate, null, null))
pid = entered(begun)
for one, count in ((begun.helper, 4), (pid, 3)):
    held = {os.stat(f"/proc/{one}/fd/{fd}").st_ino for fd in os.listdir(f"/proc/{one}/fd")}
    assert os.fstat(opened).st_ino in held and len(held) <= count, held  # the gate, null, the init, and a v2 cgroup
    assert os.fstat(secret).st_ino not in held
os.close(secret)
inside = [line for line in open(f"/proc/{pid}/status") if line.startswith("NSpid")][0].split()[-1]
rights = {kind: ["CAP_KILL"] for kind in ("bounding", "effective", "permitted")}
steps.become = become
assert wait(end(begin("kill", "-9", inside, change={"capabilities": rights}))) == 0
assert end(begun) == pid and wait(pid) == -9
steps.become = slowly
begun = begin("true", stdio=(gate, null, null))
pid = entered(begun)
os.kill(begun.helper, 9)
try:
    end(begun)
except ContainerError as error:
    assert error.message.endswith("the runtime was killed"), error.message
    assert begun.lost == pid and wait(pid) == -9
    begun.close()
assert container.pids(root, "box") == [box]
steps.become = become
assert wait(end(begin("sh", "-c", "exit 3"))) == 3
"""
        + CLOSED
    )
    run(bundle, body)


def test_a_frozen_container_holds_nobody_up(bundle: Bundle) -> None:
    body = """
container.pause(root, "box")
assert container.entering(asked("true")) is None
begun = begin("sh", "-c", "exit 5", ignore_paused=True)
assert os.waitpid(begun.helper, os.WNOHANG) == (0, 0)
until(lambda: begun._calls.pid)
container.resume(root, "box")
assert wait(end(begun)) == 5
"""
    run(bundle, body)


def test_nothing_leads_out_of_the_root(own_bundle: Bundle) -> None:
    """A folder behind a descriptor, links to the host's files, a fifo instead of a list of users: whatever an image or
    a process has put there, this way ends in the root or refuses, and waits for nothing."""
    body = """
place = bundle + "/rootfs" if os.path.isdir(bundle + "/rootfs") else spec["root"]["path"]
for change in ({"cwd": "/proc/self/fd/3"}, {"cwd": "/proc/1/root"}, {"cwd": "/proc/self/cwd"}):
    assert end(begin("true", change=change)) == 0
host = bundle + "/config.json"
os.chmod(host, 0o755)
os.symlink(host, place + "/link")
os.symlink("../" * 20 + host[1:], place + "/climb")
for name in ("/link", "/climb", "/proc/self/exe", "/dev/null", "./bin/true"):
    assert container.entering(asked(name)) is None, name
def environment():
    reader, writer = os.pipe()
    pid = end(begin("sh", "-c", "echo $HOME", stdio=(null, writer, null), change={"env": ["PATH=/bin"]}))
    os.close(writer)
    said = os.read(reader, 100).decode().strip()
    os.close(reader)
    assert wait(pid) == 0
    return said
users = place + "/etc/passwd"
os.unlink(users)
assert environment() == "/"
with open(users, "w") as file:
    file.write("a:x:1:1::/a:\\nroot:x:0:0:root:/there\\x0c:/bin/sh\\n")
assert environment() == "/there"
with open(users, "w") as file:
    file.write("root:x:0:0\\nroot:x:0:0::\\n")
assert environment() == "/"
os.unlink(users)
with open(bundle + "/users", "w") as file:
    file.write("root:x:0:0:root:/host:/bin/sh\\n")
os.symlink(bundle + "/users", users)
assert environment() == "/"
os.unlink(users)
os.mkfifo(users)
assert container.entering(asked("true", change={"env": ["PATH=/bin"]})) is None
"""
    run(own_bundle, body)


@pytest.mark.skipif(not shutil.which("apparmor_parser") or not _confines(), reason="this kernel has no AppArmor")
def test_a_label(bundle: Bundle) -> None:
    profile = f"profile wherry-entering-{os.getpid()} flags=(attach_disconnected) {{ file, capability, signal, }}\n"
    name = profile.split()[1]
    subprocess.run(["apparmor_parser", "-r"], input=profile, text=True, check=True)
    try:
        body = f"""
words = "sh", "-c", "grep -q '^{name} ' /proc/self/attr/current"
assert wait(end(begin(*words, change={{"apparmorProfile": "{name}", "noNewPrivileges": False}}))) == 0
assert wait(end(begin(*words))) == 1
"""
        run(bundle, body)
    finally:
        subprocess.run(["apparmor_parser", "-R"], input=profile, text=True, check=True)


def test_a_label_that_is_not_known(bundle: Bundle) -> None:
    body = """
change = {"apparmorProfile": "wherry-nosuch"}
begun = container.entering(asked("true", change=change))
assert begun is None or end(begun) == 0
if begun is not None:
    try:
        container.exec_quickly(asked("true", change=change))
    except ContainerError as error:
        assert "unable to apply apparmor profile wherry-nosuch" in error.message, error.message
        print("refused")
"""
    assert run(bundle, body) in (["refused"], [])


@pytest.mark.parametrize(
    "change",
    [
        {"terminal": True},
        {"scheduler": {"policy": "SCHED_BATCH"}},
        {"env": ["PATH=bin:/bin"]},
        {"cwd": "relative"},
        {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1, "hard": 1 << 70}]},
        {"env": ["PATH=/bin", *("A=" + "b" * 1000 for _ in range(300))]},
        {"env": ["PATH=/bin", "A=\0"]},
    ],
)
def test_uncommon_ones_are_left_to_others(bundle: Bundle, change: dict[str, object]) -> None:
    (bundle.path / "change").write_text(repr(change))
    run(bundle, "assert container.entering(asked('true', change=eval(open(bundle + '/change').read()))) is None\n")


def test_who_would_be_killed_with_the_container_stays_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """memory.oom.group of a cgroup or of one around it: who shares memory with one that is killed is killed, too."""
    inner = tmp_path / "pod" / "box"
    inner.mkdir(parents=True)
    layout = type("Layout", (), {"v2": Hierarchy(str(tmp_path), "/")})
    monkeypatch.setattr(entering, "host", lambda: layout)
    assert not entering._dies_together(str(inner))
    assert not entering._dies_together("")
    (inner / "memory.oom.group").write_text("0\n")
    assert not entering._dies_together(str(inner))
    (tmp_path / "pod" / "memory.oom.group").write_text("1\n")
    assert entering._dies_together(str(inner))


def test_other_containers_are_left_to_others(bundle: Bundle) -> None:
    body = """
from wherry.runtime import state
path = f"{root}/box/state.json"
kept = open(path).read()
for kind in ("user", "time"):
    known = json.loads(kept)
    known["namespaces"][kind] = "/x"
    open(path, "w").write(json.dumps(known))
    assert container.entering(asked("true")) is None
open(path, "w").write(kept)
assert container.entering(asked("true", preserve_fds=1)) is None
assert container.entering(asked("true", stdio=(2, 2, 2))) is None
assert container.entering(asked("true", sub_cgroups=["x"])) is None
os.setresuid(5, 5, 0)
assert container.entering(asked("true")) is None
os.setresuid(0, 0, 0)
syscalls.prctl(4, 1)
"""
    run(bundle, body)
