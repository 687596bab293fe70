"""`wherry plugins`: the parts of the daemon."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from wherry.cli.output import Column, listing, listing_options
from wherry.cli.table import Command
from wherry.client.introspection import Plugin

if TYPE_CHECKING:
    from wherry.cli.session import Session

COLUMNS = [
    Column[Plugin]("TYPE", "Type", lambda item: item.type),
    Column[Plugin]("ID", "ID", lambda item: item.id),
    Column[Plugin]("PLATFORMS", "Platforms", lambda item: list(item.platforms), lambda v: ",".join(v) or "-"),
    Column[Plugin]("STATUS", "Status", lambda item: item.status),
]
DETAILS = [
    Column[Plugin]("REQUIRES", "Requires", lambda item: list(item.requires), lambda v: ",".join(v) or "-"),
    Column[Plugin]("CAPABILITIES", "Capabilities", lambda item: list(item.capabilities), lambda v: ",".join(v) or "-"),
    Column[Plugin]("EXPORTS", "Exports", lambda item: dict(item.exports),
                   lambda v: ",".join(f"{key}={value}" for key, value in sorted(v.items())) or "-"),
    Column[Plugin]("ERROR", "Error", lambda item: item.error),
]  # fmt: skip


async def list_(session: Session, args: argparse.Namespace) -> None:
    """Prints the plugins."""
    plugins = await session.client.introspection.plugins(args.filters)
    if args.quiet:
        # the id alone isn't unique; it is what ctr prints
        for plugin in plugins:
            print(plugin.id)
        return
    listing(args, COLUMNS + DETAILS if args.detailed or args.format == "json" else COLUMNS, plugins)


def _configure(parser: argparse.ArgumentParser) -> None:
    listing_options(parser)
    parser.add_argument("-d", "--detailed", action="store_true", help="what each needs, exports and says")
    parser.add_argument("filters", nargs="*", metavar="FILTER")


COMMANDS = [Command(("list", "ls"), "list the parts of the daemon", list_, _configure, "wherry plugins ls type~=grpc")]
