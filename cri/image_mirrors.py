"""The older way to name mirrors and certificates, `[registry.mirrors]` and `[registry.configs.HOST.tls]`.

What the tables say is written as a folder of `hosts.toml` files, which is what pulls understand (`config_path`). As
with containerd, both ways at once are refused.

    [plugins."io.containerd.grpc.v1.cri".registry.mirrors."docker.io"]    # "*": every registry without one of its own
      endpoint = ["https://mirror.example", "http://127.0.0.1:5000"]      # in this order, then the registry itself
    [plugins."io.containerd.grpc.v1.cri".registry.configs."mirror.example".tls]
      ca_file = "/etc/ssl/mirror.pem"                                     # cert_file, key_file, insecure_skip_verify
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from wherry.core.errors import InvalidArgument
from wherry.cri.settings import Registry


def config_path(registry: Registry, folder: str) -> str:
    """Where pulls find the hosts of a registry: the configured folder, or `folder`, which is written anew.

    "" where nothing is said. Raises InvalidArgument for tables that can't be understood, or that contradict.
    """
    tls = {
        host: table["tls"] for host, table in registry.configs.items() if isinstance(table, Mapping) and "tls" in table
    }
    if not registry.mirrors and not tls:
        return registry.config_path
    if registry.config_path:
        raise InvalidArgument("registry: `mirrors` and `configs.….tls` cannot be set when `config_path` is provided")
    shutil.rmtree(folder, ignore_errors=True)
    mirrors = {host: _endpoints(host, table) for host, table in registry.mirrors.items()}
    for host in {*mirrors, *tls}:
        at = os.path.join(folder, "_default" if host == "*" else host)
        if host != "*" and (os.sep in host or host.startswith(".")):
            raise InvalidArgument(f'registry.mirrors."{host}": not a host')
        os.makedirs(at, mode=0o700, exist_ok=True)
        lines = _certificates(host, tls)
        for endpoint in mirrors.get(host, []):
            name = urlsplit(endpoint).netloc
            # a path is the whole root of that API, as containerd takes it
            whole = ["override_path = true"] if urlsplit(endpoint).path.strip("/") else []
            lines += [f"[host.{json.dumps(endpoint)}]", *whole, *_certificates(name, tls)]
        with open(os.path.join(at, "hosts.toml"), "w", encoding="utf-8") as file:
            file.write("\n".join([*lines, ""]))
    return folder


def _endpoints(host: str, table: object) -> list[str]:
    found = table.get("endpoint") or [] if isinstance(table, Mapping) else None
    if not isinstance(found, list | tuple) or not all(isinstance(item, str) for item in found):
        raise InvalidArgument(f'registry.mirrors."{host}".endpoint: expected an array of addresses')
    for endpoint in found:
        if urlsplit(endpoint).scheme not in {"http", "https"} or not urlsplit(endpoint).netloc:
            raise InvalidArgument(f'registry.mirrors."{host}".endpoint: {endpoint!r} is no address of a registry')
    return list(found)


def _certificates(host: str, tls: Mapping[str, Any]) -> list[str]:
    """The keys of `hosts.toml` for a host's TLS."""
    table = tls.get(host) or {}
    if not isinstance(table, Mapping):
        raise InvalidArgument(f'registry.configs."{host}".tls: expected a table')
    lines = []
    if table.get("ca_file"):
        lines.append(f"ca = {json.dumps(str(table['ca_file']))}")
    if table.get("cert_file"):
        lines.append(
            f"client = [[{json.dumps(str(table['cert_file']))}, {json.dumps(str(table.get('key_file', '')))}]]"
        )
    if table.get("insecure_skip_verify"):
        lines.append("skip_verify = true")
    return lines
