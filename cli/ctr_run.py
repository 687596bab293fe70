"""`wherry containers run`: ctr's form of run, with an id in front of the command."""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING

from wherry.cli import launching
from wherry.cli.following import OURS, coded, interruptible, patiently, run_task, stream_options
from wherry.cli.table import Command
from wherry.client.launch import create, remove
from wherry.core.errors import InvalidArgument, WherryError

if TYPE_CHECKING:
    from wherry.cli.session import Session


def _configure(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("running")
    own.add_argument("--rm", action="store_true", help="remove the container when it has ended")
    stream_options(own)
    own.add_argument("--null-io", action="store_true", help="no input, output thrown away")
    own.add_argument("--pid-file", default="", metavar="FILE", help="write the process id there")
    launching.configure(parser)


async def run(session: Session, args: argparse.Namespace) -> int:
    """Makes, starts and, unless it is detached, follows a container."""
    interruptible()
    with coded(OURS):
        if args.rm and args.detach:
            raise InvalidArgument("flags --detach and --rm can't be used together")
        client = session.client
        launched = await create(client, launching.launch(args))
    try:
        status = await run_task(session, launched, args)
    except BaseException:
        if args.rm:
            # what went wrong first is what a person wants to know
            with contextlib.suppress(WherryError):
                await remove(client, launched.container)
        raise
    if args.rm:
        await patiently(lambda: remove(client, launched.container))
    return status


ABOUT = """run a command in a new container, whose id comes before the command

Unless it is detached, the container's output and input are this command's, signals go to it, and its exit code is
passed on (125: an error of ours, 126: a command that can't be run, 127: no such command). A detached container whose
output nobody reads waits when its FIFO is full: use --log-uri or --null-io for one that has much to say."""

COMMANDS = [
    Command(
        ("run",),
        ABOUT,
        run,
        _configure,
        "wherry containers run --rm -t --memory 256m docker.io/library/alpine:latest box sh",
    )
]
