"""What needs no kernel: addresses, records, rules as text, names as bytes, files, flags."""

from __future__ import annotations

import ipaddress
import os
import struct
from pathlib import Path

import pytest

from wherry.client.network import Port, parse_ports, show_ports
from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, ResourceExhausted
from wherry.network import dns_message as wire
from wherry.network import files, resolv, rules
from wherry.network.dns import Names
from wherry.network.model import Connection, Endpoint, Network, Subnet
from wherry.network.model import Port as Published
from wherry.network.pools import check_subnet, host_networks, mac_of, pick_address, pick_subnet
from wherry.network.store import Store


def network(name: str = "shop", subnet: str = "10.9.0.0/29", **more: object) -> Network:
    settled = check_subnet(Subnet(subnet, ""))
    return Network(f"id-{name}", name, f"br-{name}", [settled], **more)  # type: ignore[arg-type]


def test_subnets_come_from_the_pools_and_overlap_nothing() -> None:
    taken = [ipaddress.ip_network("10.9.0.0/25"), ipaddress.ip_network("fd00::/64")]
    assert str(pick_subnet(["10.9.0.0/24/26"], taken)) == "10.9.0.128/26"
    assert str(pick_subnet(["10.9.0.0/25/26", "10.8.0.0/24/24"], taken)) == "10.8.0.0/24"
    assert str(pick_subnet(["fd00::/48/64"], taken)) == "fd00:0:0:1::/64"
    with pytest.raises(ResourceExhausted):
        pick_subnet(["10.9.0.0/25/26"], taken)
    assert pick_subnet(["10.9.0.0/16/24"], [], "seed") == pick_subnet(["10.9.0.0/16/24"], [], "seed")
    for wrong in ("10.9.0.0/24", "10.9.0.0/24/23", "10.9.0.0/24/32", "x/24/25"):
        with pytest.raises(InvalidArgument):
            pick_subnet([wrong], [])
    assert any(item.version == 4 for item in host_networks())


@pytest.mark.parametrize(
    "wrong",
    [
        Subnet("10.9.0.1/24", ""),
        Subnet("10.9.0.0/31", ""),
        Subnet("10.9.0.0/24", "10.8.0.1"),
        Subnet("10.9.0.0/24", "10.9.0.0"),
        Subnet("10.9.0.0/24", "", "10.8.0.0/25"),
        Subnet("127.0.0.0/24", ""),
        Subnet("rubbish", ""),
    ],
)
def test_wrong_subnets(wrong: Subnet) -> None:
    with pytest.raises(InvalidArgument):
        check_subnet(wrong)


def test_addresses_are_given_out_in_turn() -> None:
    subnet = check_subnet(Subnet("10.9.0.0/29", ""))
    assert subnet.gateway == "10.9.0.1"
    assert pick_address(subnet, set()) == "10.9.0.2"
    assert pick_address(subnet, {"10.9.0.4"}, "10.9.0.3") == "10.9.0.5"
    assert pick_address(subnet, {"10.9.0.2"}, "10.9.0.6") == "10.9.0.3"  # over the end
    with pytest.raises(ResourceExhausted):
        pick_address(subnet, {f"10.9.0.{last}" for last in range(2, 7)}, "10.9.0.4")
    assert pick_address(subnet, set(), "", "10.9.0.6") == "10.9.0.6"
    for wrong in ("10.9.0.0", "10.9.0.7", "10.9.0.1", "10.10.0.2", "x"):
        with pytest.raises(InvalidArgument):
            pick_address(subnet, set(), "", wrong)
    assert mac_of("10.9.0.2") == "02:57:0a:09:00:02"


def test_records_survive_and_addresses_have_one_owner(tmp_path: Path) -> None:
    path = str(tmp_path / "network.db")
    store, shop = Store(path), network()
    store.add_network(shop)
    with pytest.raises(AlreadyExists):
        store.add_network(Network("other", "shop", "br", shop.subnets))
    one, two = Connection("ns", "one", "networks", ports=[Published(80, 8080)]), Connection("ns", "two", "networks")
    store.take(one, [(shop, Endpoint(shop.id, "shop", "eth0"))])
    store.take(two, [(shop, Endpoint(shop.id, "shop", "eth0"))])
    assert (one.endpoints[0].ipv4, two.endpoints[0].ipv4) == ("10.9.0.2/29", "10.9.0.3/29")
    third = Connection("ns", "three", "networks")
    with pytest.raises(FailedPrecondition, match=r'10\.9\.0\.3 is in use by container "two"'):
        store.take(third, [(shop, Endpoint(shop.id, "shop", "eth0", ipv4="10.9.0.3"))])
    with pytest.raises(FailedPrecondition, match='in use by "one", "two"'):
        store.remove_network(shop)
    store.close()
    store = Store(path)
    assert store.networks() == [shop]
    assert store.connections() == [one, two]
    assert os.stat(path).st_mode & 0o777 == 0o600
    store.drop(one)
    store.drop(one)
    store.leave(two, two.endpoints[0])
    assert store.connections()[0].endpoints == []
    # a released address rests: the next one is another
    store.take(third := Connection("ns", "three", "networks"), [(shop, Endpoint(shop.id, "shop", "eth0"))])
    assert third.endpoints[0].ipv4 == "10.9.0.4/29"
    assert store.setting("k", "a") == store.setting("k", "b") == "a"
    store.drop(third)
    store.drop(two)
    store.remove_network(shop)
    store.close()


def test_rules_say_what_is_published_where() -> None:
    shop = network(internal=False)
    endpoint = Endpoint(shop.id, "shop", "eth0", ipv4="10.9.0.2/29", ipv6="fd00::2/64")
    ports = [
        Published(80, 8080),
        Published(81, 8081, "udp", "127.0.0.1"),
        Published(82, 8082, "tcp", "::1"),
        Published(83, 8083, "tcp", "0.0.0.0"),
    ]
    connection = Connection("ns", "c", "networks", endpoints=[endpoint], ports=ports)
    assert rules.publish("t", connection).splitlines() == [
        "add element inet t any4 { tcp . 8080 : 10.9.0.2 . 80 }",
        "add element inet t any6 { tcp . 8080 : fd00::2 . 80 }",
        "add element inet t one4 { 127.0.0.1 . udp . 8081 : 10.9.0.2 . 81 }",
        "add element inet t one6 { ::1 . tcp . 8082 : fd00::2 . 82 }",
        "add element inet t any4 { tcp . 8083 : 10.9.0.2 . 83 }",
    ]
    assert "delete element inet t one4 { 127.0.0.1 . udp . 8081 }" in rules.withdraw("t", connection)
    assert 'add element inet t pairs { "br-shop" . "br-shop" }' in rules.add_network("t", shop)
    assert "subnets4 { 10.9.0.0/29 }" in rules.add_network("t", shop)
    closed = rules.add_network("t", network(internal=True), 5353)
    assert "subnets4" not in closed
    assert 'internal { "br-shop" }' in closed
    assert "dns4 { 10.9.0.1 : 5353 }" in closed
    assert rules.publish("t", Connection("ns", "c", "none", ports=ports)) == ""


def question(name: str, kind: int = wire.A, flags: int = 0x0100) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".") if part)
    return struct.pack("!HHHHHH", 77, flags, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, wire.IN)


def test_messages_of_dns() -> None:
    query = wire.parse(question("Web.Shop."))
    assert (query.id, query.name, query.kind) == (77, "web.shop", wire.A)
    answer = wire.answer(query, [wire.address("10.9.0.2")])
    assert answer[:4] == struct.pack("!HH", 77, 0x8580)
    assert answer.endswith(b"\x00\x04\x0a\x09\x00\x02")
    assert wire.is_answer_to(answer, 77, query.question)
    assert not wire.is_answer_to(answer, 78, query.question)
    assert not wire.is_answer_to(answer, 77, wire.parse(question("other")).question)
    assert wire.reversed_address("2.0.9.10.in-addr.arpa") == "10.9.0.2"
    nibbles = ipaddress.ip_address("fd00::2").reverse_pointer
    assert wire.reversed_address(nibbles) == "fd00::2"
    assert wire.reversed_address("x.in-addr.arpa") is None
    assert wire.name("web.shop")[1] == b"\x03web\x04shop\x00"


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"\0" * 11,
        question("a", flags=0x8000),
        question("a")[:-1],
        question("a" * 64),
        question(".".join(["a" * 60] * 5)),
        question("a")[:12] + b"\xc0\x0c\0\1\0\1",
        struct.pack("!HHHHHH", 1, 0, 2, 0, 0, 0),
    ],
)
def test_damaged_messages_are_refused(wrong: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        wire.parse(wrong)
    refused = wire.refuse(wrong, wire.FORMERR)
    assert refused is None or refused[3] & 0xF == wire.FORMERR


def test_names_are_seen_on_shared_networks_only() -> None:
    def owner(*on: tuple[str, str, str]) -> dict[str, object]:
        endpoints = [{"network": net, "addresses": [address], "names": [name]} for net, address, name in on]
        return {"dns": [], "ports": [], "endpoints": endpoints}

    names = Names()
    names.networks = {"a": {"internal": False}, "b": {"internal": True}}
    web, db = owner(("a", "10.0.0.2", "Web")), owner(("b", "10.1.0.2", "db"))
    both = owner(("a", "10.0.0.3", "both"), ("b", "10.1.0.3", "both"))
    for key, value in (("web", web), ("db", db), ("both", both)):
        names.set(key, value)
    assert names.addresses(web, "db") is None
    assert names.addresses(web, "both") == ["10.0.0.3"]
    assert names.addresses(both, "web") == ["10.0.0.2"]
    assert names.addresses(both, "db") == ["10.1.0.2"]
    assert names.name(web, "10.0.0.3") == "both"
    assert names.name(web, "10.1.0.2") is None
    assert names.may_ask_outside(both)
    assert not names.may_ask_outside(db)
    names.set("both", None)
    assert names.addresses(web, "both") is None
    assert names.owner("10.0.0.3") is None


def test_files() -> None:
    host = "# c\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nsearch a.b\noptions edns0 trust-ad\nsortlist x\n"
    assert files.resolv_conf(host, [], [], []) == "search a.b\nnameserver 192.0.2.1\noptions edns0 trust-ad\n"
    assert files.resolv_conf(host, ["9.9.9.9"], ["."], ["ndots:1"]) == "nameserver 9.9.9.9\noptions ndots:1\n"
    embedded = files.resolv_conf(host, ["9.9.9.9"], [], [], embedded=["10.9.0.1"])
    assert embedded == "search a.b\nnameserver 10.9.0.1\noptions edns0 trust-ad ndots:0\n"
    assert "nameserver 8.8.8.8" in files.resolv_conf("nameserver ::1\n", [], [], [])
    assert resolv.servers("nameserver x\nnameserver fe80::1%eth0\n") == ["fe80::1%eth0"]
    connection = Connection("ns", "c", "none")
    assert "127.0.1.1\tbox" in files.hosts(connection, "box", "", [], "")
    with pytest.raises(InvalidArgument):
        files.hosts(connection, "box", "", ["up:host-gateway"], "")


def test_ports_as_people_write_them() -> None:
    assert parse_ports("8080:80") == [Port(80, 8080)]
    assert parse_ports("80/udp") == [Port(80, 0, "udp")]
    assert parse_ports("127.0.0.1::80") == [Port(80, 0, "tcp", "127.0.0.1")]
    assert parse_ports("[fd00::1]:8080:80/TCP") == [Port(80, 8080, "tcp", "fd00::1")]
    assert parse_ports("8000-8005:80") == [Port(80, 8000, "tcp", "", 8005)]
    assert parse_ports("70-71:80-81") == [Port(80, 70), Port(81, 71)]
    assert show_ports(parse_ports("70-72:80-82") + parse_ports("[::1]:9:9")) == (
        "0.0.0.0:70-72->80-82/tcp, [::1]:9->9/tcp"
    )
    for wrong in ("", "x", "0:1", "1:65536", "a:b", "80/icmp", "1.2.3:80:80", "[::1]80", "5-4:5-4", "1-2:1-3"):
        with pytest.raises(InvalidArgument):
            parse_ports(wrong)
