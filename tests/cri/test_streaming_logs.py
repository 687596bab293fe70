"""Logs as a kubelet rotates and reads them, on `wherryd` and on containerd; and over the daemon's death."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest

from tests.cri import streams
from tests.cri.kubelet import ContainerdLab, WherryLab, refused
from tests.cri.streams import wish

Lab = WherryLab | ContainerdLab
RECORD = re.compile(r"(\S+) (stdout|stderr) ([PF]) (.*)")


def records(path: Path) -> list[tuple[str, str, str]]:
    """Stream, tag and text of each record."""
    found = []
    for line in path.read_text().splitlines():
        match = RECORD.fullmatch(line)
        assert match, line
        found.append((match[2], match[3], match[4]))
    return found


def started(lab: Lab, script: str, **fields: Any) -> tuple[str, Path]:
    config = lab.pod_config(host_network=True)
    pod = lab.run_pod(config)
    container = lab.run(pod, lab.container_config("box", ["sh", "-c", script], **fields), config)
    return container, lab.logs / config.metadata.name / "box.log"


def test_records_are_those_of_containerd(each_lab: Lab) -> None:
    script = (
        "echo one; echo two >&2; echo; head -c 16384 /dev/zero | tr '\\0' a; echo;"
        "head -c 40000 /dev/zero | tr '\\0' b; echo; sleep 0.2; printf 'no end'"
    )
    container, path = started(each_lab, script)
    each_lab.exited(container)
    each_lab.until(lambda: "no end" in path.read_text(), "all is logged")
    found = records(path)
    assert [each for each in found if each[0] == "stderr"] == [("stderr", "F", "two")]
    assert [
        (tag, text if len(text) < 100 else (text[0], len(text))) for stream, tag, text in found if stream == "stdout"
    ] == [
        ("F", "one"),
        ("F", ""),
        ("F", ("a", 16384)),
        ("P", ("b", 16384)),
        ("P", ("b", 16384)),
        ("F", ("b", 40000 - 2 * 16384)),
        ("P", "no end"),
    ]
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_kubelet_rotates_without_losing_a_line(each_lab: Lab) -> None:
    container, path = started(each_lab, "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; sleep 1000000")
    files = []
    for number in range(6):
        time.sleep(0.02)
        rotated = path.with_name(f"box.log.{number}")
        with contextlib.suppress(FileNotFoundError):
            path.rename(rotated)
            files.append(rotated)
        each_lab.kubelet.ReopenContainerLog(container_id=container)
        assert path.exists()
    each_lab.until(lambda: "line 2999\n" in "".join(each.read_text() for each in [*files, path]), "all is logged")
    texts = [text for each in [*files, path] for _, _, text in records(each)]
    assert texts == [f"line {number}" for number in range(3000)]


def test_what_can_not_be_rotated(lab: WherryLab) -> None:
    assert refused(lab.kubelet.ReopenContainerLog, container_id="nobody").code() == grpc.StatusCode.NOT_FOUND
    container, _ = started(lab, "exit 0")
    lab.exited(container)
    error = refused(lab.kubelet.ReopenContainerLog, container_id=container)
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error


def test_the_log_goes_on_while_the_daemon_is_dead(lab: WherryLab) -> None:
    container, path = started(lab, "i=0; while true; do echo $i; i=$((i+1)); sleep 0.05; done")
    lab.until(lambda: "F 3" in path.read_text(), "it runs")
    lab.daemon.kill()
    before = len(records(path))
    lab.until(lambda: len(records(path)) > before + 10, "it goes on")
    lab.daemon.start()
    path.rename(path.with_name("old"))
    lab.kubelet.ReopenContainerLog(container_id=container)
    lab.until(lambda: path.exists() and len(records(path)) > 5, "it goes on in the new file")
    numbers = [int(text) for each in (path.with_name("old"), path) for _, _, text in records(each)]
    assert numbers == list(range(len(numbers)))
    # and it can be attached to and executed in
    url = lab.kubelet.Attach(container_id=container, stdout=True, stderr=True).url
    done = streams.websocket(url, ["v5.channel.k8s.io"], [], 1)
    assert len(done["channels"][1].splitlines()) > 3
    url = lab.kubelet.Exec(container_id=container, cmd=["echo", "hello"], stdout=True).url
    assert streams.websocket(url, ["v5.channel.k8s.io"], [])["channels"][1] == b"hello\n"


def test_a_client_that_reads_nothing_does_not_stop_the_log(lab: WherryLab) -> None:
    script = (
        "read x; i=0; while [ $i -lt 400 ]; do head -c 15000 /dev/zero | tr '\\0' x; echo; i=$((i+1)); done; echo end"
    )
    container, path = started(lab, script, stdin=True)
    url = lab.kubelet.Attach(container_id=container, stdin=True, stdout=True).url
    parts = urlsplit(url)
    head = (
        f"GET {parts.path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    with socket.create_connection((parts.hostname, parts.port)) as silent:
        silent.sendall(head.encode() + b"\x82\x82\0\0\0\0\0\n")  # and one masked message: channel 0, a newline
        lab.until(lambda: "F end" in path.read_text(), "all is logged", 60)
    # a line whose end was held up for a second is in parts
    whole = "".join(text + "\n" * (tag == "F") for _, tag, text in records(path)).splitlines()
    assert [len(line) for line in whole] == [15000] * 400 + [3]
    assert lab.exited(container).exit_code == 0


@pytest.fixture
def small_disk(lab: WherryLab) -> Iterator[Path]:
    folder = lab.folder / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_under_the_log_stops_nobody(lab: WherryLab, small_disk: Path) -> None:
    config = lab.pod_config(host_network=True)
    config.log_directory = str(small_disk)
    pod = lab.run_pod(config)
    script = "while read x; do echo start; i=0; while [ $i -lt 200 ]; do echo $x; i=$((i+1)); done; done; exit 3"
    wanted = lab.container_config("box", ["sh", "-c", script], stdin=True, stdin_once=True)
    container = lab.run(pod, wanted, config)
    path = small_disk / "box.log"
    (small_disk / "ballast").write_bytes(b"x" * 200_000)
    url = lab.kubelet.Attach(container_id=container, stdin=True, stdout=True, stderr=True).url
    line = b"y" * 2000 + b"\n"
    wishes = [wish("error"), wish("stdin", line * 2 + b"last\n", fin=True), wish("stdout"), wish("stderr")]
    done = streams.spdy(url, ["v4.channel.k8s.io"], wishes)
    assert done["data"]["stdout"] == b"start\n" + line * 200 + b"start\n" + line * 200 + b"start\n" + b"last\n" * 200
    assert json.loads(done["data"]["error"])["status"] == "Success"
    assert lab.exited(container).exit_code == 3
    records(path)  # each is whole
    os.unlink(small_disk / "ballast")


def test_a_client_that_goes_away_leaves_the_process_to_its_end(lab: WherryLab) -> None:
    container, _ = started(lab, "sleep 1000000")
    url = lab.kubelet.Exec(
        container_id=container, cmd=["sh", "-c", "yes | head -c 4000000; echo done > /tmp/done"], stdout=True
    ).url
    streams.websocket(url, ["v4.channel.k8s.io"], [], 0.05)
    lab.until(
        lambda: lab.kubelet.ExecSync(container_id=container, cmd=["cat", "/tmp/done"], timeout=5).stdout, "it ends"
    )


def test_a_terminal_whose_client_goes_away_is_hung_up(lab: WherryLab) -> None:
    container, _ = started(lab, "sleep 1000000")
    script = "trap 'echo hung > /tmp/hung; exit' HUP; echo ready; while true; do sleep 0.1; done"
    url = lab.kubelet.Exec(container_id=container, cmd=["sh", "-c", script], stdin=True, stdout=True, tty=True).url
    assert b"ready" in streams.websocket(url, ["v4.channel.k8s.io"], [], 1)["channels"][1]
    lab.until(
        lambda: lab.kubelet.ExecSync(container_id=container, cmd=["cat", "/tmp/hung"], timeout=5).stdout, "it knows"
    )


def test_nothing_is_left_of_streams(lab: WherryLab) -> None:
    container, _ = started(lab, "sleep 1000000")
    pid = lab.daemon.process.pid if lab.daemon.process is not None else 0
    fifos = lab.folder / "state" / "cri" / "fifo"

    def counted() -> tuple[int, int, int]:
        return (
            len(os.listdir(f"/proc/{pid}/fd")),
            len(os.listdir(f"/proc/{pid}/task")),
            len(list(fifos.iterdir())) if fifos.exists() else 0,
        )

    def use() -> None:
        for fields in ({"cmd": ["echo", "x"]}, {"cmd": ["cat"], "stdin": True}, {"cmd": ["/none"]}):
            url = lab.kubelet.Exec(container_id=container, stdout=True, **fields).url
            streams.websocket(url, ["v5.channel.k8s.io"], [b"\xff\0"])
        url = lab.kubelet.Attach(container_id=container, stdout=True).url
        streams.websocket(url, ["v5.channel.k8s.io"], [], 0.3)

    use()
    lab.until(lambda: counted()[2] == 0, "the FIFOs are gone")
    before = counted()
    for _ in range(3):
        use()
    lab.until(lambda: counted()[0] <= before[0] and counted()[2] == 0, f"as before: {before}")
    lab.daemon.kill()  # what one that is killed leaves is gone with the first stream of the next one
    (fifos / "stray").mkdir(parents=True)
    lab.daemon.start()
    lab.kubelet.Exec(container_id=container, cmd=["true"], stdout=True)
    assert not (fifos / "stray").exists()
