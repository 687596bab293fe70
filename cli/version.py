"""`wherry version`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from wherry.cli.formats import document, format_option
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
    if args.format not in {"", "table"}:
        document(args, {"Client": own, "Server": theirs})
        return
    for title, values in (("Client", own), ("\nServer", theirs)):
        print(f"{title}:")
        for name, value in values.items():
            print(f"  {name + ':':<9} {value}")


def _configure(parser: argparse.ArgumentParser) -> None:
    format_option(parser, "lines (default), json, or a template")


COMMANDS = [
    Command(
        ("version",),
        "print the versions of this client and of the daemon",
        version,
        _configure,
        example="wherry version --format '{{.Server.Version}}'",
    )
]
