"""Debian's containerd, by `ctr --runc-binary`. It has no flag for a limit of processes: the configuration says it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.containerd import Containerd
from tests.runtime.bundles import make_spec
from tests.runtime.callers import MEMORY, PIDS, WAIT, Caller, Done, call, call_on_terminal


class Ctr(Caller):
    def __init__(self, runtime: str, folder: Path, daemon: Containerd, rootfs: str) -> None:
        super().__init__(runtime, folder)
        self._ctr = [daemon.ctr, "-a", daemon.address]
        self._rootfs = rootfs

    def _run(self, name: str, script: str, *flags: str) -> list[str]:
        self.used.add(name)
        spec = make_spec(self._rootfs)
        spec["process"].update(args=["sh", "-c", script], terminal="--tty" in flags)
        spec["root"]["readonly"] = True
        spec["linux"]["resources"].update(memory={"limit": MEMORY}, pids={"limit": PIDS})
        spec["linux"]["cgroupsPath"] = f"/wherry-ctr/{name}"
        config = self.folder / f"{name}.json"
        config.write_text(json.dumps(spec))
        return [*self._ctr, "run", "--runc-binary", self.runtime, *flags, "--config", str(config), name]

    def run(self, name: str, script: str) -> Done:
        return call(self._run(name, script, "--rm"), check=False)

    def run_on_terminal(self, name: str, script: str) -> str:
        return call_on_terminal(self._run(name, script + WAIT, "--rm", "--tty"))

    def start(self, name: str, script: str) -> None:
        call(self._run(name, script, "--detach"))

    def _exec(self, name: str, script: str, *flags: str) -> list[str]:
        number = len(list(self.folder.iterdir()))
        (self.folder / f"exec-{number}").touch()
        return [*self._ctr, "task", "exec", *flags, "--exec-id", f"e{number}", name, "sh", "-c", script]

    def exec(self, name: str, script: str) -> Done:
        return call(self._exec(name, script), check=False)

    def exec_on_terminal(self, name: str, script: str) -> str:
        return call_on_terminal(self._exec(name, script + WAIT, "--tty"))

    def pause(self, name: str) -> None:
        call([*self._ctr, "task", "pause", name])

    def resume(self, name: str) -> None:
        call([*self._ctr, "task", "resume", name])

    def status(self, name: str) -> str:
        listed = call([*self._ctr, "task", "list"]).stdout
        found = re.search(rf"^{re.escape(name)} +\d+ +(\w+)", listed, re.MULTILINE)
        return found[1].lower() if found else ""

    def stop(self, name: str) -> int:
        call([*self._ctr, "task", "kill", "--signal", "TERM", name])
        while self.status(name) == "running":
            continue
        said = call([*self._ctr, "task", "delete", name]).stderr  # "task x exit with non-zero exit code 9"
        found = re.search(r"exit code (\d+)", said)
        return int(found[1]) if found else 0

    def remove(self, name: str) -> None:
        call([*self._ctr, "container", "delete", name])

    def discard(self, name: str) -> None:
        call([*self._ctr, "task", "delete", "--force", name], check=False)
        call([*self._ctr, "container", "delete", name], check=False)
