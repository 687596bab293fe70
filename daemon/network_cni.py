"""Networks of CNI for containers: conflists of the host, by their names, with everything that a container asks for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Collection
from typing import Any

import structlog

from wherry.core.errors import NotFound, WherryError
from wherry.daemon.config import NetworkOptions
from wherry.network.cni import Attachment, Cni, NetworkList
from wherry.network.cni.plugin import TRY_AGAIN, PluginError
from wherry.network.model import Connection, Endpoint
from wherry.network.resolv import Resolv

log = structlog.get_logger(__name__)

# seconds before the next try of a DEL that failed; the last one is repeated
_RETRIES = (1.0, 5.0, 30.0, 120.0)
# seconds before the next try of an ADD that a plugin asks to try again
_AGAIN = (0.2, 0.5, 1.0)


class CniNetworks:
    """The conflists of the host, and the containers on them."""

    def __init__(self, options: NetworkOptions, cache: str, hub: str = "") -> None:
        """`cache` is the folder of what was added; `hub`: where an ordinary user's plugins run (network/within.py)."""
        self._hub = hub
        within = [sys.executable, "-I", "-m", "wherry.network.within", hub, os.path.join(cache, "var")] if hub else []
        self._cni = Cni(options.cni_conf_dir, options.cni_bin_dirs, cache, within=within)
        self._dns: dict[str, dict[str, Any]] = {}
        self._retrying: set[asyncio.Task[None]] = set()

    def networks(self) -> list[NetworkList]:
        """All; files that are wrong are logged."""
        found, wrong = self._cni.networks()
        for text in wrong:
            log.warning("network configuration", error=text)
        return found

    def find(self, name: str) -> str | None:
        """The network's name, None where there is no such network. Raises InvalidArgument where its file is wrong."""
        try:
            return self._cni.load(name).name
        except NotFound:
            return None

    def publishes(self, name: str) -> bool:
        """Whether the network's plugins publish ports."""
        return "portMappings" in self._cni.load(name).capabilities()

    async def add(self, connection: Connection, endpoint: Endpoint) -> None:
        """Attach a container's namespace; the endpoint gets what the plugins gave it."""
        network = self._cni.load(endpoint.name)
        attachment = self._attachment(connection, endpoint, ports=not self._hub)
        for pause in (*_AGAIN, None):
            try:
                result = await self._cni.add(network, attachment)
                break
            except PluginError as error:
                if error.number != TRY_AGAIN or pause is None:
                    raise
            await asyncio.sleep(pause)
        for interface, address in result.inside():
            if interface is not None and interface.name == endpoint.interface:
                endpoint.mac = interface.mac or endpoint.mac
            if ":" in address.address:
                endpoint.ipv6, endpoint.gateway6 = endpoint.ipv6 or address.address, address.gateway
            else:
                endpoint.ipv4, endpoint.gateway4 = address.address, address.gateway
        self._dns[connection.key] = dict(result.dns)

    async def delete(self, connection: Connection, endpoint: Endpoint) -> None:
        """Detach it. What a plugin couldn't do is tried again until it can: nothing waits for that."""
        self._dns.pop(connection.key, None)
        attachment = self._attachment(connection, endpoint, ports=not self._hub)
        try:
            await self._cni.delete(endpoint.name, attachment)
        except WherryError as error:
            log.warning("CNI network not taken away yet", container=connection.key, error=error.message)
            # the namespace is gone by then, and with it what could be in the way
            self._retry(endpoint.name, Attachment(attachment.container, attachment.interface))

    def clean_up(self, connections: Collection[Connection]) -> None:
        """Detach what an earlier daemon attached and no connection has."""
        alive = {
            (_id(connection), endpoint.interface)
            for connection in connections
            for endpoint in connection.endpoints
            if endpoint.kind == "cni"
        }
        for kept in self._cni.attachments():
            if (kept.attachment.container, kept.attachment.interface) not in alive:
                self._retry(kept.network.name, Attachment(kept.attachment.container, kept.attachment.interface))

    def resolv_conf(self, connection: Connection) -> str:
        """What the plugins said of DNS; "" where they said nothing."""
        dns = self._dns.get(connection.key) or {}
        if not dns.get("nameservers"):
            return ""
        search = list(dns.get("search") or ([dns["domain"]] if dns.get("domain") else []))
        return Resolv(list(dns["nameservers"]), search, list(dns.get("options") or [])).text()

    async def close(self) -> None:
        for task in self._retrying:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _retry(self, network: str, attachment: Attachment) -> None:
        async def work() -> None:
            pauses = iter((0.0, *_RETRIES))
            pause = 0.0
            while True:
                pause = next(pauses, pause)
                await asyncio.sleep(pause)
                try:
                    await self._cni.delete(network, attachment)
                except WherryError as error:
                    log.warning("CNI network not taken away yet", container=attachment.container, error=error.message)
                else:
                    return

        task = asyncio.get_running_loop().create_task(work())
        self._retrying.add(task)
        task.add_done_callback(self._retrying.discard)

    @staticmethod
    def _attachment(connection: Connection, endpoint: Endpoint, *, ports: bool) -> Attachment:
        """`ports`: the plugins publish them."""
        capabilities: dict[str, Any] = {}
        if ports and connection.ports and connection.publishing() is None:
            capabilities["portMappings"] = [
                {
                    "hostPort": port.host_port,
                    "containerPort": port.container_port,
                    "protocol": port.protocol,
                    "hostIP": port.host_ip,
                }
                for port in connection.ports
            ]
        if wanted := [item for item in (endpoint.ipv4, endpoint.ipv6) if item]:
            capabilities["ips"] = wanted
        if endpoint.mac:
            capabilities["mac"] = endpoint.mac
        if endpoint.aliases or connection.names:
            capabilities["aliases"] = {endpoint.name: list(dict.fromkeys([*connection.names, *endpoint.aliases]))}
        if connection.dns:
            capabilities["dns"] = {"servers": connection.dns}
        args = [("IgnoreUnknown", "1"), ("K8S_POD_NAME", connection.container)]
        return Attachment(_id(connection), endpoint.interface, connection.netns, args, capabilities)


def _id(connection: Connection) -> str:
    """The id that plugins get: of one life of one container, whatever its record is called."""
    return f"{connection.namespace}-{os.path.basename(connection.netns)}"
