"""`wherry logs` of Kubernetes' containers: the kubelet's files, over its rotation, to the container's end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.cri.kubelet import NAMESPACE, WherryLab
from wherry.client import cri_logs
from wherry.client.logs import Entry, read
from wherry.core.errors import NotFound
from wherry.shim.crilog import CriLog

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes containers: run as root")


def command(lab: WherryLab, *args: str) -> list[str]:
    return [sys.executable, "-m", "wherry.cli", "-a", lab.address, "-n", NAMESPACE, *args]


def wherry(lab: WherryLab, *args: str) -> str:
    return subprocess.run(command(lab, *args), capture_output=True, text=True, timeout=60, check=True).stdout


def started(lab: WherryLab, script: str, **fields: Any) -> tuple[str, Path]:
    config = lab.pod_config(host_network=True)
    pod = lab.run_pod(config)
    container = lab.run(pod, lab.container_config("box", ["sh", "-c", script], **fields), config)
    return container, lab.logs / config.metadata.name / "box.log"


def rotate(lab: WherryLab, container: str, path: Path, number: int) -> None:
    """As a kubelet names them."""
    path.rename(path.with_name(f"{path.name}.20261123-0000{number:02d}"))
    lab.kubelet.ReopenContainerLog(container_id=container)


def test_what_a_container_of_a_pod_wrote(lab: WherryLab) -> None:
    script = "echo one; echo two >&2; head -c 40000 /dev/zero | tr '\\0' b; echo; printf end; sleep 1000"
    container, path = started(lab, script)
    lab.until(lambda: path.exists() and "P end\n" in path.read_text(), "all is logged")
    done = subprocess.run(command(lab, "logs", container[:12]), capture_output=True, check=True, timeout=60)
    assert done.stdout == b"one\n" + b"b" * 40000 + b"\nend"
    assert done.stderr == b"two\n"
    assert wherry(lab, "logs", "--tail", "1", container) == "end"
    first, _, text = wherry(lab, "logs", "-t", container).partition(" ")
    assert text.startswith("one\n")
    assert abs(datetime.fromisoformat(first).timestamp() - time.time()) < 600
    assert wherry(lab, "logs", "--since", datetime.now(UTC).isoformat(), container) == ""
    assert json.loads(wherry(lab, "inspect", container))[0]["LogPath"] == str(path)


def test_a_log_is_followed_over_rotations_to_the_end(lab: WherryLab) -> None:
    script = "i=0; while [ ! -e /tmp/stop ]; do echo line $i; i=$((i+1)); sleep 0.001; done; echo that was all"
    container, path = started(lab, script)
    lab.until(path.exists, "it writes")
    with subprocess.Popen(command(lab, "logs", "-f", container), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline()]
        rest = threading.Thread(target=lambda: seen.extend(process.stdout or ()))
        rest.start()
        for number in range(5):
            before = len(seen)
            rotate(lab, container, path, number)
            lab.until(lambda before=before: len(seen) > before + 20, "the new file is followed")  # type: ignore[misc]
        lab.exec(container, "touch", "/tmp/stop")
        assert process.wait(60) == 0
        rest.join(30)
    assert seen[-1] == "that was all\n"
    assert seen[:-1] == [f"line {number}\n" for number in range(len(seen) - 1)]
    # who comes later reads the same, of a container that has ended; what the kubelet has compressed is its own
    assert wherry(lab, "logs", container) == "".join(seen)
    assert wherry(lab, "logs", "--tail", "3", container) == "".join(seen[-3:])
    oldest = path.with_name(f"{path.name}.20261123-000000")
    count = len(oldest.read_text().splitlines())
    subprocess.run(["gzip", str(oldest)], check=True)
    assert wherry(lab, "logs", container) == "".join(seen[count:])


def test_a_container_without_a_log(lab: WherryLab) -> None:
    config = lab.pod_config(host_network=True)
    made = lab.container_config("silent", ["sleep", "1000"])
    made.log_path = ""
    container = lab.run(lab.run_pod(config), made, config)
    done = subprocess.run(command(lab, "logs", container), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode
    assert "has no log" in done.stderr


# -- the files


def test_a_rotation_is_no_end(tmp_path: Path) -> None:
    # between its opening and its lock the new file is nobody's: the old one's lock says that more will come
    path = tmp_path / "0.log"
    log = CriLog(str(path), 100)
    log.add("stdout", [b"one\n"])
    entries = read(str(path), follow=True)
    assert next(entries).data == b"one\n"
    path.rename(tmp_path / "0.log.20261123-000000")
    path.write_bytes(b"2026-11-23T00:00:00.000000001Z stdout F two\n")  # nobody has locked it
    got: list[Entry] = []
    reading = threading.Thread(target=lambda: got.extend(entries))
    reading.start()
    while not got:
        time.sleep(0.01)
    time.sleep(0.2)
    assert reading.is_alive()
    log.reopen()
    log.add("stderr", [b"three\n", b"four"])
    log.close()
    reading.join(30)
    assert [(entry.stream, entry.data) for entry in got] == [
        ("stdout", b"two\n"),
        ("stderr", b"three\n"),
        ("stderr", b"four"),
    ]


def test_the_last_lines_come_with_their_parts(tmp_path: Path) -> None:
    at = "2026-11-23T00:00:00Z stdout"
    (tmp_path / "0.log.20261123-000000").write_text(f"{at} F one\n{at} P tw\n")
    (tmp_path / "0.log").write_text(f"{at} P o\n{at} F !\n{at} F three\n{at} P four")
    path = str(tmp_path / "0.log")
    for tail, text in ((1, "three\n"), (2, "two!\nthree\n"), (3, "one\ntwo!\nthree\n"), (9, "one\ntwo!\nthree\n")):
        assert b"".join(entry.data for entry in read(path, tail=tail)).decode() == text


def test_between_two_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        list(read(str(tmp_path / "0.log")))
    (tmp_path / "0.log.20261123-000000").write_bytes(b"2026-11-23T00:00:00.5Z stdout P:x one\n")
    (tmp_path / "0.log.20261122-000000.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "10.log").write_bytes(b"2026-11-23T00:00:00Z stdout F other\n")
    assert list(read(str(tmp_path / "0.log"))) == [Entry(1795392000_500000000, "stdout", b"one")]


@pytest.mark.parametrize(
    "line", [b"", b"x", b"x stdout F text", b"2026-11-23T00:00:00Z stdout F", b"2026-11-23T00:00:00Z \xff"]
)
def test_half_a_record_is_none(line: bytes) -> None:
    assert cri_logs.parse(line) is None
