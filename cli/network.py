"""`wherry network`: networks of containers."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from wherry.cli import inspect
from wherry.cli.arguments import pairs
from wherry.cli.formats import Headings, filters, labels_fit, listing_flags, show
from wherry.cli.saying import each
from wherry.cli.table import Command
from wherry.client.finding import find
from wherry.client.network import Attachment, Network, Subnet
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    from wherry.cli.session import Session

COLUMNS: Headings = {"ID": "NETWORK ID", "Name": "NAME", "Driver": "DRIVER", "Subnets": "SUBNETS"}
SHORT = 12
_TRUE = {"true", "1"}


async def list_(session: Session, args: argparse.Namespace) -> None:
    """Prints the networks."""
    found = filters(args.filter, ("name", "id", "driver", "label", "internal"))
    rows = []
    for item in await session.client.networks.list():
        if not labels_fit(found.get("label", ()), item.labels) or not _fits(found, item):
            continue
        rows.append(
            {
                "ID": item.id if args.no_trunc or item.driver == "cni" else item.id[:SHORT],
                "Name": item.name,
                "Driver": item.driver,
                "Scope": "local",
                "IPv6": str(item.ipv6).lower(),
                "Internal": str(item.internal).lower(),
                "Subnets": " ".join(subnet.subnet for subnet in item.subnets) or "-",
                "Labels": ",".join(f"{key}={value}" for key, value in sorted(item.labels.items())),
            }
        )
    show(args, rows, COLUMNS, quiet="ID")


def _fits(found: dict[str, list[str]], item: Network) -> bool:
    tests: dict[str, Callable[[str], bool]] = {
        "name": lambda value: value in item.name,
        "id": item.id.startswith,
        "driver": lambda value: value == item.driver,
        "internal": lambda value: (value.lower() in _TRUE) == item.internal,
    }
    return all(any(tests[key](value) for value in values) for key, values in found.items() if key in tests)


async def create(session: Session, args: argparse.Namespace) -> None:
    """Makes a network and prints its id."""
    wanted = Network(
        name=args.name,
        driver=args.driver,
        subnets=_subnets(args),
        ipv6=args.ipv6,
        internal=args.internal,
        labels=pairs(args.label),
        dns=not args.disable_dns,
    )
    made = await session.client.networks.create(_with_options(wanted, args.opt))
    print(made.id)


def _subnets(args: argparse.Namespace) -> list[Subnet]:
    """Gateways and ranges belong to the subnets of their family: there is one of each at most."""
    found = []
    for text in args.subnet:
        six = ":" in text
        gateway = [item for item in args.gateway if (":" in item) == six]
        part = [item for item in args.ip_range if (":" in item) == six]
        found.append(Subnet(text, gateway[0] if gateway else "", part[0] if part else ""))
    if not found and (args.gateway or args.ip_range):
        raise InvalidArgument("--gateway and --ip-range need a --subnet")
    return found


def _with_options(wanted: Network, options: list[str]) -> Network:
    """`-o KEY=VALUE`, by our names and by docker's."""
    for key, value in pairs(options).items():
        if key in {"bridge", "com.docker.network.bridge.name"}:
            wanted = wanted._replace(bridge=value)
        elif key in {"mtu", "com.docker.network.driver.mtu"}:
            if not value.isdigit():
                raise InvalidArgument(f"option {key}: {value!r} is no number")
            wanted = wanted._replace(mtu=int(value))
        elif key == "isolated":
            wanted = wanted._replace(isolated=value.lower() in _TRUE)
        elif key == "com.docker.network.bridge.enable_icc":
            wanted = wanted._replace(isolated=value.lower() not in _TRUE)
        else:
            raise InvalidArgument(f"unknown option {key!r}: there are bridge, mtu and isolated")
    return wanted


async def remove(session: Session, args: argparse.Namespace) -> int:
    """Removes networks that nobody is on."""
    return await each(args.names, session.client.networks.delete, missing_ok=args.force)


async def prune(session: Session, args: argparse.Namespace) -> int:
    """Removes networks that no container names."""
    from wherry.cli.system import agreed

    if not agreed(args, "all networks that no container uses"):
        return 1
    names = await session.client.networks.prune()
    if names:
        print("Deleted Networks:\n" + "\n".join(names))
    return 0


async def connect(session: Session, args: argparse.Namespace) -> None:
    """Puts a container on a network."""
    container = await find(session.client, args.container)
    attachment = Attachment(args.network, args.alias, args.ip, args.ip6, args.mac_address)
    await session.client.networks.connect(container.id, attachment)


async def disconnect(session: Session, args: argparse.Namespace) -> None:
    """Takes a container off a network."""
    try:
        container = await find(session.client, args.container)
        await session.client.networks.disconnect(container.id, args.network)
    except (NotFound, FailedPrecondition):
        if not args.force:
            raise


def _list_options(parser: argparse.ArgumentParser) -> None:
    listing_flags(parser)


def _create_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-d", "--driver", default="bridge", choices=("bridge",), help="there is one; others by CNI's conflists")
    add("--subnet", action="append", default=[], metavar="CIDR", help="10.9.0.0/24; one of each family at most")
    add("--gateway", action="append", default=[], metavar="ADDRESS", help="the bridge's address (the subnet's first)")
    add("--ip-range", action="append", default=[], metavar="CIDR", help="give addresses out of this part only")
    add("--ipv6", action="store_true", help="IPv6 too")
    add("--internal", action="store_true", help="no way to the outside")
    add("--disable-dns", action="store_true", help="don't resolve containers' names")
    add("-o", "--opt", action="append", default=[], metavar="KEY=VALUE", help="bridge=NAME, mtu=N, isolated=true")
    add("--label", action="append", default=[], metavar="KEY=VALUE", help="a label")
    add("name", metavar="NAME")


def _remove_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="no error where it isn't there")
    parser.add_argument("names", nargs="+", metavar="NETWORK")


def _prune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="don't ask")


def _connect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--alias", action="append", default=[], metavar="NAME", help="another name on this network")
    parser.add_argument("--ip", default="", metavar="ADDRESS", help="its IPv4 address")
    parser.add_argument("--ip6", default="", metavar="ADDRESS", help="its IPv6 address")
    parser.add_argument("--mac-address", default="", metavar="MAC", help="its MAC address")
    _disconnect_names(parser)


def _disconnect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="no error where it isn't on it")
    _disconnect_names(parser)


def _disconnect_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", metavar="NETWORK")
    parser.add_argument("container", metavar="CONTAINER")


COMMANDS = [
    Command(("list", "ls"), "list networks", list_, _list_options, "wherry network ls --filter driver=bridge"),
    Command(
        ("create",), "make a network", create, _create_options,
        "wherry network create --subnet 10.9.0.0/24 --ipv6 shop",
    ),
    inspect.command("network"),
    Command(("remove", "rm"), "remove networks that nobody is on", remove, _remove_options, "wherry network rm shop"),
    Command(("prune",), "remove networks that no container names", prune, _prune_options, "wherry network prune -f"),
    Command(
        ("connect",), "put a container on a network", connect, _connect_options,
        "wherry network connect --alias db shop postgres",
    ),
    Command(
        ("disconnect",), "take a container off a network", disconnect, _disconnect_options,
        "wherry network disconnect shop postgres",
    ),
]  # fmt: skip
