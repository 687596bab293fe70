"""`wherry commit`: an image of what a container's files are now."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from wherry.cli.arguments import switch
from wherry.cli.table import Command
from wherry.cli.transfers import full_name
from wherry.client.commit import Changes
from wherry.client.commit import commit as commit_image
from wherry.client.finding import find

if TYPE_CHECKING:
    from wherry.cli.session import Session


async def commit(session: Session, args: argparse.Namespace) -> None:
    """Makes the image and prints its id; without a name it is named by the container's id."""
    client = session.client
    container = await find(client, args.container)
    name = full_name(args.image) if args.image else f"localhost/committed:{container.id[:12]}"
    changes = Changes(args.author, args.message, tuple(args.change), args.pause and not args.no_pause)
    made = await commit_image(client, container.id, name, changes)
    print(made.target.digest)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--author", default="", metavar="NAME", help="who made it")
    parser.add_argument("-m", "--message", default="", metavar="TEXT", help="what changed")
    parser.add_argument(
        "-c", "--change", action="append", default=[], metavar="INSTRUCTION", help='as in a Dockerfile: CMD ["sh"]'
    )
    parser.add_argument(
        "-p",
        "--pause",
        default=True,
        type=switch,
        nargs="?",
        const=True,
        metavar="BOOL",
        help="pause it meanwhile (true)",
    )
    parser.add_argument("--no-pause", action="store_true", help="let it run meanwhile")
    parser.add_argument("container", metavar="CONTAINER")
    parser.add_argument("image", nargs="?", default="", metavar="NAME[:TAG]", help="the image's name")


COMMANDS = [
    Command(("commit",), "make an image of a container's files", commit, _configure,
            "wherry commit -m 'with my changes' web registry.example/web:2"),
]  # fmt: skip
