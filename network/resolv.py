"""/etc/resolv.conf, read and written: resolv.conf(5)."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import NamedTuple


class Resolv(NamedTuple):
    """What such a file says."""

    nameservers: Sequence[str] = ()
    search: Sequence[str] = ()
    options: Sequence[str] = ()

    def text(self) -> str:
        lines = [f"search {' '.join(self.search)}"] if self.search else []
        lines += [f"nameserver {server}" for server in self.nameservers]
        if self.options:
            lines.append(f"options {' '.join(self.options)}")
        return "".join(f"{line}\n" for line in lines)


def parse(text: str) -> Resolv:
    """What a file says; lines that nobody knows are left out, of `search` and `domain` the last one counts."""
    nameservers: list[str] = []
    search: list[str] = []
    options: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0].startswith(("#", ";")):
            continue
        if words[0] == "nameserver":
            nameservers.append(words[1])
        elif words[0] in ("search", "domain"):
            search = words[1:]
        elif words[0] == "options":
            options += words[1:]
    return Resolv(nameservers, search, options)


def servers(text: str) -> list[str]:
    """The servers of a file that can be asked from this host."""
    found = []
    for server in parse(text).nameservers:
        try:
            ipaddress.ip_address(server.partition("%")[0])
        except ValueError:
            continue
        found.append(server)
    return found


def outside(nameservers: Sequence[str]) -> list[str]:
    """Those that a container reaches too: not the host's loopback, not link-local ones, which need an interface."""
    found = []
    for server in nameservers:
        try:
            address = ipaddress.ip_address(server)
        except ValueError:
            continue
        if not (address.is_loopback or address.is_link_local or address.is_unspecified):
            found.append(server)
    return found
