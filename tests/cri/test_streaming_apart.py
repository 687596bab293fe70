"""Streams of containers in somebody else's shim, containerd's own: where a program of ours writes the log."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests import busybox
from tests.cri import streams
from tests.cri.kubelet import WherryLab, closing
from tests.peers import need

_APART = """
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.apart]
  runtime_type = "io.containerd.runc.v2"
  runtime_path = "{shim}"
"""


@pytest.fixture(scope="module")
def apart() -> Iterator[WherryLab]:
    need("runc")
    lab = WherryLab(_APART.format(pause=busybox.NAME, shim=need("containerd-shim-runc-v2")), image=False)
    for opened in closing(lab):
        opened.import_image(["/bin/sleep", "1000000"])
        yield opened


def test_exec_attach_and_rotation(apart: WherryLab) -> None:
    config = apart.pod_config(host_network=True)
    pod = apart.run_pod(config, handler="apart")
    script = "echo begun; while sleep 0.05; do echo tick; done"
    container = apart.run(pod, apart.container_config("box", ["sh", "-c", script]), config)
    path = apart.logs / config.metadata.name / "box.log"
    apart.until(lambda: "stdout F tick\n" in path.read_text(), "it is logged")
    apart.restart()
    old = path.with_name("old")
    path.rename(old)
    apart.kubelet.ReopenContainerLog(container_id=container)
    url = apart.kubelet.Attach(container_id=container, stdout=True, stderr=True).url
    assert b"tick\ntick\n" in streams.websocket(url, ["v5.channel.k8s.io"], [], 1)["channels"][1]
    apart.until(lambda: "stdout F tick\n" in path.read_text(), "the new file is written to")
    request = {"container_id": container, "cmd": ["sh", "-c", "cat; exit 3"], "stdin": True, "stdout": True}
    done = streams.websocket(apart.kubelet.Exec(**request).url, ["v5.channel.k8s.io"], [b"\0in", b"\xff\0"])
    assert done["channels"][1] == b"in"
    assert json.loads(done["channels"][3])["details"]["causes"][0]["message"] == "3"


def test_a_terminal_with_input(apart: WherryLab) -> None:
    config = apart.pod_config(host_network=True)
    pod = apart.run_pod(config, handler="apart")
    script = "while read line; do echo got $line; [ $line = end ] && exit 2; done"
    wanted = apart.container_config("box", ["sh", "-c", script], stdin=True, tty=True)
    container = apart.run(pod, wanted, config)
    for text, said in ((b"one\n", b"got one"), (b"end\n", b"got end")):
        url = apart.kubelet.Attach(container_id=container, stdin=True, stdout=True, tty=True).url
        assert said in streams.websocket(url, ["v5.channel.k8s.io"], [b"\0" + text], 1)["channels"][1]
    assert apart.exited(container).exit_code == 2
