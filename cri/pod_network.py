"""Pods on networks: CNI, with what Kubernetes hands over to its plugins.

Which networks: the first `max_conf_num` of the folder, in the order of the files' names; eth0, eth1 and so on. A
handler may have a folder of its own. Conventions: https://www.cni.dev/docs/conventions/
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import structlog

from wherry.core.errors import InvalidArgument, Unavailable, WherryError
from wherry.core.names import quote
from wherry.cri import netns as netns_files
from wherry.cri.records import Pod
from wherry.cri.settings import Settings
from wherry.network.cni import Attachment, Cni, NetworkList, Result
from wherry.network.cni.plugin import TRY_AGAIN, PluginError, find
from wherry.proto import cri_pb2 as cri

log = structlog.get_logger(__name__)

# seconds before the next try of an ADD that a plugin asks to try again
_AGAIN: Final = (0.2, 0.5, 1.0)
# bits that may come at once where a pod's bandwidth is limited: as many as fit the field, as containerd says
_BURST: Final = 0xFFFFFFFF
_INGRESS, _EGRESS = "kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?)(Ki|Mi|Gi|Ti|Pi|m|k|M|G|T|P|)")
_UNITS: Final = {"": 1, "m": 1e-3, **{unit: 1000 ** (at + 1) for at, unit in enumerate("kMGTP")}} | {
    f"{unit}i": 1024 ** (at + 1) for at, unit in enumerate("KMGTP")
}
# the least and the most of a bandwidth (Kubernetes' bandwidth.ExtractPodBandwidthResources): 1k and 1P bits a second
_LEAST, _MOST = 1000, 10**15


class PodNetwork:
    """The networks of one node."""

    def __init__(self, settings: Settings, cache: str) -> None:
        """`cache` is the folder for what was added."""
        self._settings = settings
        self._cache = cache
        self._folders: dict[str, Cni] = {}

    def _cni(self, handler: str = "") -> tuple[Cni, int]:
        """The library for a handler's networks, and how many of them are joined (0: all)."""
        own = self._settings.handlers.get(handler)
        folder, most = self._settings.cni.conf_dir, self._settings.cni.max_conf_num
        if own is not None and own.cni_conf_dir:
            folder, most = own.cni_conf_dir, own.cni_max_conf_num or most
        if folder not in self._folders:
            self._folders[folder] = Cni(folder, list(self._settings.cni_bin_dirs), self._cache)
        return self._folders[folder], most

    def networks(self, handler: str = "") -> list[NetworkList]:
        """The networks that a pod joins. Raises Unavailable, in the words that operators know, where there is none."""
        cni, most = self._cni(handler)
        found, wrong = cni.networks()
        if not found:
            conf = cni.conf_dir
            why = "; ".join(wrong) if wrong else f"no network config found in {conf}"
            raise Unavailable(f"cni plugin not initialized: {why}")
        return found[:most] if most else found

    def usable(self, handler: str = "") -> list[NetworkList]:
        """The same, whose plugins are all there. Raises NotFound for one that isn't: better than half-way."""
        found = self.networks(handler)
        for network in found:
            for plugin in network.plugins:
                find(str(plugin["type"]), self._settings.cni_bin_dirs)
        return found

    async def ready(self, handler: str = "") -> None:
        """Whether pods can be attached: raises what is missing, a configuration, a plugin, or what a plugin says."""
        cni, _ = self._cni(handler)
        for network in self.usable(handler):
            await cni.status(network)

    async def add(self, pod: Pod) -> None:
        """Attach a pod's namespace to its networks; its facts have addresses and results then.

        Raises what a plugin refuses; what was done for this pod is taken back then.
        """
        cni, _ = self._cni(pod.facts.handler)
        networks = self.networks(pod.facts.handler)
        attachments = [self._attachment(pod, at) for at in range(len(networks))]
        pod.facts.more["networks"] = [network.name for network in networks]
        try:
            results = await self._add_all(cni, networks, attachments)
        except BaseException:
            await asyncio.shield(self._take_back(pod))
            raise
        pod.facts.network = networks[0].name
        pod.facts.cni = {attachments[at].interface: dict(result.raw) for at, result in enumerate(results)}
        pod.facts.ips = _in_order(_addresses(results), self._settings.cni.ip_pref)
        if not pod.facts.ips:
            await self._take_back(pod)
            raise Unavailable(f"failed to find network info for sandbox {quote(pod.id)}: no address was assigned")

    async def _add_all(
        self, cni: Cni, networks: Sequence[NetworkList], attachments: Sequence[Attachment]
    ) -> Sequence[Result]:
        pairs = list(zip(networks, attachments, strict=True))
        if self._settings.cni.setup_serially or len(pairs) == 1:
            return [await _add(cni, network, attachment) for network, attachment in pairs]
        tasks = [asyncio.ensure_future(_add(cni, network, attachment)) for network, attachment in pairs]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _take_back(self, pod: Pod) -> None:
        try:
            await self.delete(pod)
        except (WherryError, OSError) as error:
            log.warning("a pod's network isn't taken away yet", pod=pod.id, error=str(error))

    async def delete(self, pod: Pod) -> None:
        """Detach a pod; fine where that was done. Raises what a plugin couldn't do, after all were asked."""
        cni, _ = self._cni(pod.facts.handler)
        names = pod.facts.more.get("networks") or []
        errors: list[WherryError] = []
        netns = pod.facts.netns if netns_files.is_there(pod.facts.netns) else ""
        for at in reversed(range(len(names))):
            try:
                await cni.delete(str(names[at]), Attachment(pod.id, f"eth{at}", netns))
            except WherryError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        pod.facts.more.pop("networks", None)

    async def collect(self, pods: Iterable[Pod]) -> None:
        """Detach what was attached for pods that nobody knows any more."""
        known = {pod.id for pod in pods}
        cni, _ = self._cni()
        for kept in cni.attachments():
            if kept.attachment.container not in known:
                try:
                    await cni.delete(kept.network.name, kept.attachment)
                except WherryError as error:
                    log.warning("what a lost pod had of a network is still there", error=error.message)

    def _attachment(self, pod: Pod, at: int) -> Attachment:
        metadata = pod.config.metadata
        args = [
            ("IgnoreUnknown", "1"),
            ("K8S_POD_NAMESPACE", metadata.namespace),
            ("K8S_POD_NAME", metadata.name),
            ("K8S_POD_INFRA_CONTAINER_ID", pod.id),
            ("K8S_POD_UID", metadata.uid),
        ]
        return Attachment(pod.id, f"eth{at}", pod.facts.netns, args, capabilities(pod.config))


async def _add(cni: Cni, network: NetworkList, attachment: Attachment) -> Result:
    for pause in _AGAIN:
        try:
            return await cni.add(network, attachment)
        except PluginError as error:
            if error.number != TRY_AGAIN:
                raise
        await asyncio.sleep(pause)
    return await cni.add(network, attachment)


def capabilities(config: cri.PodSandboxConfig) -> dict[str, Any]:
    """What a pod asks of the plugins that have these capabilities. Raises InvalidArgument for a bandwidth."""
    found: dict[str, Any] = {}
    ports = [
        {
            "hostPort": port.host_port,
            "containerPort": port.container_port,
            "protocol": cri.Protocol.Name(port.protocol).lower(),
            "hostIP": port.host_ip,
        }
        for port in config.port_mappings
        if port.host_port > 0
    ]
    if ports:
        found["portMappings"] = ports
    if bandwidth := _bandwidth(config.annotations):
        found["bandwidth"] = bandwidth
    dns = config.dns_config
    if dns.servers or dns.searches or dns.options:
        found["dns"] = {"servers": [*dns.servers], "searches": [*dns.searches], "options": [*dns.options]}
    if config.annotations:
        found["io.kubernetes.cri.pod-annotations"] = dict(config.annotations)
    if config.linux.cgroup_parent:
        found["cgroupPath"] = config.linux.cgroup_parent
    return found


def _bandwidth(annotations: Mapping[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, key in ((_INGRESS, "ingress"), (_EGRESS, "egress")):
        if text := annotations.get(name):
            found[f"{key}Rate"] = _rate(name, text)
            found[f"{key}Burst"] = _BURST
    return found


def _rate(name: str, text: str) -> int:
    match = _QUANTITY.fullmatch(text.strip())
    rate = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not _LEAST <= rate <= _MOST:
        raise InvalidArgument(f"annotation {name}: {quote(text)} is no bandwidth between 1k and 1P: invalid argument")
    return rate


def _addresses(results: Sequence[Result]) -> list[str]:
    """The addresses inside of the first network that gave any, without their prefixes."""
    for result in results:
        found = [address.address.partition("/")[0] for _, address in result.inside()]
        if found:
            return list(dict.fromkeys(found))
    return []


def _in_order(found: Sequence[str], preferred: str) -> list[str]:
    """The pod's address first: of the preferred family, or as the plugins gave them."""
    if preferred == "cni":
        return list(found)
    version = 6 if preferred == "ipv6" else 4
    first = next((each for each in found if _version(each) == version), None)
    return list(found) if first is None else [first, *(each for each in found if each != first)]


def _version(address: str) -> int:
    try:
        return ipaddress.ip_address(address).version
    except ValueError:
        return 0
