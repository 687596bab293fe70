"""What an ADD answers: interfaces, addresses, routes, DNS; of every version of the specification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from wherry.core.errors import Internal


class Interface(NamedTuple):
    """An interface; `sandbox` is the path of the container's namespace, "" for one of the host."""

    name: str
    mac: str = ""
    sandbox: str = ""


class Address(NamedTuple):
    """An address with its prefix; `interface` is an index into the interfaces, None where it isn't said."""

    address: str
    gateway: str = ""
    interface: int | None = None


class Result(NamedTuple):
    """A result; `raw` as the last plugin gave it."""

    interfaces: Sequence[Interface]
    ips: Sequence[Address]
    dns: Mapping[str, Any]
    raw: Mapping[str, Any]

    def inside(self) -> list[tuple[Interface | None, Address]]:
        """The container's addresses, each with its interface where that is known."""
        found: list[tuple[Interface | None, Address]] = []
        for address in self.ips:
            index = address.interface
            interface = self.interfaces[index] if index is not None and 0 <= index < len(self.interfaces) else None
            if interface is None or interface.sandbox:
                found.append((interface, address))
        return found


def parse(raw: object) -> Result:
    """Raises Internal for what is no result: a plugin's fault, nobody else's."""
    if not isinstance(raw, dict):
        raise Internal("a CNI plugin's result is no JSON object: internal error")
    try:
        interfaces = [
            Interface(str(item["name"]), str(item.get("mac") or ""), str(item.get("sandbox") or ""))
            for item in raw.get("interfaces") or []
        ]
        addresses = [
            Address(str(item["address"]), str(item.get("gateway") or ""), item.get("interface"))
            for item in raw.get("ips") or []
        ]
        old = [raw[key] for key in ("ip4", "ip6") if raw.get(key)]  # 0.2.0 and before
        addresses += [Address(str(item["ip"]), str(item.get("gateway") or "")) for item in old]
    except (KeyError, TypeError, AttributeError) as error:
        raise Internal(f"a CNI plugin's result is malformed: {error!r}: internal error") from error
    return Result(interfaces, addresses, raw.get("dns") or {}, raw)
