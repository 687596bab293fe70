"""`wherry inspect`: everything about a container, an image, a volume or a network."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from wherry.cli.formats import document, format_option
from wherry.cli.saying import complain
from wherry.cli.table import Command
from wherry.client import inspection
from wherry.client.finding import find
from wherry.core.errors import WherryError

if TYPE_CHECKING:
    from wherry.cli.session import Session

KINDS = ("container", "image", "volume", "network")


async def inspect(session: Session, args: argparse.Namespace) -> int:
    """Prints a list of JSON objects, or each by a template."""
    found, failed = [], 0
    for name in args.names:
        try:
            if args.size and args.type in {"", "container"}:
                found.append(await inspection.container(session.client, await find(session.client, name), size=True))
            else:
                found.append(await inspection.any_of(session.client, name, args.type))
        except WherryError as error:
            complain(error)
            failed = 1
    if args.format and args.format != "json":
        for item in found:
            document(args, item)
    else:
        document(args, found)
    return failed


def configure(parser: argparse.ArgumentParser, kind: str = "") -> None:
    """Adds the options; `kind` is what the noun before `inspect` says."""
    format_option(parser, "JSON (default), or a template")
    if kind:
        parser.set_defaults(type=kind)
    else:
        parser.add_argument("--type", default="", choices=KINDS, help="what it is, where names are the same")
    parser.add_argument("-s", "--size", action="store_true", help="what a container's files take")
    parser.add_argument("names", nargs="+", metavar="NAME", help="name or id")


def command(kind: str) -> Command:
    """`inspect` below a noun."""
    return Command(
        ("inspect",), f"show everything about {kind}s (JSON)", inspect, lambda parser: configure(parser, kind),
        f"wherry {kind} inspect NAME",
    )  # fmt: skip


COMMANDS = [
    Command(
        ("inspect",), "show everything about a container, image, volume or network (JSON)", inspect, configure,
        "wherry inspect -f '{{.State.Status}} {{.NetworkSettings.IPAddress}}' web",
    ),
]  # fmt: skip
