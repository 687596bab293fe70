"""`python -m wherry.cli.demo`: what Wherry does, shown on this host and checked step by step.

It runs the same commands that a person would type, against a daemon of its own in a folder of its own, and leaves
nothing behind. The exit code is 0 only when every step came out as it should.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from wherry.cli import host_image
from wherry.client.embedded import Embedded
from wherry.core.errors import WherryError

IMAGE = "demo.local/host:latest"
TOOLS = ("sh", "sleep", "cat", "ls", "id", "uname")
# says a number five times a second; stops when it is told to, with a code of its own
COUNTER = 'trap "exit 42" TERM; n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.2; done'
COUNTER_CODE = 42
RUN_CODE = 7
# seconds that anything here may take
PATIENCE = 20.0


class Failed(Exception):
    """A step didn't come out as it should."""


class Demo:
    """The steps, in order."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.daemon = Embedded(root=f"{folder}/root", state=f"{folder}/state")
        self.log = f"{folder}/counter.log"
        self.pid = 0

    def run(self) -> None:
        """All of it; raises Failed at the first step that goes wrong."""
        self.start_daemon("A daemon of its own")
        self.make_image()
        self.run_command()
        self.start_counter()
        self.kill_daemon()
        self.start_daemon("The daemon again, over the same folders")
        self.find_counter()
        self.stop_counter()

    # the steps

    def start_daemon(self, title: str) -> None:
        """Starts wherryd and shows that it answers."""
        say(title)
        before = time.monotonic()
        self.daemon.start()
        tell(f"wherryd serves after {time.monotonic() - before:.2f} s: pid {self.daemon.pid}, {self.daemon.address}")
        check(self.wherry("version").returncode == 0, "the daemon answers")

    def make_image(self) -> None:
        """Makes an image of this host's shell and imports it."""
        say("An image from this host: a shell, a few tools, and the libraries that their ELF headers name")
        path = f"{self.folder}/host.tar"
        files = host_image.write(path, IMAGE, TOOLS)
        for place in sorted(files):
            tell(f"/{place}")
        check(self.wherry("images", "import", path).returncode == 0, "the image was imported")
        listed = self.wherry("images", "ls", "-q", quiet=True)
        check(IMAGE in listed.stdout.split(), "the image is in the store")

    def run_command(self) -> None:
        """Runs a container to its end."""
        say("A container: its output and its exit code")
        script = f"echo hello from $(uname -s), pid $$, $(id -un); ls /; exit {RUN_CODE}"
        done = self.wherry("run", "--rm", "--name", "hello", IMAGE, "sh", "-c", script)
        tell(f"exit code {done.returncode}")
        check("hello from Linux, pid 1, root" in done.stdout, "its output came through")
        check(done.returncode == RUN_CODE, f"its exit code {RUN_CODE} was passed on")
        check(not self.wherry("containers", "ls", "-q", quiet=True).stdout.strip(), "nothing is left of it")

    def start_counter(self) -> None:
        """Starts a container that runs on."""
        say("A container in the background, that counts")
        done = self.wherry(
            "containers", "run", "-d", "--log-uri", f"file://{self.log}", IMAGE, "counter", "sh", "-c", COUNTER
        )
        check(done.returncode == 0, "it was started")
        wait_for(lambda: self.ticks() >= 3, "it counts")
        self.pid = self.task()[0]
        tell(f"{self.ticks()} ticks so far; its pid on this host is {self.pid}")

    def kill_daemon(self) -> None:
        """Kills the daemon as a crash would, and shows that the container doesn't notice."""
        say("wherryd is killed (SIGKILL) while the container runs")
        self.daemon.kill()
        refused = self.wherry("tasks", "ls")
        check(refused.returncode != 0, "nobody answers any more")
        before = self.ticks()
        wait_for(lambda: self.ticks() >= before + 4, "the container goes on counting")
        tell(f"{before} ticks when the daemon died, {self.ticks()} now, without it")
        check(alive(self.pid), f"its process {self.pid} is alive")

    def find_counter(self) -> None:
        """Shows that the new daemon has the old container."""
        say("The new daemon knows the container")
        self.wherry("tasks", "ls")
        pid, status = self.task()
        check((pid, status) == (self.pid, "RUNNING"), f"it runs, and still is pid {self.pid}")
        before = self.ticks()
        done = self.wherry("tasks", "exec", "counter", "sh", "-c", "echo inside: $(cat /proc/1/comm) is pid 1")
        check(done.returncode == 0 and "inside: sh is pid 1" in done.stdout, "a second process ran inside it")
        wait_for(lambda: self.ticks() > before, "it counts on")

    def stop_counter(self) -> None:
        """Stops the container and shows its exit code."""
        say("The end: a signal, the exit code that the container chose, nothing left")
        check(self.wherry("tasks", "kill", "-s", "TERM", "counter").returncode == 0, "the signal was sent")
        wait_for(lambda: self.task()[1] == "STOPPED", "it stopped")
        done = self.wherry("tasks", "rm", "counter")
        tell(f"exit code {done.returncode}, after {self.ticks()} ticks")
        check(done.returncode == COUNTER_CODE, f"its exit code is {COUNTER_CODE}")
        check(self.wherry("containers", "rm", "counter").returncode == 0, "the container was removed")
        check(not alive(self.pid), "its process is gone")

    # what the steps need

    def wherry(self, *args: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
        """Runs the command line, shown as a person would type it, with its output."""
        if not quiet:
            print(f"    $ wherry {shlex.join(args)}", flush=True)
        command = [sys.executable, "-m", "wherry.cli", "--address", self.daemon.address, *args]
        try:
            done = subprocess.run(
                command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"'wherry {' '.join(args)}' did not end within {PATIENCE:.0f} s") from None
        if not quiet:
            for line in [*done.stdout.splitlines(), *done.stderr.splitlines()]:
                print(f"      {line}", flush=True)
        return done

    def task(self) -> tuple[int, str]:
        """The counter's pid and status."""
        for line in self.wherry("tasks", "ls", quiet=True).stdout.splitlines():
            name, pid, status = line.split()
            if name == "counter":
                return int(pid), status
        raise Failed("the counter's task isn't listed")

    def ticks(self) -> int:
        """The last number that the counter said."""
        try:
            with open(self.log, encoding="utf-8") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return 0
        return int(lines[-1].split()[-1]) if lines else 0

    def clean_up(self) -> None:
        """Ends what still runs, whichever step was reached; then the daemon and its folder go."""
        if self.pid and alive(self.pid):
            with contextlib.suppress(WherryError, Failed):
                self.daemon.start()
                self.wherry("tasks", "rm", "-f", "counter", quiet=True)
                self.wherry("containers", "rm", "counter", quiet=True)
        self.daemon.stop()
        for place in mounts_below(self.folder):
            subprocess.run(["umount", "-l", place], check=False, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def say(text: str) -> None:
    """A step's title."""
    print(f"\n==> {text}", flush=True)


def tell(text: str) -> None:
    """A detail."""
    print(f"    {text}", flush=True)


def check(holds: bool, text: str) -> None:
    """Something that must be so; raises Failed where it isn't."""
    if not holds:
        raise Failed(text)
    print(f"    ok: {text}", flush=True)


def wait_for(condition: Callable[[], bool], text: str) -> None:
    """Something that must become so in `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(text)
        time.sleep(0.05)
    check(True, text)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie doesn't)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def mounts_below(folder: str) -> list[str]:
    """Places below a folder where something is mounted, the deepest first."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        places = [line.split()[4] for line in file]
    return sorted((place for place in places if place.startswith(f"{folder}/")), key=len, reverse=True)


def main() -> int:
    """The demo; its exit code."""
    if os.geteuid() != 0:
        print("the demo needs root: it makes containers", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = tempfile.mkdtemp(prefix="wherry-demo-")
    demo = Demo(folder)
    print(f"Wherry, shown on this host. Everything lies in {folder} and is removed at the end.", flush=True)
    start = time.monotonic()
    try:
        demo.run()
        demo.clean_up()
        check(not mounts_below(folder), "no mount, no process, no file is left")
    except (Failed, WherryError) as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
        with contextlib.suppress(OSError), open(demo.daemon.log, encoding="utf-8", errors="replace") as log:
            print("the daemon's last words:\n" + "".join(log.readlines()[-10:]), file=sys.stderr)
        return 1
    finally:
        demo.clean_up()
    print(f"\nEvery step came out as it should, in {time.monotonic() - start:.1f} s.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
