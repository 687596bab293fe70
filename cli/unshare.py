"""`wherry unshare`: a command where a user's containers live, as root of the user's namespaces."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from wherry.cli.table import Command
from wherry.client.embedded import NAME
from wherry.client.unshare import enter
from wherry.core import places
from wherry.core.errors import FailedPrecondition

if TYPE_CHECKING:
    from wherry.cli.session import Session


async def unshare(session: Session, args: argparse.Namespace) -> int:
    """Becomes the command; exit codes 126 and 127 where it can't be run."""
    if not places.is_users():
        raise FailedPrecondition("unshare is for ordinary users: root's containers live on the host itself")
    command = args.command or [os.environ.get("SHELL") or "/bin/sh"]
    enter(session.state or places.state(NAME if session.embedded else "wherry"))
    sys.stdout.flush()
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        sys.stderr.write(f"wherry: {command[0]}: no such command\n")
        return 127
    except OSError as error:
        sys.stderr.write(f"wherry: {command[0]}: {error.strerror}\n")
        return 126


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help="with arguments; a shell without")


COMMANDS = [
    Command(
        ("unshare",),
        "run a command in the namespaces of your containers, as their root",
        unshare,
        _configure,
        "wherry unshare ls -ln ~/.local/share/wherry",
    )
]
