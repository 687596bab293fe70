"""CNI: Debian's plugins in real namespaces, and a plugin that writes down what it was told (of version 1.1)."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Wherry
from tests.network.conftest import START, import_image, make_daemon
from tests.network.traffic import HTTP, free_port, http, until
from tests.peers import missing, need
from tests.wherryd import BUSYBOX
from wherry.core.errors import DeadlineExceeded, InvalidArgument, NotFound
from wherry.network.cni import Attachment, Cni, PluginError, load_all

PLUGINS = "/usr/lib/cni"
BRIDGE = f"wcni{os.getpid() % 100000}"

# says in LOG what it was run with; answers ADD with the previous result and its own interface added
RECORDER = """#!/usr/bin/python3 -I
import json, os, sys
config = json.load(sys.stdin)
command = os.environ["CNI_COMMAND"]
folder = os.path.dirname(sys.argv[0])
keys = ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH")
seen = {"command": command, "config": config, **{key: os.environ.get(key) for key in keys}}
with open(folder + "/log", "a") as log:
    log.write(json.dumps(seen) + "\\n")
fail = config.get("fail", {}).get(command)
if fail and not os.path.exists(folder + "/mended"):
    version = config["cniVersion"]
    print(json.dumps({"cniVersion": version, "code": fail, "msg": "told to fail", "details": config["name"]}))
    sys.exit(1)
if command == "ADD" and config.get("sleep"):
    import time
    time.sleep(config["sleep"])
if command == "VERSION":
    print(json.dumps({"cniVersion": "1.1.0", "supportedVersions": ["0.4.0", "1.0.0", "1.1.0"]}))
elif command == "ADD":
    result = config.get("prevResult") or {"interfaces": [], "ips": []}
    result["cniVersion"] = config["cniVersion"]
    result["interfaces"].append({"name": config["mark"], "sandbox": os.environ["CNI_NETNS"]})
    count = len(result["interfaces"])
    result["ips"].append({"address": "10.9.8.%d/24" % count, "interface": count - 1})
    print(json.dumps(result))
"""


class Lab:
    """A folder with configurations, the recorder and a cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf, self.bin, self.cache = folder / "net.d", folder / "bin", folder / "cache"
        self.conf.mkdir()
        self.bin.mkdir()
        plugin = self.bin / "recorder"
        plugin.write_text(RECORDER)
        plugin.chmod(0o755)

    def cni(self, timeout: float = 30.0) -> Cni:
        return Cni(str(self.conf), [str(self.bin), PLUGINS], str(self.cache), timeout)

    def write(self, name: str, *plugins: dict[str, object], version: str = "1.1.0", **more: object) -> None:
        value = {"cniVersion": version, "name": name, "plugins": plugins, **more}
        (self.conf / f"{name}.conflist").write_text(json.dumps(value))

    def log(self) -> list[dict[str, object]]:
        """What the recorder was told, and forgotten."""
        path = self.bin / "log"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return found


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def recorder(mark: str, **more: object) -> dict[str, object]:
    return {"type": "recorder", "mark": mark, **more}


async def test_chain_hands_results_on_and_deletes_backwards(lab: Lab) -> None:
    lab.write(
        "chain",
        recorder("a", capabilities={"portMappings": True, "mac": False}),
        recorder("b", capabilities={"mac": True}),
    )
    cni = lab.cni()
    network = cni.load("chain")
    mapping = [{"hostPort": 1, "containerPort": 2, "protocol": "tcp"}]
    attachment = Attachment(
        "c1", "eth7", "/run/netns/x", [("K", "v"), ("L", "w")], {"portMappings": mapping, "mac": "02:00:00:00:00:01"}
    )
    result = await cni.add(network, attachment)
    assert [item.name for item in result.interfaces] == ["a", "b"]
    assert [address.address for _, address in result.inside()] == ["10.9.8.1/24", "10.9.8.2/24"]
    first, second = lab.log()
    assert (first["command"], first["CNI_CONTAINERID"], first["CNI_IFNAME"]) == ("ADD", "c1", "eth7")
    assert (first["CNI_NETNS"], first["CNI_ARGS"]) == ("/run/netns/x", "K=v;L=w")
    assert first["CNI_PATH"] == f"{lab.bin}:{PLUGINS}"
    config = first["config"]
    assert isinstance(config, dict)
    assert config["runtimeConfig"] == {"portMappings": mapping}
    assert "capabilities" not in config
    assert "prevResult" not in config
    assert (config["name"], config["cniVersion"]) == ("chain", "1.1.0")
    other = second["config"]
    assert isinstance(other, dict)
    assert other["runtimeConfig"] == {"mac": "02:00:00:00:00:01"}
    assert [item["name"] for item in other["prevResult"]["interfaces"]] == ["a"]

    await cni.check("chain", attachment)
    assert [(entry["command"], entry["config"]["mark"]) for entry in lab.log()] == [("CHECK", "a"), ("CHECK", "b")]  # type: ignore[index]

    # with the configuration and the arguments of ADD, also by another process, after the file is gone
    (lab.conf / "chain.conflist").unlink()
    await lab.cni().delete("chain", Attachment("c1", "eth7"))
    deleted = lab.log()
    assert [(entry["command"], entry["config"]["mark"]) for entry in deleted] == [("DEL", "b"), ("DEL", "a")]  # type: ignore[index]
    assert deleted[1]["config"]["runtimeConfig"] == {"portMappings": mapping}  # type: ignore[index]
    assert len(deleted[0]["config"]["prevResult"]["interfaces"]) == 2  # type: ignore[index]
    assert deleted[0]["CNI_NETNS"] == ""
    await lab.cni().delete("chain", Attachment("c1", "eth7"))  # again: nothing to do
    assert lab.log() == []
    with pytest.raises(NotFound):
        await lab.cni().check("chain", attachment)


async def test_failed_add_is_taken_back(lab: Lab) -> None:
    lab.write("broken", recorder("a"), recorder("b", fail={"ADD": 7}), recorder("c"))
    cni = lab.cni()
    with pytest.raises(PluginError, match=r"recorder, ADD: told to fail \(broken\)") as raised:
        await cni.add(cni.load("broken"), Attachment("c", "eth0", "/x"))
    assert raised.value.number == 7
    told = [(entry["command"], entry["config"]["mark"]) for entry in lab.log()]  # type: ignore[index]
    assert told == [("ADD", "a"), ("ADD", "b"), ("DEL", "c"), ("DEL", "b"), ("DEL", "a")]
    assert cni.attachments() == []


async def test_delete_goes_on_and_succeeds_in_the_end(lab: Lab) -> None:
    lab.write("sticky", recorder("a"), recorder("b", fail={"DEL": 11}))
    cni = lab.cni()
    attachment = Attachment("c", "eth0", "/x")
    await cni.add(cni.load("sticky"), attachment)
    lab.log()
    with pytest.raises(PluginError):
        await cni.delete("sticky", attachment)
    assert [entry["config"]["mark"] for entry in lab.log()] == ["b", "a"]  # type: ignore[index]
    assert [item.attachment.container for item in cni.attachments()] == ["c"]  # kept for the next try
    (lab.bin / "mended").touch()
    await lab.cni().delete("sticky", attachment)
    assert cni.attachments() == []


async def test_a_process_killed_during_add_leaves_a_trace_to_delete_by(lab: Lab) -> None:
    lab.write("slow", recorder("a", sleep=30))
    cni = lab.cni()
    adding = asyncio.create_task(cni.add(cni.load("slow"), Attachment("c", "eth0", "/x")))
    await asyncio.to_thread(until, lab.cni().attachments)
    assert lab.cni().attachments()[0].result == {}
    adding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await adding
    assert cni.attachments() == []


async def test_gc_status_and_version(lab: Lab) -> None:
    lab.write("net", recorder("a"), recorder("b", fail={"STATUS": 50}))
    cni = lab.cni()
    network = cni.load("net")
    for name in ("stays", "goes"):
        await cni.add(network, Attachment(name, "eth0", "/x"))
    lab.log()
    await cni.gc(network, [Attachment("stays", "eth0")])
    told = lab.log()
    assert [(item["command"], item["CNI_CONTAINERID"]) for item in told[:2]] == [("DEL", "goes"), ("DEL", "goes")]
    assert [item["command"] for item in told[2:]] == ["GC", "GC"]
    valid = [{"containerID": "stays", "ifname": "eth0"}]
    assert told[2]["config"]["cni.dev/valid-attachments"] == valid  # type: ignore[index]
    assert [item.attachment.container for item in cni.attachments()] == ["stays"]
    with pytest.raises(PluginError) as raised:
        await cni.status(network)
    assert raised.value.number == 50
    assert "1.1.0" in await cni.version("recorder")
    await cni.validate(network)
    lab.log()
    lab.write("off", recorder("a"), disableGC=True, disableCheck="true")
    off = cni.load("off")
    await cni.add(off, Attachment("x", "eth0", "/x"))
    await cni.check("off", Attachment("x", "eth0"))
    await cni.gc(off, [Attachment("x", "eth0")])
    assert [item["command"] for item in lab.log()] == ["ADD"]


async def test_time_limit_ends_the_plugin(lab: Lab) -> None:
    lab.write("slow", recorder("a", sleep=60))
    cni = lab.cni(timeout=0.5)
    with pytest.raises(DeadlineExceeded, match=r"recorder, ADD: no answer after 0\.5 s"):
        await cni.add(cni.load("slow"), Attachment("c", "eth0", "/x"))


def test_configurations(lab: Lab) -> None:
    lab.write("both", recorder("a"), version="0.4.0", cniVersions=["0.3.1", "1.0.0", "9.0.0"])
    (lab.conf / "single.conf").write_text('{"cniVersion": "0.3.1", "name": "single", "type": "recorder"}')
    (lab.conf / "bad.conflist").write_text("{")
    (lab.conf / "worse.conflist").write_text('{"cniVersion": "1.0.0", "name": "../up", "plugins": [{"type": "x"}]}')
    (lab.conf / "path.conflist").write_text('{"cniVersion": "1.0.0", "name": "p", "plugins": [{"type": "../x"}]}')
    (lab.conf / "future.conflist").write_text('{"cniVersion": "7.0.0", "name": "f", "plugins": [{"type": "x"}]}')
    (lab.conf / "both").mkdir()
    (lab.conf / "both" / "10-more.conf").write_text('{"type": "recorder", "mark": "more"}')
    networks, wrong = load_all(str(lab.conf))
    assert {network.name: network.version for network in networks} == {"both": "1.0.0", "single": "0.3.1"}
    assert [plugin["mark"] for plugin in networks[0].plugins] == ["a", "more"]
    assert len(wrong) == 4
    assert any("bad.conflist: not JSON" in text for text in wrong)
    with pytest.raises(NotFound):
        lab.cni().load("nobody")


async def test_wrong_attachments(lab: Lab) -> None:
    lab.write("net", recorder("a"), {"type": "nosuchplugin"})
    cni = lab.cni()
    for attachment in (Attachment("../c", "eth0", "/x"), Attachment("c", "a/b", "/x"), Attachment("c", "eth0")):
        with pytest.raises(InvalidArgument):
            await cni.add(cni.load("net"), attachment)
    with pytest.raises(NotFound, match="nosuchplugin"):
        await cni.add(cni.load("net"), Attachment("c", "eth0", "/x"))


# -- with the standard plugins


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace, by its path."""
    if os.geteuid() != 0:
        pytest.skip("namespaces take root")
    if not os.path.exists(f"{PLUGINS}/bridge"):
        missing("CNI's plugins are missing: apt-get install containernetworking-plugins")
    name = f"wcni{os.getpid()}"
    before = {tool: output(f"{tool}-save") for tool in ("iptables", "ip6tables")}
    subprocess.run([need("ip"), "netns", "add", name], check=True)
    try:
        yield f"/run/netns/{name}"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False, capture_output=True)
        for tool, text in before.items():
            forget_chains(tool, text)


def output(*command: str) -> str:
    """What a program prints; whether it fails or not."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def forget_chains(tool: str, before: str) -> None:
    """portmap leaves its chains behind, which weren't there before: they go, and the jumps to them."""
    rules = output(f"{tool}-save", "-t", "nat").splitlines()
    ours = [line.split()[0][1:] for line in rules if line.startswith(":CNI-HOSTPORT") and line.split()[0] not in before]
    for line in rules:
        if line.startswith("-A") and any(f"-j {chain}" in line for chain in ours):
            subprocess.run([tool, "-t", "nat", "-D", *shlex.split(line)[1:]], check=False, capture_output=True)
    for flag in ("-F", "-X"):
        for chain in ours:
            subprocess.run([tool, "-t", "nat", flag, chain], check=False, capture_output=True)
    family = "ip6" if tool == "ip6tables" else "ip"
    if "*nat" not in before and "-A" not in output(f"{tool}-save", "-t", "nat"):
        subprocess.run(["nft", "delete", "table", family, "nat"], check=False, capture_output=True)


def standard(lab: Lab, *, ports: bool = True) -> None:
    portmap: list[dict[str, object]] = [{"type": "portmap", "capabilities": {"portMappings": True}}] if ports else []
    lab.write(
        "standard",
        {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipMasq": False,
            "ipam": {
                "type": "host-local",
                "dataDir": str(lab.folder / "ipam"),
                "ranges": [[{"subnet": "10.248.99.0/24"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        *portmap,
        {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        {"type": "tuning", "capabilities": {"mac": True}, "sysctl": {"net.ipv4.tcp_fin_timeout": "30"}},
        version="1.0.0",
    )


@pytest.mark.parametrize("ports", [True, False])
async def test_standard_plugins(lab: Lab, namespace: str, ports: bool) -> None:
    standard(lab, ports=ports)
    cni = lab.cni()
    network = cni.load("standard")
    await cni.validate(network)
    port = free_port()
    attachment = Attachment(
        "wherry-test",
        "eth0",
        namespace,
        capabilities={
            "portMappings": [{"hostPort": port, "containerPort": 80, "protocol": "tcp"}],
            "bandwidth": {"ingressRate": 8_000_000, "ingressBurst": 8_000_000, "egressRate": 0, "egressBurst": 0},
            "mac": "02:11:22:33:44:55",
        },
    )
    try:
        result = await cni.add(network, attachment)
        (interface, address), *_ = result.inside()
        assert interface is not None
        assert interface.name == "eth0"
        assert address.address.startswith("10.248.99.")
        inside = ("ip", "-n", os.path.basename(namespace))
        shown = output(*inside, "addr")
        assert address.address in shown
        assert "02:11:22:33:44:55" in shown
        assert "tbf" in output("tc", "qdisc")
        assert (f"--dport {port}" in output("iptables-save", "-t", "nat")) is ports
        if not ports:  # portmap 1.1.1 looks for rules of IPv6 that it didn't make
            await cni.check("standard", attachment)
            output(*inside, "addr", "flush", "dev", "eth0")  # somebody takes the address away: CHECK sees it
            with pytest.raises(PluginError):
                await cni.check("standard", attachment)
    finally:
        await cni.delete("standard", attachment)
    assert not any((lab.folder / "ipam" / "standard").glob("10.*"))
    await cni.delete("standard", attachment)
    assert f"--dport {port}" not in output("iptables-save", "-t", "nat")


def test_container_on_a_network_of_cni(lab: Lab, namespace: str) -> None:
    """`wherry run --net NAME` with a conflist; what was left when the daemon died is deleted by the next one."""
    standard(lab)
    daemon = make_daemon()
    daemon.config.write_text(
        f'[network]\npools = ["10.247.0.0/16/24"]\ncni_conf_dir = "{lab.conf}"\ncni_bin_dirs = ["{PLUGINS}"]\n'
    )
    leases = lab.folder / "ipam" / "standard"
    try:
        daemon.start(START)
        import_image(daemon)
        wherry = Wherry(daemon.address)
        assert "standard" in wherry.run("network", "ls").stdout
        port = free_port()
        script = HTTP.format(word="cni", port=80)
        wherry.run("run", "-d", "--name", "web", "--net", "standard", "-p", f"{port}:80", BUSYBOX, "sh", "-c", script)
        found = json.loads(wherry.run("inspect", "web").stdout)[0]["NetworkSettings"]["Networks"]["standard"]
        assert found["IPAddress"].startswith("10.248.99.")
        assert until(lambda: http(found["IPAddress"], 80)) == "cni"
        assert until(lambda: http("127.0.0.1", port)) == "cni"
        wherry.run("rm", "-f", "web")
        assert until(lambda: list(leases.glob("10.*")), lambda left: not left) == []
        wherry.run("run", "-d", "--name", "lost", "--net", "standard", BUSYBOX, "sleep", "1000")
        daemon.kill()
        for pid in daemon.processes():
            os.kill(pid, 9)
        subprocess.run(["rm", "-rf", str(daemon.state / "tasks")], check=False)
        assert list(leases.glob("10.*"))
        daemon.start(START)
        assert until(lambda: list(leases.glob("10.*")), lambda left: not left) == []
    finally:
        daemon.close()
