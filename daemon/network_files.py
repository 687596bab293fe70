"""The files of containers below /etc that their networks decide: STATE/network/files/NAMESPACE/ID/."""

from __future__ import annotations

import os

from wherry.daemon.network_names import RESOLV_CONF, Names
from wherry.network import files
from wherry.network.model import Connection, Endpoint
from wherry.proto import network_pb2 as pb


class Files:
    """The folder of all containers' files."""

    def __init__(self, top: str, names: Names) -> None:
        self._top = top
        self._names = names

    def folder(self, namespace: str, container: str) -> str:
        """A container's folder; whether it is there or not."""
        return os.path.join(self._top, namespace, container)

    def hostname(self, namespace: str, container: str) -> str:
        """The host's name inside, "" where we didn't give one."""
        return files.read_host(os.path.join(self.folder(namespace, container), "hostname")).strip()

    def write(
        self,
        connection: Connection,
        settings: pb.Settings,
        hostname: str,
        resolv_conf: str,
        owner: tuple[int, int] = (0, 0),
    ) -> None:
        """A container's files; `resolv_conf` is what others (CNI) said, "" for nothing. Raises InvalidArgument.

        `owner` is the container's root as the host numbers it.
        """
        folder = self.folder(connection.namespace, connection.container)
        files.write(folder, self._texts(connection, settings, hostname, resolv_conf), owner)

    def add_host(self, connection: Connection, endpoint: Endpoint) -> None:
        """The container's name at one more of its addresses."""
        folder = self.folder(connection.namespace, connection.container)
        hostname = self.hostname(connection.namespace, connection.container)
        lines = "".join(f"{item}\t{hostname}\n" for item in (endpoint.address4, endpoint.address6) if item)
        files.update(folder, "hosts", files.read_host(os.path.join(folder, "hosts")) + lines)

    def remove(self, namespace: str, container: str) -> None:
        """None there is fine."""
        files.remove(self.folder(namespace, container))

    def sweep(self, bundles: str) -> None:
        """Removes those of containers that have no bundle below this folder."""
        for namespace in _listed(self._top):
            for name in _listed(os.path.join(self._top, namespace)):
                if not os.path.isdir(os.path.join(bundles, namespace, name)):
                    self.remove(namespace, name)

    def _texts(self, connection: Connection, settings: pb.Settings, hostname: str, resolv_conf: str) -> dict[str, str]:
        host = files.read_host(RESOLV_CONF)
        asked = settings.dns, settings.dns_search, settings.dns_options
        if connection.mode == "host":
            return {
                "hosts": files.host_hosts(files.read_host("/etc/hosts"), settings.hosts),
                "resolv.conf": files.resolv_conf(host, *asked) if any(asked) else host,
                "hostname": f"{settings.hostname or os.uname().nodename}\n",
            }
        gateway = next((item.gateway4 or item.gateway6 for item in connection.endpoints), "")
        embedded = self._names.servers(connection)
        own = files.resolv_conf(host, *asked, embedded=embedded)
        return {
            "hosts": files.hosts(connection, hostname, settings.domainname, settings.hosts, gateway),
            "resolv.conf": resolv_conf if resolv_conf and not embedded and not settings.dns else own,
            "hostname": f"{hostname}\n",
        }


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
