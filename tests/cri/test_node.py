"""The node itself: its version, its status, its configuration by containerd's tables, its runtime handlers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests import busybox
from tests.cri.kubelet import NAMESPACE, ContainerdLab, Kubelet, WherryLab, closing, refused
from tests.peers import need
from tests.wherryd import Wherryd
from wherry.core.errors import InvalidArgument
from wherry.cri.conf_template import render, values
from wherry.daemon import config as configuration
from wherry.daemon.version import VERSION
from wherry.proto import cri_pb2 as cri

V2 = """
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry.k8s.io/pause:3.9"
  systemd_cgroup = false
  stream_server_port = "10010"
  max_container_log_line_size = 4096
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    max_conf_num = 0
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    default_runtime_name = "crun"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun]
      runtime_type = "io.containerd.runc.v2"
      pod_annotations = ["a.*"]
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun.options]
        BinaryName = "crun"
        SystemdCgroup = true
"""
V3 = """
version = 3
[plugins."io.containerd.cri.v1.runtime"]
  max_container_log_line_size = 4096
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    max_conf_num = 0
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "crun"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.crun]
      runtime_type = "io.containerd.runc.v2"
      pod_annotations = ["a.*"]
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.crun.options]
        BinaryName = "crun"
        SystemdCgroup = true
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "native"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "registry.k8s.io/pause:3.9"
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_port = "10010"
"""


@pytest.mark.parametrize("text", [V2, V3], ids=["v2", "v3"])
def test_containerds_tables(tmp_path: Path, text: str) -> None:
    """The same, as version 2 and version 3 of the schema say it."""
    path = tmp_path / "c.toml"
    path.write_text(text)
    read = configuration.load(str(path))
    assert read.warnings == ()
    found = read.cri_settings()
    assert found.pause_image == "registry.k8s.io/pause:3.9"
    assert found.default_handler == "crun"
    assert set(found.handlers) == {"crun", "runc"}
    assert dict(found.handlers["crun"].options) == {"BinaryName": "crun", "SystemdCgroup": True}
    assert tuple(found.handlers["crun"].pod_annotations) == ("a.*",)
    assert found.default_snapshotter == "native"
    assert tuple(found.cni_bin_dirs) == ("/usr/lib/cni",)
    assert (found.cni.max_conf_num, found.stream_server_port, found.max_container_log_line_size) == (0, "10010", 4096)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sandbox_image = 3", "sandbox_image: expected a string"),
        ("[X.cni]\nip_pref = 'fast'", "cni.ip_pref"),
        ("[X.containerd]\ndefault_runtime_name = 'none'", "no runtime 'none'"),
        ("[X.containerd.runtimes.a]\npod_annotations = 1", "expected an array"),
    ],
)
def test_wrong_tables(tmp_path: Path, text: str, said: str) -> None:
    """Named by file and key when the daemon starts."""
    table = 'plugins."io.containerd.grpc.v1.cri"'
    path = tmp_path / "c.toml"
    path.write_text(f"version = 2\n[{table}]\n{text.replace('[X', f'[{table}')}\n")
    with pytest.raises(InvalidArgument, match=re.escape(said)) as caught:
        configuration.load(str(path))
    assert str(path) in caught.value.message


def test_unknown_keys_are_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        'version = 2\n[plugins."io.containerd.grpc.v1.cri"]\nnonsense = 1\nnetns_mounts_under_state_dir = true\n'
    )
    warnings = configuration.load(str(path)).warnings
    assert any("nonsense: unknown key" in each for each in warnings)
    assert any("netns_mounts_under_state_dir: it has no effect" in each for each in warnings)


def test_templates() -> None:
    """As much of Go's templates as such files use; what isn't understood is named."""
    known = values(["10.1.0.0/16", "fd00::/64"])
    assert render("{{.PodCIDR}}{{/* a note */}}", known) == "10.1.0.0/16"
    assert render("[{{range .Routes}}{{.}};{{end}}]", known) == "[0.0.0.0/0;::/0;]"
    text = "{{range $i, $r := .PodCIDRRanges}}{{if $i}},{{else}}first {{end}}{{$r}}{{end}}"
    assert render(text, known) == "first 10.1.0.0/16,fd00::/64"
    assert render("a {{- index .PodCIDRRanges 1 -}} b", known) == "afd00::/64b"
    for wrong in (
        "{{.Nothing}}",
        "{{if .PodCIDR}}",
        "{{end}}",
        "{{range .Routes}}",
        "{{template x}}",
        "{{index .Routes 9}}",
    ):
        with pytest.raises(InvalidArgument, match="t:"):
            render(wrong, known, "t")


def test_who_it_is(each_lab: WherryLab | ContainerdLab) -> None:
    lab = each_lab
    version = lab.kubelet.Version(version="v1")
    assert (version.version, version.runtime_api_version) == ("0.1.0", "v1")
    if lab.name == "wherryd":
        assert (version.runtime_name, version.runtime_version) == ("wherry", VERSION)
    status = lab.kubelet.Status(verbose=True)
    assert {each.type for each in status.status.conditions} == {"RuntimeReady", "NetworkReady"}
    config = json.loads(status.info["config"])
    assert config["cni"]["confDir"] == str(lab.folder / "cni")
    assert config["containerd"]["snapshotter"] == "overlayfs"
    lab.conflist()
    status = lab.kubelet.Status(verbose=True)
    networks = json.loads(status.info["cniconfig"])["Networks"]
    assert "pods" in [network["Config"]["Name"] for network in networks]
    if lab.name == "wherryd":
        handlers = {each.name: each.features for each in status.runtime_handlers}
        assert set(handlers) == {"", "runc"}
        assert handlers[""].user_namespaces
        assert handlers["runc"].recursive_read_only_mounts
        assert status.features.supplemental_groups_policy
        assert lab.kubelet.RuntimeConfig().linux.cgroup_driver == cri.CGROUPFS


HANDLERS = """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc-of-debian]
  runtime_type = "io.containerd.runc.v2"
  pod_annotations = ["team.*"]
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc-of-debian.options]
    BinaryName = "{runc}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.broken]
  runtime_type = "io.containerd.nonesuch.v1"
"""


@pytest.fixture(scope="module")
def handlers() -> Iterator[WherryLab]:
    yield from closing(WherryLab(HANDLERS.format(runc=need("runc"))))


def test_a_handler_with_another_runtime(handlers: WherryLab) -> None:
    """Debian's runc makes the containers of its handler's pods."""
    lab = handlers
    config = lab.pod_config("runc", host_network=True)
    config.linux.security_context.namespace_options.pid = cri.POD
    pod = lab.run_pod(config, handler="runc-of-debian")
    assert lab.status(pod).status.runtime_handler == "runc-of-debian"
    made = lab.container_config("main", ["sleep", "1000"])
    made.linux.security_context.namespace_options.pid = cri.POD
    container = lab.run(pod, made, config)
    assert "/pause" in lab.exec(container, "ps")
    assert list(Path("/run/containerd/runc").glob(f"{NAMESPACE}/{container}")), "runc keeps no state of it"
    lab.restart()
    assert "sleep" in lab.exec(container, "ps")
    lab.remove_pods()
    assert lab.daemon.settle() == []


def test_what_handlers_can(handlers: WherryLab) -> None:
    """Each as its runtime says by `features`; a kubelet asks for no more than that."""
    found = {each.name: each.features for each in handlers.kubelet.Status().runtime_handlers}
    said = json.loads(subprocess.run([need("runc"), "features"], capture_output=True, check=True).stdout)
    idmap = said["linux"].get("mountExtensions", {}).get("idmap", {}).get("enabled", False)
    assert found["runc-of-debian"].recursive_read_only_mounts == ("rro" in said["mountOptions"])
    assert found["runc-of-debian"].user_namespaces == idmap
    assert found[""].user_namespaces
    assert not found["broken"].user_namespaces


def test_another_shim_without_a_pause_image(handlers: WherryLab) -> None:
    """Refused by name; nothing is left, nothing else is disturbed."""
    error = refused(handlers.run_pod, handlers.pod_config(host_network=True), handler="broken")
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "io.containerd.nonesuch.v1" in error.details()
    assert not handlers.kubelet.ListPodSandbox().items
    assert handlers.daemon.settle() == []


def test_a_pause_image() -> None:
    """Where the configuration names one, a pod has a process of it, which lives and dies with the pod."""
    lab = WherryLab(
        f'[plugins."io.containerd.grpc.v1.cri"]\nsandbox_image = "{busybox.NAME}"\nrestrict_oom_score_adj = true',
        image=False,
    )
    try:
        lab.import_image(["/bin/sleep", "1000000"])
        config = lab.pod_config("paused")
        lab.conflist()
        options = config.linux.security_context.namespace_options
        options.pid = cri.POD
        pod = lab.run_pod(config)
        info = lab.info(pod)
        assert info["image"] == busybox.NAME
        assert Path(f"/proc/{info['pid']}/cmdline").read_bytes() == b"/bin/sleep\x001000000\0"
        made = lab.container_config("main", ["sleep", "1000"])
        made.linux.security_context.namespace_options.pid = cri.POD
        container = lab.run(pod, made, config)
        assert "sleep 1000000" in lab.exec(container, "ps", "-o", "pid,args").splitlines()[1]
        assert lab.exec(container, "hostname").strip() == "paused"
        assert lab.status(pod).status.network.ip in lab.exec(container, "ip", "addr")
        lab.restart()
        assert lab.status(pod).status.state == cri.SANDBOX_READY
        os.kill(info["pid"], 9)
        lab.until(lambda: lab.status(pod).status.state == cri.SANDBOX_NOTREADY, "the pod isn't ready")
        lab.remove_pods()
        assert lab.daemon.settle() == []
        assert subprocess.run(
            [need("ctr"), "-a", lab.address, "-n", NAMESPACE, "snapshots", "info", pod],
            capture_output=True,
            check=False,
        ).returncode
    finally:
        lab.close()


APART = """
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.apart]
  runtime_type = "io.containerd.runc.v2"
  runtime_path = "{shim}"
"""


def test_pods_in_another_shim() -> None:
    """Debian's containerd-shim-runc-v2: one for the pod, with a pause container; logs in Kubernetes' format, rotated;
    found again by the next daemon."""
    shim = need("containerd-shim-runc-v2")
    lab = WherryLab(APART.format(pause=busybox.NAME, shim=shim), image=False)
    try:
        lab.import_image(["/bin/sleep", "1000000"])
        lab.conflist()
        config = lab.pod_config("apart")
        pod = lab.run_pod(config, handler="apart")
        script = "echo begun; while sleep 0.1; do echo on; done"
        container = lab.run(pod, lab.container_config("main", ["sh", "-c", script]), config)
        running = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in lab.daemon.processes() if _is(pid, shim)]
        assert len(running) == 1
        assert pod.encode() in running[0]
        assert lab.exec(container, "hostname").strip() == "apart"
        assert lab.status(pod).status.network.ip in lab.exec(container, "ip", "addr")
        path = lab.logs / "apart" / "main.log"
        lab.until(lambda: " stdout F begun\n" in path.read_text(), "the log has a line")
        lab.restart()
        assert lab.status(pod).status.state == cri.SANDBOX_READY
        path.rename(path.with_suffix(".1"))
        lab.kubelet.ReopenContainerLog(container_id=container)
        lab.until(lambda: " stdout F on\n" in path.read_text(), "the new log has lines")
        lab.kubelet.StopContainer(cri.StopContainerRequest(container_id=container, timeout=0))
        assert lab.exited(container).exit_code == 137
        lab.kubelet.StopPodSandbox(pod_sandbox_id=pod)
        assert lab.status(pod).status.state == cri.SANDBOX_NOTREADY
        lab.kubelet.RemovePodSandbox(pod_sandbox_id=pod)
        assert lab.daemon.settle() == []
        with_ctr = subprocess.run(
            [need("ctr"), "-a", lab.address, "-n", NAMESPACE, "containers", "ls", "-q"], capture_output=True, check=True
        )
        assert not with_ctr.stdout
    finally:
        lab.close()


def _is(pid: int, program: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.realpath(f"/proc/{pid}/exe") == os.path.realpath(program)
    return False


@pytest.mark.parametrize("name", ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "cri"])
def test_it_can_be_turned_off(name: str) -> None:
    daemon = Wherryd(config=f'version = 2\ndisabled_plugins = ["{name}"]\n')
    try:
        daemon.start()
        kubelet = Kubelet(daemon.address)
        error = refused(kubelet.Version)
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "unknown service runtime.v1.RuntimeService" in error.details()
        kubelet.close()
        assert "cri" not in daemon.ctr("plugins", "ls").stdout.split()
    finally:
        daemon.close()


def test_who_does_not_use_it_does_not_pay() -> None:
    """Nothing of it is loaded before the first call; introspection says that it is there."""
    daemon = Wherryd()
    try:
        daemon.start()
        assert ["io.containerd.grpc.v1", "cri"] in [
            line.split()[:2] for line in daemon.ctr("plugins", "ls").stdout.splitlines()
        ]

        def memory() -> int:
            text = Path(f"/proc/{daemon.pid}/smaps_rollup").read_text()
            return int(text.partition("Pss:")[2].split()[0])

        before = memory()
        kubelet = Kubelet(daemon.address)
        kubelet.Version()
        kubelet.ListPodSandbox()
        kubelet.close()
        # its messages alone are more than a megabyte: had they been there before, this would not have grown
        assert memory() - before > 1000
    finally:
        daemon.close()
