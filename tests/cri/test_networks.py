"""Pods on networks, with Debian's CNI plugins and with plugins of the tests' own that fail, stall and take notes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.cri.kubelet import CNI_BIN, ContainerdLab, Lab, WherryLab, closing, refused
from tests.peers import missing, need
from wherry.proto import cri_pb2 as cri

if not os.path.exists(f"{CNI_BIN}/bridge"):
    missing("CNI's plugins are missing: apt-get install containernetworking-plugins")

# notes each call, and answers an address; told by files beside it to fail, or to take its time
PLUGIN = """#!/usr/bin/python3 -I
import json, os, sys, time
here = os.path.dirname(os.path.abspath(__file__))
config = json.load(sys.stdin)
command = os.environ["CNI_COMMAND"]
if command == "VERSION":
    print(json.dumps({"cniVersion": "1.0.0", "supportedVersions": ["0.4.0", "1.0.0"]}))
    sys.exit()
note = {key: value for key, value in os.environ.items() if key.startswith("CNI_")}
note["config"] = config
with open(os.path.join(here, "notes"), "a") as file:
    file.write(json.dumps(note) + chr(10))
while os.path.exists(os.path.join(here, f"stall-{command}")):
    time.sleep(0.02)
if os.path.exists(os.path.join(here, f"fail-{command}")):
    print(json.dumps({"cniVersion": "1.0.0", "code": 100, "msg": "told to fail", "details": "by a test"}))
    sys.exit(1)
if command == "ADD":
    addresses = config.get("addresses") or ["10.99.0.7/24"]
    inside = {"name": os.environ["CNI_IFNAME"], "sandbox": os.environ["CNI_NETNS"]}
    answer = {"cniVersion": config["cniVersion"], "interfaces": [inside]}
    answer["ips"] = [{"address": each, "interface": 0} for each in addresses]
    print(json.dumps(answer))
"""


class Noted:
    """The plugin `noted` in a folder, which is the last of the lab's plugin folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "noted").write_text(PLUGIN)
        (folder / "noted").chmod(0o755)

    def notes(self, command: str = "") -> list[dict[str, Any]]:
        path = self.folder / "notes"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [note for note in found if not command or note["CNI_COMMAND"] == command]

    def tell(self, word: str) -> Path:
        path = self.folder / word
        path.touch()
        return path


@pytest.fixture(scope="module")
def noted_lab() -> Iterator[WherryLab]:
    yield from closing(WherryLab(more='bin_dirs = ["/usr/lib/cni", "/tmp/wherry-noted-PID"]'.replace("PID", _PID)))


_PID = str(os.getpid())


@pytest.fixture
def noted(noted_lab: WherryLab) -> Iterator[Noted]:
    folder = Path(f"/tmp/wherry-noted-{_PID}")
    plugin = Noted(folder)
    (noted_lab.folder / "cni" / "10-pods.conflist").unlink(missing_ok=True)
    try:
        yield plugin
    finally:
        for path in folder.glob("*-*"):
            path.unlink()
        noted_lab.remove_pods()
        subprocess.run(["rm", "-r", str(folder)], check=True)


def inside(lab: Lab, pod: str, *command: str) -> str:
    """The output of a program of the host in a pod's network namespace."""
    info = lab.info(pod)
    path = info["namespaces"]["network"] if lab.name == "wherryd" else f"/proc/{info['pid']}/ns/net"
    done = subprocess.run([need("nsenter"), f"--net={path}", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pod_with_an_address(each_lab: WherryLab | ContainerdLab) -> None:
    """CNI's bridge: address in the status, interface up in the namespace, hostname, everything gone afterwards."""
    lab = each_lab
    lab.conflist()
    pod = lab.run_pod(lab.pod_config("addressed"))
    network = lab.status(pod).status.network
    assert network.ip.startswith(f"{lab.subnet}.")
    assert not network.additional_ips
    links = json.loads(inside(lab, pod, "ip", "-j", "addr"))
    assert {link["ifname"] for link in links} == {"lo", "eth0"}
    assert all("UP" in link["flags"] for link in links)
    assert network.ip in {each["local"] for link in links for each in link["addr_info"]}
    if lab.name == "wherryd":
        assert lab.info(pod)["cniResult"]["eth0"]["ips"][0]["address"] == f"{network.ip}/24"
    lab.kubelet.StopPodSandbox(pod_sandbox_id=pod)
    assert lab.status(pod).status.network.ip == ""
    second = lab.run_pod(lab.pod_config("second"))
    assert lab.status(second).status.network.ip.startswith(f"{lab.subnet}.")
    lab.remove_pods()
    leases = [path for path in (lab.folder / "ipam").rglob("*") if path.name.startswith(lab.subnet)]
    assert not leases
    if isinstance(lab, WherryLab):
        assert lab.daemon.settle() == []
        assert not list((lab.daemon.state / "cri/netns").glob("*"))


def test_ports_of_the_host(lab: WherryLab) -> None:
    """portmap gets the pod's port mappings, and who connects to the host's address comes to the pod."""
    lab.conflist(
        [
            {
                "type": "bridge",
                "bridge": lab.bridge,
                "isGateway": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(lab.folder / "ipam"),
                    "ranges": [[{"subnet": f"{lab.subnet}.0/24"}]],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ]
    )
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    config = lab.pod_config("ports")
    config.port_mappings.add(protocol=cri.TCP, container_port=80, host_port=port)
    config.port_mappings.add(protocol=cri.TCP, container_port=8080)  # without a port of the host: for nobody
    pod = lab.run_pod(config)
    netns = lab.info(pod)["namespaces"]["network"]
    busybox = need("busybox")
    server = subprocess.Popen(
        [need("nsenter"), f"--net={netns}", busybox, "nc", "-l", "-p", "80", "-e", "/bin/echo", "hi"]
    )
    try:

        def answer() -> bytes:
            try:
                with socket.create_connection((f"{lab.subnet}.1", port), 2) as sock:
                    return sock.recv(100)
            except OSError:
                return b""

        assert lab.until(answer, "the pod's port answers") == b"hi\n"
    finally:
        server.kill()
        server.wait()
        lab.remove_pods()


def test_what_plugins_are_told(noted_lab: WherryLab, noted: Noted) -> None:
    """Arguments of Kubernetes, capabilities, several addresses, the first of the preferred family."""
    lab = noted_lab
    offered = {"portMappings": True, "bandwidth": True, "dns": True, "io.kubernetes.cri.pod-annotations": True}
    addresses = ["fd00::7/64", "10.99.0.7/24", "10.99.1.7/24"]
    lab.conflist([{"type": "noted", "capabilities": offered, "addresses": addresses}])
    config = lab.pod_config(
        "told", dns_config=cri.DNSConfig(servers=["10.0.0.10"], searches=["svc"], options=["ndots:5"])
    )
    config.port_mappings.add(protocol=cri.UDP, container_port=53, host_port=5353, host_ip="127.0.0.1")
    config.annotations["kubernetes.io/ingress-bandwidth"] = "10M"
    config.annotations["kubernetes.io/egress-bandwidth"] = "500k"
    pod = lab.run_pod(config)
    network = lab.status(pod).status.network
    assert network.ip == "10.99.0.7"
    assert [each.ip for each in network.additional_ips] == ["fd00::7", "10.99.1.7"]
    (note,) = noted.notes("ADD")
    assert (note["CNI_IFNAME"], note["CNI_CONTAINERID"], note["CNI_PATH"]) == (
        "eth0",
        pod,
        f"/usr/lib/cni:{noted.folder}",
    )
    assert dict(pair.split("=") for pair in note["CNI_ARGS"].split(";")) == {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": "default",
        "K8S_POD_NAME": "told",
        "K8S_POD_INFRA_CONTAINER_ID": pod,
        "K8S_POD_UID": "uid-told",
    }
    assert note["config"]["runtimeConfig"] == {
        "portMappings": [{"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"}],
        "bandwidth": {
            "ingressRate": 10_000_000,
            "ingressBurst": 0xFFFFFFFF,
            "egressRate": 500_000,
            "egressBurst": 0xFFFFFFFF,
        },
        "dns": {"servers": ["10.0.0.10"], "searches": ["svc"], "options": ["ndots:5"]},
        "io.kubernetes.cri.pod-annotations": dict(config.annotations),
    }
    lab.kubelet.StopPodSandbox(pod_sandbox_id=pod)
    (note,) = noted.notes("DEL")
    assert note["CNI_CONTAINERID"] == pod
    assert note["config"]["prevResult"]["ips"][1]["address"] == "10.99.0.7/24"


def test_a_plugin_that_fails(noted_lab: WherryLab, noted: Noted) -> None:
    """ADD: refused in the plugin's words, nothing is left, the name is free. DEL: Stop says so, and is tried again."""
    lab = noted_lab
    lab.conflist([{"type": "noted"}])
    fail = noted.tell("fail-ADD")
    error = refused(lab.run_pod, lab.pod_config("failing"))
    assert "told to fail" in error.details()
    assert "by a test" in error.details()
    assert noted.notes("DEL")
    assert not lab.kubelet.ListPodSandbox().items
    assert lab.daemon.settle() == []
    fail.unlink()
    pod = lab.run_pod(lab.pod_config("failing"))
    fail = noted.tell("fail-DEL")
    error = refused(lab.kubelet.StopPodSandbox, pod_sandbox_id=pod)
    assert "told to fail" in error.details()
    assert lab.status(pod).status.state == cri.SANDBOX_NOTREADY
    assert "told to fail" in refused(lab.kubelet.RemovePodSandbox, pod_sandbox_id=pod).details()
    lab.restart()
    assert lab.status(pod).status.state == cri.SANDBOX_NOTREADY
    fail.unlink()
    lab.kubelet.StopPodSandbox(pod_sandbox_id=pod)
    lab.kubelet.RemovePodSandbox(pod_sandbox_id=pod)
    assert not lab.kubelet.ListPodSandbox().items
    assert lab.daemon.settle() == []


def test_a_plugin_that_stalls(noted_lab: WherryLab, noted: Noted) -> None:
    """A call's deadline is kept, the plugin is ended, what was made goes; others don't wait for it."""
    lab = noted_lab
    lab.conflist([{"type": "noted"}])
    stall = noted.tell("stall-ADD")
    call = lab.pod_config("stalling")
    began = time.monotonic()
    error = refused(lab.kubelet.RunPodSandbox, config=call, timeout=1.5)
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 40
    lab.run_pod(lab.pod_config("other", host_network=True))
    stall.unlink()
    lab.until(lambda: noted.notes("DEL"), "what was begun is taken back")

    def runs() -> str:
        try:
            return lab.run_pod(lab.pod_config("stalling"))
        except grpc.RpcError as refusal:
            if "is reserved for" not in str(refusal):
                raise
            return ""

    assert lab.until(runs, "the name is free again")


def test_a_plugin_that_is_not_there(noted_lab: WherryLab, noted: Noted) -> None:
    """The condition names it, and so does the pod's refusal."""
    lab = noted_lab
    path = lab.folder / "cni" / "10-pods.conflist"
    path.write_text(json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "nonesuch"}]}))
    condition = next(each for each in lab.kubelet.Status().status.conditions if each.type == "NetworkReady")
    assert not condition.status
    assert '"nonesuch"' in condition.message
    assert '"nonesuch"' in refused(lab.run_pod, lab.pod_config()).details()
    path.write_text("{")
    condition = next(each for each in lab.kubelet.Status().status.conditions if each.type == "NetworkReady")
    assert str(path) in condition.message
    assert lab.daemon.settle() == []


def test_sysctls_of_a_pod(lab: WherryLab) -> None:
    """Of the network and of IPC, also one of an interface that CNI makes."""
    lab.conflist()
    config = lab.pod_config("sysctls")
    config.linux.sysctls["net.ipv4.ip_unprivileged_port_start"] = "81"
    config.linux.sysctls["net.ipv4.conf.eth0.forwarding"] = "1"
    config.linux.sysctls["kernel.shm_rmid_forced"] = "1"
    pod = lab.run_pod(config)
    spaces = lab.info(pod)["namespaces"]
    command = [
        need("nsenter"),
        f"--net={spaces['network']}",
        f"--ipc={spaces['ipc']}",
        f"--uts={spaces['uts']}",
        "sh",
        "-c",
    ]
    script = (
        "hostname; sysctl -n net.ipv4.ip_unprivileged_port_start net.ipv4.conf.eth0.forwarding kernel.shm_rmid_forced"
    )
    said = subprocess.run([*command, script], capture_output=True, text=True, check=True).stdout.split()
    assert said == ["sysctls", "81", "1", "1"]
    lab.remove_pods()


def test_several_networks() -> None:
    """max_conf_num = 2: eth0 of the first file, eth1 of the second; a handler may have a folder of its own."""
    text = """max_conf_num = 2
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.apart]
  runtime_type = "io.containerd.runc.v2"
  cni_conf_dir = "{folder}"
"""
    folder = Path(f"/tmp/wherry-apart-{_PID}")
    folder.mkdir()
    lab = WherryLab(text.format(folder=folder), image=False)

    def ptp(name: str, subnet: str) -> str:
        ipam = {"type": "host-local", "dataDir": str(lab.folder / name), "ranges": [[{"subnet": subnet}]]}
        return json.dumps({"cniVersion": "1.0.0", "name": name, "plugins": [{"type": "ptp", "ipam": ipam}]})

    try:
        (lab.folder / "cni" / "10-one.conflist").write_text(ptp("one", f"{lab.subnet}.0/26"))
        (lab.folder / "cni" / "20-two.conflist").write_text(ptp("two", f"{lab.subnet}.64/26"))
        (lab.folder / "cni" / "30-three.conflist").write_text(ptp("three", f"{lab.subnet}.128/26"))
        (folder / "10-apart.conflist").write_text(ptp("apart", f"{lab.subnet}.192/26"))
        pod = lab.run_pod(lab.pod_config("both"))
        links = {link["ifname"]: link for link in json.loads(inside(lab, pod, "ip", "-j", "addr"))}
        assert set(links) == {"lo", "eth0", "eth1"}
        last = [int(links[name]["addr_info"][0]["local"].split(".")[3]) for name in ("eth0", "eth1")]
        assert [each // 64 for each in last] == [0, 1]
        assert lab.status(pod).status.network.ip == links["eth0"]["addr_info"][0]["local"]
        pod = lab.run_pod(lab.pod_config("apart"), handler="apart")
        assert int(lab.status(pod).status.network.ip.split(".")[3]) // 64 == 3
        assert lab.status(pod).status.runtime_handler == "apart"
        lab.remove_pods()
        assert lab.daemon.settle() == []
    finally:
        lab.close()
        subprocess.run(["rm", "-r", str(folder)], check=True)


def test_a_configuration_by_template() -> None:
    """UpdateRuntimeConfig makes the network's file of the pods' CIDR, once."""
    template = Path(f"/tmp/wherry-template-{_PID}")
    template.write_text(
        """{"cniVersion": "0.3.1", "name": "made", "plugins": [{"type": "ptp", "ipam": {"type": "host-local",
        "first": "{{.PodCIDR}}",
        "ranges": [{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}],
        "routes": [{{range $i, $route := .Routes}}{{if $i}}, {{end}}{"dst": "{{$route}}"}{{end}}]}}]}"""
    )
    lab = WherryLab(f'conf_template = "{template}"', image=False)
    try:
        config = cri.RuntimeConfig(network_config=cri.NetworkConfig(pod_cidr="10.9.0.0/24,fd09::/64"))
        lab.kubelet.UpdateRuntimeConfig(runtime_config=config)
        (made,) = (lab.folder / "cni").glob("*")
        ipam = json.loads(made.read_text())["plugins"][0]["ipam"]
        assert ipam["first"] == "10.9.0.0/24"
        assert ipam["ranges"] == [[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd09::/64"}]]
        assert ipam["routes"] == [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
        assert all(each.status for each in lab.kubelet.Status().status.conditions)
        config.network_config.pod_cidr = "10.10.0.0/24"
        lab.kubelet.UpdateRuntimeConfig(runtime_config=config)
        assert "10.9.0.0" in made.read_text()
        made.unlink()
        config.network_config.pod_cidr = "nonsense"
        error = refused(lab.kubelet.UpdateRuntimeConfig, runtime_config=config)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    finally:
        lab.close()
        template.unlink()
