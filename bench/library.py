"""The bundled runtime as the shim uses it, by (or without) forks of a loaded process, beside crun's command line.

crun refuses hybrid cgroups, so all of it runs in a mount namespace where cgroup v2 isn't mounted:
`python -m bench.library FOLDER` is run there by `measured`. It becomes what the fork server becomes, forks what a shim
is, and that one measures both by turns, on the same bundle: as a shim does it, each process waited for.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import measure
from bench.daemons import program
from wherry.runtime import default_spec

RUNS = 60
WARM_UPS = 5
_UNIFIED = "/sys/fs/cgroup/unified"
_ALONE = f'if mountpoint -q {_UNIFIED}; then umount {_UNIFIED}; fi; exec "$@"'


def measured(folder: Path) -> dict[str, tuple[float, float]]:
    """Milliseconds of the library and of crun, medians: `life` (create, start, end, delete) and `exec` (of true)."""
    _bundle(folder)
    command = ["unshare", "-m", "sh", "-ec", _ALONE, "sh", sys.executable, "-m", "bench.library", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(command)}: {done.stdout}{done.stderr}")
    return {name: (ours, theirs) for name, (ours, theirs) in json.loads(done.stdout).items()}


def commands(folder: Path) -> tuple[float, float]:
    """Milliseconds of `run true` by the command lines of wherry-runtime and of runc, on the bundle of `measured`."""
    file = folder / "config.json"
    spec = json.loads(file.read_text())
    spec["process"]["args"] = ["true"]
    file.write_text(json.dumps(spec))
    count = iter(range(1_000_000))

    def command(name: str) -> Callable[[], list[str]]:
        words = [program(name), "--root", f"{folder}/{name}", "run", "--bundle", str(folder)]
        return lambda: [*words, f"bench-{os.getpid()}-{next(count)}"]

    ours, theirs = measure.by_turns([command("wherry-runtime"), command("runc")])
    return ours, theirs


def _bundle(folder: Path) -> None:
    """A bundle with a static busybox and the configuration that `wherry-runtime spec` writes, without a terminal."""
    binaries = folder / "rootfs" / "bin"
    binaries.mkdir(parents=True)
    busybox = binaries / "busybox"
    busybox.write_bytes(Path(program("busybox")).read_bytes())
    busybox.chmod(0o755)
    for name in ("true", "sleep"):
        (binaries / name).symlink_to("busybox")
    for name in ("dev", "proc", "sys", "tmp"):
        (folder / "rootfs" / name).mkdir()
    spec = default_spec.make()
    spec["ociVersion"] = "1.0.2"  # Debian's crun knows no later one
    spec["process"].update(terminal=False, args=["true"])
    (folder / "config.json").write_text(json.dumps(spec))


# -- in the process that is measured ----------------------------------------------------------------------------------


def by_turns(*functions: Callable[[], None]) -> list[float]:
    """The median of each, in milliseconds."""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(-WARM_UPS, RUNS):
        for row, function in zip(times, functions, strict=True):
            begun = time.perf_counter()
            function()
            if number >= 0:
                row.append((time.perf_counter() - begun) * 1000)
    return [statistics.median(row) for row in times]


class Library:
    """What a shim does for a container."""

    def __init__(self, folder: str) -> None:
        from wherry.runtime import container  # noqa: PLC0415 - loaded by the fork server's own ways, not before them

        self._container = container
        self._root, self._bundle = f"{folder}/ours", folder
        with open(f"{folder}/config.json", "rb") as file:
            self._spec = json.loads(file.read())
        null = os.open("/dev/null", os.O_RDWR)
        self._null = (null, null, null)

    def create(self, name: str, *args: str) -> int:
        """A container that waits; config.json is read each time."""
        with open(f"{self._bundle}/config.json", "rb") as file:
            spec = json.loads(file.read())
        spec["process"]["args"] = list(args)
        request = self._container.CreateRequest(self._root, name, self._bundle, spec=spec, stdio=self._null)
        return self._container.forked(self._container.create, request)

    def start(self, name: str) -> None:
        """It runs."""
        self._container.start(self._root, name)

    def delete(self, name: str) -> None:
        """It is gone."""
        self._container.delete(self._root, name, force=True)

    def life(self) -> None:
        """All of it."""
        pid = self.create("life", "true")
        self.start("life")
        os.waitpid(pid, 0)
        self.delete("life")

    def exec(self) -> None:
        """`true` in the container "box"."""
        process = {**self._spec["process"], "args": ["true"]}
        request = self._container.ExecRequest(self._root, "box", process, stdio=self._null)
        os.waitpid(self._container.exec_quickly(request), 0)


class Crun:
    """The same by crun's commands, as a shim runs them."""

    def __init__(self, folder: str) -> None:
        self._words = [program("crun"), "--root", f"{folder}/crun"]
        self._bundle, self._pid_file = folder, f"{folder}/crun.pid"
        null = os.open("/dev/null", os.O_RDWR)
        self._streams = [(os.POSIX_SPAWN_DUP2, null, number) for number in range(3)]

    def _run(self, *words: str) -> None:
        line = [*self._words, *words]
        pid = os.posix_spawn(line[0], line, os.environ, file_actions=self._streams)
        if os.waitpid(pid, 0)[1]:
            shown = subprocess.run(line, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
            raise SystemExit(f"{' '.join(line)}: {shown.stderr}")

    def create(self, name: str) -> int:
        """A container that waits."""
        self._run("create", "--bundle", self._bundle, "--pid-file", self._pid_file, name)
        with open(self._pid_file) as file:
            return int(file.read())

    def start(self, name: str) -> None:
        """It runs."""
        self._run("start", name)

    def delete(self, name: str) -> None:
        """It is gone."""
        self._run("delete", "--force", name)

    def life(self) -> None:
        """All of it."""
        pid = self.create("life")
        self.start("life")
        os.waitpid(pid, 0)
        self.delete("life")

    def exec(self) -> None:
        """`true` in the container "box"."""
        self._run("exec", "box", "true")


def _measure(folder: str) -> None:
    """In the shim."""
    library, crun = Library(folder), Crun(folder)
    life = by_turns(library.life, crun.life)
    box = library.create("box", "sleep", "1000")
    library.start("box")
    file = Path(folder, "config.json")
    file.write_text(file.read_text().replace('"args": ["true"]', '"args": ["sleep", "1000"]'))
    other = crun.create("box")
    crun.start("box")
    try:
        exec_ = by_turns(library.exec, crun.exec)
    finally:
        for runtime, pid in ((library, box), (crun, other)):
            runtime.delete("box")
            os.waitpid(pid, 0)
    print(json.dumps({"life": life, "exec": exec_}), flush=True)


def _main() -> None:
    """As `wherry.shim.forkserver`, then one fork."""
    from wherry.runtime.sealed import ensure_sealed  # noqa: PLC0415 - may execute this process again

    ensure_sealed()
    from wherry.shim.forkserver import single_threaded  # noqa: PLC0415 - in the fork server's order

    single_threaded()
    from wherry.linux.process import set_child_subreaper  # noqa: PLC0415
    from wherry.shim import nursery  # noqa: PLC0415

    nursery.preload()
    pid = os.fork()
    if pid == 0:
        set_child_subreaper()
        _measure(sys.argv[1])
        sys.exit()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    _main()
