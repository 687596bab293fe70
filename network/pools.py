"""Which subnets and addresses are given out. Numbers in, numbers out; nothing is kept here."""

from __future__ import annotations

import ipaddress
import zlib
from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import TypeAlias

from wherry.core.errors import InvalidArgument, ResourceExhausted
from wherry.network.model import Subnet

AnyNetwork: TypeAlias = IPv4Network | IPv6Network

POOLS = ("10.210.0.0/16/22", "172.30.0.0/15/22", "192.168.192.0/18/24")
"""The default: POOL/LENGTH; networks without a subnet of their own get one of that prefix length.

A /22 holds 1021 containers, a bridge of Linux 1023 ports (BR_MAX_PORTS). The ranges are those that docker (172.17 to
172.31 in order, 192.168.0 on), podman (10.88, 10.89) and Kubernetes' usual choices reach last or not at all.
"""


def split_pool(text: str) -> tuple[AnyNetwork, int]:
    """A pool from the configuration: `10.210.0.0/16/22`. Raises InvalidArgument."""
    base, _, length = text.rpartition("/")
    try:
        pool = ipaddress.ip_network(base)
        size = int(length)
    except ValueError as error:
        raise InvalidArgument(f"address pool {text!r}: {error}: invalid argument") from None
    if not pool.prefixlen <= size <= pool.max_prefixlen - 2:
        raise InvalidArgument(f"address pool {text!r}: its subnets' length {size} doesn't fit: invalid argument")
    return pool, size


def pick_subnet(pools: Sequence[str], taken: Iterable[AnyNetwork], seed: str = "") -> AnyNetwork:
    """A subnet of the pools that overlaps nothing that is taken. Raises ResourceExhausted.

    With a `seed` the search begins elsewhere: daemons on one host that don't know of each other seldom meet.
    """
    used = list(taken)
    for text in pools:
        pool, size = split_pool(text)
        count = 1 << (size - pool.prefixlen)
        start = zlib.crc32(seed.encode()) % count if seed else 0
        step = 1 << (pool.max_prefixlen - size)
        for index in range(min(count, 4096)):
            number = int(pool.network_address) + (start + index) % count * step
            kind = IPv4Network if pool.version == 4 else IPv6Network
            candidate = kind((number, size))
            if not any(_overlap(candidate, other) for other in used):
                return candidate
    raise ResourceExhausted("all subnets of the address pools are in use: name one (--subnet), or configure more pools")


def _overlap(one: AnyNetwork, other: AnyNetwork) -> bool:
    if isinstance(one, IPv4Network):
        return isinstance(other, IPv4Network) and one.overlaps(other)
    return isinstance(other, IPv6Network) and one.overlaps(other)


def overlapping(subnet: str, taken: Iterable[AnyNetwork]) -> AnyNetwork | None:
    """The first that a subnet overlaps."""
    wanted = ipaddress.ip_network(subnet)
    return next((other for other in taken if _overlap(wanted, other)), None)


def check_subnet(subnet: Subnet) -> Subnet:
    """A subnet as it is recorded: with its gateway. Raises InvalidArgument for what doesn't fit."""
    try:
        network = ipaddress.ip_network(subnet.subnet)
        gateway = ipaddress.ip_address(subnet.gateway) if subnet.gateway else network.network_address + 1
        part = ipaddress.ip_network(subnet.range) if subnet.range else None
    except ValueError as error:
        raise InvalidArgument(f"subnet {subnet.subnet}: {error}: invalid argument") from None
    if network.prefixlen > network.max_prefixlen - 2:
        raise InvalidArgument(f"subnet {network} is too small: invalid argument")
    if network.is_loopback or network.is_multicast or network.is_unspecified:
        raise InvalidArgument(f"subnet {network} can't be used for containers: invalid argument")
    if gateway not in network or gateway == network.network_address:
        raise InvalidArgument(f"gateway {gateway} is no address of {network}: invalid argument")
    if part is not None and not (
        part.version == network.version and part.network_address in network and part.broadcast_address in network
    ):
        raise InvalidArgument(f"range {part} is not in {network}: invalid argument")
    return Subnet(str(network), str(gateway), str(part) if part is not None else "")


def pick_address(subnet: Subnet, taken: Collection[str], last: str = "", wanted: str = "") -> str:
    """A free address of a subnet, without its length: the next one behind the `last` that was given out.

    So that an address that was just released rests the longest: neighbours still know it as somebody else's.
    Raises InvalidArgument where the wanted one isn't in the subnet, ResourceExhausted.
    """
    network = ipaddress.ip_network(subnet.subnet)
    if wanted:
        return _check_wanted(network, subnet, wanted)
    part = ipaddress.ip_network(subnet.range) if subnet.range else network
    first, end = int(part.network_address), int(part.broadcast_address) + 1
    # an IPv6 subnet has no broadcast address, but nobody will miss one
    barred = {int(network.network_address), int(network.broadcast_address), int(ipaddress.ip_address(subnet.gateway))}
    start = int(ipaddress.ip_address(last)) + 1 if last else first
    if not first <= start < end:
        start = first
    used = len(taken) + len(barred) + 1
    kind = ipaddress.IPv4Address if network.version == 4 else ipaddress.IPv6Address
    number = start
    for _ in range(min(end - first, used)):
        if number not in barred and (text := str(kind(number))) not in taken:
            return text
        number = number + 1 if number + 1 < end else first
    raise ResourceExhausted(f"no address is free in {part}: resource exhausted")


def _check_wanted(network: AnyNetwork, subnet: Subnet, wanted: str) -> str:
    try:
        address = ipaddress.ip_address(wanted)
    except ValueError:
        raise InvalidArgument(f"{wanted!r} is no IP address: invalid argument") from None
    if address not in network or address in (network.network_address, network.broadcast_address):
        raise InvalidArgument(f"address {address} is none that {network} can give: invalid argument")
    if str(address) == subnet.gateway:
        raise InvalidArgument(f"address {address} is the gateway's: invalid argument")
    return str(address)


def mac_of(address: str) -> str:
    """A locally administered MAC that follows from an IPv4 address: who gets the address again is known already."""
    octets = ipaddress.IPv4Address(address).packed
    return "02:57:" + ":".join(f"{octet:02x}" for octet in octets)


def host_networks(proc: str = "/proc") -> list[AnyNetwork]:
    """The networks that the host has routes to, without the default routes: what is connected is among them."""
    found: list[AnyNetwork] = []
    with open(f"{proc}/net/route", encoding="ascii") as file:
        for line in file.readlines()[1:]:
            fields = line.split()
            # both are hexadecimal in the machine's byte order, which is the little one wherever we run
            target, mask = (int.from_bytes(bytes.fromhex(fields[index])[::-1], "big") for index in (1, 7))
            if mask:
                found.append(IPv4Network((target, mask.bit_count())))
    try:
        with open(f"{proc}/net/ipv6_route", encoding="ascii") as file:
            for line in file:
                fields = line.split()
                length = int(fields[1], 16)
                route = IPv6Network((int(fields[0], 16), length))
                if 0 < length < 128 and not route.is_link_local and not route.is_multicast:
                    found.append(route)
    except FileNotFoundError:
        pass  # a kernel without IPv6
    return found
