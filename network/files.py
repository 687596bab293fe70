"""A container's /etc/hosts, /etc/resolv.conf and /etc/hostname: texts, and the folder in which they are.

They are made anew each time that a container starts. Programs in the container may write them (they are its own files,
mounted); what they write is gone with the next start.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Sequence

from wherry.core.errors import InvalidArgument
from wherry.network.model import Connection
from wherry.network.resolv import Resolv, outside, parse

NAMES = ("hosts", "resolv.conf", "hostname")
HOST_GATEWAY = "host-gateway"
# where nothing else is known: as docker has it
_PUBLIC = ("8.8.8.8", "8.8.4.4")

_LOOPBACK = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::\tip6-localnet
ff00::\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
"""


def hosts(connection: Connection, hostname: str, domainname: str, added: Iterable[str], gateway: str) -> str:
    """/etc/hosts: the loopback, what was added (`NAME:ADDRESS`), and its own name at its own addresses.

    `gateway` is what `host-gateway` stands for. Raises InvalidArgument for a malformed addition.
    """
    lines = [_LOOPBACK]
    for entry in added:
        name, separator, address = entry.partition(":")
        if not separator or not name or not address:
            raise InvalidArgument(f"host {entry!r}: expected NAME:ADDRESS: invalid argument")
        if address == HOST_GATEWAY:
            if not gateway:
                raise InvalidArgument(f"host {entry!r}: a container without a network has no gateway: invalid argument")
            address = gateway
        lines.append(f"{address}\t{name}\n")
    own = f"{hostname}.{domainname} {hostname}" if domainname else hostname
    addresses = [item for endpoint in connection.endpoints for item in (endpoint.address4, endpoint.address6) if item]
    if own:
        lines += [f"{address}\t{own}\n" for address in addresses or ["127.0.1.1"]]
    return "".join(lines)


def host_hosts(text: str, added: Iterable[str]) -> str:
    """The host's own file with what was added, for a container with the host's network."""
    lines = []
    for entry in added:
        name, _, address = entry.partition(":")
        lines.append(f"{'127.0.0.1' if address == HOST_GATEWAY else address}\t{name}\n")
    return text + ("" if text.endswith("\n") or not text else "\n") + "".join(lines)


def resolv_conf(
    host: str,
    nameservers: Sequence[str],
    search: Sequence[str],
    options: Sequence[str],
    *,
    embedded: Sequence[str] = (),
) -> str:
    """/etc/resolv.conf of a container.

    `host` is the text of the host's file. `embedded`: addresses of our name servers, which ask the others; then a name
    without a dot is asked for as it is (ndots:0), because names of containers have none. Else the servers are those
    that were asked for, else those of the host that a container can reach.
    """
    theirs = parse(host)
    servers = list(embedded or nameservers or outside(theirs.nameservers) or _PUBLIC)
    domains = list(search or theirs.search)
    if domains == ["."]:
        domains = []
    chosen = list(options or theirs.options)
    if embedded and not any(option.startswith("ndots:") for option in options):
        chosen = [option for option in chosen if not option.startswith("ndots:")] + ["ndots:0"]
    return Resolv(servers, domains, chosen).text()


def read_host(path: str) -> str:
    """A file of the host; "" where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def write(folder: str, texts: dict[str, str], owner: tuple[int, int] = (0, 0)) -> None:
    """The files of one container, in place of those of before; `owner` is its root."""
    os.makedirs(folder, mode=0o711, exist_ok=True)
    for name, text in texts.items():
        # for everybody in the container to read, whoever it runs as
        with open(
            os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644), "w"
        ) as file:
            os.fchmod(file.fileno(), 0o644)
            if owner != (0, 0):
                os.fchown(file.fileno(), *owner)
            file.write(text)


def update(folder: str, name: str, text: str) -> None:
    """Another text for a file that a container has mounted: the same inode. One that isn't there is left out."""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, name), "r+", encoding="utf-8") as file:
        file.truncate()
        file.write(text)


def remove(folder: str) -> None:
    """None there is fine."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(folder))
