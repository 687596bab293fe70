"""Terminals: the console socket's protocol, sizes, exec, the foreground."""

from __future__ import annotations

import array
import fcntl
import os
import pty
import select
import socket
import struct
import subprocess
import termios
from pathlib import Path

from tests.runtime.bundles import Bundle, Runtime, Spec


def terminal(spec: Spec) -> None:
    spec["process"]["terminal"] = True
    spec["process"]["consoleSize"] = {"height": 33, "width": 77}


def receive(server: socket.socket) -> tuple[str, int]:
    """(name, master) from whoever connects, as containerd's shim does it."""
    server.settimeout(10)
    connection, _ = server.accept()
    with connection:
        data, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4))
    return data.decode(), array.array("i", ancillary[0][2][:4])[0]


def read_all(master: int) -> str:
    """All that comes until the other side is closed (EIO), or a few seconds of silence."""
    output = b""
    while select.select([master], [], [], 5)[0]:
        try:
            output += os.read(master, 4096)
        except OSError:
            break
    return output.decode()


def listen(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    return server


def test_create_sends_the_master_over_the_console_socket(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    name = runtime.new_id()
    script = "tty; stty size; ls -l /dev/console | cut -c1; ls /proc/$$/fd; true"
    folder = bundle.write(terminal, args=["sh", "-c", script])
    with listen(tmp_path / "c.sock") as server:
        path = str(tmp_path / "c.sock")
        runtime.detached("create", "--bundle", str(folder), "--console-socket", path, name)
        slave, master = receive(server)
    try:
        assert slave.startswith("/dev/")
        runtime.ok("start", name)
        lines = read_all(master).split()
        assert lines[:4] == ["/dev/pts/0", "33", "77", "c"]
        assert lines[4:] in (["0", "1", "2"], ["0", "1", "10", "2"])  # busybox keeps the terminal at 10
    finally:
        os.close(master)


def test_exec_with_a_terminal(runtime: Runtime, bundle: Bundle, tmp_path: Path) -> None:
    name = runtime.new_id()
    runtime.detached("run", "--detach", "--bundle", str(bundle.write(args=["sleep", "100"])), name)
    with listen(tmp_path / "c.sock") as server:
        words = ["exec", "--detach", "--tty", "--console-socket", str(tmp_path / "c.sock"), name]
        runtime.detached(*words, "sh", "-c", "tty; read line; echo got $line")
        _, master = receive(server)
    try:
        os.write(master, b"typed\n")
        words = read_all(master).split()  # the echo may come before the shell's own first word
        assert sorted(words) == ["/dev/pts/0", "got", "typed", "typed"]
    finally:
        os.close(master)


def test_run_in_the_foreground_of_a_terminal(runtime: Runtime, bundle: Bundle) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))

    def change(spec: Spec) -> None:
        spec["process"]["terminal"] = True

    # runc sets the size after the start, so that the first look may come too early
    script = "read line; echo got $line; until stty size | grep '[1-9]'; do sleep 0.05; done; exit 5"
    folder = bundle.write(change, args=["sh", "-c", script])
    words = [*runtime.words, "run", "--bundle", str(folder), runtime.new_id()]
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    try:
        os.write(master, b"typed\n")
        output = read_all(master)
        assert process.wait(10) == 5
    finally:
        process.kill()
        process.wait()
        os.close(master)
    assert "40 100" in output
    assert "got typed" in output


def test_a_detached_terminal_needs_a_socket(runtime: Runtime, bundle: Bundle) -> None:
    result = runtime("create", "--bundle", str(bundle.write(terminal, args=["true"])), runtime.new_id())
    assert result.returncode == 1
    assert "cannot allocate tty if runc will detach without setting console socket" in result.stderr
