"""What a container's record asks of networks, checked: ports, addresses, MACs."""

from __future__ import annotations

from wherry.core.errors import InvalidArgument
from wherry.core.names import quote
from wherry.network.model import Port
from wherry.proto import network_pb2 as pb
from wherry.proto.containers_pb2 import Container

EXTENSION = "wherry.network"
PROTOCOLS = ("tcp", "udp", "sctp")


def settings_of(container: Container) -> pb.Settings | None:
    """What a container asks for, None where it asks for nothing."""
    if EXTENSION not in container.extensions:
        return None
    return pb.Settings.FromString(container.extensions[EXTENSION].value)


def port(message: pb.Port) -> Port:
    """A published port. Raises InvalidArgument."""
    if not 1 <= message.container_port <= 65535 or message.host_port > 65535 or message.host_port_end > 65535:
        raise InvalidArgument("ports go from 1 to 65535: invalid argument")
    protocol = message.protocol or "tcp"
    if protocol not in PROTOCOLS:
        raise InvalidArgument(f"protocol {quote(protocol)} of a port: invalid argument")
    if protocol == "sctp" and not message.host_port:
        raise InvalidArgument("a port of sctp needs a port of the host: invalid argument")
    return Port(message.container_port, message.host_port, protocol, _ip(message.host_ip), message.host_port_end)


def _ip(text: str) -> str:
    import ipaddress  # noqa: PLC0415 -- for the few that name an address

    try:
        return str(ipaddress.ip_address(text)) if text else ""
    except ValueError:
        raise InvalidArgument(f"{quote(text)} is no IP address: invalid argument") from None


def mac(text: str) -> str:
    """A MAC address as the kernel spells it, "" for "". Raises InvalidArgument."""
    if not text:
        return ""
    octets = text.lower().replace("-", ":").split(":")
    if len(octets) != 6 or any(len(octet) != 2 or not set(octet) <= set("0123456789abcdef") for octet in octets):
        raise InvalidArgument(f"{quote(text)} is no MAC address: invalid argument")
    if int(octets[0], 16) & 1:
        raise InvalidArgument(f"{quote(text)} is a multicast address: invalid argument")
    return ":".join(octets)
