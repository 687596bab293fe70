"""What a container's network changes in its OCI specification: the namespace that it joins, its name, three files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from wherry.core.errors import InvalidArgument
from wherry.core.names import quote
from wherry.network.files import NAMES


class Spec:
    """A specification that is being adapted. Raises InvalidArgument for one that is no JSON object."""

    def __init__(self, data: bytes, container: str) -> None:
        try:
            value = json.loads(data)
        except ValueError as error:
            raise InvalidArgument(f"spec of container {quote(container)} is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise InvalidArgument(f"spec of container {quote(container)} is no JSON object: invalid argument")
        self._value: dict[str, Any] = value

    def data(self) -> bytes:
        return json.dumps(self._value, separators=(",", ":"), ensure_ascii=False).encode()

    def users(self) -> dict[str, str] | None:
        """The user namespace that is asked for: the `path` of one, or its `uids` and `gids` as uid_map has them.

        None where there is to be none. Raises InvalidArgument for a new one without mappings.
        """
        for item in self._namespaces():
            if item.get("type") == "user":
                if item.get("path"):
                    return {"path": str(item["path"])}
                return {"uids": self._mapping("uidMappings"), "gids": self._mapping("gidMappings")}
        return None

    def root(self) -> tuple[int, int]:
        """Who the container's root is on the host."""
        found = [0, 0]
        for number, name in enumerate(("uidMappings", "gidMappings")):
            for item in self._linux().get(name) or ():
                if not item.get("containerID"):
                    found[number] = int(item.get("hostID") or 0)
        return found[0], found[1]

    def _mapping(self, name: str) -> str:
        try:
            lines = [
                f"{int(item.get('containerID') or 0)} {int(item.get('hostID') or 0)} {int(item['size'])}\n"
                for item in self._linux()[name]
            ]
        except (KeyError, TypeError, ValueError):
            raise InvalidArgument(
                f"a user namespace needs {name} (containerID, hostID, size): invalid argument"
            ) from None
        return "".join(lines)

    @property
    def hostname(self) -> str:
        return str(self._value.get("hostname") or "")

    def join(self, path: str, users: str = "") -> None:
        """The network namespace of `path`, "" is the host's; `users` is the user namespace that owns it."""
        kept = [item for item in self._namespaces() if item.get("type") != "network"]
        if users:
            kept = [{**item, "path": users} if item.get("type") == "user" else item for item in kept]
        if path:
            kept.append({"type": "network", "path": path})
        self._linux()["namespaces"] = kept

    def name(self, hostname: str, domainname: str) -> None:
        """The host's name inside, where it has a namespace for it and nobody named it before."""
        if not any(item.get("type") == "uts" for item in self._namespaces()):
            return
        if not self._value.get("hostname") and hostname:
            self._value["hostname"] = hostname
        if domainname and not self._value.get("domainname"):
            self._value["domainname"] = domainname

    def mount(self, folder: str, names: Sequence[str] = NAMES) -> None:
        """The files of a folder below /etc; what the specification mounts there itself stays."""
        mounts = self._value.setdefault("mounts", [])
        taken = {str(item.get("destination")) for item in mounts if isinstance(item, dict)}
        for name in names:
            destination, source = f"/etc/{name}", os.path.join(folder, name)
            if destination not in taken and os.path.exists(source):
                mounts.append(
                    {
                        "destination": destination,
                        "type": "bind",
                        "source": source,
                        "options": ["rbind", "rprivate", "rw"],
                    }
                )

    def _linux(self) -> dict[str, Any]:
        linux: dict[str, Any] = self._value.setdefault("linux", {})
        return linux

    def _namespaces(self) -> list[dict[str, Any]]:
        found = self._linux().get("namespaces") or []
        return [item for item in found if isinstance(item, dict)]
