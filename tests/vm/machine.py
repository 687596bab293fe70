"""A running VM: qemu without acceleration, pure cgroup v2, driven by commands over a virtio port."""

from __future__ import annotations

import compileall
import json
import os
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.vm.image import PYTHON, REPOSITORY, SITE, Image

_BOOT_SECONDS = 150  # 5 to 10 on an idle machine; CI's may be busy
_MEMORY = "1024M"
# without the last two the clock is an emulated device, and each unmount and cgroup waits for quiet processors
_COMMAND_LINE = (
    "console=ttyS0 root=/dev/vda rw cgroup_no_v1=all quiet loglevel=4 mitigations=off "
    "tsc=reliable rcupdate.rcu_expedited=1"
)
# an old one: emulating the vector instructions that libc chooses on a new one takes a third longer
_PROCESSOR = "Nehalem"
#: What the fork server loads, with optimised byte code.
_OPTIMIZED = ("core", "linux", "proto", "runtime", "shim")
_SCRIPT = """#!/opt/wherry/bin/python
import sys
from {module} import {function}
sys.exit({function}())
"""


@dataclass(frozen=True)
class Done:
    """What a command in the VM left: its exit code and both of its streams."""

    code: int
    out: str


class Machine:
    """Boots on entering, is killed on leaving. `run` needs nothing but the agent in the image."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._folder = Path(tempfile.mkdtemp(prefix="wherry-vm."))
        self._next = 0
        self._pending = b""

    def __enter__(self) -> Self:
        try:
            self._boot()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def _boot(self) -> None:
        _write_tree(self._folder / "tree.tar")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._folder / "agent"))
        listener.listen(1)
        listener.settimeout(10)
        console = self._folder / "console"
        drive = "if=none,format=raw,cache=unsafe,snapshot=on"
        command = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", _PROCESSOR, "-smp", "2", "-m", _MEMORY),
            *("-M", "q35,usb=off", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd), "-append", _COMMAND_LINE),
            *("-drive", f"file={self._image.root},id=root,{drive}", "-device", "virtio-blk-pci,drive=root"),
            *("-drive", f"file={self._folder}/tree.tar,id=tree,{drive}", "-device", "virtio-blk-pci,drive=tree"),
            *("-chardev", f"socket,id=agent,path={self._folder}/agent", "-device", "virtio-serial-pci"),
            *("-device", "virtserialport,chardev=agent,name=agent,nr=1"),
            *("-serial", f"file:{console}"),
        ]
        with (self._folder / "qemu").open("wb") as messages:
            self._qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages)
        started = time.monotonic()
        try:
            self._port, _ = listener.accept()
            self._receive(_BOOT_SECONDS)
        except (OSError, EOFError) as error:
            said = f"{(self._folder / 'qemu').read_text()}\n{self.console()}"
            raise RuntimeError(f"the VM didn't boot within {_BOOT_SECONDS} s:\n{said}") from error
        finally:
            listener.close()
        self.boot_seconds = time.monotonic() - started

    def console(self) -> str:
        """What the kernel and systemd said so far (the last 8000 characters)."""
        path = self._folder / "console"
        return path.read_text(errors="replace")[-8000:] if path.exists() else ""

    def run(self, script: str, timeout: float = 60) -> Done:
        """Run a bash script as root in the VM. The code is negative if a signal or the timeout (seconds) ended it."""
        self._next += 1
        began = time.monotonic()
        request = {"id": self._next, "script": script, "timeout": timeout}
        self._port.sendall(json.dumps(request).encode() + b"\n")
        while (answer := self._receive(timeout + 30)).get("id") != self._next:
            continue
        if os.environ.get("WHERRY_VM_TRACE"):
            print(f"{time.monotonic() - began:6.2f} s  {script.removeprefix('set -e').strip()[:100]!r}")
        return Done(answer["code"], answer["out"])

    def check(self, script: str, timeout: float = 60) -> str:
        """Like `run`, but fails with the output unless the code is 0; returns the output without the last newline."""
        done = self.run(f"set -e\n{script}", timeout)
        if done.code:
            raise AssertionError(f"exit code {done.code} in the VM of:\n{script}\n--- output:\n{done.out}")
        return done.out.rstrip("\n")

    def lanes(self, scripts: Sequence[str], timeout: float) -> Done:
        """Scripts side by side; their output one after the other, the code of one that failed."""
        begin = "".join(f'( {lane}\n) >/root/lane-{at} 2>&1 &\npids="$pids $!"\n' for at, lane in enumerate(scripts))
        end = "bad=0; for pid in $pids; do wait $pid || bad=$?; done; cat /root/lane-*; exit $bad"
        return self.run(f"rm -f /root/lane-*\n{begin}{end}", timeout)

    def wait(self, script: str, seconds: int = 180, tell: str = "") -> str:
        """A script until it succeeds, and its output then; a failure has that of the script `tell`, too."""
        loop = (
            f"end=$((SECONDS + {seconds}))\nuntil out=$( {{ {script}\n}} 2>&1 ); do\n"
            '  [ $SECONDS -lt $end ] || { echo "$out"; exit 1; }\n  sleep 0.2\ndone\necho "$out"'
        )
        done = self.run(loop, seconds + 60)
        if done.code:
            raise AssertionError(f"not within {seconds} s in the VM:\n{script}\n{done.out}\n{self.run(tell).out}")
        return done.out.rstrip("\n")

    def _receive(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._pending:
            self._port.settimeout(max(0.1, deadline - time.monotonic()))
            chunk = self._port.recv(1 << 20)
            if not chunk:
                raise EOFError("the VM is gone")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return dict(json.loads(line))

    def _end(self) -> None:
        qemu = getattr(self, "_qemu", None)
        if qemu is not None and qemu.poll() is None:
            qemu.send_signal(signal.SIGKILL)
            qemu.wait()
        if port := getattr(self, "_port", None):
            port.close()
        if keep := os.environ.get("WHERRY_VM_CONSOLE"):
            shutil.copy(self._folder / "console", keep)
        shutil.rmtree(self._folder, ignore_errors=True)


def chosen(tests: Mapping[str, str]) -> str:
    """pytest's -k for several files: a file's name, and which of its tests."""
    return " or ".join(f"({name} and ({which}))" for name, which in tests.items())


def remove(machine: Machine, name: str) -> None:
    """Kill a container's task and remove both. (`tasks delete` exits with the container's code, as ctr does.)"""
    machine.run(f"wherry tasks delete --force {name}")
    machine.check(f"wherry containers rm {name}")


def _write_tree(target: Path) -> None:
    """The working tree as it would be installed at /opt/wherry, and the tests at /opt/src."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as tar:
        for package, folder in project["tool"]["setuptools"]["package-dir"].items():
            if (REPOSITORY / folder).is_dir() and package.count(".") == 1:
                _add_package(tar, REPOSITORY / folder, f"{SITE}/{package.replace('.', '/')}")
        _add_package(tar, REPOSITORY / "tests", "opt/src/tests")
        tar.add(REPOSITORY / "pyproject.toml", "opt/src/pyproject.toml", filter=_clean)
        with tempfile.TemporaryDirectory() as scripts:
            metadata = Path(scripts) / "METADATA"
            version = project["project"]["version"]
            metadata.write_text(f"Metadata-Version: 2.1\nName: wherry\nVersion: {version}\n")
            tar.add(metadata, f"{SITE}/wherry-{version}.dist-info/METADATA", filter=_clean)
            for name, text in _scripts(project).items():
                script = Path(scripts) / name
                script.write_text(text)
                script.chmod(0o755)
                tar.add(script, f"opt/wherry/bin/{name}", filter=_clean)
    with open(target, "ab") as disk:
        disk.write(b"\0" * (-disk.tell() % 512))


def _scripts(project: dict[str, Any]) -> dict[str, str]:
    """The commands that pip would put into `bin`: entry points, and script files with their first line adapted."""
    texts: dict[str, str] = {}
    for name, entry in project["project"]["scripts"].items():
        module, _, function = entry.partition(":")
        texts[name] = _SCRIPT.format(module=module, function=function)
    for file in project["tool"]["setuptools"].get("script-files", []):
        _, _, rest = (REPOSITORY / file).read_text().partition("\n")
        texts[Path(file).name] = f"#!/opt/wherry/bin/python\n{rest}"
    return texts


def _add_package(tar: tarfile.TarFile, folder: Path, name: str) -> None:
    """A package, compiled where this Python's byte code is the VM's too: compiling takes long there."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "package"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__", "*.proto"))
        if f"{sys.version_info.major}.{sys.version_info.minor}" == PYTHON:
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            for level in (0, 2) if folder.name in _OPTIMIZED else (0,):
                compileall.compile_dir(
                    copy, quiet=2, stripdir=str(copy), prependdir=f"/{name}", invalidation_mode=mode, optimize=level
                )
        tar.add(copy, name, filter=_owned)


def _clean(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if member.name.endswith(("__pycache__", ".pyc", ".proto")):
        return None
    return _owned(member)


def _owned(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = "root"
    return member
