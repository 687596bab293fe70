"""CRI as a kubelet calls it: over gRPC, on the socket of `wherryd` or of Debian's containerd."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc

from tests import busybox, leftovers
from tests.peers import need
from tests.wherryd import Wherryd
from wherry.proto import cri_pb2 as cri
from wherry.proto.service import methods

T = TypeVar("T")
NAMESPACE = "k8s.io"
CNI_BIN = "/usr/lib/cni"
# calls of a kubelet have a deadline of two minutes, RunPodSandbox of four
TIMEOUT = 100.0
_CONTAINERD = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{folder}/d.sock"
[ttrpc]
  address = "{folder}/d.sock.ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni_bin}"
    conf_dir = "{folder}/cni"
"""
_WHERRY = """
version = 2
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{cni_bin}"
  conf_dir = "{folder}/cni"
{more}
"""


class Kubelet:
    """A client of both services: `kubelet.RunPodSandbox(config=…)` is that call, with the request's fields."""

    def __init__(self, address: str) -> None:
        # a daemon that comes back is found soon; `min` is how long one attempt may take (as with a kubelet)
        backoff = {"initial": 100, "min": 5000, "max": 200}
        options: list[tuple[str, Any]] = [("grpc.default_authority", "localhost")]
        options += [(f"grpc.{word}_reconnect_backoff_ms", value) for word, value in backoff.items()]
        self._channel = grpc.insecure_channel(f"unix:{address}", options=options)

    def close(self) -> None:
        self._channel.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        for service in ("runtime.v1.RuntimeService", "runtime.v1.ImageService"):
            method = methods(service).get(name)
            if method is not None:
                kind = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
                call = kind(method.path, method.request.SerializeToString, method.response.FromString)
                break
        else:
            raise AttributeError(name)
        make = method.request

        def called(request: Any = None, *, timeout: float = TIMEOUT, **fields: Any) -> Any:
            return call(make(**fields) if request is None else request, timeout=timeout, wait_for_ready=True)

        return called


def refused(call: Callable[..., Any], *args: Any, **fields: Any) -> Any:
    """The error (grpc.RpcError) of a call that must fail."""
    try:
        answer = call(*args, **fields)
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"it was answered: {answer}")


class Lab:
    """A daemon with CRI, a kubelet's client on it, and a folder `cni` for network configurations."""

    def __init__(self, folder: Path, address: str, name: str) -> None:
        self.folder = folder
        self.address = address
        self.name = name
        self.kubelet = Kubelet(address)
        self.logs = folder / "pods"
        (folder / "cni").mkdir(exist_ok=True)
        number = uuid.uuid4().int
        self.bridge = f"k8s{number % 10**8}"
        self.subnet = f"10.{100 + number % 99}.{number // 99 % 256}"

    # -- networks

    def conflist(self, plugins: list[dict[str, Any]] | None = None, **more: Any) -> None:
        """Write the network's configuration; by default a bridge with host-local addresses and port mappings."""
        if plugins is None:
            plugins = [
                {
                    "type": "bridge",
                    "bridge": self.bridge,
                    "isGateway": True,
                    "ipMasq": False,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": str(self.folder / "ipam"),
                        "ranges": [[{"subnet": f"{self.subnet}.0/24"}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                }
            ]
        value = {"cniVersion": "1.0.0", "name": "pods", "plugins": plugins, **more}
        path = self.folder / "cni" / "10-pods.conflist"
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(value))
        beside.rename(path)
        self.until(self._network_ready, "the network's configuration is read")

    def _network_ready(self) -> bool:
        conditions = {each.type: each.status for each in self.kubelet.Status().status.conditions}
        return bool(conditions["NetworkReady"])

    # -- pods

    def pod_config(self, name: str = "", *, host_network: bool = False, attempt: int = 0, **more: Any) -> Any:
        """A pod's configuration; `more` are fields of it."""
        name = name or f"pod-{uuid.uuid4().hex[:8]}"
        (self.logs / name).mkdir(parents=True, exist_ok=True)  # as a kubelet does
        config = cri.PodSandboxConfig(
            metadata=cri.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="default", attempt=attempt),
            log_directory=str(self.logs / name),
            **more,
        )
        if not more.get("hostname") and not host_network:
            config.hostname = name
        options = config.linux.security_context.namespace_options
        if host_network:
            options.network = cri.NODE
        if options.pid == cri.POD:
            options.pid = cri.CONTAINER
        return config

    def run_pod(self, config: Any = None, *, handler: str = "", **more: Any) -> str:
        """Run a pod (on the host's network, unless a configuration says otherwise); its id."""
        config = config if config is not None else self.pod_config(**{"host_network": True, **more})
        return str(self.kubelet.RunPodSandbox(config=config, runtime_handler=handler).pod_sandbox_id)

    def status(self, pod: str, *, verbose: bool = False) -> Any:
        """PodSandboxStatus."""
        return self.kubelet.PodSandboxStatus(pod_sandbox_id=pod, verbose=verbose)

    def info(self, pod: str) -> dict[str, Any]:
        """The verbose information of a pod."""
        return cast("dict[str, Any]", json.loads(self.status(pod, verbose=True).info["info"]))

    def remove_pods(self) -> None:
        """Stop and remove all pods, as a kubelet that drains a node: what doesn't answer in time is asked again."""
        end = time.monotonic() + TIMEOUT
        while True:
            try:
                for item in self.kubelet.ListPodSandbox().items:
                    self.kubelet.StopPodSandbox(pod_sandbox_id=item.id)
                    self.kubelet.RemovePodSandbox(pod_sandbox_id=item.id)
            except grpc.RpcError as error:
                silent = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED
                if error.code() not in silent or time.monotonic() > end:
                    raise
                time.sleep(0.2)
            else:
                return

    # -- containers

    def container_config(self, name: str, command: list[str], **more: Any) -> Any:
        """A container's configuration of the tests' image."""
        return cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name=name),
            image=cri.ImageSpec(image=busybox.NAME),
            command=command,
            log_path=f"{name}.log",
            **more,
        )

    def create(self, pod: str, config: Any, pod_config: Any) -> str:
        """CreateContainer; its id."""
        request = cri.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=pod_config)
        return str(self.kubelet.CreateContainer(request).container_id)

    def run(self, pod: str, config: Any, pod_config: Any) -> str:
        """Create and start a container; its id."""
        container = self.create(pod, config, pod_config)
        self.kubelet.StartContainer(container_id=container)
        return container

    def exec(self, container: str, *command: str, timeout: int = 60) -> str:
        """ExecSync; its output. The command must succeed."""
        done = self.kubelet.ExecSync(container_id=container, cmd=command, timeout=timeout)
        assert done.exit_code == 0, done
        return str(done.stdout.decode())

    def container_status(self, container: str) -> Any:
        """ContainerStatus."""
        return self.kubelet.ContainerStatus(container_id=container).status

    def exited(self, container: str, timeout: float = 60) -> Any:
        """Wait until a container has exited; its status."""
        return self.until(
            lambda: (status := self.container_status(container)).state == cri.CONTAINER_EXITED and status,
            f"container {container} ends",
            timeout,
        )

    @staticmethod
    def until(found: Callable[[], T], what: str, timeout: float = 60) -> T:
        """Ask until the answer is true; it."""
        end = time.monotonic() + timeout
        while not (answer := found()):
            assert time.monotonic() < end, f"in vain: {what}"
            time.sleep(0.02)
        return answer

    def import_busybox(self) -> str:
        """The tests' image in the namespace k8s.io."""
        return self.import_image([])

    def import_image(self, command: list[str]) -> str:
        """The same, with a command of its own for who names none."""
        archive = self.folder / "busybox.tar"
        busybox.write_archive(archive)
        if command:
            _set_command(archive, command)
        ctr = [need("ctr"), "--address", self.address, "--namespace", NAMESPACE, "images", "import", str(archive)]
        subprocess.run(ctr, capture_output=True, check=True, timeout=60)
        return busybox.NAME

    def clean_up(self) -> None:
        """Undo what plugins made."""
        self.kubelet.close()
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True, check=False)


class WherryLab(Lab):
    """`wherryd`; `daemon` is it. `more` are lines of the configuration, below the table of CNI."""

    def __init__(self, more: str = "", *, image: bool = True, env: Mapping[str, str] | None = None) -> None:
        self.daemon = Wherryd(env=dict(env or {}))
        self.daemon.folder.chmod(0o711)  # for containers whose root isn't the host's
        text = _WHERRY.format(folder=self.daemon.folder, cni_bin=CNI_BIN, more=more)
        self.daemon.config.write_text(text)
        super().__init__(self.daemon.folder, self.daemon.address, "wherryd")
        try:
            self.daemon.start()
            if image:
                self.import_busybox()
        except BaseException:
            self.daemon.close()
            raise

    def restart(self, *, kill: bool = True) -> None:
        """SIGKILL (or SIGTERM), and another daemon."""
        if kill:
            self.daemon.kill()
        else:
            self.daemon.stop()
        self.daemon.start()

    def close(self) -> None:
        """End everything."""
        with contextlib.suppress(grpc.RpcError):
            self.remove_pods()
        self.clean_up()
        self.daemon.close()


class ContainerdLab(Lab):
    """Debian's containerd with its own CRI plugin, whose pods have the tests' busybox as their pause image."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="cd-", dir="/tmp"))
        self._log = (folder / "log").open("wb")
        (folder / "config.toml").write_text(_CONTAINERD.format(folder=folder, pause=busybox.NAME, cni_bin=CNI_BIN))
        self.process = subprocess.Popen(
            [need("containerd"), "--config", str(folder / "config.toml")], stdout=self._log, stderr=self._log
        )
        super().__init__(folder, str(folder / "d.sock"), "containerd")
        try:
            self.until(self._serves, "containerd serves", 30)
            self.import_image(["/bin/sleep", "1000000"])  # a pause that stays
        except BaseException:
            self.close()
            raise

    def _serves(self) -> bool:
        with contextlib.suppress(grpc.RpcError):
            self.kubelet.Version(timeout=1.0)
            return True
        return False

    def close(self) -> None:
        """End everything."""
        with contextlib.suppress(grpc.RpcError):
            self.remove_pods()
        self.clean_up()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self._log.close()
        leftovers.end(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)


def shims_in(lab: WherryLab, bundle: Path) -> list[int]:
    """The processes that work in a bundle: a shim, and what it forks."""
    found = []
    for pid in lab.daemon.processes():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/cwd") == str(bundle):
                found.append(pid)
    return found


def _set_command(archive: Path, command: list[str]) -> None:
    """Give the image of an archive a command that stays."""
    with tarfile.open(archive) as tar:
        files = {item.name: tar.extractfile(item).read() for item in tar if item.isfile()}  # type: ignore[union-attr]
    index = json.loads(files["index.json"])

    def blob(digest: str) -> str:
        return f"blobs/{digest.replace(':', '/')}"

    def put(value: Any) -> dict[str, Any]:
        data = json.dumps(value).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        files[blob(digest)] = data
        return {"digest": digest, "size": len(data)}

    manifest = json.loads(files[blob(index["manifests"][0]["digest"])])
    config = json.loads(files[blob(manifest["config"]["digest"])])
    config["config"]["Cmd"] = command
    manifest["config"] |= put(config)
    index["manifests"][0] |= put(manifest)
    files["index.json"] = json.dumps(index).encode()
    with tarfile.open(archive, "w") as tar:
        for name, data in files.items():
            item = tarfile.TarInfo(name)
            item.size = len(data)
            tar.addfile(item, io.BytesIO(data))


def closing(lab: WherryLab | ContainerdLab) -> Iterator[Any]:
    """For fixtures: the lab, closed at the end."""
    try:
        yield lab
    finally:
        lab.close()
