"""`wherry push`: the daemon brings an image to a registry."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from wherry.cli.table import Command
from wherry.cli.transfers import explained, full_name, progress_options, registry, registry_options, result, show
from wherry.core.errors import NotFound
from wherry.core.platforms import parse

if TYPE_CHECKING:
    from wherry.cli.session import Session


async def push(session: Session, args: argparse.Namespace) -> None:
    """Brings the image to the registry."""
    client = session.client
    name = args.local or args.reference
    try:
        local = await client.images.find(name)
    except NotFound:
        raise NotFound(
            f"no such image: {name} ('wherry images' lists them, 'wherry tag' gives one this name)"
        ) from None
    platforms = [parse(text) for text in args.platform]
    progress = client.transfer.push(registry(args, full_name(args.reference)), name=local.name, platforms=platforms)
    with explained():
        await show(progress, quiet=args.quiet, style=args.format)
    if args.format == "json":
        result(args, full_name(args.reference))


def _configure(parser: argparse.ArgumentParser) -> None:
    registry_options(parser)
    progress_options(parser)
    parser.add_argument("--platform", action="append", default=[], metavar="OS/ARCH", help="platforms to push (all)")
    parser.add_argument("reference", metavar="IMAGE", help="the name in the registry")
    parser.add_argument("local", nargs="?", metavar="LOCAL", help="the image here, where its name is another")


COMMANDS = [
    Command(("push",), "bring an image to a registry", push, _configure, "wherry push registry.example/app:1 app:dev")
]
