"""The node itself: Version, Status, RuntimeConfig, UpdateRuntimeConfig."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import structlog

from wherry.core.errors import WherryError
from wherry.cri import conf_template
from wherry.cri.handlers import OURS, systemd_cgroups
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from wherry.cri.node import Node

log = structlog.get_logger(__name__)

RUNTIME = "wherry"
_CRI_VERSION = "v1"
_ASK = 5.0  # seconds for a runtime to say what it can
# what Version answers as its own version to whoever asks: containerd's constant, which kubelets don't look at
_KUBE_VERSION = "0.1.0"
# the file that is made of a template, as containerd names it
_MADE_CONF = "10-containerd-net.conflist"


class NodeStatus:
    """What a kubelet asks of a node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._known: dict[str, cri.RuntimeHandlerFeatures] = {}

    def version(self, request: cri.VersionRequest) -> cri.VersionResponse:
        """Who this is."""
        return cri.VersionResponse(
            version=_KUBE_VERSION,
            runtime_name=RUNTIME,
            runtime_version=self._node.host.version,
            runtime_api_version=_CRI_VERSION,
        )

    async def status(self, request: cri.StatusRequest) -> cri.StatusResponse:
        """The conditions, the handlers with what they can, and with `verbose` the configuration."""
        response = cri.StatusResponse(features=cri.RuntimeFeatures(supplemental_groups_policy=True))
        network = cri.RuntimeCondition(type="NetworkReady", status=True)
        last = "OK"
        try:
            await self._node.pods.network.ready()
        except (WherryError, OSError) as error:
            last = error.message if isinstance(error, WherryError) else str(error)
            network.status = False
            network.reason = "NetworkPluginNotReady"
            network.message = f"Network plugin returns error: {last}"
        runtime = cri.RuntimeCondition(type="RuntimeReady", status=True)
        response.status.conditions.extend([runtime, network])
        for name in ("", *sorted(self._node.settings.handlers)):
            handler = cri.RuntimeHandler(name=name, features=await self._features(name))
            response.runtime_handlers.append(handler)
        if request.verbose:
            response.info["config"] = json.dumps(self._config())
            response.info["cniconfig"] = json.dumps(self._networks())
            response.info["lastCNILoadStatus"] = last
            response.info["lastCNILoadStatus.default"] = last
        return response

    async def _features(self, name: str) -> cri.RuntimeHandlerFeatures:
        """What a handler's runtime can do: what it says by `features` (OCI), once; ours can all of it."""
        settings = self._node.settings
        handler = settings.handlers.get(name or settings.default_handler)
        if handler is None or (handler.runtime_path or handler.runtime_type) not in OURS:
            return cri.RuntimeHandlerFeatures()
        binary = str(handler.options.get("BinaryName") or "")
        if binary in ("", "wherry-runtime"):
            return cri.RuntimeHandlerFeatures(recursive_read_only_mounts=True, user_namespaces=True)
        if binary not in self._known:
            self._known[binary] = await _ask(binary)
        return self._known[binary]

    def _config(self) -> dict[str, Any]:
        """The settings by containerd's names, and where things are."""
        found: dict[str, Any] = _camel(dataclasses.asdict(self._node.settings))
        places, host = self._node.places, self._node.host
        found["containerdEndpoint"] = host.socket
        found["rootDir"] = os.path.join(places.root, "cri")
        found["stateDir"] = os.path.join(places.state, "cri")
        return found

    def _networks(self) -> dict[str, Any]:
        settings = self._node.settings
        try:
            networks = self._node.pods.network.networks()
        except WherryError:
            networks = []
        return {
            "PluginDirs": list(settings.cni_bin_dirs),
            "PluginConfDir": settings.cni.conf_dir,
            "PluginMaxConfNum": settings.cni.max_conf_num,
            "Prefix": "eth",
            "Networks": [
                {
                    "Config": {"Name": network.name, "CNIVersion": network.version, "Plugins": list(network.plugins)},
                    "IFName": f"eth{at}",
                    "File": network.path,
                }
                for at, network in enumerate(networks)
            ],
        }

    def runtime_config(self, request: cri.RuntimeConfigRequest) -> cri.RuntimeConfigResponse:
        """Who makes cgroups: a kubelet does as the runtime does."""
        driver = cri.SYSTEMD if systemd_cgroups(self._node.settings) else cri.CGROUPFS
        return cri.RuntimeConfigResponse(linux=cri.LinuxRuntimeConfiguration(cgroup_driver=driver))

    async def update_runtime_config(self, request: cri.UpdateRuntimeConfigRequest) -> cri.UpdateRuntimeConfigResponse:
        """The addresses of this node's pods: where there is a template, a network's configuration is made of them.

        Where a network is ready, it stays as it is. Raises InvalidArgument for a CIDR or a template that is wrong.
        """
        cidrs = [part for part in request.runtime_config.network_config.pod_cidr.split(",") if part]
        template = self._node.settings.cni.conf_template
        if not cidrs:
            return cri.UpdateRuntimeConfigResponse()
        if not template:
            log.info("the kubelet tells its pods' addresses; there is no conf_template for them", cidr=",".join(cidrs))
            return cri.UpdateRuntimeConfigResponse()
        try:
            await self._node.pods.network.ready()
        except (WherryError, OSError):
            folder = self._node.settings.cni.conf_dir
            conf_template.write(template, os.path.join(folder, _MADE_CONF), cidrs)
            log.info("network configuration made", folder=folder, cidr=",".join(cidrs))
        return cri.UpdateRuntimeConfigResponse()


async def _ask(binary: str) -> cri.RuntimeHandlerFeatures:
    """What `BINARY features` tells; nothing for one that doesn't know the command or isn't there."""
    try:
        process = await asyncio.create_subprocess_exec(
            binary,
            "features",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        log.warning("a handler's runtime can't be asked what it can", binary=binary, error=str(error))
        return cri.RuntimeHandlerFeatures()
    try:
        async with asyncio.timeout(_ASK):
            output, _ = await process.communicate()
        found = json.loads(output)
        linux = found.get("linux") or {}
        idmap = ((linux.get("mountExtensions") or {}).get("idmap") or {}).get("enabled")
        return cri.RuntimeHandlerFeatures(
            recursive_read_only_mounts="rro" in (found.get("mountOptions") or ()),
            user_namespaces=bool(idmap) and "user" in (linux.get("namespaces") or ()),
        )
    except (TimeoutError, ValueError, AttributeError):
        log.warning("a handler's runtime doesn't say what it can", binary=binary)
        return cri.RuntimeHandlerFeatures()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _camel(value: Any) -> Any:
    """Keys as containerd's JSON has them: `sandbox_image` is `sandboxImage`; a handler's name stays as it is."""
    if not isinstance(value, Mapping):
        return [_camel(item) for item in value] if isinstance(value, list | tuple) else value
    made: dict[str, Any] = {}
    for key, item in value.items():
        head, *rest = str(key).split("_")
        name = head + "".join(word.title() for word in rest)
        if key in ("runtimes", "options"):
            made[name] = {inner: _camel(each) for inner, each in item.items()}
        else:
            made[name] = _camel(item)
    return made
