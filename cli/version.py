"""`wherry version`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from wherry.cli.output import print_json
from wherry.cli.table import Command

if TYPE_CHECKING:
    from wherry.cli.session import Session


def client_version() -> str:
    """The version of the installed package; `unknown` in a tree that was never installed.

    It is read from the name of the package's metadata folder: `importlib.metadata` takes longer than the question to
    the daemon.
    """
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            if name.startswith("wherry-") and name.endswith(".dist-info"):
                return name.removeprefix("wherry-").removesuffix(".dist-info")
            if name == "wherry.egg-info":
                return _from_metadata()
    return "unknown"


def _from_metadata() -> str:
    from importlib import metadata  # noqa: PLC0415 - slow to load

    try:
        return metadata.version("wherry")
    except metadata.PackageNotFoundError:
        return "unknown"


async def version(session: Session, args: argparse.Namespace) -> None:
    """Prints both versions."""
    own = {"Version": client_version(), "Python": ".".join(map(str, sys.version_info[:3]))}
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


COMMANDS = [Command(("version",), "print the versions of this client and of the daemon", version, _configure)]
