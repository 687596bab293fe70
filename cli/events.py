"""`wherry events`: what happens, as it happens, and what happened before."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from wherry.cli.formats import filters
from wherry.cli.output import when
from wherry.cli.table import Command
from wherry.client.finding import find
from wherry.core.errors import InvalidArgument, WherryError

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.client.api import Client
    from wherry.client.events import Event
    from wherry.client.transport import Calls
    from wherry.core.errors import Unavailable

# how long a daemon may be away while its events are followed, and between two tries to reach it, in seconds
AWAY = 120.0
RETRY = 0.2


# docker's words for what happens to a container
_TOPICS = {
    "create": "/containers/create",
    "start": "/tasks/start",
    "die": "/tasks/exit",
    "oom": "/tasks/oom",
    "pause": "/tasks/paused",
    "unpause": "/tasks/resumed",
    "exec_create": "/tasks/exec-added",
    "exec_start": "/tasks/exec-started",
    "destroy": "/containers/delete",
    "update": "/containers/update",
    "checkpoint": "/tasks/checkpointed",
}
_TYPES = {
    "container": "^/(tasks|containers)/",
    "image": "^/images/",
    "snapshot": "^/snapshot/",
    "content": "^/content/",
}


async def chosen(client: Client, items: Sequence[str]) -> list[str]:
    """containerd's filters for docker's `--filter KEY=VALUE`: one of the values of each key, and all keys.

    Raises InvalidArgument, NotFound for a container that isn't there.
    """
    found = filters(items, ("type", "event", "container"))
    rules = [""]
    for key, values in found.items():
        alternatives = [rule for value in values for rule in await _rules(client, key, value)]
        rules = [",".join(filter(None, (rule, other))) for rule in rules for other in alternatives]
    return [rule for rule in rules if rule]


async def _rules(client: Client, key: str, value: str) -> list[str]:
    if key == "container":
        identity = (await find(client, value)).id
        # tasks name their container so, the records of containers otherwise
        return [f"event.container_id=={identity}", f"event.id=={identity}"]
    known = _TYPES if key == "type" else _TOPICS
    if value not in known:
        raise InvalidArgument(f"filter {key}={value}: there are {', '.join(known)}")
    return [f'topic~="{known[value]}"' if key == "type" else f'topic=="{known[value]}"']


async def events(session: Session, args: argparse.Namespace) -> None:
    """Prints events, one a line, until it is interrupted."""
    args.filters = [*args.filters, *await chosen(session.client, args.filter)]
    async for event in _source(session, args):
        fields = event.fields()
        number = {"Sequence": event.sequence} if event.sequence else {}
        if args.format == "json":
            line = json.dumps(
                {
                    "Timestamp": when(event.at),
                    "Namespace": event.namespace,
                    "Topic": event.topic,
                    "Event": fields,
                    **number,
                }
            )
        else:
            first = f"{event.sequence} " if args.sequence else ""
            line = f"{first}{when(event.at)} {event.namespace} {event.topic} {json.dumps(fields)}"
        # a reader wants each event when it happens, not when a buffer is full
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _source(session: Session, args: argparse.Namespace) -> AsyncIterator[Event]:
    """The standard subscription where it is enough: it works with containerd, too."""
    if args.since is None and args.until is None and not args.sequence:
        return session.client.events.subscribe(args.filters)

    def lost(error: Unavailable) -> Calls | None:
        deadline = time.monotonic() + AWAY
        while time.monotonic() < deadline:
            time.sleep(RETRY)
            try:
                return session.another().calls
            except WherryError:
                continue
        return None

    after, since = args.since or (None, None)
    return session.client.events.follow(args.filters, after=after, since=since, until=args.until, lost=lost)


def _start(text: str) -> tuple[int | None, float | None]:
    """A number of an event, or a time."""
    if text.isascii() and text.isdigit():
        return int(text), None
    return None, _moment(text)


def _moment(text: str) -> float:
    from wherry.cli.moments import moment

    return moment(text)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text", help="a line (default) or JSON for each")
    parser.add_argument(
        "--since", type=_start, metavar="SEQ|TIME",
        help="also what happened after the event of that number (0: all that is kept), or since a time "
        "(10m, 2026-11-22T18:00:00Z, @SECONDS)",
    )  # fmt: skip
    parser.add_argument("--until", type=_moment, metavar="TIME", help="stop there instead of waiting for more")
    parser.add_argument("--sequence", action="store_true", help="begin each line with the event's number")
    parser.add_argument(
        "-f", "--filter", action="append", default=[], metavar="KEY=VALUE",
        help="type=container|image|…, event=start|die|oom|…, container=NAME",
    )  # fmt: skip
    parser.add_argument("filters", nargs="*", metavar="FILTER", help='topic~="/tasks/.+", namespace==default …')


ABOUT = """show what happens as it happens

wherryd numbers events and keeps them for a while (docs/daemon.md). With --since, --until or --sequence a subscription
that breaks is made again where it stopped, so that a restart of the daemon hides nothing."""

COMMANDS = [Command(("events",), ABOUT, events, _configure, "wherry events --since 10m 'topic==\"/tasks/exit\"'")]
