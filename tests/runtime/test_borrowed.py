"""An init that is built without a fork: what it says, what it leaves, and what happens when its maker dies."""

from __future__ import annotations

import platform

import pytest

from tests.runtime.bundles import Bundle
from tests.runtime.test_library import drive

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has the machine code")

HEAD = """
import signal, time
from wherry.runtime import borrowed, create, init, make
made = []
spawn = borrowed.spawn
def counted(plan, recorded):
    made.append(plan.state.id)
    return spawn(plan, recorded)
borrowed.spawn = counted
def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run(bundle: Bundle, body: str) -> list[str]:
    return drive(bundle, HEAD + body)


def test_it_waits_and_becomes_the_program(bundle: Bundle) -> None:
    body = """
reader, writer = os.pipe()
null = os.open("/dev/null", os.O_RDWR)
script = "echo $$ $A; ls /proc/self/fd; cat /proc/self/comm; exit 7"
pid = container.create(request("one", "sh", "-c", script, stdio=(null, writer, null)))
assert made == ["one"]
assert os.readlink(f"/proc/{pid}/exe").startswith("/memfd:wherry-init")
assert container.state(root, "one")["status"] == "created"
container.start(root, "one")
os.close(writer)
said = b""
while part := os.read(reader, 1000):
    said += part
assert said.split()[:4] == [b"1", b"0", b"1", b"2"], said
assert said.split()[-1] == b"cat", said
assert wait(pid) == 7
container.delete(root, "one")
os.close(reader)
os.close(null)
print("done")
"""
    assert run(bundle, body) == ["done"]


def test_a_program_that_can_not_be_executed(bundle: Bundle) -> None:
    body = """
for args, text in ((["nosuch"], 'exec: "nosuch": executable file not found in $PATH'), (["/etc/passwd"], "denied")):
    try:
        container.create(request("one", *args))
    except ContainerError as error:
        assert error.message.startswith("unable to start container process: exec"), error.message
        assert text in error.message, error.message
    else:
        raise SystemExit("created")
spec["mounts"].append({"destination": "/x", "type": "bind", "source": bundle + "/odd", "options": ["bind"]})
with open(bundle + "/odd", "w") as file:
    file.write("#!/not/there\\n")
os.chmod(bundle + "/odd", 0o755)
pid = container.create(request("two", "/x"))
try:
    container.start(root, "two")
except ContainerError as error:
    print(error.message)
assert wait(pid) == 255
container.delete(root, "two")
assert made == ["one", "one", "two"]
"""
    assert run(bundle, body) == ["exec /x: no such file or directory"]


def test_what_fails_while_it_is_built(bundle: Bundle) -> None:
    body = """
spec["mounts"].append({"destination": "/x", "type": "nosuchfs", "source": "none"})
try:
    container.create(request("one", "true"))
except ContainerError as error:
    print(error.message.split(" to rootfs")[0])
spec["mounts"].pop()
spec["process"]["cwd"] = "/proc/self/fd/7"
try:
    container.create(request("one", "true"))
except ContainerError as error:
    assert "cwd" in error.message, error.message
assert made == ["one", "one"]
"""
    said = 'unable to start container process: error during container init: error mounting "none"'
    assert run(bundle, body) == [said]


def test_its_maker_is_killed_before_it_is_recorded(bundle: Bundle) -> None:
    body = """
def die(plan, pid):
    print(pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
record, make.record = make.record, die
if os.fork() == 0:
    container.create(request("one", "sleep", "100"))
    os._exit(0)
assert os.waitpid(-1, 0)[1] == signal.SIGKILL
make.record = record
assert os.waitstatus_to_exitcode(os.wait()[1]) == 1  # init, a subreaper's child now
container.delete(root, "one", force=True)
"""
    assert len(run(bundle, body)) == 1


def test_it_is_killed_while_it_is_built(bundle: Bundle) -> None:
    body = """
def die(plan, channel):
    os._exit(128 + signal.SIGKILL)
build, init.build = init.build, die
if os.fork() == 0:
    container.create(request("one", "sleep", "100"))
    os._exit(0)
statuses = {os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)}
assert statuses == {97, 128 + signal.SIGKILL}, statuses
init.build = build
container.delete(root, "one", force=True)
pid = container.create(request("one", "sleep", "100"))
container.start(root, "one")
container.kill(root, "one", 9)
assert wait(pid) == -9
container.delete(root, "one")
print("done")
"""
    assert run(bundle, body) == ["done"]


@pytest.mark.parametrize(
    "change",
    [
        'spec["hooks"] = {"startContainer": [{"path": "/bin/true"}]}',
        'spec["linux"]["namespaces"] = [{"type": "mount"}]',
        'spec["linux"]["resources"]["memory"] = {"limit": 16 << 20}',
        (
            'spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ERRNO", '
            '"syscalls": [{"names": ["execve"], "action": "SCMP_ACT_ALLOW"}]}'
        ),
        (
            'spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", '
            '"syscalls": [{"names": ["execveat"], "action": "SCMP_ACT_KILL"}]}'
        ),
    ],
)
def test_uncommon_containers_are_forked(bundle: Bundle, change: str) -> None:
    body = """
plan = create.Plan(type("S", (), {"id": "one"})(), spec, spec["process"])
plan.open_namespaces()
assert borrowed.serves(plan)
CHANGE
plan = create.Plan(type("S", (), {"id": "one"})(), spec, spec["process"])
plan.open_namespaces()
assert not borrowed.serves(plan)
os.mkdir(root)
""".replace("CHANGE", change)
    run(bundle, body)
