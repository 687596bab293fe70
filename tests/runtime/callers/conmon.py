"""conmon alone, as podman and CRI-O call it: it creates, holds the terminal, writes the log, waits for the exit."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path

from tests.peers import need
from tests.runtime.bundles import Spec, make_spec
from tests.runtime.callers import MEMORY, PIDS, Caller, Done, call

_SECONDS = 30


class Conmon(Caller):
    def __init__(self, runtime: str, folder: Path, rootfs: str) -> None:
        super().__init__(runtime, folder)
        self._conmon = need("conmon")
        self._rootfs = rootfs
        self._root = folder / "state"
        self._words = [runtime, "--root", str(self._root)]
        self._execs = 0
        for name in ("exits", "sockets"):
            (folder / name).mkdir(exist_ok=True)

    def _spec(self, script: str, *, terminal: bool) -> Spec:
        spec = make_spec(self._rootfs)
        spec["process"].update(args=["sh", "-c", script], terminal=terminal)
        spec["linux"]["resources"].update(memory={"limit": MEMORY}, pids={"limit": PIDS})
        return spec

    def _monitor(self, name: str, log: Path, *flags: str, runtime_id: str = "") -> None:
        """Start conmon and wait until it says, on the pipe that it is given for this, what the runtime did."""
        reader, writer = os.pipe()
        beginning, begins = os.pipe()
        command = [
            *(self._conmon, "--api-version", "1", "-c", runtime_id or name, "-u", name, "-n", name),
            *("-r", self.runtime, "--runtime-arg", "--root", "--runtime-arg", str(self._root)),
            *("-b", str(self.folder / (runtime_id or name)), "-p", str(self.folder / f"{name}.pid")),
            *("--exit-dir", str(self.folder / "exits"), "--socket-dir-path", str(self.folder / "sockets")),
            *("-l", f"k8s-file:{log}", *flags),
        ]
        environment = {**os.environ, "_OCI_SYNCPIPE": str(writer), "_OCI_STARTPIPE": str(beginning)}
        process = subprocess.Popen(
            command, env=environment, pass_fds=(writer, beginning), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(writer)
        os.close(beginning)
        os.write(begins, b"\0")
        os.close(begins)
        said = b""
        while not said.endswith(b"\n") and select.select([reader], [], [], _SECONDS)[0]:
            chunk = os.read(reader, 4096)
            if not chunk:
                break
            said += chunk
        os.close(reader)
        process.wait(_SECONDS)
        answer = json.loads(said or b"{}")
        if (answer.get("pid") or answer.get("data") or -1) <= 0:
            raise AssertionError(f"conmon: {said!r}")

    def _create(self, name: str, script: str, *, terminal: bool = False) -> Path:
        self.used.add(name)
        bundle = self.folder / name
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(self._spec(script, terminal=terminal)))
        log = self.folder / f"{name}.log"
        self._monitor(name, log, *(["-t"] if terminal else []))
        call([*self._words, "start", name])
        return log

    def _end(self, name: str) -> int:
        """The exit code that conmon writes."""
        path = self.folder / "exits" / name
        deadline = time.monotonic() + _SECONDS
        while not path.exists() or not path.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return int(path.read_text())

    def run(self, name: str, script: str) -> Done:
        log = self._create(name, script)
        code = self._end(name)
        self.remove(name)
        return Done([], code, _logged(log, "stdout"), _logged(log, "stderr"))

    def run_on_terminal(self, name: str, script: str) -> str:
        log = self._create(name, script, terminal=True)
        self._end(name)
        self.remove(name)
        return _logged(log, "stdout")

    def start(self, name: str, script: str) -> None:
        self._create(name, script)

    def _exec(self, name: str, script: str, *, terminal: bool = False) -> tuple[int, Path]:
        self._execs += 1
        session = f"{name}-{self._execs}"
        process = self._spec(script, terminal=terminal)["process"]
        path = self.folder / f"{session}.json"
        path.write_text(json.dumps(process))
        log = self.folder / f"{session}.log"
        flags = ["-e", "--exec-process-spec", str(path), *(["-t"] if terminal else [])]
        self._monitor(session, log, *flags, runtime_id=name)
        return self._end(name), log

    def exec(self, name: str, script: str) -> Done:
        (self.folder / "exits" / name).unlink(missing_ok=True)
        code, log = self._exec(name, script)
        return Done([], code, _logged(log, "stdout"), _logged(log, "stderr"))

    def exec_on_terminal(self, name: str, script: str) -> str:
        (self.folder / "exits" / name).unlink(missing_ok=True)
        return _logged(self._exec(name, script, terminal=True)[1], "stdout")

    def pause(self, name: str) -> None:
        call([*self._words, "pause", name])

    def resume(self, name: str) -> None:
        call([*self._words, "resume", name])

    def status(self, name: str) -> str:
        shown = call([*self._words, "state", name], check=False)
        return str(json.loads(shown.stdout)["status"]) if shown.returncode == 0 else ""

    def stop(self, name: str) -> int:
        (self.folder / "exits" / name).unlink(missing_ok=True)
        call([*self._words, "kill", name, str(int(signal.SIGTERM))])
        return self._end(name)

    def remove(self, name: str) -> None:
        call([*self._words, "delete", name])

    def discard(self, name: str) -> None:
        call([*self._words, "delete", "--force", name], check=False)


def _logged(log: Path, stream: str) -> str:
    """Lines `2026-01-01T00:00:00.0+00:00 stdout F text`; P: a part of a line."""
    text = ""
    for line in log.read_text().splitlines():
        found = re.match(r"\S+ (\w+) ([FP]) ?(.*)", line)
        if found and found[1] == stream:
            text += found[3] + ("\n" if found[2] == "F" else "")
    return text.replace("\r", "")
