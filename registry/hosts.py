"""Which hosts answer for a registry's name: the registry itself, and what `hosts.toml` puts in front of it.

The folder layout and the keys are containerd's (docs/hosts.md there): `DIR/HOST_PORT_/hosts.toml`, `DIR/HOST:PORT/…`,
`DIR/_default/…`; without a `hosts.toml`, certificates as Docker lays them (`*.crt`, `*.cert` with `*.key`).
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntFlag
from typing import Any
from urllib.parse import urlsplit

from wherry.core.errors import InvalidArgument
from wherry.core.reference import DEFAULT_HOST

# the name `docker.io` is served from elsewhere
DOCKER_REGISTRY = "registry-1.docker.io"
# seconds for a connection (containerd's default)
DIAL_SECONDS = 30.0


class Capability(IntFlag):
    """What a host is trusted with: to give content, to say what a tag means, to take content."""

    PULL = 1
    RESOLVE = 2
    PUSH = 4


ALL = Capability.PULL | Capability.RESOLVE | Capability.PUSH
_CAPABILITIES = {"pull": Capability.PULL, "resolve": Capability.RESOLVE, "push": Capability.PUSH}


@dataclass(frozen=True, slots=True)
class Host:
    """One host that is asked: `scheme://netloc` + `path` is the root of its API."""

    scheme: str
    netloc: str
    path: str = "/v2"
    capabilities: Capability = ALL
    ca: tuple[str, ...] = ()
    # pairs of certificate and key; "" where both are in one file
    client: tuple[tuple[str, str], ...] = ()
    skip_verify: bool = False
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    dial_seconds: float = DIAL_SECONDS
    proxy: str = ""
    # https is tried first and http is right, too, where nobody speaks TLS there
    plain_ok: bool = False

    @property
    def root(self) -> str:
        """The URL in front of `/REPOSITORY/manifests/…`."""
        return f"{self.scheme}://{self.netloc}{self.path}"


def hosts_for(name: str, *, config_dir: str = "", default_scheme: str = "") -> list[Host]:
    """The hosts to ask for a registry's name (`docker.io`, `127.0.0.1:5000`), in order.

    `config_dir` may be several folders with colons between them, the first that knows the name counts.
    `default_scheme` (`http` for plain registries) is for hosts that no file describes. Raises InvalidArgument for a
    file that is wrong, with its path.
    """
    default = _default(name, default_scheme)
    for folder in filter(None, config_dir.split(":")):
        found = _folder(folder, name)
        if found is not None:
            file = os.path.join(found, "hosts.toml")
            hosts = _parse_file(file, found, default) if os.path.isfile(file) else [_with_certificates(default, found)]
            return [_either(host) for host in hosts]
    return [default]


def _either(host: Host) -> Host:
    """A plain host that TLS was configured for: which of both it is, its port doesn't tell (containerd's rule)."""
    if host.scheme == "http" and (host.ca or host.client or host.skip_verify) and _port(host.netloc) not in {"", "80"}:
        return replace(host, scheme="https", plain_ok=True)
    return host


def _port(netloc: str) -> str:
    match = re.search(r":(\d+)$", netloc)
    return match[1] if match else ""


def netloc_of(name: str) -> str:
    """Where a registry is by its name alone. What stands elsewhere is a mirror, and not told who the user is there."""
    return DOCKER_REGISTRY if name == DEFAULT_HOST else name


def is_local(netloc: str) -> bool:
    """A loopback address, which nobody else can listen in on: plain http will do there."""
    host = netloc.rpartition(":")[0] if _port(netloc) else netloc
    return host in {"localhost", "[::1]", "::1"} or re.fullmatch(r"127\.\d+\.\d+\.\d+", host) is not None


def _default(name: str, scheme: str) -> Host:
    if name == DEFAULT_HOST:
        return Host("https", netloc_of(name))
    if scheme or not is_local(name):
        return Host(scheme or "https", name)
    # as containerd: TLS without a look at the certificate, and where there is none, plain
    port = _port(name)
    if port == "80":
        return Host("http", name)
    return Host("https", name, skip_verify=True, plain_ok=port not in {"", "443"})


def _folder(root: str, name: str) -> str | None:
    host, colon, port = name.rpartition(":")
    names = [f"{host}_{port}_", name] if colon and port.isdigit() else [name]
    return next((path for part in (*names, "_default") if os.path.isdir(path := os.path.join(root, part))), None)


def _with_certificates(host: Host, folder: str) -> Host:
    """Certificates as Docker lays them into a registry's folder."""
    files = sorted(os.listdir(folder))
    client = []
    for file in files:
        if file.endswith(".cert"):
            key = file.removesuffix(".cert") + ".key"
            if key not in files:
                raise InvalidArgument(f"{folder}: {file} has no {key} beside it: invalid argument")
            client.append((os.path.join(folder, file), os.path.join(folder, key)))
    ca = tuple(os.path.join(folder, file) for file in files if file.endswith(".crt"))
    return replace(host, ca=ca, client=tuple(client), skip_verify=host.skip_verify and not ca)


def _parse_file(path: str, folder: str, default: Host) -> list[Host]:
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: {error}: invalid argument") from error
    tables = tree.get("host", {})
    if not isinstance(tables, dict):
        raise InvalidArgument(f"{path}: host is no table: invalid argument")
    found = []
    for address, table in tables.items():
        if not isinstance(table, dict):
            raise InvalidArgument(f'{path}: host."{address}" is no table: invalid argument')
        found.append(_read(path, folder, address, table, default))
    server = tree.get("server", "")
    if not isinstance(server, str):
        raise InvalidArgument(f"{path}: server is no string: invalid argument")
    top = {key: value for key, value in tree.items() if key not in {"server", "host"}}
    found.append(_read(path, folder, server, top, default))
    return found


def _read(path: str, folder: str, address: str, table: Mapping[str, Any], default: Host) -> Host:
    """One host's keys; without an address, those of the registry itself."""
    where = f"{path}: {address or 'server'}"
    host = _address(where, address, _flag(where, table, "override_path")) if address else default
    headers = table.get("header") or {}
    if not isinstance(headers, dict):
        raise InvalidArgument(f"{where}: header is no table: invalid argument")
    lines = {key: ", ".join(_strings(where, key, value)) for key, value in headers.items()}
    for key, value in lines.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", key) or re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value):
            raise InvalidArgument(f"{where}: header {key!r} can't be sent: invalid argument")
    ca = tuple(os.path.join(folder, item) for item in _strings(where, "ca", table.get("ca")))
    return replace(
        host,
        capabilities=_capabilities(where, table.get("capabilities")),
        ca=ca,
        client=_client(where, folder, table.get("client")),
        skip_verify=_flag(where, table, "skip_verify", default=host.skip_verify and not ca),
        headers=lines,
        dial_seconds=_seconds(where, table.get("dial_timeout")),
        proxy=str(table.get("proxy") or ""),
    )


def _address(where: str, address: str, override_path: bool) -> Host:
    try:
        parts = urlsplit(address if "://" in address else f"https://{address}")
        right = parts.scheme in {"http", "https"} and bool(parts.hostname) and "@" not in parts.netloc
        right = right and (parts.port is None or parts.port > 0)
    except ValueError:
        right = False
    if not right:
        raise InvalidArgument(f"{where}: not an address of a registry: invalid argument")
    path = parts.path.rstrip("/")
    if not override_path and not path.endswith("/v2"):
        path += "/v2"
    netloc = DOCKER_REGISTRY if parts.netloc == DEFAULT_HOST else parts.netloc
    return Host(parts.scheme, netloc, path)


def _flag(where: str, table: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    value = table.get(key, default)
    if not isinstance(value, bool):
        raise InvalidArgument(f"{where}: {key} is neither true nor false: invalid argument")
    return value


def _strings(where: str, key: str, value: object) -> list[str]:
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise InvalidArgument(f"{where}: {key} is neither a string nor an array of strings: invalid argument")
    return [str(item) for item in items]


def _capabilities(where: str, value: object) -> Capability:
    found = Capability(0)
    for name in _strings(where, "capabilities", value):
        if name not in _CAPABILITIES:
            raise InvalidArgument(f"{where}: unknown capability {name!r}: invalid argument")
        found |= _CAPABILITIES[name]
    return found or ALL


def _client(where: str, folder: str, value: object) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    pairs = []
    for item in value if isinstance(value, list) else [value]:
        parts = [item] if isinstance(item, str) else item
        if not isinstance(parts, list) or len(parts) not in {1, 2} or not all(isinstance(p, str) for p in parts):
            raise InvalidArgument(f"{where}: client must be a path, paths or pairs of paths: invalid argument")
        key = parts[1] if len(parts) == 2 else ""
        pairs.append((os.path.join(folder, parts[0]), os.path.join(folder, key) if key else ""))
    return tuple(pairs)


def _seconds(where: str, value: object) -> float:
    if value is None:
        return DIAL_SECONDS
    units = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
    parts = re.findall(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|\u00b5s|ms|s|m|h)", str(value))
    if not parts or "".join(number + unit for number, unit in parts) != str(value):
        raise InvalidArgument(f"{where}: dial_timeout {value!r} is no duration: invalid argument")
    return sum(float(number) * units[unit] for number, unit in parts)
