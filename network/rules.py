"""The rules of nftables as text: one table of ours, made whole, and what a container or a network adds to it.

Everything that changes is in sets and maps, so that a container costs a few elements and no rule, and a packet a few
lookups however many containers there are.

- `guard`: what comes from a container can't pretend to be, or reach, the host's loopback (`route_localnet` is on for
  our bridges, so that ports published on 127.0.0.1 work; this closes what it would open: CVE-2020-8558).
- `prerouting`, `output`: published ports, for packets to an address of the host. ::1 isn't among them: the kernel
  never routes from the loopback address of IPv6, there the keeper relays.
- `postrouting`: containers leave with the host's address; so does what comes from the host's loopback, and what a
  container sends to a port of its own network's host (the answer must come back this way).
- `forward`: networks don't see each other, internal ones nothing at all, and from outside comes in only what is
  published.

A verdict of ours ends only this table's chains: a `drop` of somebody else's still drops (docs/networks.md).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence

from wherry.network.model import Connection, Network, Port

_TABLE = """\
table inet {table} {{
  set bridges {{ type ifname; }}
  set internal {{ type ifname; }}
  set pairs {{ type ifname . ifname; }}
  set subnets4 {{ type ipv4_addr; flags interval; }}
  set subnets6 {{ type ipv6_addr; flags interval; }}
  map any4 {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
  map one4 {{ type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }}
  map any6 {{ type inet_proto . inet_service : ipv6_addr . inet_service; }}
  map one6 {{ type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service; }}
  map dns4 {{ type ipv4_addr : inet_service; }}
  map dns6 {{ type ipv6_addr : inet_service; }}
  chain guard {{
    type filter hook prerouting priority -300; policy accept;
    iifname @bridges ip daddr 127.0.0.0/8 drop
    iifname @bridges ip saddr 127.0.0.0/8 drop
  }}
  chain prerouting {{
    type nat hook prerouting priority -100; policy accept;
    iifname @bridges meta l4proto {{ tcp, udp }} th dport 53 redirect to :ip daddr map @dns4
    iifname @bridges meta l4proto {{ tcp, udp }} th dport 53 redirect to :ip6 daddr map @dns6
    iifname @internal return
    iifname != "lo" ip daddr 127.0.0.0/8 return
    fib daddr type local jump publish
  }}
  chain output {{
    type nat hook output priority -100; policy accept;
    ip6 daddr ::1 return
    fib daddr type local jump publish
  }}
  chain publish {{
    dnat ip to ip daddr . meta l4proto . th dport map @one4
    dnat ip to meta l4proto . th dport map @any4
    dnat ip6 to ip6 daddr . meta l4proto . th dport map @one6
    dnat ip6 to meta l4proto . th dport map @any6
  }}
  chain postrouting {{
    type nat hook postrouting priority 100; policy accept;
    oifname @bridges ip saddr 127.0.0.0/8 masquerade
    oifname @bridges ct status dnat ip saddr @subnets4 masquerade
    oifname @bridges ct status dnat ip6 saddr @subnets6 masquerade
    oifname != @bridges ip saddr @subnets4 masquerade
    oifname != @bridges ip6 saddr @subnets6 masquerade
  }}
  chain forward {{
    type filter hook forward priority 0; policy accept;
    iifname . oifname @pairs accept
    iifname @internal drop
    oifname @internal drop
    ct state established,related accept
    oifname @bridges ct status dnat accept
    oifname @bridges drop
  }}
}}
"""


def whole(
    table: str, networks: Iterable[Network], connections: Iterable[Connection], dns: Mapping[str, int] | None = None
) -> str:
    """The table as it should be, in place of the one that is there: in one transaction.

    `dns`: by network id, the port on which its names are served where that isn't 53.
    """
    used = list(networks)
    text = remove(table) + _TABLE.format(table=table)
    text += "".join(add_network(table, item, (dns or {}).get(item.id, 53)) for item in used)
    return text + "".join(publish(table, item) for item in connections)


def remove(table: str) -> str:
    """Without the table, whether it is there or not (adding first makes deleting safe)."""
    return f"add table inet {table}\ndelete table inet {table}\n"


def add_network(table: str, network: Network, dns_port: int = 53) -> str:
    """What a network adds to the table."""
    return "".join(f"add element inet {table} {name} {{ {value} }}\n" for name, value in _network(network, dns_port))


def remove_network(table: str, network: Network, dns_port: int = 53) -> str:
    """What was added for it, taken away."""
    return "".join(
        f"delete element inet {table} {name} {{ {value.partition(' : ')[0]} }}\n"
        for name, value in _network(network, dns_port)
    )


def dns_elements(table: str, network: Network, dns_port: int, *, add: bool) -> str:
    """What leads questions for names to another port than 53; nothing where it is 53."""
    verb = "add" if add else "delete"
    return "".join(
        f"{verb} element inet {table} {name} {{ {value if add else value.partition(' : ')[0]} }}\n"
        for name, value in _dns(network, dns_port)
    )


def _dns(network: Network, dns_port: int) -> list[tuple[str, str]]:
    if dns_port == 53:
        return []
    return [("dns6" if item.is6 else "dns4", f"{item.gateway} : {dns_port}") for item in network.subnets]


def _network(network: Network, dns_port: int) -> list[tuple[str, str]]:
    bridge = f'"{network.bridge}"'
    elements = [("bridges", bridge), ("pairs", f"{bridge} . {bridge}")]
    if network.internal:
        elements.append(("internal", bridge))
    else:
        elements += [("subnets6" if item.is6 else "subnets4", item.subnet) for item in network.subnets]
    return elements + _dns(network, dns_port)


def publish(table: str, connection: Connection) -> str:
    """The published ports of a container."""
    return "".join(
        f"add element inet {table} {name} {{ {key} : {value} }}\n" for name, key, value in _ports(connection)
    )


def withdraw(table: str, connection: Connection, others: Iterable[Connection] = ()) -> str:
    """Without them; what one of the others publishes too is theirs (this one wanted it in vain)."""
    ports = _ports(connection)
    if not ports:
        return ""
    theirs = {(name, key) for other in others if other is not connection for name, key, _ in _ports(other)}
    return "".join(
        f"delete element inet {table} {name} {{ {key} }}\n" for name, key, _ in ports if (name, key) not in theirs
    )


def _ports(connection: Connection) -> list[tuple[str, str, str]]:
    endpoint = connection.publishing()
    if endpoint is None:
        return []
    found = []
    for port in connection.ports:
        if not port.host_port or port.host_port_end:
            continue  # which one it will be isn't known yet
        if endpoint.address4 and 4 in families(port):
            found.append(_port(port, "4", endpoint.address4))
        if endpoint.address6 and 6 in families(port):
            found.append(_port(port, "6", endpoint.address6))
    return found


def _port(port: Port, family: str, address: str) -> tuple[str, str, str]:
    key = f"{port.protocol} . {port.host_port}"
    value = f"{address} . {port.container_port}"
    if port.host_ip in ("", "0.0.0.0", "::"):
        return f"any{family}", key, value
    return f"one{family}", f"{port.host_ip} . {key}", value


def families(port: Port) -> Sequence[int]:
    """The families of the host's addresses on which a port is published."""
    if not port.host_ip:
        return (4, 6)
    return (ipaddress.ip_address(port.host_ip).version,)
