"""The runtime as the shim uses it: by fork, from a process that lives on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.runtime.bundles import Bundle, make_spec

PRELUDE = """
import json, os, sys
from wherry.linux import process
from wherry.runtime import container, sealed
from wherry.runtime.errors import ContainerError
sealed.ensure_sealed()
container.preload()
process.set_child_subreaper()
root, bundle = sys.argv[1:3]
spec = json.load(open(bundle + "/config.json"))
def request(name, *args, **kwargs):
    changed = {**spec, "process": {**spec["process"], "args": list(args)}}
    return container.CreateRequest(root, name, bundle, spec=changed, **kwargs)
before = sorted(os.listdir("/proc/self/fd")), os.readlink("/proc/self/ns/pid_for_children"), os.getcwd()
modules = set(sys.modules)
"""

EPILOGUE = """
assert (sorted(os.listdir("/proc/self/fd")), os.readlink("/proc/self/ns/pid_for_children"), os.getcwd()) == before
assert set(sys.modules) == modules, set(sys.modules) - modules
"""


def drive(bundle: Bundle, body: str) -> list[str]:
    """Run `body` in a process of its own; it must leave that process as it was, and import nothing late."""
    spec = make_spec(bundle.rootfs)
    (bundle.path / "config.json").write_text(json.dumps(spec))
    words = [sys.executable, "-c", PRELUDE + body + EPILOGUE, str(bundle.path / "state"), str(bundle.path)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert os.listdir(bundle.path / "state") == []
    return result.stdout.splitlines()


def test_a_container_by_fork_is_the_callers_child(bundle: Bundle) -> None:
    body = """
reader, writer = os.pipe()
null = os.open("/dev/null", os.O_RDWR)
pid = container.forked(container.create, request("one", "sh", "-c", "echo out; exit 7", stdio=(null, writer, null)))
assert container.state(root, "one")["status"] == "created"
container.start(root, "one")
os.close(writer)
assert os.read(reader, 100) == b"out\\n"
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
container.forked(container.delete, root, "one")
os.close(reader)
os.close(null)
print("done")
"""
    assert drive(bundle, body) == ["done"]


def test_a_container_without_a_fork_and_exec(bundle: Bundle) -> None:
    body = """
pid = container.create(request("one", "sleep", "100"))
container.start(root, "one")
process_ = {**spec["process"], "args": ["sh", "-c", "exit 4"]}
second = container.exec_process(container.ExecRequest(root, "one", process_))
assert os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) == 4
assert container.pids(root, "one") == [pid]
container.pause(root, "one")
container.resume(root, "one")
container.update(root, "one", {"pids": {"limit": 50}})
assert container.cgroup(root, "one").stats().values["pids"]["limit"] == 50
container.kill(root, "one", 9)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
container.delete(root, "one")
"""
    assert drive(bundle, body) == []


def test_errors_come_back_and_leave_no_process(bundle: Bundle) -> None:
    body = """
for call in (lambda r: container.create(r), lambda r: container.forked(container.create, r)):
    for args, kwargs in ((("nosuch",), {}), (("sh",), {"console_socket": "/no/such"})):
        try:
            call(request("one", *args, **kwargs))
        except ContainerError as error:
            print(error.message)
    try:
        os.waitpid(-1, os.WNOHANG)
        raise SystemExit("a child was left")
    except ChildProcessError:
        pass
try:
    container.state(root, "one")
except ContainerError as error:
    print(error.kind)
"""
    missing = 'unable to start container process: exec: "nosuch": executable file not found in $PATH'
    socket = "cannot use console socket if runc will not detach or allocate tty"
    assert drive(bundle, body) == [missing, socket, missing, socket, "not_found"]


def test_many_containers_from_one_process(bundle: Bundle) -> None:
    body = """
for number in range(20):
    pid = container.create(request(f"many-{number}", "true"))
    container.start(root, f"many-{number}")
    assert os.waitpid(pid, 0)[1] == 0
    container.delete(root, f"many-{number}")
"""
    drive(bundle, body)


def test_a_user_namespace_by_fork(bundle: Bundle) -> None:
    body = """
mappings = [{"containerID": 0, "hostID": 100000, "size": 1000}]
spec["linux"]["namespaces"].append({"type": "user"})
spec["linux"].update(uidMappings=mappings, gidMappings=mappings)
pid = container.forked(container.create, request("user", "sh", "-c", "exit $(id -u)"))
container.start(root, "user")
assert os.waitpid(pid, 0) == (pid, 0)
container.delete(root, "user")
"""
    drive(bundle, body)


def test_a_pipe_that_nobody_reads_is_an_error_in_a_forked_child(bundle: Bundle) -> None:
    body = """
def write():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        os.write(writer, b"x")
    except BrokenPipeError:
        return "told"
print(container.forked(write))
os.mkdir(root)
"""
    assert drive(bundle, body) == ["told"]


def test_a_label_of_mounts_becomes_their_context(bundle: Bundle) -> None:
    """No host within reach has SELinux: what is shown is that the kernel is asked for it, and says what it says."""
    body = """
from wherry.runtime import kernel
kernel._selinux_enabled = lambda: True
spec["linux"]["mountLabel"] = "system_u:object_r:container_file_t:s0:c4,c5"
try:
    container.create(request("one", "true"))
except ContainerError as error:
    print(error.message.partition("(flags")[2])
"""
    (said,) = drive(bundle, body)
    assert 'context="system_u:object_r:container_file_t:s0:c4,c5"' in said
