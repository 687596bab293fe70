"""Network configurations: `.conflist` files, and `.conf` and `.json` with a single plugin, as libcni reads them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wherry.core.errors import InvalidArgument, NotFound
from wherry.core.names import quote

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Those that are spoken here, oldest first."""
# spec, section 1: "must start with an alphanumeric character, optionally followed by …"
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_SUFFIXES = (".conf", ".conflist", ".json")


@dataclass(frozen=True, slots=True)
class NetworkList:
    """A network: its plugins' configurations in order. `version` is the one that is spoken with the plugins."""

    name: str
    version: str
    plugins: Sequence[Mapping[str, Any]]
    disable_check: bool = False
    disable_gc: bool = False
    path: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    def capabilities(self) -> set[str]:
        """What at least one plugin says that it can do (portMappings, bandwidth, ips, mac, aliases, dns …)."""
        return {name for plugin in self.plugins for name, on in (plugin.get("capabilities") or {}).items() if on}

    def at_least(self, version: str) -> bool:
        return _number(self.version) >= _number(version)


def parse(value: object, path: str = "", conf_dir: str = "") -> NetworkList:
    """A configuration that was read. Raises InvalidArgument, which names the file and what is wrong."""
    where = path or "network configuration"
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where}: no JSON object: invalid argument")
    name = value.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgument(f"{where}: {quote(str(name))} is no name of a network: invalid argument")
    plugins = value.get("plugins") if "plugins" in value else [value]
    if not isinstance(plugins, list):
        raise InvalidArgument(f"{where}: plugins: expected an array: invalid argument")
    if conf_dir and not value.get("loadOnlyInlinedPlugins", False) and "plugins" in value:
        plugins = [*plugins, *_folder(os.path.join(conf_dir, name))]
    if not plugins:
        raise InvalidArgument(f"{where}: no plugins: invalid argument")
    for plugin in plugins:
        kind = plugin.get("type") if isinstance(plugin, dict) else None
        if not isinstance(kind, str) or not kind or "/" in kind:
            raise InvalidArgument(f"{where}: a plugin's type is {kind!r}: invalid argument")
    return NetworkList(
        name=name,
        version=_version(value, where),
        plugins=plugins,
        disable_check=_flag(value, "disableCheck", where),
        disable_gc=_flag(value, "disableGC", where),
        path=path,
        data=value,
    )


def _version(value: Mapping[str, Any], where: str) -> str:
    """The highest of those that the file allows and that are spoken here (1.1: `cniVersions`)."""
    offered = [value.get("cniVersion", "0.1.0"), *(value.get("cniVersions") or [])]
    spoken = [item for item in offered if item in VERSIONS]
    if not spoken:
        raise InvalidArgument(f"{where}: cniVersion {offered[0]!r} is none of {', '.join(VERSIONS)}: invalid argument")
    return str(max(spoken, key=_number))


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _flag(value: Mapping[str, Any], key: str, where: str) -> bool:
    # the specification allows both the boolean and its spelling
    found = value.get(key, False)
    if isinstance(found, bool):
        return found
    if isinstance(found, str) and found.lower() in ("true", "false"):
        return found.lower() == "true"
    raise InvalidArgument(f"{where}: {key}: expected true or false: invalid argument")


def _folder(folder: str) -> list[Any]:
    """Further plugins, a file each: how programs add one to a network that isn't theirs (libcni 1.3)."""
    return [_read(os.path.join(folder, name)) for name in _names(folder, (".conf",))]


def _names(folder: str, suffixes: Sequence[str]) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(tuple(suffixes)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}: invalid argument") from error
    except ValueError as error:
        raise InvalidArgument(f"{path}: not JSON: {error}: invalid argument") from error


def load_all(conf_dir: str) -> tuple[list[NetworkList], list[str]]:
    """The networks of a folder in the order of the files' names, and what was wrong with other files.

    Of two with one name the first counts.
    """
    found: dict[str, NetworkList] = {}
    wrong: list[str] = []
    for name in _names(conf_dir, _SUFFIXES):
        path = os.path.join(conf_dir, name)
        try:
            network = parse(_read(path), path, conf_dir)
        except InvalidArgument as error:
            wrong.append(error.message)
            continue
        found.setdefault(network.name, network)
    return list(found.values()), wrong


def load(conf_dir: str, name: str) -> NetworkList:
    """A network by its name. Raises NotFound; InvalidArgument where its own file is the one that is wrong."""
    networks, wrong = load_all(conf_dir)
    for network in networks:
        if network.name == name:
            return network
    hint = f" ({wrong[0]})" if wrong else ""
    raise NotFound(f"network {quote(name)} in {conf_dir}: not found{hint}")
