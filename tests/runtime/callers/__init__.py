"""Programs that drive an OCI runtime by its command line: what each can be asked for, in one vocabulary.

A caller is given a runtime's program; the containers that it makes run busybox. `tests/runtime/test_callers.py` asks
all of them for the same things.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from abc import ABC, abstractmethod
from pathlib import Path

from tests.peers import need

MEMORY, PIDS = 32 << 20, 25
_SECONDS = 60

Done = subprocess.CompletedProcess[str]


class Caller(ABC):
    """One way to run containers. `runtime` is the program that makes them; names are the caller's to keep apart."""

    def __init__(self, runtime: str, folder: Path) -> None:
        self.runtime = runtime
        self.folder = folder
        self.used: set[str] = set()

    @abstractmethod
    def run(self, name: str, script: str) -> Done:
        """Run `sh -c SCRIPT` to its end and remove it: output and exit code."""

    @abstractmethod
    def start(self, name: str, script: str) -> None:
        """Start it in the background, limited to MEMORY bytes and PIDS processes."""

    @abstractmethod
    def exec(self, name: str, script: str) -> Done:
        """`sh -c SCRIPT` in a running container."""

    @abstractmethod
    def exec_on_terminal(self, name: str, script: str) -> str:
        """The same with a terminal; what came out of it."""

    @abstractmethod
    def run_on_terminal(self, name: str, script: str) -> str:
        """`run` with a terminal; what came out of it."""

    @abstractmethod
    def pause(self, name: str) -> None: ...

    @abstractmethod
    def resume(self, name: str) -> None: ...

    @abstractmethod
    def status(self, name: str) -> str:
        """`running`, `paused`, `stopped` or, when it is gone, nothing."""

    @abstractmethod
    def stop(self, name: str) -> int:
        """End it with a signal that its program may catch; its exit code."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a stopped container."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Whatever is left of it goes; nothing left is fine."""

    def clean(self) -> None:
        for name in self.used:
            self.discard(name)
        self.used.clear()


def call(words: list[str], *, check: bool = True) -> Done:
    """Run a command; raises with what it said."""
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    if check and done.returncode:
        raise AssertionError(f"{words}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done


#: What a script on a terminal ends with: output of one that ends at once may be lost by who relays it.
WAIT = "; echo said; read line"


def call_on_terminal(words: list[str]) -> str:
    """Run a command on a terminal of 30 lines and 90 columns, and type a line when it has `said` something; its output
    with plain line ends."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (30, 90))
    script = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, *words]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    output = b""
    answered = False
    deadline = time.monotonic() + _SECONDS
    fcntl.fcntl(master, fcntl.F_SETFL, os.O_NONBLOCK)
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        if select.select([master], [], [], 0 if ended else 0.1)[0]:
            try:
                output += os.read(master, 65536)
                if b"said" in output and not answered:
                    answered = True
                    os.write(master, b"\n")
                continue
            except OSError:
                pass
        if ended:
            break
    process.kill()
    process.wait()
    os.close(slave)
    os.close(master)
    return output.decode(errors="replace").replace("\r\n", "\n")


def write_program(name: str, folder: Path) -> str:
    """A runtime as a program of its own: ours, from this tree; the others are on PATH."""
    if name != "wherry-runtime":
        return need(name)
    program = folder / name
    program.write_text(f"#!{sys.executable}\nfrom wherry.runtime.command import main\nmain()\n")
    program.chmod(0o755)
    return str(program)
