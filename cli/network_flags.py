"""The network's options of `run` and `create`: -p, -P, --net and their neighbours.

A command calls `configure(parser)` and, with what was parsed, `network_options(args, name)`; the answer is for
`Launch.network`. Ports that a container has now are in `client.networks.status()`, `show_port` spells them.
"""

from __future__ import annotations

import argparse

from wherry.client.network import MODES, Attachment, NetworkOptions, Port, parse_ports
from wherry.core.errors import InvalidArgument


def configure(parser: argparse.ArgumentParser, *, hostname: bool = True) -> None:
    """Adds the options; without `hostname` where the command has that one already."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "-p", "--publish", action="append", default=[], metavar="[ADDRESS:][HOST:]PORT[/PROTOCOL]",
        help="publish a port (8080:80, 127.0.0.1::80, 7000-7009:7000-7009/udp)",
    )  # fmt: skip
    group.add_argument(
        "--expose", action="append", default=[], metavar="PORT[/PROTOCOL]", help="a port that -P publishes, too"
    )
    group.add_argument("-P", "--publish-all", action="store_true", help="publish all ports that the image exposes")
    group.add_argument(
        "--net", "--network", dest="net", action="append", default=[], metavar="NETWORK",
        help="bridge (the default), none, host, container:ID, or a network's name; again for more of them",
    )  # fmt: skip
    group.add_argument(
        "--network-alias", "--net-alias", action="append", default=[], metavar="NAME",
        help="another name on its networks",
    )  # fmt: skip
    group.add_argument("--ip", default="", metavar="ADDRESS", help="its IPv4 address")
    group.add_argument("--ip6", default="", metavar="ADDRESS", help="its IPv6 address")
    group.add_argument("--mac-address", default="", metavar="MAC", help="its MAC address")
    if hostname:
        group.add_argument("-h", "--hostname", default="", metavar="NAME", help="host name")
    group.add_argument("--domainname", default="", metavar="NAME", help="domain name")
    group.add_argument(
        "--add-host", action="append", default=[], metavar="NAME:ADDRESS",
        help="a line of /etc/hosts (host-gateway is the host's address)",
    )  # fmt: skip
    group.add_argument("--dns", action="append", default=[], metavar="ADDRESS", help="a name server")
    group.add_argument(
        "--dns-search", action="append", default=[], metavar="DOMAIN", help="a search domain (. for none)"
    )
    group.add_argument(
        "--dns-option", "--dns-opt", dest="dns_option", action="append", default=[], metavar="OPTION",
        help="an option of resolv.conf",
    )  # fmt: skip


def network_options(args: argparse.Namespace, *names: str) -> NetworkOptions:
    """What the options ask for. `names` are what others find the container by (its name; its id is known anyway).

    Raises InvalidArgument for what can't be meant together.
    """
    mode, container, attachments = _networks(args)
    ports = [port for text in args.publish for port in parse_ports(text)]
    if mode in {"none", "host", "container"}:
        _refuse(args, mode, ports)
    return NetworkOptions(
        mode=mode,
        container=container,
        networks=attachments,
        ports=ports if mode in {"bridge", "networks"} else (),
        publish_all=args.publish_all and mode in {"bridge", "networks"},
        exposed=args.expose,
        hostname=args.hostname,
        domainname=args.domainname,
        hosts=[_host(text) for text in args.add_host],
        dns=args.dns,
        dns_search=args.dns_search,
        dns_options=args.dns_option,
        names=[name for name in names if name],
        optional=not (args.net or ports or args.publish_all),
    )


def _networks(args: argparse.Namespace) -> tuple[str, str, list[Attachment]]:
    wanted = list(args.net) or ["bridge"]
    single = [name for name in wanted if name in MODES or name == "default" or name.startswith("container:")]
    if single and len(wanted) > 1:
        raise InvalidArgument(f"--net {single[0]} can't be joined with other networks")
    first = Attachment("bridge", args.network_alias, args.ip, args.ip6, args.mac_address)
    if not single:
        # addresses are for the first network, aliases for all of them
        head, *rest = wanted
        return "networks", "", [first._replace(network=head), *(Attachment(name, args.network_alias) for name in rest)]
    mode, _, container = wanted[0].partition(":")
    if mode == "container" and not container:
        raise InvalidArgument("--net container: needs a container's id")
    if mode == "default":
        mode = "bridge"
    return mode, container, [first] if mode == "bridge" else []


def _refuse(args: argparse.Namespace, mode: str, ports: list[Port]) -> None:
    """docker lets some of these pass without an effect; whoever asks for them is better told."""
    given = [
        flag
        for flag, value in (("--ip", args.ip), ("--ip6", args.ip6), ("--mac-address", args.mac_address),
                            ("--network-alias", args.network_alias))
        if value
    ]  # fmt: skip
    if mode == "container":
        given += [
            flag
            for flag, value in (("-p", ports), ("--hostname", args.hostname), ("--add-host", args.add_host),
                                ("--dns", args.dns))
            if value
        ]  # fmt: skip
    if mode == "none" and ports:
        given.append("-p")
    if given:
        raise InvalidArgument(f"{given[0]} can't be used with --net {mode}")


def _host(text: str) -> str:
    name, separator, address = text.partition(":" if "=" not in text else "=")
    if not separator or not name or not address:
        raise InvalidArgument(f"--add-host {text!r}: expected NAME:ADDRESS")
    return f"{name}:{address.strip('[]')}"
