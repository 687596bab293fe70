"""`wherry version`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from wherry.cli.output import print_json
from wherry.cli.table import Command

if TYPE_CHECKING:
    from wherry.cli.session import Session


# as in pyproject.toml (a test compares): reading the installed metadata takes longer than the question to the daemon
VERSION = "0.1.0"


async def version(session: Session, args: argparse.Namespace) -> None:
    """Prints both versions."""
    own = {"Version": VERSION, "Python": ".".join(map(str, sys.version_info[:3]))}
    answer = await session.client.version()
    server = await session.client.introspection.server()
    theirs = {"Version": answer.version, "Revision": answer.revision, "UUID": server.uuid}
    if args.format == "json":
        print_json({"Client": own, "Server": theirs})
        return
    for title, values in (("Client", own), ("\nServer", theirs)):
        print(f"{title}:")
        for name, value in values.items():
            print(f"  {name + ':':<9} {value}")


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table", help="lines (default), or JSON")


COMMANDS = [
    Command(
        ("version",),
        "print the versions of this client and of the daemon",
        version,
        _configure,
        example="wherry version --format json",
    )
]
