"""Runs in the VM: takes commands from the harness by a virtio port, one JSON object a line, and answers each.

Request: {"id": 1, "script": "…", "timeout": 60}; answer: {"id": 1, "code": 0, "out": "…"} with both streams in `out`.
The disk /dev/vdb holds a tar archive, unpacked before the first command.
"""

from __future__ import annotations

import glob
import json
import os
import signal
import subprocess
import tempfile
import time

PORTS = "/dev/vport*p1"


def answer(request: dict[str, object]) -> dict[str, object]:
    with tempfile.TemporaryFile() as out:
        # a file, not a pipe: what a command leaves running must not hold the answer back
        process = subprocess.Popen(
            ["/bin/bash", "-c", str(request["script"])],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(float(str(request["timeout"])))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        out.seek(0)
        return {"id": request["id"], "code": code, "out": out.read().decode(errors="replace")}


def find_port() -> str:
    """The port's node; the driver asks the host for its ports after it loaded."""
    for _ in range(100):
        if found := glob.glob(PORTS):
            return found[0]
        time.sleep(0.05)
    raise SystemExit(f"no {PORTS}: {sorted(os.listdir('/dev'))}")


def main() -> None:
    os.environ.update(HOME="/root", PATH="/opt/wherry/bin:/usr/sbin:/usr/bin:/sbin:/bin", LANG="C.UTF-8")
    subprocess.run(["tar", "-x", "-C", "/", "-f", "/dev/vdb"], check=True)
    with open(find_port(), "r+b", buffering=0) as port:
        port.write(b'{"ready": true}\n')
        pending = b""
        while chunk := port.read(65536):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                rest = memoryview(json.dumps(answer(json.loads(line))).encode() + b"\n")
                while rest:  # the kernel takes 32 KiB at once
                    rest = rest[port.write(rest) :]


if __name__ == "__main__":
    main()
