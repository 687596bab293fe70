"""`wherry events`: what happens, as it happens."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from wherry.cli.output import when
from wherry.cli.table import Command

if TYPE_CHECKING:
    from wherry.cli.session import Session


async def events(session: Session, args: argparse.Namespace) -> None:
    """Prints events, one a line, until it is interrupted."""
    async for event in session.client.events.subscribe(args.filters):
        fields = event.fields()
        if args.format == "json":
            line = json.dumps(
                {"Timestamp": when(event.at), "Namespace": event.namespace, "Topic": event.topic, "Event": fields}
            )
        else:
            line = f"{when(event.at)} {event.namespace} {event.topic} {json.dumps(fields)}"
        # a reader wants each event when it happens, not when a buffer is full
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text", help="a line (default) or JSON for each")
    parser.add_argument("filters", nargs="*", metavar="FILTER", help='topic~="/tasks/.+", namespace==default …')


COMMANDS = [
    Command(
        ("events",), "show what happens as it happens", events, _configure, "wherry events 'topic==\"/tasks/exit\"'"
    )
]
