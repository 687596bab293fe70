"""Pods with a user namespace: their containers' root is nobody on the host."""

from __future__ import annotations

import json
import os

import pytest

from tests.cri.kubelet import WherryLab
from tests.cri.test_containers import Pod, linux
from wherry.proto import cri_pb2 as cri

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes containers: run as root")


def test_a_user_namespace(lab: WherryLab) -> None:
    lab.conflist()
    ids = [cri.IDMapping(container_id=0, host_id=200000, length=65536)]
    users = cri.UserNamespace(mode=cri.POD, uids=ids, gids=ids)
    config = lab.pod_config()
    config.linux.security_context.namespace_options.userns_options.CopyFrom(users)
    pod = Pod(lab.run_pod(config), config, lab)
    options = cri.NamespaceOption(pid=cri.CONTAINER, userns_options=users)
    container = pod.run("users", "sleep", "1000", linux=linux(namespace_options=options))
    assert lab.exec(container, "id", "-u").strip() == "0"
    assert lab.exec(container, "cat", "/proc/self/uid_map").split() == ["0", "200000", "65536"]
    assert lab.exec(container, "sh", "-c", "touch /x; stat -c %u /x /bin/busybox /etc/resolv.conf").split() == ["0"] * 3
    init = _pid(lab, container)
    assert os.stat(f"/proc/{init}").st_uid == 200000
    assert os.stat(f"/proc/{init}/root/x").st_uid == 200000
    lab.kubelet.StopPodSandbox(pod_sandbox_id=pod.id)
    lab.kubelet.RemovePodSandbox(pod_sandbox_id=pod.id)


def _pid(lab: WherryLab, container: str) -> int:

    return int(json.loads(lab.kubelet.ContainerStatus(container_id=container, verbose=True).info["info"])["pid"])
