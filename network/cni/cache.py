"""What is kept of each attachment until it is deleted: with which configuration, arguments and result it was made.

The files are libcni's (`CACHE/results/NETWORK-CONTAINER-INTERFACE`, kind `cniCacheV1`): its tools read them. DEL uses
the configuration that ADD used, whatever the network's file says by then.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wherry.network.cni.config import NetworkList, parse

_KIND = "cniCacheV1"


@dataclass(frozen=True, slots=True)
class Attachment:
    """A container on a network by an interface. `netns` is a path, "" where it is gone (then only DEL makes sense).

    `args` become CNI_ARGS; `capabilities` are the runtime's arguments by capability: `portMappings`, `bandwidth`,
    `ips`, `mac`, `aliases`, `dns` (https://www.cni.dev/docs/conventions/). Those that no plugin has are left out.
    """

    container: str
    interface: str = "eth0"
    netns: str = ""
    args: Sequence[tuple[str, str]] = ()
    capabilities: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cached:
    """One file of the cache."""

    network: NetworkList
    attachment: Attachment
    result: Mapping[str, Any]
    path: str


class Cache:
    """The folder of results."""

    def __init__(self, folder: str) -> None:
        self._folder = os.path.join(folder, "results")

    def write(self, network: NetworkList, attachment: Attachment, result: Mapping[str, Any] | None) -> None:
        """Keep an attachment; without a result before ADD is begun, so that a sudden end leaves a trace to clean up."""
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        value = {
            "kind": _KIND,
            "containerId": attachment.container,
            "config": base64.b64encode(json.dumps(network.data).encode()).decode(),
            # the plugins of the network's folder are part of it, and may be others by then
            "plugins": list(network.plugins),
            "ifName": attachment.interface,
            "networkName": network.name,
            "netns": attachment.netns,
            "cniArgs": [list(item) for item in attachment.args],
            "capabilityArgs": dict(attachment.capabilities),
            "result": result,
        }
        path = self._path(network.name, attachment)
        beside = f"{path}.new"
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            json.dump(value, file)
        os.rename(beside, path)

    def read(self, network: str, attachment: Attachment) -> Cached | None:
        """What is kept of an attachment, None where nothing (readable) is."""
        return self._read(self._path(network, attachment))

    def remove(self, network: str, attachment: Attachment) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(network, attachment))

    def all(self) -> list[Cached]:
        """All attachments that are kept."""
        try:
            names = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return []
        found = [self._read(os.path.join(self._folder, name)) for name in names if not name.endswith(".new")]
        return [item for item in found if item is not None]

    def _path(self, network: str, attachment: Attachment) -> str:
        return os.path.join(self._folder, f"{network}-{attachment.container}-{attachment.interface}")

    @staticmethod
    def _read(path: str) -> Cached | None:
        try:
            with open(path, "rb") as file:
                value = json.load(file)
            config = json.loads(base64.b64decode(value["config"]))
            if "plugins" in config:
                config = {**config, "plugins": value.get("plugins") or config["plugins"]}
            attachment = Attachment(
                container=value["containerId"],
                interface=value["ifName"],
                netns=value.get("netns") or "",
                args=[(str(key), str(item)) for key, item in value.get("cniArgs") or []],
                capabilities=value.get("capabilityArgs") or {},
            )
            return Cached(parse(config, path), attachment, value.get("result") or {}, path)
        except (OSError, ValueError, KeyError, TypeError):
            return None
