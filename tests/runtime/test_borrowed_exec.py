"""A process that is added to a container without a fork: what it is, what it may see, and what is left of its maker."""

from __future__ import annotations

import platform

import pytest

from tests.runtime.bundles import Bundle
from tests.runtime.test_library import drive

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has the machine code")

HEAD = """
import signal, time
from wherry.runtime import borrowed_exec, execute, identity
made = []
spawn = borrowed_exec.spawn
def counted(plan, *rest):
    made.append(plan.process["args"])
    return spawn(plan, *rest)
borrowed_exec.spawn = counted
def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def run(*args, change=None, **kwargs):
    process_ = {**spec["process"], "args": list(args), **(change or {})}
    return container.exec_process(container.ExecRequest(root, "box", process_, **kwargs))
box = container.create(request("box", "sleep", "1000"))
container.start(root, "box")
"""
TAIL = """
container.kill(root, "box", 9)
assert wait(box) == -9
container.delete(root, "box")
"""


def run(bundle: Bundle, body: str) -> list[str]:
    return drive(bundle, HEAD + body + TAIL)


def test_it_is_what_was_asked_for(bundle: Bundle) -> None:
    body = """
reader, writer = os.pipe()
null = os.open("/dev/null", os.O_RDWR)
script = "id -u; pwd; echo $A; ulimit -n; grep -E 'CapBnd|NoNewPrivs' /proc/self/status; ls /proc/self/fd"
limits = [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 77}]
none = {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]}
change = {"user": {"uid": 5, "gid": 6}, "cwd": "/tmp", "env": ["PATH=/bin", "A=b"]}
change.update(rlimits=limits, capabilities=none, noNewPrivileges=True)
file = bundle + "/pid"
words = ["sh", "-c", script + "; cat /proc/self/stat"]
pid = run(*words, change=change, stdio=(null, writer, writer), pid_file=file)
assert int(open(file).read()) == pid and pid in container.pids(root, "box") + [pid]
os.close(writer)
said = b""
while part := os.read(reader, 1000):
    said += part
assert wait(pid) == 0
lines = said.decode().splitlines()
print(*lines[:6])
assert lines[6:10] == ["0", "1", "2", "3"], lines  # the last one is the folder that ls reads
fields = lines[10].rpartition(")")[2].split()
assert fields[1] != fields[2] == fields[3] != "0", fields  # a session and a group of its own
os.close(reader), os.close(null)
assert len(made) == 1
"""
    assert run(bundle, body) == ["5 /tmp b 77 CapBnd:\t0000000000000020 NoNewPrivs:\t1"]


def test_it_is_in_the_containers_namespaces_and_cgroups(bundle: Bundle) -> None:
    body = """
pid = run("sleep", "1000")
for kind in ("pid", "mnt", "ipc", "uts", "net"):
    assert os.readlink(f"/proc/{pid}/ns/{kind}") == os.readlink(f"/proc/{box}/ns/{kind}"), kind
assert open(f"/proc/{pid}/cgroup").read() == open(f"/proc/{box}/cgroup").read()
assert sorted(container.pids(root, "box")) == sorted([box, pid])
os.kill(pid, 9)
assert wait(pid) == -9
assert made == [["sleep", "1000"]]
"""
    run(bundle, body)


def test_what_can_not_be_executed_is_told_and_gone(bundle: Bundle) -> None:
    body = """
with open(bundle + "/rootfs/odd" if os.path.isdir(bundle + "/rootfs") else spec["root"]["path"] + "/odd", "w") as file:
    file.write("#!/not/there\\n")
    os.fchmod(file.fileno(), 0o755)
try:
    for words in (["nosuch"], ["/nosuch"], ["/odd"], ["/etc"]):
        try:
            run(*words, pid_file=bundle + "/pid")
        except ContainerError as error:
            print(error.message.removeprefix("unable to start container process: "))
        assert not os.path.exists(bundle + "/pid")
        assert container.pids(root, "box") == [box]
finally:
    os.unlink(file.name)
assert len(made) == 4
"""
    assert run(bundle, body) == [
        'exec: "nosuch": executable file not found in $PATH',
        'exec: "/nosuch": stat /nosuch: no such file or directory',
        "exec /odd: no such file or directory",
        'exec: "/etc": permission denied',
    ]


def test_nobody_looks_into_the_memory_that_it_borrows(bundle: Bundle) -> None:
    """It is not dumpable from before its birth until it executes its program, so that nobody without the host's
    CAP_SYS_PTRACE may trace it; and afterwards its maker is as it was."""
    body = """
seen = []
become = identity.become
def watched(*args, **kwargs):
    seen.append(os.stat(f"/proc/self/mem").st_uid)
    done = become(*args, **kwargs)
    from wherry.linux import syscalls
    seen.append(syscalls.prctl(3))  # PR_GET_DUMPABLE
    return done
from wherry.runtime import init
init.identity.become = watched
from wherry.linux import syscalls
isolate = init.isolate
def born(plan, channel):
    seen.append(syscalls.prctl(3))
    isolate(plan, channel)
init.isolate = born
assert wait(run("true", change={"user": {"uid": 5, "gid": 5}})) == 0
init.isolate, init.identity.become = isolate, become
assert syscalls.prctl(3) == 1
print(seen)
"""
    assert run(bundle, body) == ["[0, 0, 0]"]


def test_its_maker_outlives_nothing_and_leaves_nothing(bundle: Bundle) -> None:
    """Killed while it has the memory: the maker ends, the container doesn't mind."""
    body = """
def die(plan, label):
    os.kill(os.getpid(), signal.SIGKILL)
settle_in, execute.settle_in = execute.settle_in, die
child = os.fork()
if child == 0:
    run("true")
    os._exit(0)
statuses = {os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)}
assert statuses == {97, -9}, statuses
execute.settle_in = settle_in
assert wait(run("sh", "-c", "exit 3")) == 3
assert container.pids(root, "box") == [box]
"""
    run(bundle, body)


@pytest.mark.parametrize(
    "change",
    [
        'plan.kinds["user"] = ""',
        'plan.kinds["time"] = ""',
        'plan.process = {**plan.process, "scheduler": {"policy": "SCHED_BATCH"}}',
        'plan.linux = {"resources": {"memory": {"limit": 16 << 20}}}',
        'plan.linux = {"seccomp": {"defaultAction": "SCMP_ACT_NOTIFY"}}',
        'plan.linux = {"seccomp": {"syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}}',
    ],
)
def test_uncommon_ones_are_forked(bundle: Bundle, change: str) -> None:
    body = """
from wherry.runtime.plan import Plan
plan = Plan(type("S", (), {"id": "one"})(), spec, spec["process"])
assert borrowed_exec.serves(plan)
CHANGE
assert not borrowed_exec.serves(plan)
""".replace("CHANGE", change)
    run(bundle, body)
