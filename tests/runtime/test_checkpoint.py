"""checkpoint and restore, by criu. Debian's criu 3.17 can't read the vdso of kernels from 6.2 on: then only what is
refused, and that criu's words are passed on. In the VM of `make test-v2` (6.1) all of it runs, with runc and crun."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.peers import need
from tests.runtime.bundles import Bundle, Runtime, Spec, cgroups_of, mounts_below
from tests.runtime.test_terminal import listen, receive, terminal

_SECONDS = 20
_COUNT = "i=0; while :; do i=$((i+1)); echo $i >/tmp/now; mv /tmp/now /tmp/count; sleep 0.05; done"


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split(".")[:2])


@pytest.fixture
def criu() -> str:
    if _kernel() >= (6, 2):
        pytest.skip("Debian's criu 3.17 fails on this kernel's vdso; `make test-v2` has one that it can read")
    return need("criu")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Counter:
    """A container that counts up in a file of its root, seen from outside."""

    def __init__(self, runtime: Runtime, bundle: Bundle, folder: Path) -> None:
        self.runtime = runtime
        self.bundle = bundle
        self.name = runtime.new_id()
        self.images = str(folder / "images")
        self.work = str(folder / "work")
        self.log = Path(self.work, "restore.log")
        self._file = Path(bundle.rootfs, "tmp", "count")

    def write(self, *changes: Callable[[Spec], None]) -> None:
        def change(spec: Spec) -> None:
            spec["root"]["readonly"] = False
            for one in changes:
                one(spec)

        self.bundle.write(change, args=["sh", "-c", _COUNT])

    def start(self, *changes: Callable[[Spec], None]) -> None:
        self.write(*changes)
        self.runtime.detached("run", "--detach", "--bundle", str(self.bundle.path), self.name)
        wait_until(self._file.exists)
        self.goes_on()

    def count(self) -> int:
        return int(self._file.read_text())

    def goes_on(self) -> None:
        before = self.count()
        wait_until(lambda: self.count() > before)

    def checkpoint(self, *flags: str) -> None:
        self.runtime.ok("checkpoint", "--image-path", self.images, "--work-path", self.work, *flags, self.name)

    def restore(self, *flags: str) -> None:
        words = ("restore", "--detach", "--image-path", self.images, "--work-path", self.work)
        try:
            self.runtime.detached(*words, "--bundle", str(self.bundle.path), *flags, self.name)
        except AssertionError as error:
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            raise AssertionError("\n".join(line for line in lines if "Error" in line)) from error


@pytest.fixture
def counter(criu: str, runtime: Runtime, own_bundle: Bundle, tmp_path: Path) -> Counter:
    return Counter(runtime, own_bundle, tmp_path)


def test_a_container_goes_on_where_it_was(counter: Counter, runtime: Runtime, tmp_path: Path) -> None:
    def limited(spec: Spec) -> None:
        spec["linux"]["resources"]["pids"] = {"limit": 77}

    counter.start(limited)
    counter.checkpoint()
    assert runtime("state", counter.name).returncode == 1
    assert cgroups_of(counter.name) == []
    there = counter.count()
    counter.restore("--pid-file", str(tmp_path / "pid"))
    counter.goes_on()
    assert counter.count() > there
    state = runtime.state(counter.name)
    assert state["status"] == "running"
    assert (tmp_path / "pid").read_text() == str(state["pid"])
    assert [Path(folder, "pids.max").read_text() for folder in cgroups_of(counter.name)] == ["77\n"]
    assert runtime.ok("exec", counter.name, "sh", "-c", "echo $(cat /proc/1/comm) in") == "sh in\n"
    assert mounts_below(tmp_path) == []
    runtime.ok("kill", counter.name, "KILL")
    wait_until(lambda: bool(runtime.state(counter.name)["status"] == "stopped"))
    runtime.ok("delete", counter.name)
    assert cgroups_of(counter.name) == []


def test_it_is_restored_more_than_once(counter: Counter, runtime: Runtime) -> None:
    counter.start()
    counter.checkpoint()
    for _ in range(2):
        counter.restore()
        counter.goes_on()
        runtime.ok("delete", "--force", counter.name)


def test_leave_running(counter: Counter, runtime: Runtime) -> None:
    counter.start()
    pid = runtime.state(counter.name)["pid"]
    counter.checkpoint("--leave-running")
    assert runtime.state(counter.name)["pid"] == pid
    counter.goes_on()
    runtime.ok("delete", "--force", counter.name)
    counter.restore()
    counter.goes_on()


def test_memory_first(counter: Counter, runtime: Runtime, tmp_path: Path) -> None:
    """--pre-dump leaves it running; the images that follow name the first ones as their parent."""
    counter.start()
    runtime.ok("checkpoint", "--pre-dump", "--image-path", str(tmp_path / "first"), counter.name)
    counter.goes_on()
    assert runtime.state(counter.name)["status"] == "running"
    counter.checkpoint("--parent-path", "../first")
    assert os.readlink(f"{counter.images}/parent") == "../first"
    counter.restore()
    counter.goes_on()


@contextlib.contextmanager
def beside(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A helper of criu's that runs meanwhile and ends by itself."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
        output, _ = process.communicate(timeout=_SECONDS)
        assert process.returncode == 0, output
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with open("/proc/net/tcp") as file:
        return any(
            line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in file.readlines()[1:]
        )


def test_pages_to_a_page_server(counter: Counter, criu: str) -> None:
    """--page-server: the memory goes to another criu, over TCP, the rest to the image folder as always."""
    counter.start()
    port = free_port()
    os.makedirs(counter.images)
    server = (criu, "page-server", "--address", "127.0.0.1", "--port", str(port), "--images-dir", counter.images)
    with beside(*server):
        wait_until(lambda: listens(port))
        counter.checkpoint("--page-server", f"127.0.0.1:{port}")
    counter.restore()
    counter.goes_on()


def test_pages_when_they_are_asked_for(counter: Counter, runtime: Runtime, criu: str) -> None:
    """--lazy-pages: the one that is written serves its memory, the one that is restored takes it as it needs it."""
    counter.start()
    there, port = counter.count(), free_port()
    ready, tell = os.pipe()
    words = ["checkpoint", "--image-path", counter.images, "--work-path", counter.work, "--lazy-pages"]
    words += ["--page-server", f"127.0.0.1:{port}", "--status-fd", str(tell), counter.name]
    writer = subprocess.Popen([*runtime.words, *words], pass_fds=[tell], stdin=subprocess.DEVNULL)
    os.close(tell)
    try:
        with open(ready, "rb") as status:
            assert status.read(1) == b"\0"
        server = (criu, "lazy-pages", "--page-server", "--address", "127.0.0.1", "--port", str(port))
        with beside(*server, "--images-dir", counter.images, "--work-dir", counter.work):
            wait_until(lambda: os.path.exists(f"{counter.work}/lazy-pages.socket"))
            again = runtime.new_id()
            words = ["restore", "--detach", "--lazy-pages", "--image-path", counter.images, "--work-path", counter.work]
            runtime.detached(*words, "--bundle", str(counter.bundle.path), again)
            counter.goes_on()
            assert counter.count() > there
            assert writer.wait(_SECONDS) == 0
    finally:
        writer.kill()
        writer.wait()


def test_mounts_are_the_ones_of_the_host(counter: Counter, runtime: Runtime, tmp_path: Path) -> None:
    """Bind mounts lead to the bundle's sources again, one within another; tmpfs and masked paths are as they were."""
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").write_text("file")
    (tmp_path / "inside" / "deep").write_text("deep")

    def mounted(spec: Spec) -> None:
        spec["linux"]["maskedPaths"] += ["/etc/passwd"]
        spec["mounts"] += [
            {"destination": "/outer", "type": "bind", "source": str(tmp_path / "outer"), "options": ["rbind"]},
            {"destination": "/outer/inner", "type": "bind", "source": str(tmp_path / "inside"), "options": ["bind"]},
            {"destination": "/some/file", "type": "bind", "source": str(tmp_path / "file"), "options": ["bind", "ro"]},
        ]

    counter.start(mounted)
    runtime.ok("exec", counter.name, "sh", "-c", "echo kept >/dev/shm/file")
    counter.checkpoint()
    (tmp_path / "file").write_text("changed")
    counter.restore()
    script = "cat /outer/inner/deep; echo; cat /some/file; echo; cat /dev/shm/file /etc/passwd; echo x >/some/file"
    said = runtime("exec", counter.name, "sh", "-c", script)
    assert said.stdout.split() == ["deep", "changed", "kept"]
    assert "Read-only" in said.stderr


def test_a_joined_network_namespace_is_joined_again(counter: Counter, runtime: Runtime, tmp_path: Path) -> None:
    name = f"wherry-criu-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:

        def joined(spec: Spec) -> None:
            for item in spec["linux"]["namespaces"]:
                if item["type"] == "network":
                    item["path"] = f"/run/netns/{name}"

        counter.start(joined)
        counter.checkpoint()
        counter.restore()
        counter.goes_on()
        pid = runtime.state(counter.name)["pid"]
        assert os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(f"/run/netns/{name}").st_ino
    finally:
        runtime("delete", "--force", counter.name)
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_a_terminal_is_handed_over_again(criu: str, runtime: Runtime, own_bundle: Bundle, tmp_path: Path) -> None:
    name = runtime.new_id()
    script = "while read line; do echo got $line; done"
    folder = str(own_bundle.write(terminal, args=["sh", "-c", script]))
    images = str(tmp_path / "images")
    with listen(tmp_path / "c.sock") as server:
        words = ("--bundle", folder, "--console-socket", str(tmp_path / "c.sock"))
        runtime.detached("run", "--detach", *words, name)
        _, master = receive(server)
        assert "got one" in _say(master, "one")
        runtime.ok("checkpoint", "--image-path", images, name)
        os.close(master)
        runtime.detached("restore", "--detach", "--image-path", images, *words, name)
        _, master = receive(server)
    assert "got two" in _say(master, "two")
    os.close(master)


def _say(master: int, word: str) -> str:
    os.write(master, f"{word}\n".encode())
    output = ""
    while f"got {word}" not in output and select.select([master], [], [], _SECONDS)[0]:
        output += os.read(master, 4096).decode()
    return output


def test_restore_in_the_foreground(criu: str, runtime: Runtime, own_bundle: Bundle, tmp_path: Path) -> None:
    """Standard streams that were pipes are the new caller's; signals go in, the exit code comes out."""
    name = runtime.new_id()
    script = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    folder = str(own_bundle.write(args=["sh", "-c", script]))
    images = str(tmp_path / "images")
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([*runtime.words, "run", "--bundle", folder, name], **pipes)  # type: ignore[call-overload]
    with first:
        assert first.stdout.readline() == "ready\n"
        runtime.ok("checkpoint", "--image-path", images, name)
        assert first.wait(_SECONDS) == 137
    words = [*runtime.words, "restore", "--image-path", images, "--bundle", folder, name]
    second = subprocess.Popen(words, **pipes)  # type: ignore[call-overload]
    with second:
        wait_until(lambda: runtime("state", name).returncode == 0 and runtime.state(name)["status"] == "running")
        wait_until(lambda: _catches(second.pid, signal.SIGTERM))
        second.send_signal(signal.SIGTERM)
        assert second.stdout.readline() == "bye\n"
        assert second.wait(_SECONDS) == 5
    assert runtime("state", name).returncode == 1


def _catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


def test_a_user_namespace(criu: str, ours: Runtime, open_bundle: Bundle) -> None:
    """runc's fails here: criu, who is nobody in the host's eyes by then, can't reach what it reads."""
    counter = Counter(ours, open_bundle, open_bundle.path)
    both = [{"containerID": 0, "hostID": 100000, "size": 65536}]

    def mapped(spec: Spec) -> None:
        spec["linux"]["namespaces"].append({"type": "user"})
        spec["linux"].update(uidMappings=both, gidMappings=both)

    for folder, _, files in os.walk(counter.bundle.rootfs):
        for name in (folder, *(os.path.join(folder, file) for file in files)):
            os.chown(name, 100000, 100000, follow_symlinks=False)
    counter.start(mapped)
    counter.checkpoint()
    for path in (Path(counter.images), *Path(counter.images).iterdir()):
        os.chown(path, 100000, 100000)  # criu reads its images when it is in the user namespace already
    counter.restore()
    counter.goes_on()
    assert ours.ok("exec", counter.name, "id", "-u") == "0\n"
    assert os.stat(f"/proc/{ours.state(counter.name)['pid']}").st_uid == 100000


# -- what fails -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_fails_leaves_it_running(
    criu: str, ours: Runtime, own_bundle: Bundle, tmp_path: Path
) -> None:
    """Its standard error is a file of the host's, which criu can't find again: it says so, and we pass it on."""
    name = ours.new_id()
    folder = str(own_bundle.write(args=["sleep", "100"]))
    with open(tmp_path / "outside", "w") as file:
        words = [*ours.words, "run", "--detach", "--bundle", folder, name]
        subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, check=True)
    failed = ours("checkpoint", "--image-path", str(tmp_path / "images"), name)
    assert failed.returncode == 1
    assert "criu failed: type" in failed.stderr
    assert "log file: " in failed.stderr
    assert "Error (criu/" in failed.stderr
    assert ours.state(name)["status"] == "running"
    ours.ok("exec", name, "true")


def test_a_restore_that_fails_leaves_nothing(counter: Counter, runtime: Runtime, tmp_path: Path) -> None:
    counter.start()
    counter.checkpoint()
    Path(counter.images, "core-1.img").unlink()
    failed = runtime(
        *("restore", "--image-path", counter.images, "--bundle", str(counter.bundle.path), "--detach", counter.name)
    )
    assert failed.returncode == 1
    assert "criu failed" in failed.stderr
    assert runtime("state", counter.name).returncode == 1
    assert cgroups_of(counter.name) == []
    assert mounts_below(tmp_path) == []


def test_only_a_running_container_is_written(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    name = runtime.new_id()
    runtime.detached("create", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    refused = runtime("checkpoint", "--image-path", str(tmp_path / "images"), name)
    assert refused.returncode == 1
    assert "cannot be checkpointed in created state" in refused.stderr


_FAKE = """#!{python}
import os, socket, sys
from wherry.runtime import criu_messages as m
sock = socket.socket(fileno=int(sys.argv[2]))
request = m.decode(sock.recv(65536), m.REQUEST)
answer = {{"type": request["type"], "success": True}}
if request["type"] == m.VERSION:
    answer["version"] = {{"major_number": 3, "minor_number": 17}}
elif {dies}:
    os._exit(3)
else:
    folder = f"/proc/{{os.getppid()}}/fd/{{request['opts']['images_dir_fd']}}"
    with open(f"{{folder}}/{{request['opts']['log_file']}}", "w") as log:
        print("(00.1) all is well", "(00.2) Error (criu/vdso.c:1): no vdso", sep=chr(10), file=log)
    answer.update(success=False, cr_errno=3, cr_errmsg="so it is")
sock.send(m.encode(answer, m.RESPONSE))
"""


@pytest.mark.parametrize("command", ["checkpoint", "restore"])
@pytest.mark.parametrize("dies", [False, True])
def test_criu_says_why(ours: Runtime, own_bundle: Bundle, tmp_path: Path, command: str, dies: bool) -> None:
    """With a criu that refuses, or that dies: its words come through, and the container is as it was."""
    program = tmp_path / "criu"
    program.write_text(_FAKE.format(python=sys.executable, dies=dies))
    program.chmod(0o755)
    name = ours.new_id()
    folder = str(own_bundle.write(args=["sleep", "100"]))
    images = tmp_path / "images"
    images.mkdir()
    (images / "descriptors.json").write_text('["/dev/null", "/dev/null", "/dev/null"]')
    if command == "checkpoint":
        ours.detached("run", "--detach", "--bundle", folder, name)
    more = ("--bundle", folder) if command == "restore" else ()
    failed = ours("--criu", str(program), command, "--image-path", str(images), *more, name)
    assert failed.returncode == 1
    if dies:
        assert "criu failed: it ended without an answer (exit status 3)" in failed.stderr
    else:
        kind = "DUMP" if command == "checkpoint" else "RESTORE"
        assert f"criu failed: type {kind} errno 3: so it is" in failed.stderr
        assert "Error (criu/vdso.c:1): no vdso" in failed.stderr
        assert "all is well" not in failed.stderr
    if command == "checkpoint":
        assert ours.state(name)["status"] == "running"
    else:
        assert not (ours.root / name).exists()
        assert cgroups_of(name) == []


def test_without_criu(ours: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    name = ours.new_id()
    ours.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    for words in (("checkpoint", name), ("restore", "--bundle", str(bundle.path), ours.new_id())):
        failed = ours("--criu", "nosuch", *words, cwd=tmp_path)
        assert failed.returncode == 1
        assert 'criu version check failed: exec: "nosuch": executable file not found in $PATH' in failed.stderr.replace(
            "\\", ""
        )
    assert ours.state(name)["status"] == "running"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--manage-cgroups-mode", "odd"), "Invalid manage cgroups mode"),
        (("--empty-ns", "pid"), 'namespace "pid" is not supported'),
        (("--page-server", "nowhere"), "Use --page-server ADDRESS:PORT to specify page server"),
        (("--parent-path", "/abs"), "--parent-path must be relative"),
        (("--lazy-pages", "--status-fd", "77"), "invalid --status-fd argument 77"),
    ],
)
def test_flags_that_cannot_be_meant(
    ours: Runtime, bundle: Bundle, tmp_path: Path, flags: tuple[str], says: str
) -> None:
    fake = tmp_path / "criu"
    fake.write_text(_FAKE.format(python=sys.executable, dies=True))
    fake.chmod(0o755)
    name = ours.new_id()
    ours.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    failed = ours("--criu", str(fake), "checkpoint", "--image-path", str(tmp_path / "images"), *flags, name)
    assert failed.returncode == 1
    assert says in failed.stderr.replace("\\", "")
    assert ours.state(name)["status"] == "running"
